"""The picture of the main job: per table, both losses over the outer steps and the learned strengths."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.demo import Result
from bilevel.errors import InvalidValueError
from bilevel.plotting import new_figure
from bilevel.table import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, SubFigure

MOST_BARS = 30
MOST_COLUMNS = 60  # of a heat map
COLORS = "RdBu_r"  # blue: weaker than the common strength, red: stronger
WEAK, STRONG = "#4393c3", "#d6604d"  # from the same map


def save_picture(results: list[Result], path: str) -> None:
    """Draw all results into one PNG file.

    Raises:
        BilevelError: matplotlib is missing, or the file cannot be written.
    """
    figure = draw(results)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise InvalidValueError(f"cannot write the picture {path}: {error.strerror or error}") from error


def check_writable(path: str) -> None:
    """Raise now rather than after a minute of training if the picture cannot be drawn or written."""
    new_figure(1)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise InvalidValueError(f"cannot write the picture {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise InvalidValueError(f"cannot write the picture {path}: that is a folder; name a file, such as demo.png")


def draw(results: list[Result]) -> Figure:
    """Return the picture: a band per table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.7 * len(results)), layout="constrained")
    bands = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for band, result in zip(bands, results, strict=True):
        _draw_band(band, result)
    return figure


def _draw_band(band: SubFigure, result: Result) -> None:
    count = result.model.strengths.numel()
    band.suptitle(
        f"{result.table.name}: {count} L2 strengths, test log loss {result.tuned.test_loss:.3f} "
        f"(grid search {result.grid.test_loss:.3f}, default {result.default.test_loss:.3f})",
        fontsize=13,
        fontweight="bold",
    )
    left, right = band.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.9))[0]
    _draw_losses(left.subplots(), result)
    strengths: Floats = result.model.strengths.numpy()
    if result.table.image is not None:
        _draw_images(right, result, strengths)
    elif len(strengths) == 1:
        _draw_bars(right.subplots(), result, strengths[0])
    else:
        _draw_map(right, result, strengths)


def _draw_losses(axes: Axes, result: Result) -> None:
    from matplotlib.ticker import MaxNLocator

    solution = result.model.solution
    records = [solution.start, *solution.history]
    steps = [record.step for record in records]
    axes.plot(steps, [r.outer_loss for r in records], "o-", color="C0", label="outer: validation log loss + prior")
    inner = [math.nan if r.inner_loss is None else r.inner_loss for r in records]
    axes.plot(steps, inner, "s-", color="C1", ms=4, label="inner: training log loss + penalty")
    axes.axhline(result.tuned.validation_loss, color="C0", ls=":", label="validation log loss of bilevel, in the end")
    axes.axhline(result.grid.validation_loss, color="0.4", ls="--", label="validation log loss of the grid search")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="outer step", ylabel="loss", title="both losses, mean over the folds")
    axes.legend(frameon=False, fontsize="small", loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bars(axes: Axes, result: Result, strengths: Floats) -> None:
    """Draw each strength as a bar from the common one, weak on the left and strong on the right."""
    common = result.model.common
    order = np.argsort(strengths)
    title = "learned L2 strengths (1/C)"
    if len(order) > MOST_BARS:
        order = np.concatenate([order[: MOST_BARS // 2], order[-MOST_BARS // 2 :]])
        title += f", the {MOST_BARS // 2} weakest and the {MOST_BARS // 2} strongest of {len(strengths)}"
    shown = strengths[order]
    places = np.arange(len(order))
    axes.barh(places, shown - common, left=common, color=[STRONG if s > common else WEAK for s in shown], height=0.75)
    axes.axvline(common, color="0.2", lw=1, label=f"common strength {common:.3g}")
    axes.set_yticks(places, [_short(result.table.features[i]) for i in order], fontsize=8)
    axes.set_ylim(len(order) - 0.3, -0.7)
    axes.set_xscale("log")
    _readable_ticks(axes.xaxis, float(shown.min()), float(shown.max()))
    axes.set(title=title, xlabel="less shrinkage  ←  strength  →  more shrinkage")
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_images(place: SubFigure, result: Result, strengths: Floats) -> None:
    """Draw one image of strengths per class, with the pixels that never change left out."""
    columns = min(5, len(strengths))
    grid = place.subplots(math.ceil(len(strengths) / columns), columns, squeeze=False)
    place.suptitle(f"learned L2 strengths (1/C), one image per class; common strength {result.model.common:.3g}")
    constant = np.ptp(result.table.x, axis=0) == 0.0
    shape, scale, shown = result.table.image, _scale(strengths, result.model.common), None
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name, row in zip(grid.flat, result.table.classes, strengths, strict=False):
        image = np.ma.masked_where(constant, row).reshape(shape)
        shown = axes.imshow(image, cmap=_colors(), norm=scale)
        axes.set_title(name, fontsize=11)
    _color_bar(place, shown, grid, scale)


def _draw_map(place: SubFigure, result: Result, strengths: Floats) -> None:
    """Draw classes by features, the features with the largest range of strengths first where they are many."""
    axes = place.subplots()
    order, title = np.arange(strengths.shape[1]), "learned L2 strengths (1/C)"
    if len(order) > MOST_COLUMNS:
        spread = np.ptp(np.log(strengths), axis=0)
        order = np.sort(np.argsort(spread)[-MOST_COLUMNS:])
        title += f", {MOST_COLUMNS} of {strengths.shape[1]} features: those in which the classes differ most"
    scale = _scale(strengths, result.model.common)
    shown = axes.imshow(strengths[:, order], cmap=_colors(), norm=scale, aspect="auto")
    axes.set_title(title)
    axes.set_yticks(range(len(strengths)), [_short(name) for name in result.table.classes], fontsize=8)
    names = [_short(result.table.features[i]) for i in order]
    axes.set_xticks(range(len(order)), names, rotation=90, fontsize=8 if len(order) <= 30 else 6)
    _color_bar(place, shown, axes, scale)


def _scale(strengths: Floats, common: float) -> Normalize:
    """Return a logarithmic scale with the common strength in the middle."""
    from matplotlib.colors import LogNorm

    reach = max(float(strengths.max()) / common, common / float(strengths.min()), 1.01)
    return LogNorm(common / reach, common * reach)


def _colors() -> Any:
    import matplotlib

    return matplotlib.colormaps[COLORS].with_extremes(bad="0.88")


def _color_bar(place: SubFigure, shown: Any, axes: Any, scale: Normalize) -> None:
    bar = place.colorbar(shown, ax=axes, shrink=0.85, label="weaker  ←  strength  →  stronger")
    _readable_ticks(bar.ax.yaxis, float(scale.vmin or 0.0), float(scale.vmax or 1.0))


def _readable_ticks(axis: Any, low: float, high: float) -> None:
    """Write plain numbers on a logarithmic axis, also where it covers less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 8.0 * low else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
