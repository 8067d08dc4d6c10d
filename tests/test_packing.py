import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.packing import pack_conversations, pack_rows, split_long, stream_rows

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
@settings(max_examples=200, deadline=None)
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
@settings(max_examples=100, deadline=None)
def test_text_stays_in_order_after_each_bos(lengths, row_len):
    rows, _ = pack_rows(make(lengths), row_len, BOS)
    for row in rows:
        for piece in np.split(row, np.flatnonzero(row == BOS))[1:]:
            assert (np.diff(piece[1:].astype(int)) == 1).all()


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
@settings(max_examples=100, deadline=None)
def test_equals_scanning_best_fit(lengths, row_len):
    docs = make(lengths)
    pieces = [len(p) for d in docs for p in split_long(d, row_len, BOS)]
    expected_rows, expected_cropped = slow_pack(pieces, row_len)
    rows, cropped = pack_rows(docs, row_len, BOS)
    assert cropped == expected_cropped
    bounds = [[*np.flatnonzero(row == BOS), row_len] for row in rows]
    assert [np.diff(b).tolist() for b in bounds] == expected_rows


def test_a_long_document_is_cut_not_dropped():
    pieces = split_long(np.arange(1, 11, dtype=np.uint16), 5, BOS)
    assert [p.tolist() for p in pieces] == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [0, 9, 10]]
    rows, cropped = pack_rows([np.arange(1, 11, dtype=np.uint16)], 5, BOS)
    assert len(rows) == 2 and cropped == 3


conversations = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=20), max_size=30)


def rendered(talks):
    """Each conversation: BOS, then its tokens; trained on where the token is odd."""
    return [([BOS, *talk], [0, *(token % 2 for token in talk)]) for talk in talks]


@given(conversations, st.integers(21, 64))
@settings(max_examples=100, deadline=None)
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
@settings(max_examples=100, deadline=None)
def test_a_stream_has_every_token_in_order(talks, row_len):
    tokens, mask = stream_rows(rendered(talks), row_len, pad=99)
    flat = [token for ids, _ in rendered(talks) for token in ids]
    assert tokens.ravel()[: len(flat)].tolist() == flat and (tokens.ravel()[len(flat) :] == 99).all()
    assert mask.ravel()[: len(flat)].tolist() == [bit for _, bits in rendered(talks) for bit in bits]
    assert not mask.ravel()[len(flat) :].any() and len(tokens) == -(-len(flat) // row_len)
