"""Where a program runs: process group, device, compute dtype, the compiler, printing once, and signals."""

import datetime
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from nanochat.errors import UserError, end_with_parent
from nanochat.files import let_go
from nanochat.flags import DeviceType
from nanochat.paths import get_base_dir

T = TypeVar("T")

IGNORE_INDEX = -1  # target of a position without a loss


class DistInfo(NamedTuple):
    """What torchrun says about this process."""

    ddp: bool
    rank: int
    local_rank: int
    world_size: int


def get_dist_info() -> DistInfo:
    """Rank and world size from torchrun's environment; a lone process is rank 0 of 1."""
    found = {name: value for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if (value := os.environ.get(name))}
    if found in ({}, {"WORLD_SIZE": "1"}):
        return DistInfo(False, 0, 0, 1)
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    if missing := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in found]:
        raise UserError(f"{shown} is set but {', '.join(missing)} is not: start with torchrun, or unset it")
    numbers = [int(value) if value.isdecimal() else -1 for value in found.values()]
    if not 0 <= numbers[1] <= numbers[0] < numbers[2]:
        raise UserError(f"{shown}: no ranks of one group; start with torchrun, or unset all three")
    return DistInfo(True, *numbers)


def ranks_per_node() -> int:
    """Ranks on each host, as torchrun says; a lone process is one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_dist_info().world_size))


_on_heartbeat: list[Callable[[], object]] = []


def on_heartbeat(listener: Callable[[], object]) -> Callable[[], None]:
    """Have `listener` called at every heartbeat of this process, until the function that is returned is called."""
    _on_heartbeat.append(listener)
    return lambda: _on_heartbeat.remove(listener)


def heartbeat() -> None:
    """Say from within long work (batches of an evaluation, sampled tokens, a disk) that this process is alive. Does
    nothing until a watchdog listens. Raises Stopped as `interruptible` does: Python drops what is raised by a signal
    that comes within a finalizer."""
    for listener in _on_heartbeat:
        listener()
    if StopSignal.installed is not None:
        StopSignal.installed.check()


def print0(*values: object, **options: Any) -> None:
    """print on rank 0 only, flushed so that logs follow the run."""
    if get_dist_info().rank == 0:
        print(*values, flush=True, **options)


def pick_device_type(requested: DeviceType = "auto") -> str:
    """The device type to run on. Raises UserError where one was requested that this machine lacks."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if requested == "auto":
        return next(name for name, there in present.items() if there)
    if not present[requested]:
        have = ", ".join(name for name, there in present.items() if there)
        raise UserError(
            f"--device-type={requested}: no such device here (present: {have}); drop the flag or choose one of these"
        )
    return requested


def compute_init(device_type: DeviceType = "auto") -> tuple[bool, int, int, int, torch.device]:
    """Seed, set matmul precision, join the process group. Returns (ddp, rank, local_rank, world_size, device)."""
    kind = pick_device_type(device_type)
    info = get_dist_info()
    device = torch.device(kind)
    if kind == "cuda":
        if info.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {info.local_rank} has no GPU: this host shows {torch.cuda.device_count()}; "
                f"lower --nproc-per-node"
            )
        device = torch.device("cuda", info.local_rank)
        torch.cuda.set_device(device)
        # in the store, where the next stage finds what this one has compiled; /tmp may go with the machine
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(get_base_dir() / "compiled"))
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(42)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a torchrun that is killed would leave us behind, with the GPU
        end_with_parent(signal.SIGKILL)
    if info.ddp and not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=30)  # the first step compiles; ranks may differ by minutes there
        try:
            dist.init_process_group(backend, timeout=timeout, device_id=device if kind == "cuda" else None)
        except (ValueError, dist.DistNetworkError, dist.DistStoreError) as error:  # of MASTER_ADDR and MASTER_PORT
            raise UserError(f"the ranks do not meet ({str(error).splitlines()[0]}): start with torchrun") from None
        barrier()
    return *info, device


def allow_variants() -> None:
    """Let torch compile one function for up to 64 combinations of shapes, dtypes and flags: it gives up after 8, for
    good. Seen: 15 of a block, with short and long windows, value embeddings, statistics and evaluation; 15 of
    update_rules.nesterov (hsdp on 3 nodes); some 20 of the 8-bit kernels."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


@functools.cache
def kernel(function: Any, on_gpu: bool) -> Any:
    """`function` compiled for GPUs, where a chain of small operations would read and write memory at each link; as it
    is on a CPU, where compiling would take longer than a small run."""
    if not on_gpu:
        return function
    allow_variants()
    return torch.compile(function, dynamic=False, fullgraph=True)


def barrier() -> None:
    """Wait for all ranks; nothing to wait for in a lone process."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank, by rank: a collective call. A lone process has its own only."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank, and so is its UserError: a collective call. For what ranks that
    look at a shared disk at different times might see differently."""
    if not dist.is_initialized():
        return action()
    answer: list[Any] = [None, None]  # the result, the user's mistake
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return cast(T, answer[0])


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def compute_cleanup() -> None:
    """Let go of folders; leave the process group, all ranks together: one whose peer is gone aborts in a collective."""
    let_go()
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies in it (compute capability >= 8.0), else fp32. `NANOCHAT_DTYPE` overrides."""
    names = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    requested = os.environ.get("NANOCHAT_DTYPE")
    if requested is not None:
        if requested not in names:
            raise UserError(f"NANOCHAT_DTYPE={requested}: expected one of {', '.join(names)}")
        return names[requested]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


@contextmanager
def out_of_memory_is_one_line(device: torch.device, advice: str) -> Iterator[None]:
    """Running out of memory is the user's to mend: turn the stack trace into a UserError that says how."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"{device} is out of memory: {advice}") from None


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a host clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_host(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start copying `values` to the host, on a GPU into pinned memory; what is returned waits for them."""
    copy = values.to("cpu", non_blocking=values.is_cuda)
    copied = torch.cuda.Event() if values.is_cuda else None
    if copied is not None:
        copied.record()

    def wait() -> torch.Tensor:
        if copied is not None:
            copied.synchronize()
        return copy

    return wait


class Stopped(BaseException):
    """A signal asked to stop within `interruptible`. No Exception: nothing is to take it for a failure of its own."""


class StopSignal:
    """Remembers signals so that the training loop can finish its step, save and leave; a second Ctrl-C ends at once.

    The handler only sets a flag (saving inside it could interrupt a half-done optimizer step), but within
    `interruptible` it raises Stopped. What this process was started to ignore (nohup) stays ignored.
    """

    installed: "StopSignal | None" = None  # the one that has the signals

    def __init__(self) -> None:
        self.received: str | None = None
        self._open = False  # within `interruptible`
        self._at = 0.0  # when the first signal came
        self._vote: Callable[[], torch.Tensor] | None = None  # of the last call: above 0 where any rank votes for it
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        others = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        numbers += [number for number in others if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        StopSignal.installed = self

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._at > 1:  # the first one may have come by several ways
            raise KeyboardInterrupt
        self.check()

    def check(self) -> None:
        """Raise Stopped within `interruptible`, after a signal."""
        if self._open and self.received is not None:
            raise Stopped

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        StopSignal.installed = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device, wish: bool = False) -> bool:
        """True where some rank was signalled, or wishes to stop; the same on every rank at the same call: the one after
        that happened, or the next.

        The ranks' votes are brought together while the next step is prepared, and read at the following call: reading
        them at once would make the host wait for the device at every step, and the device then for the host.
        """
        vote = wish or self.received is not None
        if not dist.is_initialized():
            return vote
        answer = torch.tensor(float(vote)).to(device, non_blocking=True)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        before, self._vote = self._vote, to_host(answer)
        return before is not None and before().item() > 0


@contextmanager
def interruptible() -> Iterator[None]:
    """Work that this rank does alone and that may be dropped, such as its part of an evaluation: a signal to stop
    raises Stopped in it, wherever it is, in torch.compile too, which takes minutes and looks at no flag."""
    stop = StopSignal.installed
    if stop is None:
        yield
        return
    try:
        stop._open = True
        stop.check()
        yield
    finally:
        stop._open = False
