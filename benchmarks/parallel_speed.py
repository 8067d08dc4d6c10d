"""Speed and memory of the training step under each strategy, on random tokens (no data loading).

    torchrun --standalone --nproc_per_node=2 -m benchmarks.parallel_speed --depth=20 --parallel=fsdp --out=speed.json

One step = all micro-batches of --total-batch-size and the optimizer. Medians; the first steps, which compile, are left
out.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from benchmarks.measure import Step, about, speed
from benchmarks.output import Output, write_json
from nanochat import cli, parallel
from nanochat.cli import int_flag
from nanochat.config import build_config, resolve
from nanochat.gpt import GPT
from nanochat.parallel import Parallel
from nanochat.runtime import compute_cleanup, compute_dtype, compute_init, print0, ranks_per_node
from scripts.base_train import Settings as TrainSettings

WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
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
    parallel.shard_model(model, parallel.make_mesh(policy, "cuda", node), policy)
    model.to_empty(device=device)
    model.init_weights()
    rows, length = settings.device_batch_size, settings.max_seq_len
    inputs, targets = torch.randint(settings.vocab_size, (2, rows, length), device=device)
    optimizer = model.setup_optimizer(use_muon=settings.use_muon)
    step = Step(model, policy, optimizer, inputs, targets, settings.total_batch_size // (rows * length * world), world)
    result = about(settings, device, without=("out", "save_to"))
    result |= {"ranks": world, "strategy": policy.strategy, "parameters": model.num_params()}
    result |= speed(step, WARM_UP, settings.steps, settings.profile)
    if settings.save_to:
        result["saving"] = saving(step, settings.save_to)
    for name, value in result.items():
        print0(f"{name:<24}{value}")
    if rank == 0:
        write_json(settings, result)
    compute_cleanup()


if __name__ == "__main__":
    cli.run(main, Settings)
