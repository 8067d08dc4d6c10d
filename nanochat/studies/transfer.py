"""Does the best learning rate of a narrow model stay the best of a wide one? Arithmetic over finished runs, no model.

Losses come from a grid: widths x learning rates (a factor 2 apart) x seeds. The minimum is placed between grid points
by a parabola (vertices of one sweep agreed to 0.05 log2 where argmins could only say "within a factor 2"); what counts
in use is asked as well: how much is lost by training a wide model at the narrow one's rate. Rates are in log2, relative
to the base rates.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from nanochat.errors import UserError
from nanochat.studies.figures import line_panels

MAX_SHIFT = 0.5  # log2, between the vertices of any two widths
MAX_EXCESS = 0.5  # % of the loss, at the transferred rate
MIN_CONTROL_SHIFT = 1.0  # log2, that the standard parametrisation must show, or the test has no power
MIN_WIDTHS, MIN_SPAN = 4, 8  # how many widths, and the widest over the narrowest
CROSSING_ERRORS = 3.0  # standard errors of the gap between two widths beyond which the wider one is worse
BLOCKS = 50  # a curve of losses is compared in means over 1/50 of the run: single batches differ by more than widths

Grid = Mapping[float, Mapping[int, float]]
"""log2 rate -> seed -> loss; inf where a run diverged."""


class Vertex(NamedTuple):
    """Where the loss is least, in log2 of the rate. Where the grid cannot say, log2_rate and loss are nan and `problem`
    says why; [low, high] is what surely holds the minimum then (of a parabola that is found: the vertex itself)."""

    log2_rate: float
    loss: float
    low: float
    high: float
    problem: str = ""


def vertex(points: Sequence[tuple[float, float]]) -> Vertex:
    """The minimum of the parabola through the best of (log2 rate, loss) and its two neighbours.

    Points need not be evenly spaced; a diverged run has loss inf or nan. There is no vertex where the best point lies
    at an edge of the grid or beside a diverged run, where the three are equally good, or where all diverged. Raises
    UserError when fewer than three points are given or two share a rate.
    """
    ordered = sorted((rate, loss if math.isfinite(loss) else math.inf) for rate, loss in points)
    rates = [rate for rate, _ in ordered]
    if len(set(rates)) < 3 or len(set(rates)) < len(rates):
        raise UserError(
            f"a parabola needs three different learning rates, got {len(points)} runs at {sorted(set(rates))}"
        )
    best = min(range(len(ordered)), key=lambda index: ordered[index][1])
    x, y = ordered[best]
    if y == math.inf:
        return Vertex(math.nan, math.nan, -math.inf, math.inf, "diverged at every rate")
    x0, y0 = ordered[best - 1] if best > 0 else (-math.inf, math.inf)
    x2, y2 = ordered[best + 1] if best < len(ordered) - 1 else (math.inf, math.inf)
    # a parabola's vertex lies within half a step of the best of three points; a diverged one gives only its own place
    low = (x0 + x) / 2 if math.isfinite(y0) else x0
    high = (x + x2) / 2 if math.isfinite(y2) else x2
    if math.isinf(x0) or math.isinf(x2):
        end = "lowest" if math.isinf(x0) else "highest"
        return Vertex(math.nan, math.nan, low, high, f"the best rate is the {end} of the grid")
    if math.isinf(y0) or math.isinf(y2):
        return Vertex(math.nan, math.nan, low, high, "a run next to the best one diverged")
    left, right = (y - y0) / (x - x0), (y2 - y) / (x2 - x)  # slopes of the two chords
    curvature = (right - left) / (x2 - x0)
    if not curvature > 0:
        return Vertex(math.nan, math.nan, low, high, "three rates are equally good")
    # Newton's form: y0 + left (t - x0) + curvature (t - x0)(t - x)
    at = (x0 + x) / 2 - left / (2 * curvature)
    at = min(max(at, low), high)  # rounding alone can carry it out
    return Vertex(at, y + (at - x) * (left + curvature * (at - x0)), at, at)


class Estimate(NamedTuple):
    """Mean over seeds and its standard error (nan for one seed)."""

    mean: float
    stderr: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean; (inf, nan) where a value is not finite."""
    if not all(map(math.isfinite, values)):
        return Estimate(math.inf, math.nan)
    return Estimate(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


class TransferResult(NamedTuple):
    """One width of a sweep."""

    width: int
    losses: dict[float, Estimate]  # log2 rate -> loss over the seeds, in nats
    seeds: int  # how many are finished at this width
    compared: int  # of them at all widths; everything here is over those, since each seed has its own text
    argmin: float  # best rate of the grid, log2; nan where all diverged
    best: Estimate  # its loss
    vertex: Vertex  # of the mean losses
    vertex_stderr: float  # over the vertices of single seeds; nan where a seed has none, or is alone
    transferred: float  # best rate of the base width, log2
    # loss at that rate beyond `best`, in % of it; its error is of the seeds' differences: a seed sees the same text
    excess: Estimate


def transfer_results(grids: Mapping[int, Grid], base_width: int) -> list[TransferResult]:
    """One result for each width, in order of width, over the seeds that all widths have; one at least. All widths have
    runs at the same rates. Raises UserError where the base width diverged at every rate."""
    seeds = shared_seeds(grids)
    finished = {width: len(next(iter(grid.values()))) for width, grid in grids.items()}
    grids = {
        width: {rate: {seed: by_seed[seed] for seed in seeds} for rate, by_seed in grid.items()}
        for width, grid in grids.items()
    }
    transferred = _argmin(grids[base_width])
    if math.isnan(transferred):
        raise UserError(f"a run of the base width {base_width} diverged at every rate: lower --multipliers")
    results = []
    for width, grid in sorted(grids.items()):
        losses = {rate: estimate(list(by_seed.values())) for rate, by_seed in sorted(grid.items())}
        best = _argmin(grid)
        least = excess = Estimate(math.inf, math.nan)
        if not math.isnan(best):
            least = losses[best]
            nats = estimate([grid[transferred][seed] - grid[best][seed] for seed in seeds])
            excess = Estimate(nats.mean * 100 / least.mean, nats.stderr * 100 / least.mean)
        singles = [vertex([(rate, by_seed[seed]) for rate, by_seed in grid.items()]).log2_rate for seed in seeds]
        means = vertex([(rate, loss.mean) for rate, loss in losses.items()])
        spread, counts = estimate(singles).stderr, (finished[width], len(seeds))
        results.append(TransferResult(width, losses, *counts, best, least, means, spread, transferred, excess))
    return results


def shared_seeds(grids: Mapping[int, Grid]) -> list[int]:
    """Seeds that have a run at every rate of every width: what widths can be compared on."""
    every = [set(by_seed) for grid in grids.values() for by_seed in grid.values()]
    return sorted(set.intersection(*every)) if every else []


def _argmin(grid: Grid) -> float:
    """The rate with the least mean loss; nan where none is finite."""
    means = {rate: estimate(list(by_seed.values())).mean for rate, by_seed in grid.items()}
    best = min(means, key=lambda rate: means[rate])
    return best if math.isfinite(means[best]) else math.nan


# ---- wider is better


def block_means(losses: Sequence[float], blocks: int = BLOCKS) -> list[tuple[int, float]]:
    """Losses of single steps -> (last step of the block, counted from 1; mean over it), at most `blocks` blocks of
    equal length (the last may be shorter). This is all the smoothing that wider_is_better gets to see."""
    size = max(1, math.ceil(len(losses) / blocks))
    parts = [losses[first : first + size] for first in range(0, len(losses), size)]
    return [(size * index + len(part), math.fsum(part) / len(part)) for index, part in enumerate(parts)]


class Crossing(NamedTuple):
    """A recorded step at which a wider model had the higher loss."""

    step: int
    narrow: int
    wide: int
    gap: float


Curve = Sequence[tuple[int, float]]
"""(step, loss) in order of step."""


def wider_is_better(curves: Mapping[int, Sequence[Curve]], noise: float = 0.0) -> list[Crossing]:
    """Where it is not: crossings between neighbouring widths, in order of step; none is what muP promises.

    curves: width -> one curve a seed, in the same order of seeds and with the same steps at each width (block_means).
    It is a crossing where the mean over seeds of wide minus narrow exceeds CROSSING_ERRORS standard errors, or `noise`
    in nats where that is larger. The standard error is that of the step or, where larger, the median over the steps: of
    three seeds that of a step, often small by chance, found 5 % of the steps of equal widths to cross, this 0.5 %.
    A wide model that diverged is a crossing; seeds of which only the narrow one did are left out. A millionth of the
    loss never is one: all begin at ln(vocabulary). Raises UserError for fewer than two widths or steps that differ.
    """
    widths = sorted(curves)
    if len(widths) < 2:
        raise UserError(f"wider is better than what? Curves of two widths are needed, got {widths}")
    steps = {tuple(step for step, _ in curve) for by_seed in curves.values() for curve in by_seed}
    if len(steps) != 1 or len({len(by_seed) for by_seed in curves.values()}) != 1:
        raise UserError("loss curves of different lengths or numbers of seeds cannot be compared: finish all runs")
    found: list[Crossing] = []
    (recorded,) = steps
    losses = {w: np.ma.masked_invalid([[loss for _, loss in curve] for curve in curves[w]]) for w in widths}
    for narrow, wide in pairwise(widths):  # (seeds, steps) each; masked where a run has diverged
        gaps, diverged = losses[wide] - losses[narrow], np.ma.getmaskarray(losses[wide]).any(axis=0)
        mean = np.where(diverged, math.inf, gaps.mean(axis=0).filled(-math.inf))
        stderr = np.ma.masked_where(diverged, gaps.std(axis=0, ddof=1) / np.sqrt(gaps.count(axis=0)))
        usual = np.ma.median(stderr) if stderr.count() else 0.0
        noises = (
            CROSSING_ERRORS * np.maximum(stderr.filled(0), usual),
            1e-6 * abs(losses[narrow].mean(axis=0)).filled(0),
        )
        crosses = mean > np.maximum(noise, np.maximum(*noises))
        found += [Crossing(recorded[index], narrow, wide, float(mean[index])) for index in crosses.nonzero()[0]]
    return sorted(found)


# ---- the bars


class Judgement(NamedTuple):
    """One bar: passed is None where it was not measured, or not well enough to tell."""

    bar: str
    passed: bool | None
    detail: str


def judge(
    results_mup: Sequence[TransferResult],
    results_sp: Sequence[TransferResult],
    crossings: Sequence[Crossing] | None = None,
) -> list[Judgement]:
    """The bars, each with what was found. results_sp: the control, empty where it was not run; crossings: of
    wider_is_better, None where there was nothing to compare."""
    widths = [result.width for result in results_mup]
    span = max(widths) / min(widths)
    enough = Judgement(
        f"at least {MIN_WIDTHS} widths spanning {MIN_SPAN}x",
        len(widths) >= MIN_WIDTHS and span >= MIN_SPAN,
        f"{len(widths)} widths spanning {span:g}x",
    )
    unknown = [result for result in results_mup if result.vertex.problem]
    shift = max(result.vertex.high for result in results_mup) - min(result.vertex.low for result in results_mup)
    detail = f"{shift:.2f}" if not unknown else f"width {unknown[0].width}: {unknown[0].vertex.problem}"
    still = Judgement(f"muP: vertices within {MAX_SHIFT} log2", not unknown and shift <= MAX_SHIFT, detail)
    return [enough, still, _judge_excess(results_mup), _judge_control(results_sp), _judge_crossings(crossings)]


def _judge_excess(results: Sequence[TransferResult]) -> Judgement:
    """Missed where a width loses more than the bar, open where one does that is within a standard error of it."""
    over = [result for result in results if not result.excess.mean <= MAX_EXCESS]
    # one seed has no standard error (nan): its mean decides
    missed = [result for result in over if not result.excess.mean - result.excess.stderr <= MAX_EXCESS]
    worst = max(missed or over or results, key=lambda result: result.excess.mean)
    detail = f"worst {_percent(worst.excess)} at width {worst.width}"
    if over and not missed:
        detail += ", within a standard error of the bar: more seeds decide"
    bar = f"muP: at the transferred rate within {MAX_EXCESS} % of each width's best"
    return Judgement(bar, False if missed else None if over else True, detail)


def _judge_control(results: Sequence[TransferResult]) -> Judgement:
    bar = f"control: the optimum shifts by at least {MIN_CONTROL_SHIFT:g} log2"
    if len(results) < 2:
        return Judgement(bar, None, "not run")
    least = control_shift(results)
    detail = f"at least {least:.2f}"
    if ruined := [result.width for result in results if not math.isfinite(result.best.mean)]:
        detail += f"; width {ruined[0]} diverged at every rate: lower --multipliers"
    return Judgement(bar, least >= MIN_CONTROL_SHIFT, detail)


def _judge_crossings(crossings: Sequence[Crossing] | None) -> Judgement:
    bar = "muP: wider is better at every recorded step"
    if not crossings:
        return Judgement(bar, *((None, "nothing to compare") if crossings is None else (True, "no crossing")))
    last = crossings[-1]
    where = f"{len(crossings)} crossings, the last at step {last.step}: {last.wide} over {last.narrow}"
    return Judgement(bar, False, f"{where} by {last.gap:.4f}")


def control_shift(results: Sequence[TransferResult]) -> float:
    """log2 by which the optimum moves from the narrowest to the widest, at least: where a vertex could not be placed,
    the end of its interval that is nearer counts."""
    ordered = sorted(results, key=lambda result: result.width)
    first, last = ordered[0].vertex, ordered[-1].vertex
    return max(0.0, last.low - first.high, first.low - last.high)


# ---- tables and plots


def table(results: Sequence[TransferResult], base_width: int) -> str:
    """Lines for the console: losses of the grid, then where the minimum is and what the transferred rate costs. Seeds:
    those compared and, where there are more, those finished at this width."""
    rates = sorted({rate for result in results for rate in result.losses})
    heads = " ".join(f"{'x' + format(2**rate, 'g'):>8}" for rate in rates)
    lines = [f"width | {'seeds':<6} | {heads} | {'vertex (log2)':<16} | {f'from {base_width}':<10} | excess"]
    base = {result.width: result for result in results}[base_width].vertex.log2_rate
    for result in results:
        cells = " ".join(
            f"{result.losses[rate].mean:>7.4f}{'*' if rate == result.argmin else ' '}"
            if rate in result.losses
            else " " * 8
            for rate in rates
        )
        found, stderr = result.vertex, result.vertex_stderr
        where = found.problem or f"{found.log2_rate:+.2f}" + ("" if math.isnan(stderr) else f" +- {stderr:.2f}")
        moved = found.log2_rate - base
        delta = "" if math.isnan(moved) else f"{moved:+.2f}"
        seeds = f"{result.compared}" + (f" of {result.seeds}" if result.seeds > result.compared else "")
        lines.append(
            f"{result.width:>5} | {seeds:<6} | {cells} | {where:<16} | {delta:<10} | {_percent(result.excess)}"
        )
    return "\n".join(lines)


def _percent(excess: Estimate) -> str:
    return f"{excess.mean:.2f} %" + ("" if math.isnan(excess.stderr) else f" +- {excess.stderr:.2f}")


def rate_plot(named: Mapping[str, Sequence[TransferResult]]) -> str:
    """SVG: loss over rate, a curve a width with its vertex as a ring, a panel for each parametrisation."""
    panels = {}
    for name, results in named.items():
        panels[name] = [
            (f"width {result.width}", [(2**rate, loss.mean) for rate, loss in result.losses.items()])
            for result in results
        ] + [
            (f"width {result.width}", [(2**result.vertex.log2_rate, result.vertex.loss)])
            for result in results
            if not result.vertex.problem
        ]
    return line_panels(panels, "learning rate / base rate", "loss, nats", log_axes="x")


def curve_plot(named: Mapping[str, Mapping[int, Sequence[Curve]]]) -> str:
    """SVG: training loss over steps at the transferred rate, the first seed of each width, a panel each."""
    panels = {
        name: [(f"width {width}", by_seed[0]) for width, by_seed in sorted(curves.items())]
        for name, curves in named.items()
    }
    return line_panels(panels, "step", "training loss, nats")
