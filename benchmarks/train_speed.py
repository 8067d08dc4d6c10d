"""Speed and memory of the training step on random tokens (no data loading), on one GPU or under any strategy on many.

    python -m benchmarks.train_speed --depth=20 --vocab-size=32768 --profile       one step: where its time goes, too
    python -m benchmarks.train_speed --suite --peer=DIR --out=speed.json           a table; beside it another program
    python -m benchmarks.train_speed --depth=12 --arch=speedrun --vocab-size=50304 --max-seq-len=49152 --fp8=head \
        --device-batch-size=1 --total-batch-size=393216        the record's step on one GPU
    python -m nanochat.launch -- -m benchmarks.train_speed --depth=26 --parallel=fsdp --total-batch-size=524288

A step is one of nanochat.train.loop. Medians of steps that the host waits for, one by one, as in peer_speed.py; beside
them the speed of as many steps in a row, as training makes them. The first steps, which compile, are left out. MFU
counts attention too; matmul_mfu leaves it out, as what is published of the speedrun does.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.nn.attention import SDPBackend

from benchmarks.measure import about
from benchmarks.output import Output, write_json
from nanochat import attention, cli
from nanochat.cli import int_flag
from nanochat.config import ArchFlags, build_config, resolve
from nanochat.errors import UserError
from nanochat.hardware import peak_flops, peak_memory_bytes
from nanochat.kernels.fp8 import Fp8, apply_fp8
from nanochat.parallel import Parallel
from nanochat.runtime import compute_cleanup, compute_init, get_dist_info, print0
from nanochat.studies.short_run import ResidentLoader, build_model, short_run
from nanochat.train.loop import train_step
from nanochat.train.memory import Batch, choose_rows
from nanochat.train.observer import Observer

WARM_UP = 3
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DOCUMENT_TOKENS = 690  # between starts of documents: the mean of FineWeb's

# The suite: one process each, at a device batch of 32 rows of 2,048 tokens if nothing else is said.
SUITE = (
    "--depth=12",
    "--depth=12 --fp8=all",
    "--depth=12 --arch=speedrun",
    "--depth=12 --arch=ngram",
    "--depth=20",
    "--depth=20 --fp8=all",
    "--depth=20 --arch=ngram",
    "--depth=26 --device-batch-size=16",
    "--depth=26 --device-batch-size=16 --fp8=all",
)
PEER_DEPTHS = (12, 20)

# What kernels are for, by a part of their names; the first that fits counts, the rest is pointwise.
CLASSES = {
    "attention": ("sdpa", "flash", "fmha", "flex_attention", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "_scaled_mm", "_product"),
    "norms and sums": ("triton_per", "triton_red", "reduce"),
    "pointwise": ("triton_poi",),
    "copies": ("memcpy", "memset", "copy"),
}
# What an H100 reaches: long products of 8,192 on random data, attention of the best public kernels; the floor of both.
PRODUCT_SHARE, ATTENTION_SHARE = 0.77, 0.60  # of the peak


@cli.program
class Settings(Output, ArchFlags):
    """Measure the training step."""

    device_batch_size: Annotated[int, int_flag(gte=0)] = 32
    """Rows per forward pass; 0: as many as fit by the estimate, as in base_train."""
    total_batch_size: Annotated[int, int_flag(gte=0)] = 0
    """Tokens per step over all ranks; 0: one forward pass on each."""
    vocab_size: Annotated[int, int_flag(gte=1)] = 65_536
    """Vocabulary."""
    kernel: Literal["auto", "cudnn", "flash"] = "auto"
    """Attention kernel of --arch=nanochat that is tried first."""
    fp8: Fp8 = "none"
    """none, head or all, as in base_train."""
    parallel: Parallel = "auto"
    """auto, ddp, fsdp or hsdp."""
    node_size: Annotated[int, int_flag(gte=0)] = 0
    """GPUs that hsdp takes for a node, so that one host can stand for several; 0: those of the host."""
    steps: Annotated[int, int_flag(gte=1)] = 10
    """Timed steps."""
    profile: bool = False
    """Say which kernels take the time, too."""
    save_to: Path | None = None
    """Folder for a checkpoint; measures what saving costs the steps that go on meanwhile."""
    suite: bool = False
    """Measure the configurations of SUITE one after the other, each twice in processes of its own: with a cold cache of
    compiled kernels, and with the one that this left. Other flags count for all."""
    peer: Path | None = None
    """With --suite: checkout of another program of this family, to be measured beside it."""
    only: str = ""
    """With --suite: a regular expression; configurations that it is found in, such as 'depth=20$|peer.*=20'."""


class Phases(Observer):
    """Notes on the device's own clock where a step has come to; with a profiler, which kernels ran before and in the
    update."""

    def __init__(self) -> None:
        self.update: Any = None
        self.at_update = lambda: None

    def mark(self, step: int, phase: str) -> None:
        if phase == "update":
            self.update = torch.cuda.Event(enable_timing=True)
            self.update.record()
            self.at_update()


class Step:
    """Training steps on random tokens."""

    def __init__(self, settings: Settings, world: int, device: torch.device) -> None:
        flags = resolve(settings)
        config = build_config(flags, settings.vocab_size, document_token=0)
        if settings.node_size:
            os.environ["LOCAL_WORLD_SIZE"] = str(settings.node_size)
        self.model, forward, self.policy = build_model(config, device, settings.parallel)
        self.model.init_weights()
        apply_fp8(self.model, settings.fp8)
        rows, length = settings.device_batch_size, settings.max_seq_len
        if not rows:
            of_rank = (settings.total_batch_size or 2**30) // (length * world)
            batch = Batch(of_rank, length, settings.use_muon)
            rows = min(of_rank, choose_rows(self.model, self.policy, device, batch))
        self.rows = rows
        self.tokens = settings.total_batch_size or rows * length * world
        self.micro_batches, rest = divmod(self.tokens, rows * length * world)
        if rest or not self.micro_batches:
            raise UserError(
                f"--total-batch-size={self.tokens}: no multiple of {world} x {rows} rows of {length} tokens"
            )
        idx = torch.randint(1, settings.vocab_size, (rows * self.micro_batches, length + 1), device=device)
        idx[:, ::DOCUMENT_TOKENS] = 0
        self.phases, self.optimizer = Phases(), self.model.setup_optimizer(use_muon=settings.use_muon)
        loader, constant = ResidentLoader(idx.int(), len(idx), rows), lambda step: (1.0, 0.95)
        extra = {"grad_clip": flags.grad_clip or 0.0, "policy": self.policy, "observer": self.phases}
        self.run = short_run(self.model, forward, self.optimizer, loader, 1, self.tokens, constant, **extra)

    def __call__(self) -> tuple[float, float]:
        """One step; (seconds, those of the optimizer) on this rank."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        train_step(self.run)
        end.record()
        torch.cuda.synchronize()
        return time.perf_counter() - start, self.phases.update.elapsed_time(end) / 1000

    def in_a_row(self, steps: int) -> float:
        """Seconds a step where the host waits for the last only."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            train_step(self.run)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    def profile(self) -> dict[str, dict[str, float]]:
        """Milliseconds of one step by kernel, of forward and backward and of the update."""
        before, after = (torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) for _ in range(2))

        def switch() -> None:
            before.stop()
            after.start()

        self.phases.at_update = switch
        torch.cuda.synchronize()
        before.start()
        self()
        after.stop()
        self.phases.at_update = lambda: None
        return {"forward and backward": kernel_times(before), "update": kernel_times(after)}


def kernel_times(profiler: Any) -> dict[str, float]:
    """Name -> milliseconds, longest first."""
    times = {event.key: event.self_device_time_total / 1000 for event in profiler.key_averages()}
    return dict(sorted(((k, t) for k, t in times.items() if t > 0), key=lambda item: -item[1]))


def by_class(times: dict[str, float]) -> dict[str, float]:
    """Milliseconds by CLASSES."""
    found: dict[str, float] = {}
    for name, time_ in times.items():
        kind = next((kind for kind, parts in CLASSES.items() if any(p in name.lower() for p in parts)), "pointwise")
        found[kind] = found.get(kind, 0.0) + time_
    return found


def floors(step: Step, peak: float) -> dict[str, float]:
    """Milliseconds that products and attention of the forward and backward passes need at least, a micro-batch's causal
    half only."""
    products = step.model.estimate_flops(row_len=0) * step.tokens
    attention_flops = (step.model.estimate_flops() - step.model.estimate_flops(row_len=0)) * step.tokens / 2
    return {
        "products": 1000 * products / (PRODUCT_SHARE * peak),
        "attention": 1000 * attention_flops / (ATTENTION_SHARE * peak),
    }


def print_profile(profile: dict[str, dict[str, float]], floor: dict[str, float]) -> None:
    for part, times in profile.items():
        print0(f"{part}: {sum(times.values()):.1f} ms of kernels")
        for kind, spent in sorted(by_class(times).items(), key=lambda item: -item[1]):
            least = f", floor {floor[kind]:.1f}" if part != "update" and kind in floor else ""
            print0(f"  {kind:<16}{spent:8.1f} ms{least}")
        for name, spent in list(times.items())[:15]:
            print0(f"    {spent:8.2f} ms  {name[:110]}")


def saving(step: Step, folder: Path) -> dict[str, Any]:
    """What one asynchronous checkpoint costs: seconds that the loop is held up, the steps until it is on disk, and how
    long that takes."""
    from nanochat.saver import Saver

    started = time.perf_counter()
    saver = Saver(folder, step.model, step.optimizer)
    prepared = time.perf_counter() - started
    held = saver.save(1, {})
    started, times = time.perf_counter(), [step()[0]]
    while saver.thread is not None and saver.thread.is_alive() and len(times) < 20:
        times.append(step()[0])
    saver.wait()
    result = {
        "gigabytes": saver.total_bytes / 1e9,
        "preparing_seconds": prepared,
        "held_seconds": held,
        "step_milliseconds_meanwhile": [round(1000 * seconds, 1) for seconds in times],
        "background_seconds": time.perf_counter() - started,
    }
    saver.close()
    return result


def measure(settings: Settings, world: int, device: torch.device) -> None:
    """One configuration, on the ranks that torchrun started."""
    if settings.kernel != "auto":
        first = KERNELS[settings.kernel]
        attention.GPU_KERNELS = [first, *(kernel for kernel in attention.GPU_KERNELS if kernel is not first)]
    started = time.perf_counter()
    step = Step(settings, world, device)
    step()
    first_step = time.perf_counter() - started
    for _ in range(WARM_UP - 1):
        step()
    warm_up = time.perf_counter() - started
    times = [step() for _ in range(settings.steps)]
    model, seconds = step.model, statistics.median(total for total, _ in times)
    rate, peak = step.tokens / seconds, peak_flops(device)
    result = about(settings, device, without=("out", "save_to", "suite", "peer", "only")) | {
        "ranks": world,
        "device_batch_size": step.rows,
        "strategy": step.policy.strategy,
        "parameters": model.num_params(),
        "milliseconds": 1000 * seconds,
        "milliseconds_per_batch": 1000 * seconds / step.micro_batches,
        "optimizer_milliseconds": 1000 * statistics.median(optimizer for _, optimizer in times),
        "tokens_per_second": rate,
        "tokens_per_second_in_a_row": step.tokens / step.in_a_row(settings.steps),
        "mfu": model.estimate_flops() * rate / (peak * world) if peak else None,
        "matmul_mfu": model.estimate_flops(row_len=0) * rate / (peak * world) if peak else None,
        "peak_gib": peak_memory_bytes(device) / 2**30,
        "first_step_seconds": first_step,
        "warm_up_seconds": warm_up,
    }
    if settings.save_to:
        result["saving"] = saving(step, settings.save_to)
    for name, value in result.items():
        if name != "settings":
            print0(f"{name:<24}{value}")
    if settings.profile:
        profile, floor = step.profile(), floors(step, peak or float("inf"))
        print_profile(profile, floor)
        result |= {"kernel_milliseconds": {part: by_class(times) for part, times in profile.items()}, "floor": floor}
        result["kernels"] = profile
    if get_dist_info().rank == 0:
        write_json(settings, result)


# ---- many configurations


def measure_suite(settings: Settings) -> None:
    """SUITE, and the peer; a table, and all of it as JSON."""
    common = ["-m", "benchmarks.train_speed", f"--vocab-size={settings.vocab_size}", f"--steps={settings.steps}"]
    runs = {line: [*common, *shlex.split(line)] for line in SUITE}
    if settings.peer is not None:
        peer = [str(Path(__file__).with_name("peer_speed.py")), str(settings.peer)]
        runs |= {f"--peer --depth={depth}": [*peer, str(depth), str(settings.vocab_size)] for depth in PEER_DEPTHS}
    print(f"{'':<42}{'tok/s':>9} {'MFU':>6} {'GiB':>6} {'first step':>11} {'again':>6}")
    results = []
    for name, words in runs.items():
        if not re.search(settings.only, name):
            continue
        result = twice(words)
        results.append(result)
        if "error" in result:
            print(f"{name:<42}{result['error']}", flush=True)
            continue
        numbers = f"{result['tokens_per_second']:9,.0f} {result['mfu'] or 0:6.1%} {result['peak_gib']:6.1f}"
        seconds = f"{result['first_step_seconds']:9.1f} s {result['second_start_seconds']:4.1f} s"
        print(f"{name:<42}{numbers} {seconds}", flush=True)
    write_json(settings, {"runs": results})


def twice(words: list[str]) -> dict[str, Any]:
    """What a program says of itself in --out, started with an empty cache of compiled kernels, and again with that."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        caches = {f"{name}_CACHE_DIR": f"{folder}/{name}" for name in ("TORCHINDUCTOR", "TRITON")}
        found = []
        for _ in range(2):
            program = [sys.executable, *words, f"--out={out}"]
            done = subprocess.run(program, env={**os.environ, **caches}, capture_output=True, text=True)
            if done.returncode:
                return {"program": words, "error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
            found.append(json.loads(out.read_text()))
    return {"program": words, **found[0], "second_start_seconds": found[1]["first_step_seconds"]}


def main(settings: Settings) -> None:
    for flag, value in (("peer", settings.peer), ("only", settings.only)):
        if value and not settings.suite:
            raise UserError(f"--{flag}={value} is for --suite: give that, too")
    try:
        re.compile(settings.only)
    except re.error as error:
        raise UserError(f"--only={settings.only}: no regular expression ({error})") from None
    if settings.suite:
        return measure_suite(settings)
    _, _, _, world, device = compute_init("cuda")
    measure(settings, world, device)
    compute_cleanup()


if __name__ == "__main__":
    cli.run(main, Settings)
