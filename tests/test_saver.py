import contextlib
import errno
import io
import math
import multiprocessing
import os
import random
import tempfile
import threading
import time
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from nanochat import checkpoint, saver
from nanochat.dtensor import is_sharded
from nanochat.errors import UserError
from nanochat.saver import Saver
from tests.processes import run_processes

# Rows that divide by four ranks, that do not, and that are fewer.
SHAPES = {"even": (8, 6), "odd": (7, 3), "few": (2, 5), "vector": (5,), "big": (64, 16), "cube": (4, 2, 3)}
LAYOUTS = ("plain", "fsdp", "hsdp")


class Weights(nn.Module):
    def __init__(self, seed=None):
        super().__init__()
        for name, shape in SHAPES.items():
            generator = torch.Generator().manual_seed(0 if seed is None else seed)
            value = torch.zeros(shape) if seed is None else torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(value))


class StandIn:
    """State in every form that an optimizer's may have: rows of DTensors, whole with one owner, whole on all ranks."""

    def __init__(self, model, layout, seed=None, num_steps=0):
        self.num_steps = num_steps
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.state = {}
        for index, (name, param) in enumerate(model.named_parameters()):
            whole = torch.zeros(param.shape) if seed is None else full(param) * 2 + 1
            if layout == "plain" and self.world > 1 and index % 2 == 0:
                mesh = init_device_mesh("cpu", (self.world,))
                self.state[f"{name}.rows"] = distribute_tensor(whole, mesh, [Shard(0)])
            elif is_sharded(param):
                self.state[f"{name}.rows"] = distribute_tensor(whole, param.device_mesh, param.placements)
            else:
                self.state[f"{name}.rows"] = whole.clone()
            if index % self.world == rank:
                self.state[f"{name}.owned"] = whole * 3
        self.state["scalar"] = torch.tensor(0.0 if seed is None else seed + 0.5)

    def named_state(self):
        return self.state


def full(tensor):
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()


def build(layout, seed=None, num_steps=0):
    """A model and its optimizer's stand-in, with the values of `seed` or zeros."""
    model = Weights(seed)
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    return model, StandIn(model, layout, seed, num_steps)


def values(model, optimizer):
    """Whole tensors by name (of what is whole with an owner, this rank's)."""
    named = {**model.state_dict(), **{f"optimizer.{name}": t for name, t in optimizer.named_state().items()}}
    return {name: full(tensor) for name, tensor in named.items()}


def wrong(folder, step, layout, seed):
    """Names of what does not come back as the values of `seed`."""
    expected = values(*build(layout, seed))
    model, optimizer = build(layout)
    checkpoint.load_weights(folder, step, model)
    checkpoint.load_optimizer(folder, step, optimizer, checkpoint.read_meta(folder, step)["optimizer_steps"])
    assert optimizer.num_steps == seed + 100
    found = values(model, optimizer)
    return [name for name, value in expected.items() if not torch.equal(value, found[name])]


@contextlib.contextmanager
def saving(folder, model, optimizer, **options):
    made = Saver(folder, model, optimizer, **options)
    try:
        yield made
    finally:
        made.close()


def write(folder, step, layout, seed, last=False):
    model, optimizer = build(layout, seed, num_steps=seed + 100)
    with saving(folder, model, optimizer) as made:
        made.save(step, {}, last=last)
        made.wait()
        staged = sum(rows.nbytes for rows in made._stage()[0].values())
        return staged, made.total_bytes


def join_world(size, store):
    """Be one of `size` ranks, or of none."""
    if dist.is_initialized():
        dist.destroy_process_group()
    rank = int(os.environ["RANK"])
    if rank < size:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    return rank < size


def every_layout(world):
    return LAYOUTS if world % 2 == 0 else ("plain",)


def save_and_reshard(folder):
    """Save on 4 ranks, load on 2 and save there, load on 1 and save, load on 4; each in every layout."""
    found, written = [], []
    for number, world in enumerate((4, 2, 1, 4)):
        here = [folder / f"{number}-{layout}" for layout in every_layout(world)]
        if join_world(world, folder / f"store{number}"):
            for seed, (path, layout) in enumerate(zip(here, every_layout(world), strict=True)):
                staged, total = write(path, 1, layout, seed, last=seed == 1)
                everywhere = torch.tensor([staged])
                dist.all_reduce(everywhere)
                if everywhere.item() != total:
                    found.append(f"{path.name}: {everywhere.item()} bytes copied for {total}")
            for (seed, path), layout in product([*enumerate(here), *enumerate(written)], every_layout(world)):
                found += [f"{path.name} into {world} {layout}: {name}" for name in wrong(path, 1, layout, seed)]
        written = here
        join_world(4, folder / f"meet{number}")  # those that were left out wait for the files
        dist.barrier()
    return found


def test_what_is_saved_in_any_layout_comes_back_in_any_other_on_any_number_of_ranks(tmp_path):
    assert run_processes(4, save_and_reshard, tmp_path) == [[], [], [], []]
    for committed in tmp_path.glob("*/step_*/COMMITTED"):
        path, names = committed.parent, {name for _, name in checkpoint.sums(committed.parent)}
        assert names == {file.relative_to(path).as_posix() for file in path.rglob("*.*") if file.is_file()}
        checkpoint.verify(path, "")
    files = list(tmp_path.glob("*/step_*/model.safetensors"))
    assert len(files) == 3  # seed 1, wherever there is a second layout
    for file in files:
        saved, expected = load_file(file), Weights(1).state_dict()
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in expected)


class FullDisk(saver.dcp.FileSystemWriter):
    def write_data(self, plan, planner):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space(*_args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def defect(*_args):
    raise TypeError("a defect of ours")


def raised(action):
    try:
        action()
    except (UserError, RuntimeError, TypeError) as error:
        return type(error).__name__, str(error)
    return None


def fail_on_one_rank(folder):
    """What every rank sees when one of them cannot write, in each stage of a save."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model, optimizer = build("fsdp", 0)
    seen = {}
    with saving(folder, model, optimizer) as made:
        made.save(1, {})
        made.wait()
        patches = {
            "part": (1, mock.patch.object(saver.dcp, "FileSystemWriter", FullDisk)),
            "file": (0, mock.patch.object(saver, "write_weights", no_space)),
            "hash": (1, mock.patch.object(saver, "sha256_file", no_space)),
            "defect": (0, mock.patch.object(saver, "write_weights", defect)),
        }
        for step, (name, (victim, patch)) in enumerate(patches.items(), start=2):
            with patch if rank == victim else contextlib.nullcontext():
                made.save(step, {}, last=True)
                seen[name] = raised(made.wait)
            seen[f"{name} left"] = sorted(path.name for path in folder.iterdir())
            dist.barrier()
        usage = mock.Mock(free=10)
        with mock.patch.object(saver.shutil, "disk_usage", lambda _: usage) if rank == 0 else contextlib.nullcontext():
            seen["small"] = raised(lambda: made.save(8, {}))
        with mock.patch.object(saver, "write_weights", no_space):
            made.save(9, {}, last=True)
            seen["next"] = raised(lambda: made.save(10, {}))
        made.save(11, {})
        made.wait()
    seen["steps"] = checkpoint.committed_steps(folder)
    seen["rng"] = [state["torch"] for state in checkpoint.read_meta(folder, 11)["rng"]]
    return seen


def test_a_failure_on_one_rank_is_everyones_and_leaves_the_earlier_checkpoints(tmp_path):
    ranks = run_processes(4, fail_on_one_rank, tmp_path / "x")
    for rank, seen in enumerate(ranks):
        for name in ("part", "file", "hash", "next"):
            kind, text = seen[name]
            assert kind == "UserError" and "No space left on device; free some space" in text and "\n" not in text
        assert seen["defect"][0] == ("TypeError" if rank == 0 else "RuntimeError")
        assert "a defect of ours" in seen["defect"][1]
        assert seen["small"][0] == "UserError" and "disk full: the checkpoint needs" in seen["small"][1]
        assert all(seen[f"{name} left"] == ["step_000001"] for name in ("part", "file", "hash", "defect"))
        assert seen["steps"] == [1, 11]
        assert len(set(seen["rng"])) == 4


def test_a_disk_that_fills_up_while_tensors_are_written_is_one_line(tmp_path):
    """The archive writer makes something else of the OSError."""

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 500:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    model, optimizer = build("plain", 0)
    with saving(tmp_path / "x", model, optimizer) as made:
        made.save(1, {})
        made.wait()
        with mock.patch.object(
            FileSystem, "create_stream", lambda self, path, mode: contextlib.closing(Full(path, mode))
        ):
            made.save(2, {})
            with pytest.raises(UserError, match=r"cannot write .*\.partial_000002.*free some space"):
                made.wait()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["step_000001"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    model, optimizer = build("plain", 0)
    with saving(tmp_path / "x", model, optimizer) as made:
        made.save(1, {})
        weights = sum(4 * math.prod(shape) for shape in SHAPES.values())
        needed = weights * 3 + 4  # state: rows and owned like the weights, and a scalar
        monkeypatch.setattr(saver.shutil, "disk_usage", lambda _: mock.Mock(free=needed))
        made.save(2, {})
        with pytest.raises(UserError, match="disk full: the checkpoint needs"):
            made.save(3, {}, last=True)  # which writes the weights a second time
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["step_000001", "step_000002"]


def test_what_changes_after_save_returns_is_not_saved(tmp_path, monkeypatch):
    model, optimizer = build("plain", 3, num_steps=103)
    changed, real = threading.Event(), saver.dcp.save

    def held_up(*args, **kwargs):
        assert changed.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(saver.dcp, "save", held_up)
    meta = {"loader": {"position": [1, 2]}}
    random_before = torch.get_rng_state()
    with saving(tmp_path / "x", model, optimizer) as made:
        assert made.save(7, meta) < 30  # far from the minute that the thread would wait
        assert checkpoint.committed_steps(tmp_path / "x") == []
        with torch.no_grad():
            for tensor in [*model.parameters(), *optimizer.named_state().values()]:
                tensor.fill_(math.nan)
        optimizer.num_steps = 999
        meta["loader"]["position"].append(3)
        torch.rand(5)
        changed.set()
        made.wait()
    assert wrong(tmp_path / "x", 7, "plain", 3) == []
    saved = checkpoint.read_meta(tmp_path / "x", 7)
    assert saved["loader"] == {"position": [1, 2]}
    checkpoint.set_rng_state(saved["rng"][0])
    assert torch.equal(torch.get_rng_state(), random_before)


def test_meta_that_is_no_json_is_said_at_once(tmp_path):
    model, optimizer = build("plain", 0)
    with saving(tmp_path / "x", model, optimizer) as made:
        with pytest.raises(TypeError, match="not JSON serializable"):
            made.save(1, {"settings": object()})
        made.save(2, {})
    assert checkpoint.committed_steps(tmp_path / "x") == [2]


def test_a_saver_keeps_what_it_was_told_to(tmp_path):
    model, optimizer = build("plain", 0)
    with saving(tmp_path / "x", model, optimizer, keep_last=2, keep_every=4) as made:
        for step in range(1, 12):
            made.save(step, {})
    assert checkpoint.committed_steps(tmp_path / "x") == [4, 8, 10, 11]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 9))
def test_what_all_ranks_hold_is_dealt_out_evenly(sizes, world):
    tensors = {f"model.{index}": torch.empty(size, dtype=torch.uint8) for index, size in enumerate(sizes)}
    made, shares = Saver.__new__(Saver), []
    made._gather = lambda value: [value] * world
    for made.rank in range(world):
        shares.append(made._share(tensors))
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    bytes_of = [sum(tensors[name].nbytes for name in share) for share in shares]
    assert max(bytes_of) - min(bytes_of) <= max(sizes)


@given(st.sets(st.integers(0, 60)), st.integers(1, 5), st.integers(-1, 9))
def test_pruning_keeps_the_last_and_every_nth(steps, last, every):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in steps:
            checkpoint.step_dir(folder, step).mkdir()
            (checkpoint.step_dir(folder, step) / "COMMITTED").touch()
        checkpoint.prune(folder, last, every)
        newest = sorted(steps)[-last:]
        assert set(checkpoint.committed_steps(folder)) == {
            n for n in steps if n in newest or (every > 0 and n % every == 0)
        }
        assert {path.name for path in folder.iterdir()} == {
            checkpoint.step_dir(folder, step).name for step in checkpoint.committed_steps(folder)
        }


def test_a_checkpoint_that_goes_is_no_checkpoint_from_the_first_moment(tmp_path, monkeypatch):
    write(tmp_path / "x", 1, "plain", 0)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.discard(checkpoint.step_dir(tmp_path / "x", 1))
    assert checkpoint.committed_steps(tmp_path / "x") == []


def test_a_new_saver_clears_away_what_a_killed_run_left(tmp_path):
    folder = tmp_path / "x"
    write(folder, 3, "plain", 0)
    (folder / ".partial_000005" / "state").mkdir(parents=True)
    (folder / ".partial_000005" / "COMMITTED").touch()  # killed before the renaming
    (folder / "step_000002" / "state").mkdir(parents=True)  # killed while it was deleted
    (folder / "COMPLETE").touch()
    saving_again = Saver(folder, *build("plain", 0))
    saving_again.close()
    assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE", "step_000003"]


def save_for_ever(folder, started):
    """Checkpoint after checkpoint, with the number of the step for seed, until killed."""
    torch.set_num_threads(1)
    steps = checkpoint.committed_steps(folder)
    model, optimizer = build("plain", 0)
    with saving(folder, model, optimizer, keep_last=3, keep_every=5) as made:
        for count, step in enumerate(range(steps[-1] + 1 if steps else 1, 10**6)):
            other, state = build("plain", step)
            with torch.no_grad():
                for mine, its in zip(model.parameters(), other.parameters(), strict=True):
                    mine.copy_(its)
            optimizer.state.update(state.state)
            optimizer.num_steps = step + 100
            made.save(step, {}, last=step % 3 == 0)
            if count == 1:  # the first save stands, the second is under way
                started.set()


def test_whenever_it_is_killed_every_committed_checkpoint_is_whole(tmp_path):
    folder = tmp_path / "x"
    chance = random.Random(7)
    forked = multiprocessing.get_context("forkserver")  # importing torch takes each process seconds otherwise
    cut_short = 0
    for _ in range(20):
        started = forked.Event()
        process = forked.Process(target=save_for_ever, args=(folder, started))
        process.start()
        while not started.wait(1):  # on a busy machine two saves take more than a minute
            assert process.is_alive()
        time.sleep(chance.uniform(0, 0.1))  # a save takes a few hundredths of a second
        process.kill()
        process.join()
        cut_short += any(folder.glob(".partial_*"))
        for step in checkpoint.committed_steps(folder):
            assert wrong(folder, step, "plain", step) == []
            if step % 3 == 0:  # both copies of the weights
                saved, expected = load_file(checkpoint.step_dir(folder, step) / "model.safetensors"), Weights(step)
                assert all(torch.equal(saved[name], value) for name, value in expected.state_dict().items())
    assert cut_short > 0
    last = checkpoint.committed_steps(folder)[-1]
    assert last >= 20  # every process got on
    write(folder, last + 1, "plain", last + 1)
    assert wrong(folder, last + 1, "plain", last + 1) == []
    assert not list(folder.glob(".partial_*"))
