import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataloader
from nanochat.data import sources
from nanochat.data.text_rows import TextData, UnitOrder
from nanochat.dataloader import RowLoader
from nanochat.errors import UserError
from nanochat.paths import data_dir
from nanochat.runtime import IGNORE_INDEX
from tests.data.synchronous import Synchronous
from tests.processes import run_processes

SOURCE = "pydocs"


class LetterTokenizer:
    """One token a character; BOS is 0. Documents here are runs of code points that appear nowhere else."""

    hash = "letters"

    def get_vocab_size(self):
        return 1 << 17

    def get_bos_token_id(self):
        return 0

    def batch_encode(self, texts, num_threads=1):
        return [np.array([ord(c) for c in text], dtype=np.uint32) for text in texts]


def write_source(documents_by_shard, row_group=8):
    """A data set in the store: shards and the manifest that dataset.py reads. The last shard is for validation."""
    folder = data_dir(SOURCE)
    folder.mkdir(parents=True)
    files = {}
    for index, documents in enumerate(documents_by_shard):
        path = folder / f"shard_{index:05d}.parquet"
        pq.write_table(pa.table({"text": documents}), path, row_group_size=row_group)
        raw = path.read_bytes()
        files[path.name] = {
            "split": "val" if index == len(documents_by_shard) - 1 else "train",
            "size": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "documents": len(documents),
            "characters": sum(map(len, documents)),
            "utf8_bytes": sum(len(d.encode()) for d in documents),
        }
    (folder / "manifest.json").write_text(json.dumps({"source": SOURCE, "files": files}))


def make_documents(count, seed=0):
    """Documents of 1-40 characters, every character of all of them different."""
    lengths = np.random.default_rng(seed).integers(1, 40, count)
    starts = 0x4E00 + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return ["".join(chr(c) for c in range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    documents = make_documents(260)
    write_source([documents[:100], documents[100:240], documents[240:]])
    return documents


TEXT = TextData(SOURCE, LetterTokenizer())


def loader(rows=8, batch=4, seed=0, **options):
    return RowLoader(TEXT.rows(16, seed), rows, batch, **options)


def take_steps(data, steps):
    """Rows (steps, rows of this rank, T + 1) and the positions after them."""
    out = []
    for _ in range(steps):
        batches = [data.next_batch() for _ in range(data.batches_per_step)]
        out.append(np.concatenate([np.concatenate([b.inputs, b.targets[:, -1:]], axis=1) for b in batches]))
    return np.stack(out) if out else None


def test_targets_are_inputs_one_later_and_rows_start_with_bos(source):
    data = loader()
    batch = data.next_batch()
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all() and (batch.inputs[:, 0] == 0).all()
    data.close()


def test_an_epoch_has_each_unit_once(source):
    order = UnitOrder(sources.list_shards(SOURCE, "train"), seed=3, streams=8)
    for epoch in (0, 5):
        units = [order[epoch * order.per_epoch + i] for i in range(order.per_epoch)]
        seen = Counter((u.path, u.row_group, d) for u in units for d in range(u.start, u.stop))
        assert len(seen) == 240 and set(seen.values()) == {1}
    assert [order[i][:4] for i in range(order.per_epoch)] != [
        order[order.per_epoch + i][:4] for i in range(order.per_epoch)
    ]


def test_within_an_epoch_no_token_comes_twice(source):
    data = loader(rows=4, batch=4)
    rows = take_steps(data, 1 + data.source.order.per_epoch // 8)
    tokens = rows[rows != 0]
    assert len(set(tokens.tolist())) == len(tokens)
    data.close()


def real_rows(data, steps):
    """Rows (steps, R, T + 1) of this rank, filler left out once it has been seen to be filler."""
    out = []
    for _ in range(steps):
        kept = []
        for _ in range(data.batches_per_step):
            batch = data.next_batch()
            filler = (batch.targets == IGNORE_INDEX).all(dim=1)
            assert batch.inputs.shape == (data.device_batch_size, data.source.sequence_len)
            assert (batch.inputs[filler] == 0).all() and (batch.targets[~filler] != IGNORE_INDEX).all()
            kept.append(torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)[~filler])
        out.append(torch.cat(kept))
    return torch.stack(out).numpy() if out else None


def all_ranks(world, steps, state=None, **options):
    """(rows (steps, R, T + 1) of all ranks put together, the state after them, batches a step) at this world size."""
    merged, positions, batches = {}, {}, set()
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataloader, "Prefetcher", Synchronous)
            data = loader(rank=rank, world_size=world, state=state, **options)
        streams = data.source.rows_per_step
        rows = real_rows(data, steps)
        for i, number in enumerate(range(rank, streams, world)):
            merged[number] = rows[:, i] if steps else None
        assert not steps or rows.shape[1] == len(range(rank, streams, world))
        positions.update(data._position)
        batches.add((data.batches_per_step, data.device_batch_size))
        data.close()
    assert sorted(merged) == list(range(streams)) and len(batches) == 1
    state = {**data.source.identity(), "positions": [list(positions[n]) for n in range(streams)]}  # as gathered
    rows = np.stack([merged[n] for n in range(streams)], axis=1) if steps else None
    return rows, json.loads(json.dumps(state))


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 5), st.integers(0, 4), st.integers(0, 3)
)
@settings(max_examples=15)
def test_any_world_size_sees_the_same_global_batches_and_resumes(
    shared_source, world, world_after, rows, batch, before, seed
):
    expected, _ = all_ranks(1, before + 2, rows=rows, batch=rows, seed=seed)
    first, state = all_ranks(world, before, rows=rows, batch=batch, seed=seed)
    rest, _ = all_ranks(world_after, 2, state, rows=rows, batch=batch, seed=seed)
    again, _ = all_ranks(world, 2, state, rows=rows, batch=batch, seed=seed)
    if before:
        np.testing.assert_array_equal(first, expected[:before])
    np.testing.assert_array_equal(rest, expected[before:])
    np.testing.assert_array_equal(again, expected[before:])


@pytest.mark.parametrize("world", [3, 7, 48, 127, 1024])
def test_any_number_of_ranks_up_to_1024(shared_source, world):
    """More ranks than row groups (there are 23), and than rows where there are more than 40 of them."""
    expected, _ = all_ranks(1, 3, rows=40, batch=40)
    first, state = all_ranks(world, 1, rows=40, batch=4)
    rest, _ = all_ranks(world, 2, state, rows=40, batch=4)
    np.testing.assert_array_equal(np.concatenate([first, rest]), expected)


def test_ranks_of_a_thousand_that_own_a_stream_each(shared_source, synchronous):
    whole = loader(rows=1024, batch=64)
    expected = real_rows(whole, 2)
    for world, rank in [(1024, 0), (1024, 1023), (1000, 3), (1000, 999), (127, 126)]:
        data = loader(rows=1024, batch=64, rank=rank, world_size=world)
        np.testing.assert_array_equal(real_rows(data, 2), expected[:, rank::world])
        data.close()
    whole.close()


def test_threads_give_what_a_plain_loop_gives(shared_source):
    """The real loader, of three ranks of which two have filler."""
    whole = loader(rows=4, batch=4)
    expected = real_rows(whole, 6)
    whole.close()
    for rank in range(3):
        data = loader(rows=4, batch=1, rank=rank, world_size=3)
        assert data.batches_per_step == 2
        np.testing.assert_array_equal(real_rows(data, 6), expected[:, rank::3])
        data.close()


@pytest.mark.parametrize("world", [1, 7, 64])
def test_one_row_group_is_split_between_ranks_without_duplicates(tmp_path, monkeypatch, synchronous, world):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    documents = make_documents(1100)
    write_source([documents[:1024], documents[1024:]], row_group=1024)
    epoch, step = [], []  # what the ranks' units of the first epoch hold, and what the first step takes
    for rank in range(world):
        data = loader(rows=64, batch=64, rank=rank, world_size=world)
        assert len(data.source.order.row_groups) == 1 and data.source.order.per_epoch == 64  # a unit for each stream
        for number in range(rank, 64, world):
            epoch += data.source.packer.rows(data.source.order[number]).ravel().tolist()
        step += real_rows(data, 1).ravel().tolist()
        data.close()
    for tokens in ([token for token in part if token] for part in (epoch, step)):
        assert len(tokens) == len(set(tokens))
    assert len(set(epoch)) > 0.8 * sum(map(len, documents[:1024])) and set(step) <= set(epoch)


def test_a_rank_of_filler_only_has_a_state_and_an_epoch(shared_source):
    data = loader(rows=2, batch=4, rank=5, world_size=6)
    assert data.batches_per_step == data.device_batch_size == 1
    batch = data.next_batch()
    assert (batch.targets == IGNORE_INDEX).all() and (batch.inputs == 0).all()
    assert data.epoch() == 0 and data._position == {}
    data.close()


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("store")))
    patch.setenv("LOCAL_RANK", "1")  # so that a thousand ranks do not each hash the shards
    documents = make_documents(200)
    write_source([documents[:180], documents[180:]])
    yield
    patch.undo()


@pytest.fixture
def synchronous(monkeypatch):
    monkeypatch.setattr(dataloader, "Prefetcher", Synchronous)


def two_rank_state():
    import torch.distributed as dist

    data = loader(rows=5, batch=2, rank=dist.get_rank(), world_size=2)
    rows = real_rows(data, 3)
    state = data.state_dict()
    data.close()
    return rows, state


def test_two_processes_gather_one_state(source):
    whole = loader(rows=5)
    expected = real_rows(whole, 3)
    (rows0, state0), (rows1, state1) = run_processes(2, two_rank_state)
    assert state0 == state1 == whole.state_dict()
    np.testing.assert_array_equal(rows0, expected[:, 0::2])
    np.testing.assert_array_equal(rows1, expected[:, 1::2])
    whole.close()


def test_more_streams_than_units_starve_nobody(source):
    data = loader(rows=64, batch=64)
    assert data.source.order.per_epoch < 64
    assert take_steps(data, 12).shape == (12, 64, 17)
    assert data.epoch() > 1
    data.close()


def test_fixed_rows_are_fixed_and_capped(source):
    rows = TEXT.fixed_rows("val", 16)
    np.testing.assert_array_equal(rows, TEXT.fixed_rows("val", 16))
    val_text = {ord(c) for document in source[240:] for c in document}
    assert set(rows[rows != 0].tolist()) <= val_text
    capped = TEXT.fixed_rows("val", 16, max_tokens=16 * 5 + 3)
    np.testing.assert_array_equal(capped, rows[:5])


def test_horizon_is_about_right(source):
    text = sum(len(d) for d in source[:240])
    epochs, cropped = TEXT.horizon_in_epochs(16, 10 * text)
    assert 0 < cropped < 0.5
    assert epochs == pytest.approx(10 / (1 - cropped), rel=0.25)


def test_horizon_says_when_the_first_step_repeats_documents(source):
    epochs, _ = TEXT.horizon_in_epochs(16, 100, rows_per_step=8)
    assert epochs < 0.1
    units = UnitOrder(sources.list_shards(SOURCE, "train"), seed=0, streams=64).per_epoch
    epochs, _ = TEXT.horizon_in_epochs(16, 100, rows_per_step=64)
    assert epochs == pytest.approx(64 / units) and epochs > 1


def test_resume_with_text_that_packs_differently_is_refused(source):
    data = loader()
    for _ in range(3 * data.batches_per_step):
        data.next_batch()
    state = data.state_dict()
    data.close()
    state["positions"][1][2] += 1
    data = loader(state=state)
    with pytest.raises(UserError, match="cannot resume the data order: documents that filled"):
        data.next_batch()
    data.close()


def test_resume_with_other_data_or_seed_is_refused(source):
    data = loader()
    state = data.state_dict()
    data.close()
    for change in ({"seed": 9}, {"units_per_epoch": 1}, {"sequence_len": 99}):
        with pytest.raises(UserError, match=next(iter(change))):
            loader(state={**state, **change})


def test_damaged_shard_is_one_line_in_the_training_thread(source, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first rank of a node refuses it before that
    path = data_dir(SOURCE) / "shard_00000.parquet"
    raw = bytearray(path.read_bytes())
    raw[4 : len(raw) // 2] = b"\xff" * (len(raw) // 2 - 4)  # the size and the footer stand
    path.write_bytes(raw)
    data = loader()
    with pytest.raises(UserError, match=r"shard_00000.*damaged"):
        take_steps(data, 20)
    data.close()


def test_too_little_text_says_so_instead_of_spinning(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    write_source([["ab", "c"], ["d"]])
    data = loader()
    with pytest.raises(UserError, match="too little text"):
        data.next_batch()
    data.close()
    with pytest.raises(UserError, match="too little text"):  # before training starts
        TEXT.horizon_in_epochs(16, 100, rows_per_step=8)
    with pytest.raises(UserError, match="val split"):
        TEXT.fixed_rows("val", 16)
