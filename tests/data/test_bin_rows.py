import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataloader
from nanochat.data import bins
from nanochat.data.bins import describe_folder, document_starts, row_starts, write_tokens
from nanochat.dataloader import RowLoader, row_batches
from nanochat.errors import UserError
from nanochat.runtime import IGNORE_INDEX
from tests.data.synchronous import Synchronous

DOCUMENT = 0
T = 16


def make_stream(count, first, seed, longest=40):
    """`count` tokens: documents of up to `longest`, all tokens but the document token different, rising."""
    rng = np.random.default_rng(seed)
    tokens = np.arange(first, first + count, dtype=np.uint16)
    place = int(rng.integers(0, 5))  # a file need not begin with a document
    while place < count:
        tokens[place] = DOCUMENT
        place += int(rng.integers(1, longest))
    return tokens


def write_folder(path, train, val):
    for split, files in (("train", train), ("val", val)):
        for index, tokens in enumerate(files):
            write_tokens(path / f"{split}_{index:06d}.bin", np.asarray(tokens))
    meta = {"vocab_size": 65536, "document_token": DOCUMENT, "tokenizer_hash": "0" * 16}
    (path / "meta.json").write_text(json.dumps(meta))
    return describe_folder(path)


TRAIN = [make_stream(1500, 1, 0), make_stream(10, 1501, 1), make_stream(2300, 2001, 2)]  # none fits in the second
VAL = [make_stream(400, 10_001, 3), make_stream(300, 10_401, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tokens"), TRAIN, VAL)


def slow_rows(files, row_len):
    """The rows of one epoch, token by token."""
    rows = []
    for tokens in files:
        place = 0
        while place < len(tokens):
            if tokens[place] == DOCUMENT and place + row_len <= len(tokens):
                rows.append(tokens[place : place + row_len])
                place += row_len
            else:
                place += 1
    return np.array(rows, dtype=np.int64).reshape(-1, row_len)


ALL_ROWS = slow_rows(TRAIN, T + 1)


def loader(folder, rows, length, batch, **options):
    return RowLoader(folder.rows(length), rows, batch, **options)


def take(data, steps):
    """Rows (steps, R, T + 1) of this rank without filler, which must be as filler is."""
    out = []
    for _ in range(steps):
        kept = []
        for _ in range(data.batches_per_step):
            batch = data.next_batch()
            filler = (batch.targets == IGNORE_INDEX).all(dim=1)
            assert batch.inputs.shape == batch.targets.shape == (data.device_batch_size, data.source.sequence_len)
            assert batch.inputs.dtype == batch.targets.dtype == torch.int64
            assert (batch.inputs[filler] == DOCUMENT).all() and (batch.targets[~filler] != IGNORE_INDEX).all()
            assert (batch.inputs[:, 1:] == batch.targets[:, :-1])[~filler].all()
            kept.append(torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)[~filler])
        out.append(torch.cat(kept))
    return torch.stack(out).numpy()


def all_ranks(folder, world, steps, rows, batch, state=None):
    """(rows (steps, rows, T + 1) of all ranks put together, the state after them), the same from every rank."""
    merged = np.zeros((steps, rows, T + 1), dtype=np.int64)
    states, shapes, epochs = [], set(), set()
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataloader, "Prefetcher", Synchronous)
            data = loader(folder, rows, T, batch, rank=rank, world_size=world, state=state)
        if steps:
            merged[:, rank::world] = take(data, steps)
        states.append(data.state_dict())
        shapes.add((data.batches_per_step, data.device_batch_size))
        epochs.add(data.epoch())
        data.close()
    assert len(shapes) == len(epochs) == 1 and all(state == states[0] for state in states)
    return merged, json.loads(json.dumps(states[0]))


def cycled(first, steps, rows):
    """Rows (steps, rows, T + 1) of the global order from row number `first` on."""
    return ALL_ROWS[np.arange(first, first + steps * rows) % len(ALL_ROWS)].reshape(steps, rows, T + 1)


# ---- where rows start


@given(st.lists(st.integers(0, 6), max_size=120), st.integers(2, 12), st.integers(1, 130))
def test_greedy_starts_are_those_of_the_slow_search(tokens, row_len, scan):
    tokens = np.array(tokens, dtype=np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bins, "SCAN_TOKENS", scan)
        documents = document_starts(tokens, DOCUMENT)
    assert documents.tolist() == [place for place, token in enumerate(tokens) if token == DOCUMENT]
    starts = row_starts(documents, len(tokens), row_len)
    rows = np.array([tokens[start : start + row_len] for start in starts], dtype=np.int64).reshape(-1, row_len)
    np.testing.assert_array_equal(rows, slow_rows([tokens], row_len))


def test_rows_start_with_a_document_and_repeat_nothing():
    assert len(ALL_ROWS) > 100 and (ALL_ROWS[:, 0] == DOCUMENT).all()
    tokens = ALL_ROWS[ALL_ROWS != DOCUMENT]
    assert (np.diff(tokens) > 0).all()  # in the order of the data


def test_the_rest_of_a_document_longer_than_a_row_is_skipped():
    tokens = np.arange(100, dtype=np.uint16)
    tokens[[0, 60]] = DOCUMENT
    assert row_starts(document_starts(tokens, DOCUMENT), 100, 20).tolist() == [0, 60]


# ---- the loader


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 40))
@settings(max_examples=40)
def test_any_world_size_sees_the_same_global_batches_and_resumes(folder, world, world_after, rows, batch, before):
    first, state = all_ranks(folder, world, before, rows, batch)
    np.testing.assert_array_equal(first, cycled(0, before, rows))
    rest, _ = all_ranks(folder, world_after, 3, rows, batch, state)
    np.testing.assert_array_equal(rest, cycled(before * rows, 3, rows))


def test_resuming_at_every_step_of_two_epochs_is_exact(folder):
    rows = 7
    steps = 2 * len(ALL_ROWS) // rows + 2
    whole = loader(folder, rows, T, 4)
    state, epoch = whole.state_dict(), whole.epoch()
    assert epoch == 0
    for step in range(steps):
        expected = take(whole, 1)
        again, after = all_ranks(folder, 1, 1, rows, 3, state)
        np.testing.assert_array_equal(again, expected)
        np.testing.assert_array_equal(again, cycled(step * rows, 1, rows))
        state = whole.state_dict()
        assert state == after and whole.epoch() > epoch
        epoch = whole.epoch()
    assert 2 < epoch < 2 + 3 * rows * (T + 1) / 1500
    whole.close()


def test_the_order_goes_on_with_another_batch(folder):
    _, state = all_ranks(folder, 2, 3, 8, 4)
    rest, _ = all_ranks(folder, 3, 2, 5, 1, state)
    np.testing.assert_array_equal(rest, cycled(24, 2, 5))


@pytest.mark.parametrize("world", [1, 2, 4, 8, 100])
def test_accumulated_batches_and_filler_ranks(folder, world):
    rows, _ = all_ranks(folder, world, 2, 8, 2)
    np.testing.assert_array_equal(rows, cycled(0, 2, 8))


def test_threads_give_what_a_plain_loop_gives(folder):
    for rank in range(3):
        data = loader(folder, 4, T, 1, rank=rank, world_size=3)
        assert data.batches_per_step == 2 and data.device_batch_size == 1
        np.testing.assert_array_equal(take(data, 80), cycled(0, 80, 4)[:, rank::3])
        data.close()


def test_the_state_is_taken_between_steps_only(folder):
    data = loader(folder, 4, T, 2)
    data.next_batch()
    with pytest.raises(AssertionError, match="between optimizer steps"):
        data.state_dict()
    data.close()


def test_epoch(folder):
    data = loader(folder, len(ALL_ROWS), T, 8)
    take(data, 1)
    assert 0.97 < data.epoch() <= 1  # all rows taken; the tail of the last file is in none of them
    data.close()


def test_resume_with_other_data_or_rows_is_refused(folder, tmp_path):
    _, state = all_ranks(folder, 1, 3, 5, 5)
    with pytest.raises(UserError, match=f"sequence_len was {T} and is now 8"):
        loader(folder, 5, 8, 5, state=state)
    longer = write_folder(tmp_path, [*TRAIN, TRAIN[0]], VAL)
    with pytest.raises(UserError, match="files was"):
        loader(longer, 5, T, 5, state=state)


def test_resume_with_tokens_that_changed_under_the_same_lengths_is_refused(folder, tmp_path):
    _, state = all_ranks(folder, 1, 3, 5, 5)
    other = write_folder(tmp_path, [np.roll(TRAIN[0], 1), *TRAIN[1:]], VAL)
    data = loader(other, 5, T, 5, state=state)
    with pytest.raises(UserError, match="the tokens have changed"):
        data.next_batch()
    data.close()


def test_too_little_data_says_so_instead_of_spinning(tmp_path):
    small = write_folder(tmp_path, [[DOCUMENT, 1, 2], [], [5] * 100], [[1]])
    data = loader(small, 2, T, 2)
    with pytest.raises(UserError, match=r"none of the 3 train file.*row of 17 tokens from the start of a document on"):
        data.next_batch()
    data.close()
    with pytest.raises(UserError, match="too little data"):  # before training starts
        small.horizon_in_epochs(T, 100)
    with pytest.raises(UserError, match="none of the 1 val file"):
        small.fixed_rows("val", T)


def test_a_truncated_file_is_one_line(tmp_path):
    damaged = write_folder(tmp_path, TRAIN, VAL)
    path = damaged.train[2]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_000002\.bin is truncated"):
        loader(damaged, 2, T, 2)


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    write_folder(tmp_path, TRAIN, VAL)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "vocab_size": 1000}))
    data = loader(describe_folder(tmp_path), 8, T, 8)
    with pytest.raises(UserError, match=r"has token 1\d\d\d, but a vocabulary of 1000"):
        take(data, 20)
    data.close()
    with pytest.raises(UserError, match="vocabulary of 1000"):
        describe_folder(tmp_path).fixed_rows("val", T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_rows_arrive_on_the_gpu(folder):
    data = loader(folder, 4, T, 4, device="cuda")
    batch = data.next_batch()
    assert batch.inputs.is_cuda and batch.inputs[:, 0].tolist() == [DOCUMENT] * 4
    np.testing.assert_array_equal(batch.inputs.cpu().numpy(), ALL_ROWS[:4, :-1])
    data.close()


# ---- validation rows and the horizon


@given(st.integers(1, 60), st.integers(1, 900))
def test_fixed_rows_are_the_first_tokens_each_predicted_once(folder, length, tokens):
    stream = np.concatenate(VAL).tolist()
    count = min(tokens // length, (len(stream) - 1) // length)
    if not count:
        with pytest.raises(UserError, match="too little data"):
            folder.fixed_rows("val", length, tokens)
        return
    rows = folder.fixed_rows("val", length, tokens)
    assert rows.tolist() == [stream[i * length : (i + 1) * length + 1] for i in range(count)]
    assert rows[:, :-1].ravel().tolist() == stream[: count * length]
    assert rows[:, 1:].ravel().tolist() == stream[1 : count * length + 1]


def test_fixed_rows_go_through_row_batches(folder):
    rows = folder.fixed_rows("train", 10, 95)
    batches = [batch for rank in range(2) for batch in row_batches(rows, 4, torch.device("cpu"), rank, 2)]
    inputs = torch.cat([batch.inputs[batch.targets[:, 0] != IGNORE_INDEX] for batch in batches])
    assert sorted(inputs.tolist()) == sorted(rows[:, :-1].tolist()) and len(inputs) == 9


def test_horizon_is_that_of_the_first_file_with_rows(tmp_path):
    folder = write_folder(tmp_path, [TRAIN[1], TRAIN[0], TRAIN[0]], VAL)
    rows = len(slow_rows([TRAIN[0]], T + 1))
    epochs, cropped = folder.horizon_in_epochs(T, 10_000)
    assert epochs == pytest.approx(10_000 / (rows * T / 1500 * 3010))
    assert cropped == pytest.approx(1 - rows * (T + 1) / 1500)
