"""Speed and memory of the training step under each strategy, on random tokens (no data loading).

    torchrun --standalone --nproc_per_node=2 -m benchmarks.parallel_speed --depth=20 --parallel=fsdp --out=speed.jsonl

One step = all micro-batches of --total-batch-size and the optimizer. Medians; the first steps, which compile, are left
out. Prints one JSON line, and appends it to --out.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from nanochat import cli, parallel
from nanochat.cli import int_flag
from nanochat.config import build_config, resolve
from nanochat.gpt import GPT
from nanochat.hardware import device_name, peak_flops, peak_memory_bytes
from nanochat.optim import MuonAdamW
from nanochat.parallel import Parallel, Policy
from nanochat.runtime import compute_cleanup, compute_dtype, compute_init, print0, ranks_per_node
from scripts.base_train import Settings as TrainSettings

WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the training step."""

    depth: Annotated[int, int_flag(gte=1)] = 20
    """Layers of the model."""
    parallel: Parallel = "auto"
    """auto, ddp, fsdp or hsdp."""
    node_size: Annotated[int | None, int_flag(gte=1)] = None
    """Ranks that hsdp counts as one node; default: as many as there are."""
    use_muon: bool = True
    """False: AdamW everywhere."""
    device_batch_size: Annotated[int, int_flag(gte=1)] = 16
    """Rows per forward pass."""
    total_batch_size: Annotated[int, int_flag(gte=1)] = 524_288
    """Tokens per step over all ranks."""
    max_seq_len: Annotated[int, int_flag(gte=1)] = 2048
    """Tokens per row."""
    vocab_size: Annotated[int, int_flag(gte=1)] = 65_536
    """Vocabulary."""
    steps: Annotated[int, int_flag(gte=1)] = 5
    """Timed steps."""
    save_to: Path | None = None
    """Folder for a checkpoint; measures what saving costs the steps that go on meanwhile."""
    profile: bool = False
    """Print the kernels that take the time, too."""
    out: str | None = None
    """File that the result is appended to."""


class Step:
    """A model and its optimizer on random tokens; called, it makes one step and returns (seconds, optimizer's seconds)
    of this rank."""

    def __init__(self, model: GPT, policy: Policy, settings: Settings, world: int, device: torch.device) -> None:
        self.model, self.policy, self.world = model, policy, world
        self.forward = parallel.compile_model(model, policy)
        self.optimizer: MuonAdamW = model.setup_optimizer(use_muon=settings.use_muon)
        self.micro_batches = settings.total_batch_size // (settings.device_batch_size * settings.max_seq_len * world)
        shape = settings.device_batch_size, settings.max_seq_len
        self.inputs, self.targets = torch.randint(settings.vocab_size, (2, *shape), device=device)
        self.tokens = settings.total_batch_size

    def __call__(self) -> tuple[float, float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(self.micro_batches):
            parallel.before_micro_batch(self.model, self.policy, last=index == self.micro_batches - 1)
            loss = self.forward(self.inputs, self.targets, loss_reduction="sum")
            (loss * (self.world / self.tokens)).backward()
        torch.cuda.synchronize()  # so that the optimizer is timed alone; costs a step far less than a percent
        middle = time.perf_counter()
        self.optimizer.step(max_norm=1.0)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        end = time.perf_counter()
        return end - start, end - middle


def saving(step: Step, folder: Path) -> dict[str, Any]:
    """What one asynchronous checkpoint costs: seconds that the loop is held up, the slowest step until it is on disk,
    and how long that takes."""
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


def main(settings: Settings) -> None:
    _, rank, _, world, device = compute_init("cuda")
    with torch.device("meta"):
        train = TrainSettings(depth=settings.depth, max_seq_len=settings.max_seq_len)
        model = GPT(build_config(resolve(train), settings.vocab_size), compute_dtype(device))
    node = settings.node_size or ranks_per_node()
    policy, why = parallel.make_policy(settings.parallel, model.num_params(), model.compute_dtype, world, node)
    print0(f"{policy} ({why})")
    parallel.parallelize(model, parallel.make_mesh(policy, "cuda", node), policy)
    model.to_empty(device=device)
    model.init_weights()
    step = Step(model, policy, settings, world, device)
    started = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    warm_up = time.perf_counter() - started
    times = [step() for _ in range(settings.steps)]
    if settings.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
        print0(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70))
    seconds = statistics.median(total for total, _ in times)
    result: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "ranks": world,
        "strategy": policy.strategy,
        "parameters": model.num_params(),
        "settings": cli.as_dict(settings, without=["out", "save_to"]),
        "milliseconds": 1000 * seconds,
        "optimizer_milliseconds": 1000 * statistics.median(optimizer for _, optimizer in times),
        "tokens_per_second": settings.total_batch_size / seconds,
        "peak_gib": peak_memory_bytes(device) / 2**30,
        "warm_up_seconds": warm_up,
    }
    if settings.save_to:
        result["saving"] = saving(step, settings.save_to)
    peak = peak_flops(device)
    if peak:
        result["mfu"] = model.estimate_flops() * result["tokens_per_second"] / (peak * world)
    print0(json.dumps(result))
    if settings.out and rank == 0:
        with Path(settings.out).open("a") as stream:
            stream.write(json.dumps(result) + "\n")
    compute_cleanup()


if __name__ == "__main__":
    cli.run(main, Settings)
