"""row_files.py: what each target of a row is, against documents walked by hand; files; errors over documents."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanochat.data.packing import pack_rows
from nanochat.errors import UserError
from nanochat.eval import row_files
from nanochat.eval.bpb import measure_bpb
from nanochat.eval.row_files import (
    ALL_ROWS,
    CLEAN,
    IN_FULL,
    PACKED,
    Kind,
    bits_per_byte,
    by_kind,
    by_overlap,
    make_rows,
    packed,
    read_rows,
    score_rows,
    write_rows,
)

BOS, VOCAB = 0, 5000
SIZES = np.array([0, *(1 + np.arange(VOCAB - 1) % 7)])


class Tokens:
    """A tokenizer of documents that are token ids already, and the text data that is made of them: every token of all
    documents is another one, so that a row says whose tokens it has."""

    document_token = BOS

    def __init__(self, lengths: list[int]) -> None:
        ends = 1 + np.cumsum(lengths)
        self.documents = [np.arange(end - n, end, dtype=np.uint16) for n, end in zip(lengths, ends, strict=True)]
        self.tokenizer = self

    def batch_encode(self, texts, num_threads):
        return [self.documents[text] for text in texts]

    def get_vocab_size(self):
        return VOCAB

    def token_byte_lengths(self):
        return SIZES.tolist()

    def get_bos_token_id(self):
        return BOS

    def fixed_rows(self, split, length, max_tokens, packer=None):
        half = len(self.documents) // 2  # two units: documents are counted on
        numbers = range(len(self.documents))
        parts = [numbers[:half], numbers[half:]]
        encode = packer.encode if packer else (lambda texts: self.batch_encode(texts, 1))
        return np.concatenate([pack_rows(encode(list(part)), length + 1, BOS)[0] for part in parts if part])


def targets(row: np.void):
    """(token, document, kind, bytes) of each target of a row."""
    return zip(row["tokens"][1:], row["document"], row["kind"], row["bytes"], strict=True)


documents = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 60)


@given(documents, st.integers(2, 16))
@hypothesis_settings(max_examples=60, deadline=None)
def test_each_target_knows_whose_it_is(lengths, length):
    data = Tokens(lengths)
    rows, _ = make_rows(data, "val", length, 10**6)
    assert np.array_equal(rows["tokens"], data.fixed_rows("val", length, 10**6))
    owner = {int(t): (number, place) for number, ids in enumerate(data.documents) for place, t in enumerate(ids)}
    for row in rows:
        for token, document, kind, size in targets(row):
            if token == BOS:
                assert (document, kind, size) == (-1, Kind.NONE, 0)
                continue
            number, place = owner[int(token)]
            expected = Kind.FITS if lengths[number] <= length else Kind.HEAD if place < length else Kind.REST
            assert (document, kind, size) == (number, expected, SIZES[token])


@given(documents, st.integers(2, 16))
@hypothesis_settings(max_examples=60, deadline=None)
def test_documents_in_full_have_every_token_once_and_half_a_row_before_it(lengths, length):
    data = Tokens(lengths)
    rows, _ = make_rows(data, "val", length, 10**6, in_full=True)
    scored = np.zeros(VOCAB, int)
    for row in rows[len(packed(rows)) :]:
        context = 0  # tokens of the document before this one in the row; BOS begins anew
        previous = BOS
        for token, document, kind, size in targets(row):
            context = 0 if previous == BOS else context + 1
            if kind == Kind.IN_FULL:
                scored[token] += 1
                first = int(data.documents[document][0])
                assert first <= token < first + lengths[document] and size == SIZES[token]
                assert context >= min(token - first, length // 2)  # all of its beginning, or half a row
            else:
                assert (document, size) == (-1, 0)
            if previous != BOS and token != BOS:
                assert token == previous + 1
            previous = token
    assert scored[1 : 1 + sum(lengths)].tolist() == [1] * sum(lengths) and scored.sum() == sum(lengths)


def test_no_more_documents_in_full_than_asked_for():
    rows, _ = make_rows(Tokens([30, 30, 30, 30]), "val", 8, 45, in_full=True)
    assert set(rows["document"][rows["kind"] == Kind.IN_FULL]) == {0, 1}


def model(x: torch.Tensor, y: torch.Tensor, loss_reduction: str) -> torch.Tensor:
    """Some loss for each (x, y); nan where the target is masked, as the worst a model may do."""
    assert loss_reduction == "none"
    losses = (x * 0.37 + y * 0.11).sin().abs() + 0.1
    return torch.where(y < 0, torch.nan, losses).flatten()


def score(rows: np.ndarray, batch: int = 3, rank: int = 0, world_size: int = 1) -> np.ndarray:
    return score_rows(model, rows, batch, torch.device("cpu"), rank, world_size)


def test_the_score_of_packed_rows_is_that_of_the_rows_of_training():
    data = Tokens([7, 40, 3, 25, 90, 11])
    rows, _ = make_rows(data, "val", 16, 10**6, in_full=True)
    plain = torch.from_numpy(data.fixed_rows("val", 16, 10**6).astype(np.int64))
    expected = measure_bpb(model, [(plain[:, :-1], plain[:, 1:])], torch.from_numpy(SIZES))
    found = by_kind(score(rows), rows)
    assert list(found) == [ALL_ROWS, "documents that fit a row", "heads of longer ones", "their rests", IN_FULL]
    assert found[ALL_ROWS].bpb == pytest.approx(expected.bpb, rel=1e-12)
    assert (found[ALL_ROWS].tokens, found[ALL_ROWS].bytes) == (expected.tokens, expected.bytes)
    parts = list(found.values())[1:4]
    assert sum(part.bytes for part in parts) == expected.bytes
    assert sum(part.bpb * part.bytes for part in parts) == pytest.approx(expected.bpb * expected.bytes)
    assert found[IN_FULL].tokens == 176 and found[IN_FULL].documents == 6


def test_documents_are_told_apart_by_what_they_share():
    rows, found = make_rows(Tokens([7, 40, 3, 25, 90, 11]), "val", 16, 10**6, in_full=True)
    assert [len(ids) for ids in found] == [7, 40, 3, 25, 90, 11]
    nats = score(rows)
    lines = np.array([[5, 0], [9, 4], [0, 0], [2, 1], [3, 3], [4, 0]])
    parts = by_overlap(nats, rows, lines)
    packed_bytes = {n: rows["bytes"][(rows["document"] == n) & np.isin(rows["kind"], PACKED)].sum() for n in range(6)}
    expected = {CLEAN: [0, 2, 5], "with some": [1], "with half or more": [3, 4]}
    assert {name: part.bytes for name, part in parts.items()} == {
        name: sum(packed_bytes[n] for n in numbers) for name, numbers in expected.items()
    }
    together = by_kind(nats, rows)[ALL_ROWS]
    assert sum(p.bpb * p.bytes for p in parts.values()) == pytest.approx(together.bpb * together.bytes)


def test_standard_error_is_over_documents():
    """Draws of documents whose tokens are all alike, so that thousands of tokens tell no more than a few documents."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(300):
        lengths = rng.integers(20, 60, size=25)
        documents = np.repeat(np.arange(25), lengths)
        rows = {"bytes": np.full((1, len(documents)), 4), "document": documents[None]}
        rows["kind"] = np.full((1, len(documents)), Kind.FITS)
        draws.append(bits_per_byte(rng.normal(3, 1, size=25)[documents][None], rows, (Kind.FITS,)))
    spread = np.std([draw.bpb for draw in draws])
    assert np.mean([draw.stderr for draw in draws]) == pytest.approx(spread, rel=0.15)
    assert draws[0].documents == 25


def test_ranks_share_the_rows_and_all_have_the_whole_score(monkeypatch):
    rows, _ = make_rows(Tokens([7, 40, 3, 25, 90, 11, 5]), "val", 16, 10**6, in_full=True)
    alone, parts = score(rows), []
    monkeypatch.setattr(row_files, "gather", lambda part: parts.append(part) or [part])
    for rank in range(3):
        score(rows, 2, rank, 3)
    monkeypatch.setattr(row_files, "gather", lambda part: parts)
    assert len(rows) % 3 and all(len(part) < len(rows) for part in parts)
    assert np.array_equal(score(rows, 2, 1, 3), alone)


def test_a_file_gives_the_same_score(tmp_path):
    rows, _ = make_rows(Tokens([7, 40, 3, 25, 90, 11]), "val", 16, 10**6, in_full=True)
    write_rows(tmp_path / "rows.npy", rows)
    assert np.array_equal(read_rows(tmp_path / "rows.npy", 16, SIZES, BOS), rows)
    # what the documentation tells another program to do
    loaded, nats = np.load(tmp_path / "rows.npy"), score(rows)
    chosen = (loaded["kind"] == Kind.IN_FULL) & (loaded["bytes"] > 0)
    value = nats[chosen].sum() / math.log(2) / loaded["bytes"][chosen].sum()
    assert value == pytest.approx(by_kind(nats, rows)[IN_FULL].bpb, rel=1e-5)


def test_a_plain_array_of_tokens_is_scored_too(tmp_path):
    data = Tokens([7, 40, 3, 25, 90, 11])
    plain = data.fixed_rows("val", 16, 10**6)
    for dtype in (np.uint16, np.int64):
        np.save(tmp_path / "plain.npy", plain.astype(dtype))
        rows = read_rows(tmp_path / "plain.npy", 20, SIZES, BOS)
        found = by_kind(score(rows), rows)
        ours, _ = make_rows(data, "val", 16, 10**6)
        assert list(found) == [ALL_ROWS] and found[ALL_ROWS].bpb == by_kind(score(ours), ours)[ALL_ROWS].bpb
        assert found[ALL_ROWS].documents == np.count_nonzero(plain[:, :-1] == BOS)  # pieces


def test_files_that_do_not_fit_are_one_line(tmp_path):
    rows, _ = make_rows(Tokens([7, 40, 3, 25, 90, 11]), "val", 16, 10**6)
    path = tmp_path / "rows.npy"

    def refused(match: str, content, length: int = 16, sizes: np.ndarray = SIZES) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        with pytest.raises(UserError, match=match) as caught:
            read_rows(path, length, sizes, BOS)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    refused("no NumPy array", b"")
    refused("no NumPy array", b"hello")
    refused("no NumPy array", np.array([{}]))  # a pickle
    refused(r"\(N, T \+ 1\) of tokens", np.zeros((3, 5)))
    refused(r"\(N, T \+ 1\) of tokens", np.zeros(3, int))
    refused(r"\(N, T \+ 1\) of tokens", rows[["tokens", "bytes"]])
    refused("rows of 16 targets; this model has rows of 8", rows, length=8)
    refused("0 rows", rows[:0])
    refused("token -1 of a vocabulary", np.full((2, 5), -1))
    refused("token 5000 of a vocabulary", np.full((2, 5), VOCAB))
    refused("other lengths in this model's tokenizer", rows, sizes=np.roll(SIZES, 1))
    refused("no target has a byte", np.zeros((2, 5), int))
    with pytest.raises(UserError, match="No such file"):
        read_rows(tmp_path / "absent.npy", 16, SIZES, BOS)
    with pytest.raises(UserError, match="cannot be written"):
        write_rows(tmp_path / "absent" / "rows.npy", rows)
