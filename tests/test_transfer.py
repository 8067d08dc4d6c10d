import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.transfer import (
    Crossing,
    Spread,
    block_means,
    control_shift,
    curve_plot,
    judge,
    rate_plot,
    spread,
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


@pytest.mark.parametrize(
    "points", [[], [(0, 1), (1, 2)], [(0, 1), (0, 2), (1, 3)], [(0, math.nan), (1, math.inf), (2, math.nan)]]
)
def test_what_cannot_be_a_grid_is_refused(points):
    with pytest.raises(UserError):
        vertex(points)


def test_spread():
    assert spread([1, 2, 3]) == Spread(2, pytest.approx(1 / math.sqrt(3)))
    assert spread([5.0]).mean == 5 and math.isnan(spread([5.0]).stderr)
    assert spread([1.0, math.inf]).mean == math.inf


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
    assert "inf" in table([result])
    ruined = grid(0.0)
    ruined[2.0] = dict.fromkeys(range(3), math.inf)
    results = transfer_results({128: grid(2.0), 256: ruined}, 128)
    assert results[1].excess.mean == math.inf
    assert not judge(results, [])[2].passed


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ({256: grid(0)}, "base width 128"),
        ({128: {**grid(0), 9.0: {0: 1.0}}}, "not the same seeds"),
        ({128: {rate: {} for rate in range(3)}}, "not the same seeds"),
        ({128: grid(0), 256: grid(0, rates=(-3, -2, -1, 1))}, "no run at the base width's best rate"),
    ],
)
def test_grids_that_cannot_be_compared_are_refused(grids, message):
    with pytest.raises(UserError, match=message):
        transfer_results(grids, 128)


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
            128: grid(0.45),
            **{width: {rate: {0: 3 + 4 * (rate - 0.6) ** 2} for rate in (-1, 0, 1, 2)} for width in WIDTHS[1:]},
        },
        128,
    )
    assert passed(steep)[1:3] == [True, False]


def test_what_was_not_measured_is_neither_passed_nor_failed():
    assert [verdict.passed for verdict in judge(GOOD, [])] == [True, True, True, None, None]


def test_a_loss_within_a_standard_error_is_within_the_bar_and_one_seed_has_none():
    # at the base width's rate 0, one seed loses 6 % and the other gains 2 %: 2 % +- 4 %
    noisy = {-1.0: {0: 4.0, 1: 4.0}, 0.0: {0: 3.18, 1: 2.94}, 1.0: {0: 3.0, 1: 3.0}, 2.0: {0: 4.0, 1: 4.0}}
    base = grid(0, seeds=2)
    results = transfer_results({128: base, 256: noisy}, 128)
    assert results[1].excess.mean == pytest.approx(2) and results[1].excess.stderr == pytest.approx(4)
    assert judge(results, [])[2].passed
    single = {rate: {0: by_seed[0]} for rate, by_seed in noisy.items()}
    assert not judge(transfer_results({128: grid(0, seeds=1), 256: single}, 128), [])[2].passed


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


def test_the_seeds_spread_is_the_noise_and_a_diverged_run_crosses():
    narrow = [[(1, 3.0)], [(1, 4.0)], [(1, 5.0)]]
    assert wider_is_better({1: narrow, 2: [[(1, 3.3)], [(1, 3.9)], [(1, 4.9)]]}) == []  # +0.03 +- 0.13
    (crossing,) = wider_is_better({1: narrow, 2: [[(1, 3.3)], [(1, 4.3)], [(1, 5.2)]]})  # +0.27 +- 0.03
    assert crossing.gap == pytest.approx(0.8 / 3)
    assert len(wider_is_better({1: narrow[:1], 2: [[(1, math.inf)]]})) == 1


def test_curves_that_cannot_be_compared_are_refused():
    for curves in ({1: [curve(0)]}, {1: [curve(0)], 2: [curve(0, 19)]}, {1: [curve(0)], 2: [curve(0), curve(1)]}):
        with pytest.raises(UserError):
            wider_is_better(curves)


# ---- shown


def test_table_and_pictures_hold_every_width():
    lines = table(SHIFTED).splitlines()
    assert lines[0].split() == [
        "width",
        "|",
        "x0.125",
        "x0.25",
        "x0.5",
        "x1",
        "x2",
        "x4",
        "x8",
        "|",
        "vertex",
        "(log2)",
        "excess",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["128", "256", "512", "1024"]
    assert [line.count("*") for line in lines] == [0, 1, 1, 1, 1]
    assert "-1.50" in lines[-1]
    svg = rate_plot({"muP": GOOD, "SP": SHIFTED})
    assert all(f">width {width}<" in svg for width in WIDTHS) and ">muP<" in svg and ">SP<" in svg
    assert svg.count('r="5"') == 8  # the vertices
    assert ">width 128<" in curve_plot({"muP": {128: [curve(0)], 256: [curve(0.1)]}})
