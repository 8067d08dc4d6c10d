"""Speed and memory of the training step on random tokens (no data loading), on one GPU or under any strategy on many.

    python -m benchmarks.train_speed --depth=12 --vocab-size=32768 --out=speed.json
    python -m benchmarks.train_speed --depth=12 --arch=speedrun --vocab-size=50304 --max-seq-len=49152 --fp8=head \
        --device-batch-size=1 --total-batch-size=393216        the record's step on one GPU
    python -m nanochat.launch -- -m benchmarks.train_speed --depth=26 --parallel=fsdp --total-batch-size=524288

One step = forward and backward of all micro-batches, and the optimizer. Medians; the first steps, which compile, are
left out. MFU counts attention too; matmul_mfu leaves it out, as what is published of the speedrun does.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.nn.attention import SDPBackend

from benchmarks.measure import about
from benchmarks.output import Output, write_json
from nanochat import attention, cli, parallel
from nanochat.cli import int_flag
from nanochat.config import ArchFlags, build_config, resolve
from nanochat.errors import UserError
from nanochat.fp8 import Fp8, apply_fp8
from nanochat.gpt import GPT
from nanochat.hardware import peak_flops, peak_memory_bytes
from nanochat.parallel import Parallel
from nanochat.runtime import compute_cleanup, compute_dtype, compute_init, print0

WARM_UP = 3
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DOCUMENT_TOKENS = 690  # between starts of documents: the mean of FineWeb's


@dataclass(frozen=True, kw_only=True)
class Settings(Output, ArchFlags):
    """Measure the training step."""

    device_batch_size: Annotated[int, int_flag(gte=1)] = 32
    """Rows per forward pass."""
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
    steps: Annotated[int, int_flag(gte=1)] = 10
    """Timed steps."""
    profile: bool = False
    """Print the kernels that take the time, too."""
    save_to: Path | None = None
    """Folder for a checkpoint; measures what saving costs the steps that go on meanwhile."""


class Step:
    """A compiled model and its optimizer on the same tokens (B, T) again and again."""

    def __init__(self, settings: Settings, world: int, device: torch.device) -> None:
        flags = resolve(settings)
        with torch.device("meta"):
            model = GPT(build_config(flags, settings.vocab_size, document_token=0), compute_dtype(device))
        self.policy = parallel.parallelize_model(model, settings.parallel, device)
        model.to_empty(device=device)
        model.init_weights()
        apply_fp8(model, settings.fp8)
        self.forward = parallel.compile_model(model, self.policy)
        self.optimizer = model.setup_optimizer(use_muon=settings.use_muon)
        self.max_norm = flags.grad_clip or None
        self.model, self.world, rows, length = model, world, settings.device_batch_size, settings.max_seq_len
        idx = torch.randint(1, settings.vocab_size, (rows, length + 1), device=device)
        idx[:, ::DOCUMENT_TOKENS] = 0
        self.inputs, self.targets = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
        self.tokens = settings.total_batch_size or rows * length * world
        self.micro_batches, rest = divmod(self.tokens, rows * length * world)
        if rest or not self.micro_batches:
            raise UserError(
                f"--total-batch-size={self.tokens}: no multiple of {world} x {rows} rows of {length} tokens"
            )

    def __call__(self) -> tuple[float, float]:
        """One step; (seconds, those of the optimizer) on this rank."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(self.micro_batches):
            parallel.before_micro_batch(self.model, self.policy, last=index == self.micro_batches - 1)
            loss = self.forward(self.inputs, self.targets, loss_reduction="sum")
            (loss * (self.world / self.tokens)).backward()
        torch.cuda.synchronize()  # so that the optimizer is timed alone; costs a step far less than a percent
        middle = time.perf_counter()
        self.optimizer.step(max_norm=self.max_norm, loss=loss.detach())
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        end = time.perf_counter()
        return end - start, end - middle


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


def main(settings: Settings) -> None:
    _, rank, _, world, device = compute_init("cuda")
    if settings.kernel != "auto":
        first = KERNELS[settings.kernel]
        attention.GPU_KERNELS = [first, *(kernel for kernel in attention.GPU_KERNELS if kernel is not first)]
    step = Step(settings, world, device)
    started = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    warm_up = time.perf_counter() - started
    times = [step() for _ in range(settings.steps)]
    if settings.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
        print0(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70))
    model, seconds = step.model, statistics.median(total for total, _ in times)
    rate, peak = step.tokens / seconds, peak_flops(device)
    result = about(settings, device, without=("out", "save_to")) | {
        "ranks": world,
        "strategy": step.policy.strategy,
        "parameters": model.num_params(),
        "milliseconds": 1000 * seconds,
        "milliseconds_per_batch": 1000 * seconds / step.micro_batches,
        "optimizer_milliseconds": 1000 * statistics.median(optimizer for _, optimizer in times),
        "tokens_per_second": rate,
        "mfu": model.estimate_flops() * rate / (peak * world) if peak else None,
        "matmul_mfu": model.estimate_flops(row_len=0) * rate / (peak * world) if peak else None,
        "peak_gib": peak_memory_bytes(device) / 2**30,
        "warm_up_seconds": warm_up,
    }
    if settings.save_to:
        result["saving"] = saving(step, settings.save_to)
    for name, value in result.items():
        if name != "settings":
            print0(f"{name:<24}{value}")
    if rank == 0:
        write_json(settings, result)
    compute_cleanup()


if __name__ == "__main__":
    cli.run(main, Settings)
