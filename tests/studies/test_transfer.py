import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.studies.transfer import (
    Crossing,
    Estimate,
    block_means,
    control_shift,
    curve_plot,
    estimate,
    judge,
    rate_plot,
    table,
    transfer_results,
    vertex,
    wider_is_better,
)

# ---- vertices


@given(
    st.floats(-2.4, 2.4),
    st.floats(0.001, 5),
    st.floats(-10, 10),
    st.sets(st.integers(-12, 12), min_size=0, max_size=5),
    st.permutations(range(-4, 5)),
)
def test_exact_parabolas_are_recovered_on_any_grid_in_any_order(at, curvature, least, more, order):
    rates = [*order, *(4 * step / 13 + 0.1 for step in more)]  # uneven
    found = vertex([(rate, least + curvature * (rate - at) ** 2) for rate in rates])
    assert found.problem == ""
    assert found.log2_rate == pytest.approx(at, abs=1e-4) and found.low == found.high == found.log2_rate
    assert found.loss == pytest.approx(least, abs=1e-6)


@given(st.lists(st.floats(0, 100), min_size=3, max_size=8), st.integers(0, 2**31))
def test_whatever_the_losses_the_vertex_is_by_the_best_point_or_there_is_none(losses, seed):
    rates = np.cumsum(np.random.default_rng(seed).uniform(0.1, 2, len(losses))).tolist()
    found = vertex(list(zip(rates, losses, strict=True)))
    best = losses.index(min(losses))
    assert (best in (0, len(losses) - 1)) <= bool(found.problem)
    assert math.isnan(found.log2_rate) == math.isnan(found.loss) == bool(found.problem)
    assert found.low <= rates[best] <= found.high or not found.problem
    if not found.problem:
        assert (rates[best - 1] + rates[best]) / 2 <= found.log2_rate <= (rates[best] + rates[best + 1]) / 2
        assert found.loss <= losses[best] + 1e-9
        fitted = np.polyfit(rates[best - 1 : best + 2], losses[best - 1 : best + 2], 2)  # a slow second way
        if fitted[0] > 1e-6:
            assert found.log2_rate == pytest.approx(-fitted[1] / (2 * fitted[0]), abs=1e-3)


@pytest.mark.parametrize(
    ("losses", "problem", "interval"),
    [
        ([1, 2, 3, 4], "lowest", (-math.inf, 0.5)),
        ([4, 3, 2, 1], "highest", (2.5, math.inf)),
        ([3, 1, math.inf, math.inf], "diverged", (0.5, 2)),
        ([math.nan, 1, 2, 3], "diverged", (0, 1.5)),
        ([2, 1, 1, 1], "", (1.5, 1.5)),
        ([1, 1, 1, 1], "lowest", (-math.inf, 0.5)),
        ([math.nan, math.inf, math.nan], "diverged at every rate", (-math.inf, math.inf)),
    ],
)
def test_edges_are_flagged_and_say_where_the_minimum_must_be(losses, problem, interval):
    found = vertex(list(enumerate(losses)))
    assert problem in found.problem and bool(problem) == bool(found.problem)
    assert (found.low, found.high) == interval


def test_three_equal_losses_have_no_vertex():
    assert vertex([(0, 2.0), (1, 1.0), (1.5, 1.0), (2, 1.0), (3, 5.0)]).problem == ""
    # 1 + 2**-52 beside 1: a curvature of rounding alone is not asked to be anything but inside
    found = vertex([(0, 1.0 + 2**-52), (1, 1.0), (2, 1.0 + 2**-52)])
    assert found.problem or 0.5 <= found.log2_rate <= 1.5


@pytest.mark.parametrize("points", [[], [(0, 1), (1, 2)], [(0, 1), (0, 2), (1, 3)]])
def test_what_cannot_be_a_grid_is_refused(points):
    with pytest.raises(UserError):
        vertex(points)


def test_estimate():
    assert estimate([1, 2, 3]) == Estimate(2, pytest.approx(1 / math.sqrt(3)))
    assert estimate([5.0]).mean == 5 and math.isnan(estimate([5.0]).stderr)
    assert estimate([1.0, math.inf]).mean == math.inf


# ---- results of a sweep


def grid(at, least=3.0, seeds=3, rates=range(-3, 4), noise=0.0):
    """Losses of a width whose best rate is `at`; a seed moves all of them by the same, as its text does."""
    generator = np.random.default_rng(seeds)
    return {
        float(rate): {
            seed: least + 0.1 * seed + 0.02 * (rate - at) ** 2 + noise * generator.normal() for seed in range(seeds)
        }
        for rate in rates
    }


def test_results_of_a_sweep():
    results = transfer_results({256: grid(0.3, 2.8), 128: grid(-0.2), 512: grid(1.9, 2.5)}, base_width=128)
    assert [result.width for result in results] == [128, 256, 512]
    assert [result.vertex.log2_rate for result in results] == pytest.approx([-0.2, 0.3, 1.9])
    assert [result.argmin for result in results] == [0, 0, 2] and {result.transferred for result in results} == {0}
    assert results[2].losses[1.0].mean == pytest.approx(2.5 + 0.1 + 0.02 * 0.81)
    assert results[2].losses[1.0].stderr == pytest.approx(0.1 / math.sqrt(3))
    lost = 0.02 * (1.9**2 - 0.1**2)
    assert results[2].excess.mean == pytest.approx(100 * lost / (2.6 + 0.02 * 0.1**2))
    # the seeds' texts differ by 0.1 nats, their differences between rates not at all: the error must be of the latter
    assert results[2].excess.stderr == pytest.approx(0, abs=1e-9) and results[0].excess.mean == 0
    assert results[2].vertex_stderr == pytest.approx(0, abs=1e-6)


def test_diverged_runs_stay_visible():
    diverged = grid(0.0)
    diverged[3.0][1] = math.inf
    (result,) = transfer_results({128: diverged}, 128)
    assert result.losses[3.0].mean == math.inf and result.vertex.problem == ""
    assert "inf" in table([result], 128)
    ruined = grid(0.0)
    ruined[2.0] = dict.fromkeys(range(3), math.inf)
    results = transfer_results({128: grid(2.0), 256: ruined}, 128)
    assert results[1].excess.mean == math.inf
    assert not judge(results, [])[2].passed


def ruined(seeds=3):
    return {rate: dict.fromkeys(by_seed, math.inf) for rate, by_seed in grid(0, seeds=seeds).items()}


def test_a_width_that_diverged_everywhere_is_a_problem_of_that_width_alone():
    results = transfer_results({128: grid(0.0), 256: grid(-2.0), 512: ruined()}, 128)
    assert results[2].vertex.problem == "diverged at every rate" and math.isnan(results[2].argmin)
    assert results[2].excess.mean == results[2].best.mean == math.inf and results[1].vertex.problem == ""
    line = table(results, 128).splitlines()[-1]
    assert "diverged at every rate" in line and "*" not in line and "nan" not in line
    as_mup, as_sp = judge(results, []), judge(transfer_results({128: grid(0.0)}, 128), results)
    assert [verdict.passed for verdict in as_mup[1:3]] == [False, False] and "512: diverged" in as_mup[1].detail
    assert as_sp[3].passed is False and "width 512 diverged" in as_sp[3].detail  # nothing is known of its optimum
    assert "width 512" in rate_plot({"SP": results})


def test_widths_are_compared_on_the_seeds_that_all_have():
    """Seed 0 has its optimum at 0 and seed 2 at 2: a mean over other seeds moves the minimum of itself."""

    def of(*seeds):
        return {float(rate): {seed: 3 + 0.1 * (rate - seed) ** 2 for seed in seeds} for rate in range(-3, 4)}

    results = transfer_results({128: of(0, 2), 256: of(0), 512: of(0, 1, 2)}, 128)
    assert [result.vertex.log2_rate for result in results] == pytest.approx([0, 0, 0])
    assert [(result.compared, result.seeds) for result in results] == [(1, 2), (1, 1), (1, 3)]
    seeds = [line.split("|")[1].strip() for line in table(results, 128).splitlines()]
    assert seeds == ["seeds", "1 of 2", "1", "1 of 3"]


def test_a_base_width_that_diverged_everywhere_has_no_rate_to_transfer():
    with pytest.raises(UserError, match="base width 128 diverged at every rate"):
        transfer_results({128: ruined(), 256: grid(0)}, 128)


# ---- the bars


WIDTHS = (128, 256, 512, 1024)
GOOD = transfer_results({width: grid(0.1 * i, 3 - 0.1 * i) for i, width in enumerate(WIDTHS)}, 128)
SHIFTED = transfer_results({width: grid(-0.5 * i, 3.0) for i, width in enumerate(WIDTHS)}, 128)


def passed(mup, sp=SHIFTED, crossings=()):
    return [verdict.passed for verdict in judge(mup, sp, crossings)]


def test_all_bars_are_met_by_what_transfers():
    assert passed(GOOD) == [True] * 5


def test_each_bar_fails_alone():
    assert passed(GOOD[:3]) == [False, True, True, True, True]
    moved = transfer_results({width: grid(0.2 * i, 3 - 0.1 * i) for i, width in enumerate(WIDTHS)}, 128)
    assert passed(moved) == [True, False, True, True, True]
    assert passed(GOOD, GOOD) == [True, True, True, False, True]
    assert passed(GOOD, crossings=[Crossing(10, 128, 256, 0.1)]) == [True, True, True, True, False]
    steep = transfer_results(
        {
            128: grid(0.45, seeds=1),
            **{width: {rate: {0: 3 + 4 * (rate - 0.6) ** 2} for rate in (-1, 0, 1, 2)} for width in WIDTHS[1:]},
        },
        128,
    )
    assert passed(steep)[1:3] == [True, False]


def test_what_was_not_measured_is_neither_passed_nor_failed():
    assert [verdict.passed for verdict in judge(GOOD, [])] == [True, True, True, None, None]


@pytest.mark.parametrize(
    ("losses", "excess", "verdict"),
    [
        ((3.18, 2.94), (2, 4), None),  # one seed loses 6 %, the other gains 2 %
        ((3.016, 3.012), (0.4667, 0.0667), True),  # 0.53 % is within its error, but the mean is what counts
        ((3.06, 3.0), (1, 1), None),
        ((3.06, 3.03), (1.5, 0.5), False),
        ((3.03, 3.024), (0.9, 0.1), False),
        ((3.06,), (2, math.nan), False),  # one seed has no standard error
        ((3.012,), (0.4, math.nan), True),
    ],
)
def test_the_loss_is_within_the_bar_or_over_it_or_too_close_to_say(losses, excess, verdict):
    """Losses of the seeds at the base width's rate 0, and 3 at the best."""
    wide = {rate: dict.fromkeys(range(len(losses)), 4.0) for rate in (-1.0, 0.0, 1.0, 2.0)}
    wide[0.0], wide[1.0] = dict(enumerate(losses)), dict.fromkeys(range(len(losses)), 3.0)
    results = transfer_results({128: grid(0, seeds=len(losses)), 256: wide}, 128)
    assert results[1].excess == pytest.approx(excess, abs=1e-4, nan_ok=True)
    found = judge(results, [])[2]
    assert found.passed is verdict and ("more seeds decide" in found.detail) == (verdict is None)


def test_a_width_that_misses_the_bar_is_named_before_one_that_is_worse_but_unsure():
    def wide(*losses):
        found = {rate: dict.fromkeys((0, 1), 4.0) for rate in (-1.0, 0.0, 1.0, 2.0)}
        return {**found, 0.0: dict(enumerate(losses)), 1.0: {0: 3.0, 1: 3.0}}

    results = transfer_results({128: grid(0, seeds=2), 256: wide(3.18, 2.94), 512: wide(3.03, 3.03)}, 128)
    found = judge(results, [])[2]
    assert found.passed is False and found.detail == "worst 1.00 % +- 0.00 at width 512"


def test_an_optimum_at_the_edge_fails_muP_and_counts_for_the_control_as_far_as_it_is_known():
    edge = transfer_results({**{width: grid(0) for width in WIDTHS[:3]}, 1024: grid(-9.0)}, 128)
    assert edge[3].vertex.problem
    verdict = judge(edge, edge)
    assert verdict[1].passed is False and "lowest of the grid" in verdict[1].detail
    assert control_shift(edge) == pytest.approx(2.5) and verdict[3].passed  # beyond the middle of -3 and -2
    other_way = transfer_results({128: grid(-9.0), 256: grid(-3.0)}, 128)
    assert control_shift(other_way) == 0.0  # both somewhere low: nothing is known of the distance


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6))
def test_the_shift_is_that_of_the_vertices(places):
    results = transfer_results({128 * 2**i: grid(at) for i, at in enumerate(places)}, 128)
    assert control_shift(results) == pytest.approx(abs(places[-1] - places[0]), abs=1e-6)
    shift = max(places) - min(places)
    assume(abs(shift - 0.5) > 1e-6)
    assert judge(results, [])[1].passed == (shift <= 0.5)


# ---- wider is better


def test_blocks():
    assert block_means([1, 2, 3, 4, 5], 2) == [(3, 2.0), (5, 4.5)]
    assert block_means([1.0, 2.0], 50) == [(1, 1.0), (2, 2.0)]
    assert block_means([]) == []


@given(st.lists(st.floats(0, 20), min_size=1, max_size=300), st.integers(1, 60))
def test_blocks_cover_every_step_once(losses, blocks):
    found = block_means(losses, blocks)
    assert len(found) <= blocks and found[-1][0] == len(losses)
    starts = [0, *(step for step, _ in found)]
    lengths = [after - before for before, after in pairwise(starts)]
    assert min(lengths) > 0 and len(set(lengths[:-1])) <= 1
    total = sum(length * mean for length, (_, mean) in zip(lengths, found, strict=True))
    assert total == pytest.approx(sum(losses), abs=1e-6)


def curve(shift, steps=20):
    return [(step, 8 / (1 + step) ** 0.3 - shift * (step > 0)) for step in range(steps)]


def test_wider_is_better_at_every_step_or_the_steps_are_named():
    curves = {512: [curve(0.2)], 128: [curve(0.0)], 256: [curve(0.1)]}
    assert wider_is_better(curves) == []
    worse = list(curve(0.2))
    worse[7] = (7, worse[7][1] + 0.15)
    (crossing,) = wider_is_better({**curves, 512: [worse]})
    assert crossing[:3] == (7, 256, 512) and crossing.gap == pytest.approx(0.05)
    assert wider_is_better({**curves, 512: [worse]}, noise=0.06) == []


def test_three_standard_errors_are_the_noise():
    narrow = [[(1, 3.0)], [(1, 4.0)], [(1, 5.0)]]

    def gaps(*values, **options):
        return wider_is_better({1: narrow, 2: [[(1, 3 + i + gap)] for i, gap in enumerate(values)]}, **options)

    assert gaps(0.3, -0.1, -0.1) == []  # +0.03 +- 0.13
    assert gaps(0.3, 0.1, 0.1) == []  # +0.17 +- 0.07
    (crossing,) = gaps(0.3, 0.3, 0.2)  # +0.27 +- 0.03
    assert crossing.gap == pytest.approx(0.8 / 3)
    assert gaps(0.3, 0.3, 0.2, noise=0.3) == []


def test_widths_that_are_equal_hardly_ever_cross():
    """Three seeds, 150 steps: one standard error finds 21 % of them to cross, three of each step's own 5 %."""
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(40):
        curves = {
            width: [[(i, 3 + 0.1 * generator.normal()) for i in range(150)] for _ in range(3)] for width in (1, 2)
        }
        found += len(wider_is_better(curves))
    assert found / (40 * 150) < 0.01
    better = {1: curves[1], 2: [[(step, loss + 0.6) for step, loss in curve] for curve in curves[1]]}
    assert len(wider_is_better(better)) == 150  # a gap that is there is found


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_wide_run_that_diverged_crosses_whatever_became_of_the_narrow_one(seeds, bad):
    def curves(*first):
        return [[(1, first[0]), (2, first[1])], *([(1, 3.0), (2, 2.0)] for _ in range(seeds - 1))]

    good, broken = curves(3.0, 2.0), curves(3.0, bad)
    assert [crossing.step for crossing in wider_is_better({1: good, 2: broken})] == [2]
    assert [crossing.step for crossing in wider_is_better({1: broken, 2: broken}, noise=1.0)] == [2]
    assert wider_is_better({1: broken, 2: good}) == []
    # a first seed that diverged at the narrow width hides nothing of the others, which are 0.5 worse at step 2
    if seeds > 1:
        worse = [[(1, 3.0), (2, 2.5)] for _ in range(seeds)]
        assert [crossing.step for crossing in wider_is_better({1: broken, 2: worse})] == [2]


def test_curves_that_cannot_be_compared_are_refused():
    for curves in ({1: [curve(0)]}, {1: [curve(0)], 2: [curve(0, 19)]}, {1: [curve(0)], 2: [curve(0), curve(1)]}):
        with pytest.raises(UserError):
            wider_is_better(curves)


# ---- shown


def test_table_and_pictures_hold_every_width():
    lines = [[cell.strip() for cell in line.split("|")] for line in table(SHIFTED, 256).splitlines()]
    assert lines[0] == ["width", "seeds", lines[0][2], "vertex (log2)", "from 256", "excess"]
    assert lines[0][2].split() == ["x0.125", "x0.25", "x0.5", "x1", "x2", "x4", "x8"]
    assert [line[0] for line in lines[1:]] == ["128", "256", "512", "1024"]
    assert [line[2].count("*") for line in lines] == [0, 1, 1, 1, 1]
    assert [line[3].split()[0] for line in lines[1:]] == ["+0.00", "-0.50", "-1.00", "-1.50"]
    assert [line[4] for line in lines[1:]] == ["+0.50", "+0.00", "-0.50", "-1.00"]  # the base is not the narrowest
    svg = rate_plot({"muP": GOOD, "SP": SHIFTED})
    assert all(f">width {width}<" in svg for width in WIDTHS) and ">muP<" in svg and ">SP<" in svg
    assert ">width 128<" in curve_plot({"muP": {128: [curve(0)], 256: [curve(0.1)]}})
