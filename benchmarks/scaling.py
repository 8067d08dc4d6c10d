"""Bits per byte against the FLOPs of training, over sizes at equal tokens: a power law for each architecture.

    python -m benchmarks.scaling --runs=benchmarks/results/scaling_h200.jsonl --svg=docs/scaling.svg

--runs is what benchmarks.ablate wrote of lines like `--arch=ngram --depth=12`. Prints Markdown: a row a size, means of
its seeds, and the laws, each fitted to all sizes of an architecture by least squares on logarithmic axes.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any, NamedTuple

from nanochat import cli
from nanochat.errors import UserError
from nanochat.files import atomic_write_text, read_jsonl
from nanochat.studies.figures import line_panels

Size = tuple[int, str, int]  # tokens, architecture, depth
LEAST_SIZES = 3  # for a fit: a line goes through any two


@cli.program
class Settings:
    """Fit and draw what runs of several sizes reached."""

    runs: Path
    """Records of benchmarks.ablate."""
    svg: Path | None = None
    """Where the curve goes."""


class Point(NamedTuple):
    flops: float
    bpb: float
    seeds: int


class Law(NamedTuple):
    """bpb = at_1e15 * (FLOPs / 1e15) ** -power."""

    at_1e15: float
    power: float
    worst: float
    """Largest deviation of a point, as a share."""


def flag(line: str, name: str, default: str) -> str:
    return next((word.split("=")[1] for word in line.split() if word.startswith(f"--{name}=")), default)


def points(records: Iterable[Mapping[str, Any]]) -> dict[Size, Point]:
    """Means over the seeds of each size, in order."""
    found: dict[Size, list[tuple[float, float]]] = {}
    for record in records:
        line = record["run"]
        size = record["tokens"], flag(line, "arch", "nanochat"), int(flag(line, "depth", "20"))
        found.setdefault(size, []).append((record["FLOPs"], record["bpb"]))
    return {
        size: Point(fmean(flops for flops, _ in runs), fmean(bpb for _, bpb in runs), len(runs))
        for size, runs in sorted(found.items())
    }


def fit(curve: Iterable[Point]) -> Law:
    """UserError for fewer than three sizes."""
    places = [(math.log(point.flops / 1e15), math.log(point.bpb)) for point in curve]
    if len(places) < LEAST_SIZES:
        raise UserError(f"a fit needs three sizes of an architecture at equal tokens, here are {len(places)}")
    slope, offset = linear_regression(*zip(*places, strict=True))
    worst = max(abs(math.expm1(y - offset - slope * x)) for x, y in places)
    return Law(math.exp(offset), -slope, worst)


def main(settings: Settings) -> None:
    found = points(read_jsonl(settings.runs))
    print("| tokens | architecture | depth | FLOPs | bits per byte | seeds |\n|---:|---|---:|---:|---:|---:|")
    for (tokens, arch, depth), point in found.items():
        print(f"| {tokens:,} | {arch} | {depth} | {point.flops:.2e} | {point.bpb:.4f} | {point.seeds} |")
    panels: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
    for tokens, arch in dict.fromkeys(size[:2] for size in found):
        curve = [point for size, point in found.items() if size[:2] == (tokens, arch)]
        measured = [(point.flops, point.bpb) for point in curve]
        panels.setdefault(f"{tokens:,} tokens", []).append((arch, measured))
        if len(curve) < LEAST_SIZES:
            continue
        law = fit(curve)
        print(
            f"\n{arch}, {tokens:,} tokens: {law.at_1e15:.3f} (FLOPs / 1e15)^-{law.power:.4f}, off by "
            f"{law.worst:.1%} at most"
        )
        fitted = [(point.flops, law.at_1e15 * (point.flops / 1e15) ** -law.power) for point in curve]
        panels[f"{tokens:,} tokens"].append((f"{arch}, fit", fitted))
    if settings.svg:
        atomic_write_text(settings.svg, line_panels(panels, "FLOPs of training", "bits per byte", log_axes="xy"))


if __name__ == "__main__":
    cli.run(main, Settings)
