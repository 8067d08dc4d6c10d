"""Saves checkpoints while training goes on.

The training loop only waits until an earlier save has ended, the disk is checked and the tensors that this rank writes
are copied to the CPU (on a GPU: until the copies are enqueued). Then a thread on every rank writes its parts of state/,
and rank 0's adds the other files, COMMITTED last, renames the folder, which was .partial_* until then, and prunes older
checkpoints. What several ranks hold alike is copied and written by one of them: torch's own stager copies it on
every rank (docs/decisions.md has the numbers).

Importing this module takes 3 s (torch.distributed.checkpoint): import it where training starts.
"""

import datetime
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from nanochat.checkpoint import FORMAT, discard, prune, rng_state, step_dir, write_sums, write_weights
from nanochat.dtensor import is_sharded, local, row_range
from nanochat.errors import UserError
from nanochat.files import sha256_file
from nanochat.optim import MuonAdamW
from nanochat.runtime import gather, heartbeat, print0

HEARTBEAT_SECONDS = 30.0  # while waiting for the disk
SLOWEST_DISK = datetime.timedelta(hours=2)  # how long ranks that have written their part wait for the last one


class Saver:
    """Writes the checkpoints of one run; created, used and closed by all ranks together. keep_last: newest checkpoints
    to keep; keep_every: also those whose step is a multiple of this; -1: none. On a GPU it holds pinned memory for this
    rank's share all the time, on the CPU only during a save."""

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: MuonAdamW | None, keep_last: int = 2, keep_every: int = -1
    ) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.keep_last, self.keep_every = keep_last, keep_every
        self.group: dist.ProcessGroup | None = None
        self.rank = 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank = dist.get_rank()
            self.group = dist.new_group(backend="gloo", timeout=SLOWEST_DISK)  # type: ignore[assignment]
        self._on_first_rank(self._prepare_folder)
        tensors = self._tensors()
        self.assigned = self._share(tensors)
        self.write_items = [_write_item(name, tensors[name]) for name in self.assigned]
        self.device = local(next(iter(tensors.values()))).device
        self.pinned: dict[str, Tensor] = {}
        if self.device.type == "cuda":
            rows = {name: local(tensors[name]) for name in self.assigned}
            self.pinned = {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for n, t in rows.items()}
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def save(self, step: int, meta: dict[str, Any], last: bool = False) -> float:
        """Start saving the state as it is now, on every rank; returns the seconds that this took. meta is JSON-able;
        last: write model.safetensors too. UserError on all ranks when the disk is too small or the last save failed."""
        started = time.perf_counter()
        self.wait()
        self._on_first_rank(lambda: self._check_space(last))
        # torch takes a process without a group for one that has lost it; here it is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        steps = self.optimizer.num_steps if self.optimizer is not None else 0
        about = {"format": FORMAT, "step": step, "optimizer_steps": steps, **meta}
        document = json.dumps({**about, "rng": self._gather(rng_state(), only_first=True)}, indent=1) + "\n"
        job = (step, last, *self._stage(), document)
        self.thread = threading.Thread(target=self._run, args=job, name=f"save step {step}", daemon=True)
        self.thread.start()
        return time.perf_counter() - started

    def wait(self) -> None:
        """End the save under way (every rank calls this). Raises UserError on every rank when any of them failed."""
        if self.thread is None:
            return
        while self.thread.is_alive():
            self.thread.join(HEARTBEAT_SECONDS)
            heartbeat()
        self.thread = None
        failure, self.failure = self.failure, None
        self._agree(failure)

    def close(self) -> None:
        """Let the save under way end, and leave the process group. Call `wait` first to learn of failures: this asks
        nothing of the other ranks, for they may be gone."""
        if self.thread is not None:
            self.thread.join()
        if self.group is not None:
            dist.destroy_process_group(self.group)
        self.thread = self.group = None

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        state = self.optimizer.named_state() if self.optimizer is not None else {}
        return weights | {f"optimizer.{name}": tensor for name, tensor in state.items()}

    def _prepare_folder(self) -> None:
        """Delete what a killed run has left: checkpoints partly written or partly deleted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob(".partial_*"), *self.folder.glob("step_*")]:
            if path.name.startswith(".partial_") or not (path / "COMMITTED").exists():
                shutil.rmtree(path)

    def _share(self, tensors: dict[str, Tensor]) -> list[str]:
        """Names of the tensors whose local rows this rank writes: each part once, about as many bytes on every rank."""
        held = self._gather({
            name: (row_range(tensor)[0] if is_sharded(tensor) else 0, local(tensor).nbytes)
            for name, tensor in tensors.items()
            if not is_sharded(tensor) or local(tensor).numel() > 0
        })  # fmt: skip
        holders: dict[tuple[str, int, int], list[int]] = {}  # (name, first row, bytes) -> ranks
        for rank, parts in enumerate(held):
            for name, (row, size) in parts.items():
                holders.setdefault((name, row, size), []).append(rank)
        self.total_bytes = sum(size for _, _, size in holders)
        self.model_bytes = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.startswith("model."))
        load = [0] * len(held)
        assigned = []
        for name, row, size in sorted(holders, key=lambda part: (len(holders[part]) > 1, -part[2], part)):
            writer = min(holders[name, row, size], key=load.__getitem__)
            load[writer] += size
            if writer == self.rank:
                assigned.append(name)
        return assigned

    def _check_space(self, last: bool) -> None:
        # asked first: from inside the writers a full disk raises anything from OSError to a RuntimeError of an archive
        needed = self.total_bytes + (self.model_bytes if last else 0)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"disk full: the checkpoint needs {needed / 1e6:,.0f} MB and {self.folder} has {free / 1e6:,.0f} MB "
                "left; free some space and run again with --resume=auto"
            )

    def _stage(self) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Copy this rank's share to the CPU; on a GPU only enqueue that, and give an event that follows it."""
        tensors = self._tensors()
        rows = {name: local(tensors[name]) for name in self.assigned}
        if not self.pinned:
            form = torch.contiguous_format
            return {name: part.to("cpu", copy=True, memory_format=form) for name, part in rows.items()}, None
        for name, tensor in rows.items():
            self.pinned[name].copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # the waiting thread sleeps instead of taking a core from the loop
        copied.record(torch.cuda.current_stream(self.device))
        return self.pinned, copied

    def _run(
        self, step: int, last: bool, rows: dict[str, Tensor], copied: torch.cuda.Event | None, document: str
    ) -> None:
        """The thread: write, and leave what went wrong in `failure`. What it is given does not change meanwhile."""
        partial = self.folder / f".partial_{step:06d}"
        try:
            if copied is not None:
                torch.cuda.set_device(self.device)  # a new thread starts on GPU 0, and would take memory there
                copied.synchronize()
            dcp.save(
                rows,
                # copy-ahead is for tensors on a GPU, and would synchronise its stream
                storage_writer=dcp.FileSystemWriter(partial / "state", per_thread_copy_ahead=0),
                planner=_Planner(self.write_items, rows),
                process_group=self.group,
                no_dist=self.group is None,
            )
            hashed = self._gather(_hashes(partial, f"state/__{self.rank}_*"), only_first=True)
            if self.rank == 0:
                if last:
                    write_weights(partial / "state", partial / "model.safetensors")
                self._commit(partial, step, document, hashed)
        except (Exception, CheckpointException) as error:
            self.failure = _explained(error, partial)
        finally:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _commit(self, partial: Path, step: int, document: str, hashed: list[dict[str, str] | OSError]) -> None:
        with (partial / "meta.json").open("w") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        sums: dict[str, str] = {}
        for part in [*hashed, *(_hashes(partial, name) for name in ("state/.metadata", "*.*"))]:
            if isinstance(part, OSError):
                raise part
            sums |= part
        write_sums(partial, ((digest, name) for name, digest in sums.items()))
        target = step_dir(self.folder, step)
        discard(target)
        partial.rename(target)
        print0(f"saved {target}")
        prune(self.folder, self.keep_last, self.keep_every)

    def _gather(self, value: Any, only_first: bool = False) -> list[Any]:
        """`value` of every rank, in order; only_first: on rank 0, and nothing elsewhere."""
        if self.group is None:
            return [value]
        if not only_first:
            return gather(value, self.group)
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.gather_object(value, values if self.rank == 0 else None, dst=0, group=self.group)
        return values

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Call `action` on rank 0; what it raises is raised on all ranks."""
        problem = None
        try:
            if self.rank == 0:
                action()
        except (OSError, UserError) as error:
            problem = _explained(error, self.folder)
        self._agree(problem)

    def _agree(self, problem: BaseException | None) -> None:
        """Raise on all ranks when one of them has a problem, so that none goes on alone."""
        problems = self._gather(problem and (isinstance(problem, UserError), str(problem)))
        if problem is not None:
            raise problem
        for rank, remote in enumerate(problems):
            if remote is not None:
                is_user_error, text = remote
                raise UserError(text) if is_user_error else RuntimeError(f"rank {rank} cannot save: {text}")


class _Planner(dcp.DefaultSavePlanner):
    """Writes rows under their offset in the unsharded tensor, as DCP does for DTensors; those would need a mesh of
    CPUs, with process groups that nothing else uses."""

    def __init__(self, write_items: list[WriteItem], rows: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.write_items, self.rows = write_items, rows

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self.write_items))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.rows[write_item.index.fqn]


def _write_item(name: str, tensor: Tensor) -> WriteItem:
    rows = local(tensor)
    offsets = torch.Size((row_range(tensor)[0], *[0] * (tensor.ndim - 1)) if tensor.ndim > 0 else ())
    chunk = ChunkStorageMetadata(offsets=offsets, sizes=rows.shape)
    about = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=rows.dtype), size=tensor.shape)
    return WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=about)


def _hashes(partial: Path, pattern: str) -> dict[str, str] | OSError:
    """Name -> SHA-256 of these files. Each rank hashes what it has just written, which its host still has in memory;
    an error is returned, for the others wait for the answer."""
    try:
        return {path.relative_to(partial).as_posix(): sha256_file(path) for path in partial.glob(pattern)}
    except OSError as error:
        return error


def _explained(error: BaseException, path: Path) -> BaseException:
    """Disk errors become UserError; everything else stays what it is."""
    if isinstance(error, CheckpointException):  # no Exception itself, and the same on every rank
        rank, (cause, _) = next(iter(error.failures.items()))
        explained = _explained(cause, path)
        return explained if isinstance(explained, UserError) else RuntimeError(f"rank {rank}: {cause!r}")
    disk = isinstance(error, OSError) or (isinstance(error, RuntimeError) and "inline_container" in str(error))
    if not disk:  # the archive writer turns what the file raised into a RuntimeError
        return error
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"cannot write {path}: {reason}; free some space and run again with --resume=auto")
