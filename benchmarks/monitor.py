"""What the instruments of nanochat.train.monitor cost, and how exact spectral norms are, on random tokens and weights.

    python -m benchmarks.monitor --out=monitor.json                                            the 124M-class model
    python -m benchmarks.monitor --depth=2 --width=128 --vocab-size=512 --max-seq-len=64       a small one, on a CPU

Times are medians, on a GPU by its own clock and behind other work (see benchmarks.measure). The cost of an event in
training is the difference between a step with it and the step without beside it, either of them first. BARS hold for an
H100.
"""

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from benchmarks.measure import about, milliseconds
from benchmarks.output import Output, write_json
from nanochat import cli
from nanochat.cli import int_flag
from nanochat.cluster.stragglers import marks
from nanochat.flags import DeviceFlags
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.runtime import compute_dtype, compute_init
from nanochat.studies.short_run import ResidentLoader, short_run
from nanochat.train.loop import train_step
from nanochat.train.monitor import Monitor, MonitorSettings
from nanochat.train.observer import Observer
from nanochat.train.spectral import TINY, spectral_norms, stacks

BARS = {"microseconds_per_matrix": 50.0, "spectral_ms": 2.0, "activations_ms": 1.0, "overhead_at_10": 0.005,
        "worst_error": 0.0025}  # fmt: skip
INTERVALS = (1, 10, 100)


@cli.program
class Settings(Output, DeviceFlags):
    """Measure the monitor."""

    depth: Annotated[int, int_flag(gte=1)] = 12
    """Layers of the model."""
    width: Annotated[int, int_flag(gte=64)] = 768
    """Width of the model, a multiple of 64."""
    vocab_size: Annotated[int, int_flag(gte=1)] = 50304
    """Vocabulary."""
    max_seq_len: Annotated[int, int_flag(gte=1)] = 2048
    """Tokens per row."""
    device_batch_size: Annotated[int, int_flag(gte=1)] = 24
    """Rows per forward pass."""
    accumulation: Annotated[int, int_flag(gte=1)] = 1
    """Forward passes per step: 1 x 24 x 2048 tokens is what one of eight GPUs does."""
    repeats: Annotated[int, int_flag(gte=1)] = 20
    """Timed calls of each."""
    seeds: Annotated[int, int_flag(gte=1)] = 3
    """Matrices of each spectrum and shape."""
    compile: bool | None = None
    """torch.compile; default: on CUDA only."""


def with_spectrum(shape: tuple[int, int], values: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(side, len(values), device=values.device))[0] for side in shape)
    return (left * values) @ right.T


def spectra(shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """One matrix of each kind."""
    rank = min(shape)
    index = torch.arange(1.0, rank + 1, device=device)
    gaussian = torch.randn(shape, device=device)
    top = torch.linalg.svdvals(gaussian)[0]
    return {
        "gaussian": gaussian,
        "power law i^-0.3": with_spectrum(shape, index**-0.3),
        "power law i^-0.7": with_spectrum(shape, index**-0.7),
        "flat within 20 %": with_spectrum(shape, 0.8 + 0.4 * torch.rand(rank, device=device)),
        "all equal": with_spectrum(shape, torch.ones(rank, device=device)),
        "gaussian + 1.3 x spike": gaussian + 1.3 * top * with_spectrum(shape, torch.ones(1, device=device)),
    }


def polar_norms(
    matrices: list[Tensor], steps: int, coefficients: tuple[float, float, float], iterations: int
) -> tuple[Tensor, Tensor]:
    """Estimates without bounds, twice: power iteration with WQᵀ, where Q is what Newton-Schulz steps make of W. Were Q
    its polar factor, the eigenvalues would be the singular values of W; but it is not after so few steps, and even an
    exact one would halve the rate of the power iteration (docs/decisions.md has the errors)."""
    values = torch.zeros(len(matrices), device=matrices[0].device)
    a, b, c = coefficients
    for indices, stacked in stacks(matrices):
        W = (stacked if stacked.size(1) <= stacked.size(2) else stacked.mT).bfloat16()
        Q = W / torch.linalg.matrix_norm(W.float(), keepdim=True).clamp(min=TINY).bfloat16()
        for _ in range(steps):
            A = Q @ Q.mT
            Q = a * Q + (b * A + c * (A @ A)) @ Q
        y = torch.randn((1, W.size(1), 1), generator=torch.Generator(W.device).manual_seed(0), device=W.device)
        for _ in range(iterations):
            x = (y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=TINY)).bfloat16()
            y = (W @ (Q.mT @ x)).float()
        values[indices] = torch.linalg.matrix_norm(y) / torch.linalg.matrix_norm(x.float()).clamp(min=TINY)
    return values, values


METHODS: dict[str, Callable[[list[Tensor]], tuple[Tensor, Tensor]]] = {
    "gram": spectral_norms,
    "ns5-fast": partial(polar_norms, steps=5, coefficients=(3.4445, -4.775, 2.0315), iterations=7),
    "ns3-accurate": partial(polar_norms, steps=8, coefficients=(1.5, -0.5, 0.0), iterations=10),
}


def errors(shapes: list[tuple[int, int]], seeds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Worst signed relative error of the value by kind and method, and of the bounds, against fp64 SVD."""
    table: dict[str, dict[str, float]] = {}
    for shape in shapes:
        drawn = [spectra(shape, device) for _ in range(seeds)]
        for kind in drawn[0]:
            matrices = [one[kind] for one in drawn]
            true = torch.stack([torch.linalg.svdvals(matrix.double())[0] for matrix in matrices])
            row = table.setdefault(f"{kind}, {shape[0]}x{shape[1]}", {})
            for method, norms in METHODS.items():
                lower, upper = (bound / true - 1 for bound in norms(matrices))
                row[method] = lower[lower.abs().argmax()].item()
                if method == "gram":
                    row["highest lower bound"], row["lowest upper bound"] = lower.max().item(), upper.min().item()
                    row["highest upper bound"] = upper.max().item()
    return table


def spectral_times(matrices: list[Tensor], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds for all matrices, microseconds for each; svdvals by one matrix of each shape."""
    times = {method: milliseconds(partial(norms, matrices), device, repeats) for method, norms in METHODS.items()}
    rows = {name: {"milliseconds": ms, "microseconds_per_matrix": 1000 * ms / len(matrices), "host_milliseconds": host}
            for name, (ms, host) in times.items()}  # fmt: skip
    by_shape = {matrix.shape: matrix for matrix in matrices}
    one = {shape: milliseconds(partial(torch.linalg.svdvals, matrix), device, 2, queued=1).device
           for shape, matrix in by_shape.items()}  # fmt: skip
    ms = sum(one[matrix.shape] for matrix in matrices)
    return rows | {"svdvals": {"milliseconds": ms, "microseconds_per_matrix": 1000 * ms / len(matrices)}}


def step_times(settings: Settings, model: GPT, optimizer: MuonAdamW, compiled: bool) -> dict[str, float]:
    """Milliseconds of a step without monitor, and what an event of each kind adds to it."""
    device, tokens = model.get_device(), (settings.accumulation * settings.device_batch_size, settings.max_seq_len + 1)
    rows = torch.randint(settings.vocab_size, tokens, device=device, dtype=torch.int32)
    forward = torch.compile(model, dynamic=False) if compiled else model
    loader = ResidentLoader(rows, len(rows), settings.device_batch_size)
    run = short_run(model, forward, optimizer, loader, 1, rows.numel(), lambda step: (1.0, 0.95), grad_clip=1.0)
    kinds = {
        "norms": MonitorSettings(1, spectral_every=0, activations=False),
        "activations": MonitorSettings(1, spectral_every=0),  # and norms
        "spectral": MonitorSettings(1, activations=False),
        "everything": MonitorSettings(1),
    }
    monitors: dict[str, Observer] = {name: Monitor(model, optimizer, kind) for name, kind in kinds.items()}
    none, pending = Observer(), []

    def step(monitor: Observer) -> None:
        run.monitor = monitor
        pending.append(train_step(run).snapshot)

    plain: list[float] = []
    added: dict[str, list[float]] = {name: [] for name in monitors}
    for turn in range(settings.repeats + 3):  # the first compile and tune
        for name, monitor in monitors.items():
            order = (none, monitor) if turn % 2 else (monitor, none)  # the clock of the card drifts
            times = dict(zip(order, in_a_row([partial(step, one) for one in order], device), strict=True))
            while pending:  # as the console does, when the device has gone on
                if read := pending.pop():
                    read()
            if turn >= 3:
                plain.append(times[none])
                added[name].append(times[monitor] - times[none])
    result = {"step_ms": statistics.median(plain)}
    result |= {f"{name}_event_ms": statistics.median(differences) for name, differences in added.items()}
    result["activations_event_ms"] -= result["norms_event_ms"]  # which every event has
    for interval in INTERVALS:
        result[f"overhead_at_{interval}"] = result["everything_event_ms"] / interval / result["step_ms"]
    return result


def in_a_row(steps: list[Callable[[], None]], device: torch.device) -> list[float]:
    """Milliseconds of each. On a GPU queued behind a first one that is not timed: in training the host is a step ahead,
    so what it takes to launch something is not seen."""
    if device.type == "cuda":
        steps[0]()
    clock = marks(device, len(steps) + 1)
    for mark, step in zip(clock, [*steps, None], strict=True):
        mark.record()
        if step is not None:
            step()
    clock[-1].synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(clock)]


def report(results: dict[str, Any]) -> None:
    """Tables for people."""
    print(f"{results['device']}, torch {results['torch']}, {results['matrices']} hidden matrices")
    print(f"\n{'method':16}{'ms, all matrices':>18}{'µs a matrix':>14}{'ms of the host':>17}")
    for name, row in results["spectral"].items():
        host = f"{row['host_milliseconds']:17.3f}" if "host_milliseconds" in row else ""
        print(f"{name:16}{row['milliseconds']:18.3f}{row['microseconds_per_matrix']:14.1f}{host}")
    print(f"\n{'worst error in %':34}" + "".join(f"{name:>14}" for name in METHODS) + "   bounds of gram")
    for kind, row in results["errors"].items():
        values = "".join(f"{100 * row[name]:+14.3f}" for name in METHODS)
        bounds = (100 * row[f"{name} bound"] for name in ("highest lower", "lowest upper", "highest upper"))
        print(f"{kind:34}{values}   {' / '.join(f'{bound:+.4f}' for bound in bounds)}")
    print()
    for name, value in results["step"].items():
        print(f"{name:26}{f'{100 * value:.3f} %' if name.startswith('overhead') else f'{value:.3f}'}")
    for name, (value, bar, met) in results["bars"].items():
        print(f"bar {name}: {value:.4g} against {bar:g}: {'met' if met else 'NOT MET'}")
    if not results["bars"]:
        print("no bars: they are for a GPU")


def main(settings: Settings) -> None:
    *_, device = compute_init(settings.device_type)
    heads = settings.width // 64
    config = GPTConfig(sequence_len=settings.max_seq_len, vocab_size=settings.vocab_size, n_layer=settings.depth,
                       n_head=heads, n_kv_head=heads, n_embd=64 * heads)  # fmt: skip
    model = GPT(config, compute_dtype(device)).to(device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    compiled = settings.compile if settings.compile is not None else device.type == "cuda"
    step = step_times(settings, model, optimizer, compiled)  # which also fills the matrices that begin as zero
    matrices = [m.param.detach() for m in Monitor(model, optimizer, MonitorSettings(1)).matrices]
    shapes = sorted({tuple(matrix.shape) for matrix in matrices})
    spectral = spectral_times(matrices, device, settings.repeats)
    found = errors(shapes, settings.seeds, device)
    measured = {
        "microseconds_per_matrix": spectral["gram"]["microseconds_per_matrix"],
        "spectral_ms": spectral["gram"]["milliseconds"],
        "activations_ms": step["activations_event_ms"],
        "overhead_at_10": step["overhead_at_10"],
        "worst_error": max(abs(row["gram"]) for row in found.values()),
    }
    results = about(settings, device) | {
        "compiled": compiled,
        "matrices": len(matrices),
        "spectral": spectral,
        "errors": found,
        "step": step,
        "bars": {name: [value, BARS[name], value <= BARS[name]] for name, value in measured.items()}
        if device.type == "cuda"
        else {},
    }
    report(results)
    write_json(settings, results)


if __name__ == "__main__":
    cli.run(main, Settings)
