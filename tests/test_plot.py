import math
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from nanochat.plot import Panel, line_chart, si, thin, ticks

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
