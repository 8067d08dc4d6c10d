import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset
from nanochat.dataloader import TrainLoader, UnitOrder, fixed_rows, horizon_in_epochs
from nanochat.errors import UserError
from nanochat.paths import data_dir
from tests.processes import run_processes

SOURCE = "pydocs"


class LetterTokenizer:
    """One token a character; BOS is 0. Documents here are runs of code points that appear nowhere else."""

    def get_bos_token_id(self):
        return 0

    def encode_batch_numpy(self, texts, num_threads=1):
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


def loader(rows=8, batch=4, **options):
    return TrainLoader(LetterTokenizer(), SOURCE, rows, 16, batch, **options)


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
    order = UnitOrder(dataset.list_shards(SOURCE, "train"), seed=3, streams=8)
    for epoch in (0, 5):
        units = [order[epoch * order.per_epoch + i] for i in range(order.per_epoch)]
        seen = Counter((u.path, u.row_group, d) for u in units for d in range(u.start, u.stop))
        assert len(seen) == 240 and set(seen.values()) == {1}
    assert [order[i][:4] for i in range(order.per_epoch)] != [
        order[order.per_epoch + i][:4] for i in range(order.per_epoch)
    ]


def test_within_an_epoch_no_token_comes_twice(source):
    data = loader(rows=4, batch=4)
    rows = take_steps(data, 1 + data.order.per_epoch // 8)
    tokens = rows[rows != 0]
    assert len(set(tokens.tolist())) == len(tokens)
    data.close()


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 4), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_any_world_size_sees_the_same_global_batches_and_resumes(shared_source, world, before, seed):
    whole = loader(seed=seed)
    expected = take_steps(whole, before + 2)
    whole.close()
    states, parts = [], []
    for rank in range(world):
        data = loader(batch=8 // world, rank=rank, world_size=world, seed=seed)
        take_steps(data, before)
        states.append(data.state_dict() if world == 1 else dict(data._positions))
        data.close()
    if world > 1:  # what state_dict gathers over ranks
        positions = {n: p for part in states for n, p in part.items()}
        state = {"seed": seed, "streams": 8, "sequence_len": 16, "units_per_epoch": data.order.per_epoch,
                 "positions": [list(positions[n]) for n in range(8)]}  # fmt: skip
    else:
        state = json.loads(json.dumps(states[0]))
    for rank in range(world):
        data = loader(batch=8 // world, rank=rank, world_size=world, seed=seed, state=state)
        parts.append(take_steps(data, 2))
        data.close()
    merged = np.empty_like(expected[before:])
    for rank, part in enumerate(parts):
        merged[:, rank::world] = part
    np.testing.assert_array_equal(merged, expected[before:])


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("store")))
    documents = make_documents(200)
    write_source([documents[:180], documents[180:]])
    yield
    patch.undo()


def two_rank_state():
    import torch.distributed as dist

    data = loader(batch=2, rank=dist.get_rank(), world_size=2)
    rows = take_steps(data, 3)
    state = data.state_dict()
    data.close()
    return rows, state


def test_two_processes_gather_one_state(source):
    whole = loader()
    expected = take_steps(whole, 3)
    (rows0, state0), (rows1, state1) = run_processes(2, two_rank_state)
    assert state0 == state1 == whole.state_dict()
    np.testing.assert_array_equal(rows0, expected[:, 0::2])
    np.testing.assert_array_equal(rows1, expected[:, 1::2])
    whole.close()


def test_more_streams_than_units_starve_nobody(source):
    data = loader(rows=64, batch=64)
    assert data.order.per_epoch < 64
    assert take_steps(data, 12).shape == (12, 64, 17)
    assert data.epoch() > 1
    data.close()


def test_fixed_rows_are_fixed_and_capped(source):
    rows = fixed_rows(LetterTokenizer(), SOURCE, "val", 16)
    np.testing.assert_array_equal(rows, fixed_rows(LetterTokenizer(), SOURCE, "val", 16))
    val_text = {ord(c) for document in source[240:] for c in document}
    assert set(rows[rows != 0].tolist()) <= val_text
    capped = fixed_rows(LetterTokenizer(), SOURCE, "val", 16, max_tokens=16 * 5 + 3)
    np.testing.assert_array_equal(capped, rows[:5])


def test_horizon_is_about_right(source):
    text = sum(len(d) for d in source[:240])
    epochs, cropped = horizon_in_epochs(LetterTokenizer(), SOURCE, 16, 10 * text)
    assert 0 < cropped < 0.5
    assert epochs == pytest.approx(10 / (1 - cropped), rel=0.25)


@pytest.mark.parametrize(
    ("rows", "batch", "world", "message"), [(8, 3, 1, "device batches of 3"), (8, 8, 2, "2 rank")]
)  # fmt: skip
def test_rows_that_do_not_divide(source, rows, batch, world, message):
    with pytest.raises(UserError, match=message):
        loader(rows, batch, world_size=world)


def test_resume_with_other_data_or_seed_is_refused(source):
    data = loader()
    state = data.state_dict()
    data.close()
    for change in ({"seed": 9}, {"units_per_epoch": 1}, {"sequence_len": 99}):
        with pytest.raises(UserError, match=next(iter(change))):
            loader(state={**state, **change})


def test_damaged_shard_is_one_line_in_the_training_thread(source):
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
    with pytest.raises(UserError, match="val split"):
        fixed_rows(LetterTokenizer(), SOURCE, "val", 16)
