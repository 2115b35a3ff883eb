"""The loss on a plane as a surface that can be turned: a plain dictionary that plotly.js draws.

Nothing here needs plotly itself: the dictionary is its JSON. Backgrounds are transparent and no colour of text is set,
so that a page gives them its own.
"""

from __future__ import annotations

from typing import Any

from flatmin.train.pictures.landscape import Landscape, finite_or_none
from flatmin.train.pictures.palette import LOSS_COLOURS

__all__ = ["plotly_surface"]


def plotly_surface(plane: Landscape, loss_range: tuple[float, float]) -> dict[str, Any]:
    """Return ``{"data": […], "layout": {…}}`` of a surface, small enough for a phone: no colour bar, short titles.

    Args:
        plane: The loss on a plane.
        loss_range: Ends of the height and of the colour scale, shared by pictures that are compared.
    """
    low, high = loss_range
    trace = {
        "type": "surface",
        "x": list(plane.x),
        "y": list(plane.y or ()),
        "z": finite_or_none(plane.loss),
        "colorscale": LOSS_COLOURS.capitalize(),
        "cmin": low,
        "cmax": high,
        "showscale": False,  # the height says it
        "hovertemplate": "%{x:.3g}, %{y:.3g}<br>loss %{z:.4g}<extra></extra>",
    }
    scene = {
        "xaxis": {"title": {"text": "First"}},
        "yaxis": {"title": {"text": "Second"}},
        "zaxis": {"title": {"text": "Loss"}, "range": [low, high]},
        "aspectmode": "manual",
        "aspectratio": {"x": 1, "y": 1, "z": 0.75},
        "camera": {"eye": {"x": 1.4, "y": -1.4, "z": 0.9}},
    }
    clear = "rgba(0,0,0,0)"
    layout = {
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
        "hovermode": "closest",
        "scene": scene,
    }
    return {"data": [trace], "layout": layout}
