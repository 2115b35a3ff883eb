"""The loss around the solutions: side by side on one scale, and as surfaces that turn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flatmin.train.pictures.contours import draw_contours
from flatmin.train.pictures.landscape import Landscape, common_range
from flatmin.train.pictures.panels import colour_scale
from flatmin.train.pictures.plotly_surface import plotly_surface
from flatmin.train.report.document import Section
from flatmin.train.report.elements import data_table, figure, note
from flatmin.train.report.plots import Surface, plot_scripts, turning_surfaces
from flatmin.train.report.svg import inline_svg

__all__ = ["landscape_section"]

TITLE = "The loss around the solutions"
NUM_CONTOURS = 12  # the surfaces can be chosen, however many there are


def landscape_section(planes: Mapping[str, Landscape], caption: str) -> Section:
    """Return the pictures of landscapes of planes; call inside ``report_style``.

    Args:
        planes: By the name to print.
        caption: What they show and how it was measured.
    """
    if not planes:
        return Section(TITLE, note("No run has a landscape."))
    alike = {name: _of_same_directions(plane, planes) for name, plane in planes.items()}
    contours = [
        inline_svg(
            draw_contours([plane], [name], scale=colour_scale(alike[name])), f"contours{index}", _described(name, plane)
        )
        for index, (name, plane) in enumerate(list(planes.items())[:NUM_CONTOURS])
    ]
    surfaces = [
        Surface(name, _described(name, plane), plotly_surface(plane, common_range(alike[name])))
        for name, plane in planes.items()
    ]
    rows = [[name, *_numbers(plane)] for name, plane in planes.items()]
    body = [
        figure(contours, caption, in_thirds=len(contours) % 3 == 0),
        turning_surfaces(surfaces),
        data_table("The losses in these pictures", ["Run", "In the centre", "Least", "Most"], rows),
    ]
    return Section(TITLE, "\n".join(body), plot_scripts())


def _of_same_directions(plane: Landscape, planes: Mapping[str, Landscape]) -> list[Landscape]:
    """Those that a landscape can be compared with, and shares its scale with."""
    return [other for other in planes.values() if other.directions == plane.directions]


def _numbers(plane: Landscape) -> list[str]:
    finite = plane.loss[np.isfinite(plane.loss)]
    centre = plane.loss[len(plane.y or ()) // 2, len(plane.x) // 2]
    values = [centre, *((finite.min(), finite.max()) if finite.size else (np.nan, np.nan))]
    return [f"{value:.4g}" if np.isfinite(value) else "not finite" for value in values]


def _described(name: str, plane: Landscape) -> str:
    centre, least, most = _numbers(plane)
    return f"{plane.loss_label} around the weights of {name}: {centre} in the centre, from {least} to {most}."
