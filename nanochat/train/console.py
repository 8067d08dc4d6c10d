"""What the training loop says: log lines and metrics, from tensors that are read late, and the final figures."""

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.hardware import device_name, memory_metrics, peak_flops, peak_memory_bytes, unlisted
from nanochat.runtime import get_dist_info, print0, synchronize
from nanochat.train.monitor import GRAD_NORM, Reading

if TYPE_CHECKING:  # the loop makes the console
    from nanochat.train.loop import TrainingRun

WARMUP_STEPS = 5  # left out of tokens/s and MFU: they compile, tune kernels and fill the allocator
SMOOTHING = 0.9  # of the printed loss

TRAIN_LOSS = "Loss/train_loss"  # mean cross-entropy of the targets of a step, nats
LR_MULTIPLIER = "Optimization/lr_multiplier"  # learning rates over their full ones
STEP_SECONDS = "Time/step_seconds"  # a step, evaluations and checkpoints left out, s
TOKENS_PER_SECOND = "Time/tokens_per_second"  # training tokens over all ranks, 1/s
MFU = "Hardware/mfu"  # FLOPs of the model over the dense bf16 peak of all devices


class StepResult(NamedTuple):
    """What a training step came to, unread."""

    loss: Tensor
    """Mean over all ranks, 0-D."""
    norm: Tensor
    """Of the gradient before clipping, 0-D."""
    multiplier: float
    """Of the learning rates."""
    reading: Reading | None
    """What the monitor saw, where it looked."""


class Console:
    """Turns the unread tensors of training steps into log lines and metrics, about once a second.

    Reading a value waits for the device; doing so at every step would leave it idle in between.
    """

    def __init__(self, run: "TrainingRun", device: torch.device) -> None:
        self.run, self.device = run, device
        self.world = get_dist_info().world_size
        self.flops_per_token = run.flops_per_token
        self.peak = peak_flops(device) if run.flops_per_token else None
        if self.peak is None and run.flops_per_token and device.type == "cuda":
            print0(f"no MFU: {unlisted('bf16 peak', [device_name(device)])}")
        self.pending: list[tuple[int, StepResult, dict[str, float]]] = []
        self.seen = 0
        self.clock = time.perf_counter()
        self.failure: str | None = None  # why training cannot go on

    def check(self) -> None:
        """Flush, on all ranks; they see the same values. Raises UserError when training cannot go on."""
        self.flush()
        if self.failure is not None:
            raise UserError(self.failure)

    def step(self, result: StepResult, synced: bool) -> None:
        self.pending.append((self.run.state.step, result, self.run.step_metrics()))
        if synced or self.seen < WARMUP_STEPS or time.perf_counter() - self.clock > 1.0:
            self.flush()

    def flush(self) -> None:
        """Read what has come up since the last time, record it, print the newest step."""
        if not self.pending:
            return
        synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        state, count = self.run.state, len(self.pending)
        seconds = elapsed / count
        state.seconds += elapsed
        if self.seen >= WARMUP_STEPS:
            state.steady_steps += count
            state.steady_seconds += elapsed
        self.seen += count
        rate = self.run.tokens_per_step / seconds
        memory = memory_metrics(self.device)
        read = torch.stack([torch.stack([result.loss, result.norm]) for _, result, _ in self.pending]).tolist()
        for (step, result, further), (loss, norm) in zip(self.pending, read, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                # A norm that is not finite has spoilt the weights, though the loss shows it only at the next step.
                name, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
                self.failure = (
                    f"the {name} is {value} at step {step}: lower --matrix-lr and --embedding-lr; the checkpoints "
                    "before this step stand"
                )
                break
            state.smoothed_loss = SMOOTHING * state.smoothed_loss + (1 - SMOOTHING) * loss
            metrics = {
                TRAIN_LOSS: loss,
                GRAD_NORM: norm,
                LR_MULTIPLIER: result.multiplier,
                STEP_SECONDS: seconds,
                TOKENS_PER_SECOND: rate,
                **memory,
                **further,
            }
            if self.peak:
                metrics[MFU] = self._mfu(rate)
            state.latest.update(metrics)
            if result.reading is not None:  # hundreds of figures, which checkpoints need not keep
                metrics.update(result.reading.read())
            self.run.tracker.log(step, step * self.run.tokens_per_step, metrics)
        self.pending.clear()
        if self.failure is None:
            self._print(step, seconds, rate, further)

    def restart(self) -> None:
        """Leave what has just been done (an evaluation, a checkpoint) out of the time of the next step."""
        if not self.pending:
            self.clock = time.perf_counter()

    def _mfu(self, tokens_per_second: float) -> float:
        assert self.peak is not None and self.flops_per_token is not None
        return self.flops_per_token * tokens_per_second / (self.peak * self.world)

    def _print(self, step: int, seconds: float, rate: float, further: dict[str, float]) -> None:
        state, total = self.run.state, self.run.num_iterations
        smoothed = state.smoothed_loss / (1 - SMOOTHING**step)
        pace = state.steady_seconds / state.steady_steps if state.steady_steps else seconds
        mfu = f" | mfu {100 * self._mfu(rate):.1f}%" if self.peak else ""
        also = "".join(f" | {name.split('/')[1]} {value:.4f}" for name, value in further.items())
        multiplier, norm = state.latest[LR_MULTIPLIER], state.latest[GRAD_NORM]
        print0(
            f"step {step:05d}/{total:05d} ({100 * step / total:.1f}%) | loss {smoothed:.4f}{also} | "
            f"lrm {multiplier:.2f} | norm {norm:.3f} | {1000 * seconds:,.1f} ms | {rate:,.0f} tok/s{mfu} | "
            f"epoch {self.run.loader.epoch():.2f} | "
            f"{state.seconds / 60:.1f} min, {pace * (total - step) / 60:.1f} left"
        )

    def summary(self) -> dict[str, float]:
        """Final figures. Tokens/s and MFU are means over the steady steps, whose number stands beside them."""
        state = self.run.state
        result: dict[str, float] = {"steps": state.step, "tokens": state.step * self.run.tokens_per_step}
        result.update(
            {f"final {name.split('/')[1]}": value for name, value in state.latest.items() if _is_result(name)}
        )
        result.update({f"minimum {name.split('/')[1]}": value for name, value in state.best.items()})
        result["training minutes"] = state.seconds / 60
        if self.flops_per_token:
            result["training FLOPs"] = self.flops_per_token * state.step * self.run.tokens_per_step
        result["peak memory GiB"] = peak_memory_bytes(self.device) / 2**30
        if state.steady_steps:
            rate = state.steady_steps * self.run.tokens_per_step / state.steady_seconds
            result["tokens per second"] = rate
            result["steps averaged"] = state.steady_steps
            if self.peak:
                result["mfu"] = self._mfu(rate)
                result["peak FLOP/s per device"] = self.peak
        return result


def _is_result(name: str) -> bool:
    return name.startswith(("Loss/", "Eval/"))
