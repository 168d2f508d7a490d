"""Pictures of a run. Matplotlib is imported only here, and only when a picture is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.errors import BilevelError, InvalidValueError
from bilevel.solution import QUANTILES, SHOWN_ONE_BY_ONE, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(columns: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Any]]:
    """Return a figure with a row of axes, outside of pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BilevelError('pictures need matplotlib; write: pip install "bilevel[plot]"') from error
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def check_picture(path: str, argument: str) -> None:
    """Raise now rather than after the work if a picture cannot be written there."""
    figure, _ = new_figure(1)
    folder, kind = Path(path).absolute().parent, Path(path).suffix.lower().lstrip(".")
    kinds = figure.canvas.get_supported_filetypes()
    if not folder.is_dir():
        raise InvalidValueError(f"{argument} {path}: there is no folder {Path(path).parent}")
    if Path(path).is_dir():
        raise InvalidValueError(f"{argument} {path}: that is a folder; name a file, such as methods.png")
    if kind and kind not in kinds:  # matplotlib writes a name without an ending as PNG
        raise InvalidValueError(f"{argument} {path}: there are no pictures of kind .{kind}, only {', '.join(kinds)}")


def plot_run(records: list[Record]) -> Figure:
    """Draw losses, residuals and hyperparameters (natural units) over the outer steps."""
    figure, (losses, residuals, values) = new_figure(3)
    plot_losses(losses, records)
    _plot_residuals(residuals, records)
    _plot_hyperparameters(values, records)
    for axes in (losses, residuals, values):
        axes.set_xlabel("outer step")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_losses(axes: Axes, records: list[Record]) -> None:
    """Draw the outer loss, the inner one and that of the third split."""
    steps = [record.step for record in records]
    axes.plot(steps, [record.outer_loss for record in records], label="outer loss", color="C0")
    if all(record.inner_loss is not None for record in records):
        axes.plot(steps, [float(record.inner_loss or 0.0) for record in records], label="inner loss", color="C1")
    tested = [(record.step, record.test_loss) for record in records if record.test_loss is not None]
    if tested:
        axes.plot(*zip(*tested, strict=True), label="test loss", color="C2")
    axes.set_title("losses")
    axes.legend(frameon=False)


def _plot_residuals(axes: Axes, records: list[Record]) -> None:
    curves = {
        "hypergradient norm": "hypergradient_norm",
        "inner residual": "inner_residual",
        "adjoint residual": "adjoint_residual",
        "estimated error": "error",
    }
    for name, figure in curves.items():
        shown = [(record.step, record[figure]) for record in records if record[figure]]
        if shown:
            axes.plot(*zip(*shown, strict=True), label=name)
    untrusted = [record.step for record in records if record.verdict == "untrusted"]
    for i, step in enumerate(untrusted):
        axes.axvspan(step - 0.5, step + 0.5, color="C3", alpha=0.15, lw=0, label="untrusted" if i == 0 else None)
    axes.set_yscale("log")
    axes.set_title("hypergradient and residuals")
    axes.legend(frameon=False, fontsize="small")


def _plot_hyperparameters(axes: Axes, records: list[Record]) -> None:
    steps = [record.step for record in records]
    names = list(records[0].hparams)
    smallest = min(value for record in records for values in record.hparams.values() for value in values)
    for color, name in enumerate(names):
        columns = list(zip(*(record.hparams[name] for record in records), strict=True))
        if records[0].sizes[name] <= SHOWN_ONE_BY_ONE:
            for i, column in enumerate(columns):
                axes.plot(steps, column, color=f"C{color}", alpha=0.8, label=name if i == 0 else None)
        else:
            middle = QUANTILES.index(0.5)
            axes.fill_between(steps, columns[0], columns[-1], color=f"C{color}", alpha=0.15, lw=0)
            axes.fill_between(steps, columns[1], columns[-2], color=f"C{color}", alpha=0.3, lw=0)
            label = f"{name}: median, 80 % and range of {records[0].sizes[name]}"
            axes.plot(steps, columns[middle], color=f"C{color}", label=label)
    if smallest > 0.0:
        axes.set_yscale("log")
    axes.set_title("hyperparameters")
    axes.legend(frameon=False, fontsize="small")


MARKS = {"exact": ("o", "C2"), "approximate": ("s", "C0"), "untrusted": ("X", "C3")}
NO_ERROR = 1e-17  # where an error of exactly zero is drawn, on a log scale


def plot_comparison(axes: Axes, marks: list[tuple[str, float, float, str]], cost: str) -> None:
    """Draw method, cost, error and verdict of each mark, both figures on log scales."""
    for verdict, (marker, color) in MARKS.items():
        mine = [mark for mark in marks if mark[3] == verdict]
        if mine:
            errors = [max(error, NO_ERROR) for _, _, error, _ in mine]
            axes.scatter([at for _, at, _, _ in mine], errors, marker=marker, color=color, label=verdict, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel=cost, ylabel="relative error of the hypergradient")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", title="verdict", title_fontsize="small")
    for (label, at, error, _), rise in zip(marks, _rises(axes, marks), strict=True):
        axes.annotate(label, (at, max(error, NO_ERROR)), xytext=(6, rise), textcoords="offset points", fontsize="small")


def _rises(axes: Axes, marks: list[tuple[str, float, float, str]]) -> list[float]:
    """Return how far, in points, each label goes up so that it does not lie on one to its left or right."""
    points = [axes.transData.transform((at, max(error, NO_ERROR))) for _, at, error, _ in marks]
    placed: list[tuple[float, float, float]] = []  # left end, right end, height
    rises = [0.0] * len(marks)
    for i in sorted(range(len(marks)), key=lambda i: float(points[i][1])):
        x, y = float(points[i][0]), float(points[i][1])
        right = x + 7.0 * len(marks[i][0])
        while any(left < right and x < end and abs(y + rises[i] - height) < 11.0 for left, end, height in placed):
            rises[i] += 3.0
        placed.append((x, right, y + rises[i]))
    return rises
