"""The surface that turns: plotly takes it, and it holds the numbers of the landscape."""

import json
import math
from typing import Any

import plotly.graph_objects
import pytest
from picture_data import XS, YS, line, plane

from flatmin.train.pictures.landscape import Landscape
from flatmin.train.pictures.plotly_surface import plotly_surface

RANGE = (0.0, 9.0)


def checked(figure: dict[str, Any]) -> dict[str, Any]:
    """Give back the figure if plotly accepts every property of it, and JSON its numbers."""
    plotly.graph_objects.Figure(figure)
    text = json.dumps(figure, allow_nan=False)
    return json.loads(text)


def test_plotly_refuses_what_it_does_not_know() -> None:
    """The control of the checks here."""
    figure = plotly_surface(Landscape.from_dict(plane()), RANGE)
    figure["data"][0]["colour"] = "red"
    with pytest.raises(ValueError, match="colour"):
        checked(figure)


def test_a_plane_shows_its_losses_at_their_positions() -> None:
    trace = checked(plotly_surface(Landscape.from_dict(plane()), RANGE))["data"][0]
    assert (trace["x"], trace["y"], trace["z"]) == (XS, YS, plane()["loss"])


def test_height_and_colours_have_the_range_that_is_given() -> None:
    figure = checked(plotly_surface(Landscape.from_dict(plane()), RANGE))
    assert tuple(figure["layout"]["scene"]["zaxis"]["range"]) == RANGE
    assert (figure["data"][0]["cmin"], figure["data"][0]["cmax"]) == RANGE


def test_losses_that_are_not_finite_leave_holes() -> None:
    holes = plane()
    holes["loss"][0][1], holes["loss"][1][2], holes["loss"][2][4] = None, math.inf, math.nan
    trace = checked(plotly_surface(Landscape.from_dict(holes), RANGE))["data"][0]
    assert [trace["z"][0][1], trace["z"][1][2], trace["z"][2][4]] == [None] * 3
    assert trace["z"][0][0] == holes["loss"][0][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line(format=2), "format of a landscape must be 1, got 2"),
        (line(loss=[1.0]), r"loss must have the shape of the positions, \(5,\), got \(1,\)"),
    ],
)
def test_what_is_no_landscape_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Landscape.from_dict(content)
