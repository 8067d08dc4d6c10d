"""Is every host fit to train on? Measured in about a second before a run; slow ones are named.

    python -m nanochat.cluster.preflight                                     this machine
    torchrun --nproc-per-node=8 -m nanochat.cluster.preflight                all of its GPUs; several hosts likewise

It warns and does not stop a run. Only a disk that cannot be written is an error.
"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.flags import DeviceFlags


@cli.program
class Settings(DeviceFlags):
    """Measure every rank's matmuls, all-reduce, disk, memory and clock, and name what is slow."""


import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist

from nanochat import paths, runtime
from nanochat.errors import UserError
from nanochat.files import temporary_path
from nanochat.runtime import gather, print0, synchronize

REPEATS = 5  # the best counts: what disturbs a measurement only ever makes it slower
SLOW = 0.8  # of the median. Healthy cards of one model differ by some per cent; a throttled or shared one by far more
SLOW_DISK = 0.5  # of the median: the disks of equal hosts differ more, as their caches are in different states
SKEW_SECONDS = 1.0  # clocks beyond this spoil the order of log lines, and the ages of files on a shared disk
DISK_BYTES = 32 * 2**20
CLOCK_ROUNDS = 8


@dataclass(frozen=True)
class Measurement:
    """What one rank found."""

    rank: int
    host: str
    values: dict[str, float]  # by their names in COMPARED; what was not measured here is missing
    clock_seconds: float  # this clock minus that of rank 0
    clock_accuracy: float  # the true difference lies within ± this
    error: str = ""  # why the artifact store cannot be written


# name: (share of the median below which a rank is named, what to look at)
MATMUL, ALL_REDUCE, DISK, MEMORY = "matmul, TFLOP/s", "all-reduce, GB/s (bus)", "disk write, MB/s", "free memory, GiB"
COMPARED = {
    MATMUL: (SLOW, "power, temperature and other programs"),
    ALL_REDUCE: (0.0, ""),  # the ranks wait for each other: it names nobody
    DISK: (SLOW_DISK, "the disk under the artifact store"),
    MEMORY: (SLOW, "programs left over there"),
}


def check(device: torch.device, folder: Path) -> list[Measurement]:
    """Measure all ranks, print a table and warnings on rank 0. Collective; returns the same list, by rank, everywhere.

    `folder`: where disk speed is measured (created if missing). Raises UserError, on all ranks, when it cannot be
    written on some host.
    """
    hosts, (rank, _) = gather(socket.gethostname()), runtime.rank_and_world()
    values, error = {}, ""
    if hosts.index(hosts[rank]) == rank:
        try:
            values[DISK] = disk_mbytes(folder)
        except OSError as problem:
            error = problem.strerror or str(problem)
    values |= {MATMUL: matmul_tflops(device), MEMORY: free_gib(device)}
    if len(hosts) > 1:
        values[ALL_REDUCE] = all_reduce_gbytes(device)
    measurements = gather(Measurement(rank, hosts[rank], values, *clock_offset(device), error))
    if failed := next((m for m in measurements if m.error), None):
        raise UserError(
            f"rank {failed.rank} on {failed.host} cannot write to {folder}: {failed.error}; free or mount that disk "
            "there, or set NANOCHAT_BASE_DIR to one that all hosts can write to"
        )
    print0(table(measurements))
    for line in warnings(measurements):
        print0(f"warning: {line}")
    return measurements


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Shortest of REPEATS runs after one to warm up."""
    seconds = []
    for _ in range(1 + REPEATS):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s of square matmuls: bf16 of 8192 on a GPU (1.4 ms on an H100), fp32 of 512 elsewhere."""
    gpu = device.type == "cuda"
    size, times = (8192, 20) if gpu else (512, 4)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))

    def work() -> None:
        for _ in range(times):
            c = torch.mm(a, b)
        c[0, 0].item()  # waits, on every kind of device

    return times * 2 * size**3 / _best_seconds(work, device) / 1e12


def all_reduce_gbytes(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce over all n ranks, GB/s: 2 (n - 1)/n × bytes / seconds, which does not depend on n.
    256 MiB on GPUs, 4 MiB elsewhere."""
    world = dist.get_world_size()
    data = torch.zeros((256 if device.type == "cuda" else 4) * 2**20 // 4, device=device)
    seconds = _best_seconds(lambda: dist.all_reduce(data), device)
    return 2 * (world - 1) / world * data.nbytes / seconds / 1e9


def disk_mbytes(folder: Path) -> float:
    """MB/s of one file of DISK_BYTES written to `folder` and flushed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = temporary_path(folder / "preflight")
    data = os.urandom(2**20) * (DISK_BYTES // 2**20)
    begun = time.perf_counter()
    try:
        with open(path, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - begun) / 1e6
    finally:
        path.unlink(missing_ok=True)


def free_gib(device: torch.device) -> float:
    """Free memory of the GPU, or of the host, in GiB."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free / 2**30


def clock_offset(device: torch.device, clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """(this clock minus rank 0's in seconds, accuracy): the true offset lies within ± accuracy.

    Nobody leaves a barrier before everybody has entered it. So with the times of entry and exit, those of this rank in
    its own clock and those of rank 0 in rank 0's: entry - exit of rank 0 <= offset <= exit - entry of rank 0.
    """
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        runtime.barrier()  # so that all enter the next one at nearly the same time
        synchronize(device)
        entry = clock()
        runtime.barrier()
        synchronize(device)
        rounds.append((entry, clock()))
    first = gather(rounds)[0]
    if first == rounds:
        return 0.0, 0.0
    pairs = list(zip(rounds, first, strict=True))
    low, high = max(own[0] - other[1] for own, other in pairs), min(own[1] - other[0] for own, other in pairs)
    return (low + high) / 2, max(high - low, 0.0) / 2


def table(measurements: list[Measurement]) -> str:
    """Worst and median of each number, with the rank of the worst."""
    hosts = len({m.host for m in measurements})
    lines = [f"preflight: {len(measurements)} rank(s) on {hosts} host(s)"]
    for label in COMPARED:
        known, usual = _known(measurements, label)
        if known:
            value, rank, host = min(known)
            where = f"(rank {rank} on {host})" if len(known) > 1 else ""
            lines.append(f"  {label:24} worst {value:9.2f}  median {usual:9.2f}  {where}".rstrip())
    if len(measurements) > 1:
        worst = max(measurements, key=lambda m: abs(m.clock_seconds))
        lines.append(
            f"  {'clock against rank 0, s':24} worst {worst.clock_seconds:+9.4f}  known within "
            f"±{max(m.clock_accuracy for m in measurements):.4f}  (rank {worst.rank} on {worst.host})"
        )
    return "\n".join(lines)


def warnings(measurements: list[Measurement]) -> list[str]:
    """One line for each rank that is slow in something, or whose clock is off."""
    lines = []
    for label, (share, look) in COMPARED.items():
        known, usual = _known(measurements, label)
        lines += [
            f"rank {rank} on {host}: {label} {value:.2f}, {100 * value / usual:.0f} % of the median {usual:.2f}; "
            f"look at {look}, or leave that host out"
            for value, rank, host in known
            if value < share * usual
        ]
    usual = median(m.clock_seconds for m in measurements)  # it may be rank 0 whose clock is off
    return lines + [
        f"rank {m.rank} on {m.host}: its clock is {m.clock_seconds - usual:+.2f} s from the median of all "
        f"(±{m.clock_accuracy:.2f}); start time synchronisation there"
        for m in measurements
        if abs(m.clock_seconds - usual) > SKEW_SECONDS + m.clock_accuracy
    ]


def _known(measurements: list[Measurement], label: str) -> tuple[list[tuple[float, int, str]], float]:
    """(value, rank, host) of the ranks that measured this, and the median; 0 where none did."""
    known = [(m.values[label], m.rank, m.host) for m in measurements if label in m.values]
    return known, median(value for value, *_ in known) if known else 0.0


def main(settings: Settings) -> None:
    check(runtime.compute_init(settings.device_type)[-1], paths.get_base_dir())
    runtime.compute_cleanup()


if __name__ == "__main__":
    cli.run(main, Settings)
