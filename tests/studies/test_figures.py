"""studies/figures.py: every curve is in the picture under its name, whatever its points."""

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.studies.figures import line_panels

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.filterwarnings("ignore:Data has no positive")
@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.floats(), st.floats()), max_size=8), max_size=3), st.sampled_from(["", "x", "xy"])
)
def test_any_curves_make_a_well_formed_picture_with_their_names(curves, log_axes):
    near = [[(x, y) for x, y in points if not (abs(x) > 1e9 or abs(y) > 1e9)] for points in curves]
    named = [(f"<curve {index} & more>", points) for index, points in enumerate(near)]
    found = texts(line_panels({"<one>": named, "two": named}, "step & time", "loss", log_axes=log_axes))
    assert {"<one>", "two", "step & time", *(name for name, _ in named)} <= set(found)


def test_a_name_has_one_colour_and_one_entry_in_the_legend_and_the_file_is_always_the_same():
    rising = [(0, 0), (1, 1), (2, 5), (3, math.inf), (4, 2)]
    panels = {"one": [("a", rising), ("b", rising), ("a", [(1, 1)])], "two": [("b", rising)]}
    svg = line_panels(panels, "x", "y")
    assert [texts(svg).count(name) for name in ("a", "b", "one", "two")] == [1, 1, 1, 1]
    assert svg == line_panels(panels, "x", "y")
