"""baselines.py: predictors of bytes against slow references."""

import lzma
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanochat.eval import baselines
from nanochat.eval.baselines import order0_bpb, primed_xz_bpb, trigram_bpb, xz_bpb


def slow_order0(train: bytes, val: bytes) -> float:
    counts = Counter(train)
    return sum(-math.log2((counts[byte] + 1) / (len(train) + 256)) for byte in val) / len(val)


def slow_trigram(train: bytes, val: bytes) -> float:
    """Witten-Bell by dictionaries, straight from the formula."""
    following: dict[bytes, Counter] = defaultdict(Counter)
    for order in (0, 1, 2):
        for i in range(order, len(train)):
            following[train[i - order : i]][train[i]] += 1

    def probability(context: bytes, byte: int) -> float:
        shorter = probability(context[1:], byte) if context else 1 / 256
        seen = following.get(context)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    return sum(-math.log2(probability(val[max(0, i - 2) : i], val[i])) for i in range(len(val))) / len(val)


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=60))
@hypothesis_settings(max_examples=15, deadline=None)
def test_against_slow_references(train, val):
    assert order0_bpb(train, val) == pytest.approx(slow_order0(train, val), rel=1e-9)
    assert trigram_bpb(train, val) == pytest.approx(slow_trigram(train, val), rel=1e-9)


def test_text_counted_in_pieces(monkeypatch):
    rng = random.Random(5)
    train = bytes(rng.choice(b"abcd ") for _ in range(5000))
    val = bytes(rng.choice(b"abcde ") for _ in range(300))
    monkeypatch.setattr(baselines, "_CHUNK", 37)
    assert trigram_bpb(train, val) == pytest.approx(slow_trigram(train, val), rel=1e-9)
    assert order0_bpb(train, val) == pytest.approx(slow_order0(train, val), rel=1e-9)


def test_the_trigram_model_is_a_probability():
    """Over all next bytes it sums to 1, in contexts that were seen and in others."""
    train = b"the cat sat on the mat and the cat ran"
    tables = [baselines._counts(train, order).reshape(-1, 256) for order in (1, 2, 3)]
    for context in (b"th", b"zz", b"ca", b"zt"):
        every = b"".join(context + bytes([byte]) for byte in range(256))
        assert baselines._witten_bell(tables, every)[2::3].sum() == pytest.approx(1.0)


def test_known_sources():
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, 1 << 17, dtype=np.uint8).tobytes()
    fresh = rng.integers(0, 256, 1 << 13, dtype=np.uint8).tobytes()
    assert order0_bpb(noise, fresh) == pytest.approx(8.0, abs=0.02)
    assert xz_bpb(fresh) > 8.0
    cycle = b"abc" * 10_000
    assert trigram_bpb(cycle, cycle[:3000]) < 0.05
    assert order0_bpb(cycle, cycle) == pytest.approx(math.log2(3), abs=0.02)


def test_xz_is_the_size_of_a_readable_archive():
    text = b"It is what it is, and it was what it was. " * 50
    archive = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert xz_bpb(text) == 8 * len(archive) / len(text)
    assert lzma.decompress(archive) == text


def test_xz_after_train_text_is_what_the_text_adds_to_it():
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
    fresh = rng.integers(0, 256, 1 << 13, dtype=np.uint8).tobytes()
    assert primed_xz_bpb(noise, noise[: 1 << 13]) < 1  # 3 MiB back, within the window
    assert 7.9 < primed_xz_bpb(noise[: 1 << 14], fresh) < 8.2
    english = b"It is what it is, and it was what it was; nobody knows why it was so. "
    assert primed_xz_bpb(english, english) < 0.2 * xz_bpb(english)
    assert primed_xz_bpb(b"", english) == pytest.approx(xz_bpb(english), rel=0.7)  # without the headers
