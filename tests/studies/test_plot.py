import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.studies.plot import LinePanel, Panel, Series, line_chart, log_ticks, render_lines, si, thin, ticks

finite = st.floats(-1e9, 1e9)


@given(finite, st.floats(1e-3, 1e9))
def test_ticks_are_few_ordered_and_inside(low, width):
    found = ticks(low, low + width)
    assert len(found) <= 6
    assert found == sorted(set(found))
    slack = width * 1e-6
    assert all(low - slack <= tick <= low + width + slack for tick in found)


def test_ticks_of_a_plain_range():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(3, 3) == [3]


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=30))
def test_any_points_make_a_well_formed_picture_with_the_curve_inside(points):
    panel = Panel("<Loss & more>", "step", [(x, y) for x, y in points if abs(x) < 1e9 and abs(y) < 1e9])
    root = ET.fromstring(line_chart([panel, panel]))
    width, height = float(root.get("width")), float(root.get("height"))
    for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
        for pair in line.get("points").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= width and 0 <= y <= height


def test_points_that_cannot_be_drawn_are_left_out():
    bad = [(0, math.nan), (1, math.inf), (math.nan, 0.0)]
    assert "no data" in line_chart([Panel("t", "x", bad)])
    assert "no data" not in line_chart([Panel("t", "x", [*bad, (3, 1.0)])])


@given(st.lists(st.tuples(finite, finite), max_size=100), st.integers(1, 20))
def test_thinning_keeps_both_ends_and_the_order(points, most):
    kept = thin(points, most)
    assert len(kept) <= most + 1
    if points:
        assert kept[0] == points[0] and kept[-1] == points[-1]
    remaining = iter(points)
    assert all(point in remaining for point in kept)


def test_si():
    assert [si(value) for value in (0, 950, 1500, 2e6, 3.2e9)] == ["0", "950", "1.5k", "2M", "3.2B"]


# ---- several curves a panel


SVG = "{http://www.w3.org/2000/svg}"
above_0 = st.floats(1e-6, 1e9)


@given(
    st.lists(st.lists(st.tuples(st.floats(), st.floats()), max_size=12), max_size=4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
)
def test_any_curves_make_a_well_formed_picture_with_everything_inside(curves, log_x, log_y, share_y, columns):
    near = [[(x, y) for x, y in points if not (abs(x) > 1e9 or abs(y) > 1e9)] for points in curves]
    series = [Series(f"<curve {index} & more>", points) for index, points in enumerate(near)]
    panel = LinePanel("<Loss>", "step & time", series, log_x, log_y, "loss <nats>")
    root = ET.fromstring(render_lines([panel, panel, panel], columns, share_y))
    width, height = float(root.get("width")), float(root.get("height"))
    places = [pair.split(",") for line in root.iter(f"{SVG}polyline") for pair in line.get("points").split()]
    places += [(mark.get("cx"), mark.get("cy")) for mark in root.iter(f"{SVG}circle")]
    places += [(text.get("x"), text.get("y")) for text in root.iter(f"{SVG}text")]
    assert places
    assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in places)


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1.0, 1e300, 1.7e308])
def test_numbers_of_any_size_do_not_break_a_logarithmic_axis(value):
    ET.fromstring(render_lines([LinePanel("t", "x", [Series("a", [(value, value)])], log_x=True, log_y=True)]))


def polylines(panels, **options):
    """(colour class, points in px) of the curves, without the strokes of the legend."""
    root = ET.fromstring(render_lines(panels, **options))
    found = []
    for line in root.iter(f"{SVG}polyline"):
        points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        if points[0][1] != points[-1][1] or len(points) > 2:
            found.append((line.get("class"), points))
    return found


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors_and_no_place_for_0():
    points = [(0, 1), (-1, 2), (1, 10), (2, 100), (4, 1000), (8, 0)]
    ((_, places),) = polylines([LinePanel("t", "x", [Series("a", points)], log_x=True, log_y=True)])
    (x1, y1), (x2, y2), (x3, y3) = places
    assert abs((x3 - x2) - (x2 - x1)) < 0.3 and abs((y3 - y2) - (y2 - y1)) < 0.3
    assert x1 < x2 < x3 and y1 > y2 > y3  # up is smaller y in a picture


def test_a_name_has_one_colour_in_all_panels_and_one_entry_in_the_legend():
    rising = [(0, 0), (1, 1), (2, 5)]
    panels = [
        LinePanel("one", "x", [Series("a", rising), Series("b", rising), Series("a", [(1, 1)])]),
        LinePanel("two", "x", [Series("b", rising), Series("c", rising)]),
    ]
    assert [kind for kind, _ in polylines(panels)] == ["line c0", "line c1", "line c1", "line c2"]
    svg = render_lines(panels)
    assert [svg.count(f">{name}<") for name in "abc"] == [1, 2, 1]
    assert svg.count('class="line c0" cx=') == 1  # the single point is a mark


def test_more_curves_than_colours_differ_by_dashes():
    many = [Series(str(index), [(0, index), (1, 2 * index), (2, 1)]) for index in range(10)]
    svg = render_lines([LinePanel("t", "x", many)])
    assert svg.count("stroke-dasharray") == 2 * 2  # the ninth and tenth, each with its stroke in the legend


def test_shared_ranges_put_the_same_value_at_the_same_height():
    panels = [LinePanel("t", "x", [Series("a", [(0, 1), (1, top)])]) for top in (2, 100)]
    (_, low), (_, high) = polylines(panels, share_y=True)
    assert low[0][1] == high[0][1] and low[1][1] > high[1][1]
    (_, low), (_, high) = polylines(panels)
    assert low[1][1] == high[1][1]


def test_panels_are_laid_out_in_rows():
    panel = LinePanel("t", "x", [Series("a", [(0, 0), (1, 1)])])
    sizes = [ET.fromstring(render_lines([panel] * 5, columns=columns)) for columns in (2, 5)]
    (width2, height2), (width5, height5) = [(float(root.get("width")), float(root.get("height"))) for root in sizes]
    assert (width5, height2) == (2.5 * width2, 3 * height5)


@given(above_0, st.floats(1.001, 1e9))
def test_logarithmic_ticks_are_few_ordered_and_inside(low, factor):
    found = [value for value, _ in log_ticks(low, low * factor)]
    assert len(found) <= 11
    assert found == sorted(set(found))
    assert all(low * 0.999999 <= value <= low * factor * 1.000001 for value in found)


def test_logarithmic_ticks_of_widths_rates_norms_and_losses():
    assert [label for _, label in log_ticks(128, 2048)] == ["128", "256", "512", "1024", "2048"]
    assert [label for _, label in log_ticks(0.125, 2)] == ["1/8", "1/4", "1/2", "1", "2"]
    assert [value for value, _ in log_ticks(1e-4, 1)] == [1e-4, 1e-3, 1e-2, 0.1, 1]
    assert [label for _, label in log_ticks(3.1, 3.4)] == ["3.1", "3.2", "3.3", "3.4"]
