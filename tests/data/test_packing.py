import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat.data.packing import pack_conversations, pack_rows, stream_rows

BOS = 0
documents = st.lists(st.integers(0, 60), max_size=40)


def make(lengths):
    """Documents whose tokens say where they come from: never BOS, all different."""
    start, out = 1, []
    for length in lengths:
        out.append(np.arange(start, start + length, dtype=np.uint16))
        start += length
    return out


@given(documents, st.integers(2, 33))
@settings(max_examples=200)
def test_rows_are_full_start_with_bos_and_account_for_every_token(lengths, row_len):
    docs = make(lengths)
    rows, cropped = pack_rows(docs, row_len, BOS)
    assert rows.shape[1] == row_len and (rows[:, 0] == BOS).all()
    body = row_len - 1
    pieces = sum(max(1, -(-n // body)) for n in lengths)
    assert rows.size + cropped == sum(lengths) + pieces  # the pieces' BOS tokens are tokens too
    seen = rows[rows != BOS]
    assert len(set(seen.tolist())) == len(seen)  # nothing twice


@given(documents, st.integers(2, 33))
@settings(max_examples=100)
def test_text_stays_in_order_after_each_bos(lengths, row_len):
    rows, _ = pack_rows(make(lengths), row_len, BOS)
    for row in rows:
        for piece in np.split(row, np.flatnonzero(row == BOS))[1:]:
            assert (np.diff(piece[1:].astype(int)) == 1).all()


def piece_lengths(length, row_len):
    """Of a document's pieces, each with its BOS."""
    starts = range(0, max(length, 1), row_len - 1)
    return [min(length - start, row_len - 1) + 1 for start in starts]


def slow_pack(lengths, row_len):
    """Best fit by scanning: the lengths placed in each row, and the tokens cropped."""
    left, rows, cropped = sorted(lengths), [], 0
    while left:
        space, row = row_len, []
        while space and left:
            fitting = [n for n in left if n <= space]
            choice = max(fitting) if fitting else min(left)
            left.remove(choice)
            row.append(min(choice, space))
            cropped += choice - min(choice, space)
            space -= min(choice, space)
        if space:
            cropped += sum(row)
        else:
            rows.append(row)
    return rows, cropped


@given(documents, st.integers(2, 33))
@settings(max_examples=100)
def test_equals_scanning_best_fit(lengths, row_len):
    docs = make(lengths)
    pieces = [n for length in lengths for n in piece_lengths(length, row_len)]
    expected_rows, expected_cropped = slow_pack(pieces, row_len)
    rows, cropped = pack_rows(docs, row_len, BOS)
    assert cropped == expected_cropped
    bounds = [[*np.flatnonzero(row == BOS), row_len] for row in rows]
    assert [np.diff(b).tolist() for b in bounds] == expected_rows


def test_a_long_document_is_cut_not_dropped():
    rows, cropped = pack_rows([np.arange(1, 11, dtype=np.uint16)], 5, BOS)
    assert rows.tolist() == [[0, 5, 6, 7, 8], [0, 1, 2, 3, 4]] and cropped == 3
    rows[0] = 9  # one's own memory


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_wide_tokens_and_no_documents(dtype):
    documents = [np.array([top, 1], dtype=dtype) for top in (2, np.iinfo(dtype).max)]
    rows, _ = pack_rows(documents, 3, int(np.iinfo(dtype).max) - 1)
    assert rows.dtype == dtype and sorted(rows[:, 1].tolist()) == [2, np.iinfo(dtype).max]
    assert pack_rows([], 5, BOS)[0].shape == (0, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 3}, "width is 3"),
        ({"tokens": b"abc"}, "for 3 bytes of tokens"),
        ({"row_len": 1}, "row_len is 1"),
        ({"ends": [2, 1]}, "ends must rise up to 2"),
        ({"ends": [1]}, "ends must rise up to 2"),
        ({"bos": 65536}, "bos is no token of 2 bytes"),
    ],
)
def test_what_cannot_be_packed_is_one_line(changes, words):
    arguments = {"tokens": b"abcd", "ends": [1, 2], "width": 2, "bos": 0, "row_len": 4, **changes}
    with pytest.raises(ValueError, match=words):
        rustbpe.pack_rows(**arguments)


def scan_pack(docs, row_len):
    """What it replaces: a buffer of documents, scanned for each place in a row."""
    buffer = [np.concatenate([[BOS], doc[i : i + row_len - 1]]).astype(doc.dtype)
              for doc in docs for i in range(0, max(len(doc), 1), row_len - 1)]  # fmt: skip
    rows = []
    while buffer:
        row, space = [], row_len
        while space and buffer:
            best, best_length, shortest, shortest_length = -1, 0, -1, row_len + 1
            for i, doc in enumerate(buffer):
                length = len(doc)
                if best_length <= length <= space:  # the last of equals
                    best, best_length = i, length
                if length < shortest_length:
                    shortest, shortest_length = i, length
            doc = buffer.pop(best if best >= 0 else shortest)
            row.append(doc[:space])
            space -= len(row[-1])
        if not space:
            rows.append(np.concatenate(row))
    return np.stack(rows)


def test_packing_is_many_times_as_fast_as_scanning_and_equal():
    """By processor time, the fastest of several: 24 times, 50 for 2,000 documents, on two cores; the promise is 20."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.1, 1000), 20_000).astype(int).tolist()
    docs = [np.random.default_rng(n).integers(1, 60_000, n).astype(np.uint16) for n in lengths]

    def seconds(call):
        times = []
        for _ in range(5):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return min(times)

    assert np.array_equal(pack_rows(docs, 2049, BOS)[0], scan_pack(docs, 2049))
    assert seconds(lambda: scan_pack(docs, 2049)) > 10 * seconds(lambda: pack_rows(docs, 2049, BOS))


conversations = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=20), max_size=30)


def rendered(talks):
    """Each conversation: BOS, then its tokens; trained on where the token is odd."""
    return [([BOS, *talk], [0, *(token % 2 for token in talk)]) for talk in talks]


@given(conversations, st.integers(21, 64))
@settings(max_examples=100)
def test_conversations_stay_whole_and_come_once(talks, row_len):
    tokens, mask = pack_conversations(rendered(talks), row_len, pad=BOS)
    assert tokens.shape == mask.shape and (not len(tokens) or tokens.shape[1] == row_len)
    found = []
    for row, bits in zip(tokens, mask, strict=True):
        for piece in np.split(row, np.flatnonzero(row == BOS))[1:]:
            if len(piece) > 1:
                found.append(piece[1:].tolist())
        assert (bits == (row % 2) * (row != BOS)).all()
    assert sorted(found) == sorted(talks)
    assert len(tokens) == slow_bins([len(talk) + 1 for talk in talks], row_len)


def slow_bins(lengths, row_len):
    """How many rows best fit needs, by scanning."""
    left, rows = list(lengths), 0
    while left:
        space = row_len
        while fitting := [n for n in left if n <= space]:
            left.remove(max(fitting))
            space -= max(fitting)
        rows += 1
    return rows


@given(conversations, st.integers(2, 50))
@settings(max_examples=100)
def test_a_stream_has_every_token_in_order(talks, row_len):
    tokens, mask = stream_rows(rendered(talks), row_len, pad=99)
    flat = [token for ids, _ in rendered(talks) for token in ids]
    assert tokens.ravel()[: len(flat)].tolist() == flat and (tokens.ravel()[len(flat) :] == 99).all()
    assert mask.ravel()[: len(flat)].tolist() == [bit for _, bits in rendered(talks) for bit in bits]
    assert not mask.ravel()[len(flat) :].any() and len(tokens) == -(-len(flat) // row_len)
