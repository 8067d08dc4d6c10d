"""overlap.py: near-duplicates against plain Python, clusters, what is held out of them, lines on both sides."""

import random
import re

import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanochat.data import overlap
from nanochat.data.overlap import clusters, hold_out, shared_lines, sketches


def words(seed, count: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices("abcdefghij", k=chance.randint(3, 8))) for _ in range(count)]


def alike(one: str, other: str) -> bool:
    first, second = sketches([one, other])
    return bool((first == second).any())


def slow_sketch(text: str) -> list[int]:
    """By loops over integers of any size."""
    letters = bytes(byte for byte in text.lower().encode() if byte >= 128 or chr(byte).isalnum()) or text.encode()
    hashes = []
    for start in range(len(letters) - overlap.WINDOW + 1):
        value = 0
        for byte in letters[start : start + overlap.WINDOW]:
            value = (value * 0x9E3779B97F4A7C15 + byte) % 2**64
        value = (value ^ (value >> 29)) * int(overlap._ODD[0]) % 2**64
        if value < 2**64 // overlap.EVERY:
            hashes.append(value ^ (value >> 32))
    assert len(hashes) >= overlap.FEW
    least = [min(value * int(odd) % 2**64 for value in hashes) for odd in overlap._ODD[2:]]
    pairs = zip(least[::2], least[1::2], strict=True)
    odd, other = int(overlap._ODD[0]), int(overlap._ODD[1])
    return [((a * odd % 2**64 ^ b) * other + i) % 2**64 for i, (a, b) in enumerate(pairs)]


def test_against_a_slow_reference():
    for seed in range(5):
        text = " ".join(words(seed, 60)).title() + "! Déjà-vu, 中文."
        assert sketches([text])[0].tolist() == slow_sketch(text)


@given(st.lists(st.text(st.sampled_from("abAB é中.\n"), max_size=300), max_size=12))
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_sketch_does_not_depend_on_what_is_hashed_with_it(texts):
    together = sketches(texts)
    assert together.shape == (len(texts), overlap.PAIRS)
    for text, sketch in zip(texts, together, strict=True):
        assert np.array_equal(sketches([text])[0], sketch)


def test_how_alike_texts_must_be():
    """The share of runs in common that the module's docstring gives, within what 200 tries say."""
    found = {}
    for percent in (80, 50, 30, 10):
        hits = 0
        for seed in range(200):
            # of n words each, the first m in common: a share of m / (2n - m)
            n = 400
            m = round(2 * n * percent / (100 + percent))
            shared = words(seed, m)
            one, other = (" ".join(shared + words(f"{seed} {side}", n - m)) for side in (1, 2))
            hits += alike(one, other)
        found[percent] = hits / 200
    assert found[80] > 0.98 and 0.8 < found[50] < 0.97 and 0.4 < found[30] < 0.68 and found[10] < 0.16


def test_short_texts_are_alike_only_by_their_letters():
    assert alike("An example.", "an EXAMPLE") and not alike("An example.", "an examples")
    assert not alike("!!", "??") and not alike("你好", "你们")
    assert alike("", "")


def test_unrelated_texts_are_not_alike():
    texts = [" ".join(words(seed, 100)) for seed in range(3000)]
    assert len(set(clusters(sketches(texts)).tolist())) == 3000


@given(st.lists(st.tuples(*[st.integers(0, 12)] * 3), min_size=1, max_size=30))
@hypothesis_settings(max_examples=100, deadline=None)
def test_clusters_are_the_connected_parts(rows):
    found = clusters(np.array(rows, np.uint64)).tolist()
    for start in range(len(rows)):  # reached by going from row to row
        reached, waiting = set(), [start]
        while waiting:
            place = waiting.pop()
            reached.add(place)
            linked = (i for i, row in enumerate(rows) if any(a == b for a, b in zip(row, rows[place], strict=True)))
            waiting += [i for i in linked if i not in reached and i not in waiting]
        assert found[start] == min(reached)


documents = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 50)), min_size=1, max_size=40)


@given(documents, st.integers(1, 300), st.integers(0, 300))
@hypothesis_settings(max_examples=200, deadline=None)
def test_clusters_are_on_one_side_unless_it_is_said(rows, budget, most):
    labels, sizes = np.array(rows).T
    held, torn = hold_out(labels, sizes, budget, most)
    assert sizes[held].sum() <= max(budget, most)
    divided = set(labels[held].tolist()) & set(labels[~held].tolist())
    assert torn == bool(divided)
    if divided:  # only where next to nothing fits
        whole = [label for label in set(labels.tolist()) if label not in divided]
        assert sum(sizes[labels == label].sum() for label in whole if held[labels == label].all()) <= budget / 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 300), st.integers(0, 300))
@hypothesis_settings(max_examples=100, deadline=None)
def test_of_what_is_not_alike_the_first_are_held_out(sizes, budget, most):
    held, torn = hold_out(np.arange(len(sizes)), np.array(sizes), budget, most)
    expected, size = 0, 0
    for number in sizes:
        if size + number > budget:
            break
        expected, size = expected + 1, size + number
    assert held.tolist() == [i < expected for i in range(len(sizes))] and not torn


def test_many_small_clusters_rather_than_a_large_one():
    labels = np.repeat(np.arange(41), [50, *[3] * 40])
    held, _ = hold_out(labels, np.ones(len(labels), int), 100)
    assert not held[:50].any() and held.sum() == 99


lines = st.lists(st.sampled_from(["short", "x" * 39, "y" * 40, " " + "z" * 41 + " ", "w" * 60]), max_size=6)


@given(st.lists(lines.map("\n".join), max_size=5), st.lists(lines.map("\n".join), max_size=5))
@hypothesis_settings(max_examples=80, deadline=None)
def test_lines_on_both_sides(val, train):
    there = {line.strip() for text in train for line in re.split("\n", text)}
    expected = []
    for text in val:
        long = [line.strip() for line in text.split("\n") if len(line.strip()) >= 40]
        expected.append([len(long), sum(line in there for line in long)])
    assert shared_lines(val, iter(train)).tolist() == expected
