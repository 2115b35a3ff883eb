"""The loss around each solution, on the same axes and the same scale: a sharp minimum beside a wide one."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]  # ships no types

from flatmin.train.report.results import Comparison, MethodResult

_COLOURS = "viridis"
_NUM_LEVELS = 24


def draw_loss_contours(comparison: Comparison) -> Figure:
    """Draw the loss around each solution seen from above, as contours on one scale."""
    scale, levels = _common_scale(comparison)
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    panels = figure.subplots(1, len(comparison.methods), sharex=True, sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, comparison.methods, strict=True):
        _draw_contours(axes, result, levels, scale)
    panels[0].set_ylabel("Second direction")
    bar = figure.colorbar(ScalarMappable(scale, _COLOURS), ax=list(panels), shrink=0.9, pad=0.02, aspect=25)
    bar.set_label("Training loss")
    bar.outline.set_visible(False)
    return figure


def draw_loss_surfaces(comparison: Comparison) -> Figure:
    """Draw the loss around each solution as a surface, on one scale."""
    scale, _ = _common_scale(comparison)
    figure = Figure(figsize=(10.4, 3.3))
    for column, result in enumerate(comparison.methods):
        axes = figure.add_subplot(1, len(comparison.methods), column + 1, projection="3d")
        _draw_surface(axes, result, scale)
    figure.subplots_adjust(left=0.0, right=0.95, bottom=0.06, top=0.92, wspace=0.16)
    return figure


def _common_scale(comparison: Comparison) -> tuple[Normalize, Sequence[float]]:
    losses = np.asarray([result.picture.losses for result in comparison.methods])
    finite = losses[np.isfinite(losses)]
    scale = Normalize(0.0, float(finite.max()))
    return scale, np.linspace(0.0, float(finite.max()), _NUM_LEVELS + 1).tolist()


def _draw_contours(axes: Axes, result: MethodResult, levels: Sequence[float], scale: Normalize) -> None:
    positions, losses = result.picture.positions, np.asarray(result.picture.losses)
    axes.contourf(positions, positions, losses, levels=levels, cmap=_COLOURS, norm=scale)
    axes.contour(positions, positions, losses, levels=levels, colors="white", linewidths=0.5, alpha=0.55)
    axes.plot(0, 0, marker="o", markersize=5, markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.8)
    axes.set(title=result.name, xlabel="First direction", aspect="equal")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _draw_surface(axes: Axes3D, result: MethodResult, scale: Normalize) -> None:
    x, y = np.meshgrid(result.picture.positions, result.picture.positions)
    losses = np.asarray(result.picture.losses)
    axes.plot_surface(
        x, y, losses, cmap=_COLOURS, norm=scale, rcount=40, ccount=40, linewidth=0.2, edgecolor="#ffffff40"
    )
    axes.set(title=result.name, zlim=(scale.vmin, scale.vmax), xlabel="First", ylabel="Second")
    axes.set_zlabel("Training loss")
    axes.view_init(elev=28, azim=-55)
    axes.set_box_aspect((4, 4, 3), zoom=0.95)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0.0, 0.0, 0.0, 0.0))
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.set_tick_params(labelsize="small", pad=0)
