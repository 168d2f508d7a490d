"""Pictures of a run. Matplotlib is imported only here, and only when a picture is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bilevel.errors import BilevelError
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
    """Draw the outer and the inner loss."""
    steps = [record.step for record in records]
    axes.plot(steps, [record.outer_loss for record in records], label="outer loss", color="C0")
    if all(record.inner_loss is not None for record in records):
        axes.plot(steps, [float(record.inner_loss or 0.0) for record in records], label="inner loss", color="C1")
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
