"""The plots of a report, as plain data for plotly.js.

Colours are names ("c1", "faint") that the page turns into those of the reader's light or dark theme; what they tell is
also told by dashes, symbols or labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bilevel.reporting.runs import Seen
from bilevel.solution import QUANTILES, SHOWN_ONE_BY_ONE, Record

Trace = dict[str, Any]

WIDE = 30.0  # ratio of the largest to the smallest positive value above which an axis is logarithmic
BARS = 100  # values of a vector that are drawn one by one
CELLS = 20_000  # of a heat map
TENSORS = 8  # tensors of many values that get plots of their own
SYMBOLS = {"exact": "circle", "approximate": "square", "untrusted": "x"}


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        name: of its element in the page.
        title: what it shows.
        caption: how to read it; also what a screen reader says.
        traces: of plotly.
        layout: of plotly.
    """

    name: str
    title: str
    caption: str
    traces: list[Trace]
    layout: dict[str, Any]


def plots(run: Seen) -> list[Plot]:
    """Return all plots of a run."""
    return [_losses(run.records), _gap(run), _trust(run.records), *_hyperparameters(run), _cost(run.records)]


def _losses(records: list[Record]) -> Plot:
    traces = [
        _line(records, "outer_loss", "validation", "c1", width=3),
        _line(records, "inner_loss", "training", "c2", dash="dot"),
        _line(records, "test_loss", "test", "c3", dash="dash", width=3),
    ]
    traces = [trace for trace in traces if trace["y"]]
    test = "" if any(record.test_loss is not None for record in records) else " No third split was given."
    caption = f"Both losses over the outer steps; the training loss holds its penalties.{test}"
    return Plot("losses", "Losses", caption, traces, _axes("outer step", "loss", traces))


def _gap(run: Seen) -> Plot:
    ends = [("start", run.records[0])]
    tested = [record for record in run.records if record.test_loss is not None]
    if tested:
        lowest = min(tested, key=lambda record: record.test_loss or 0.0)
        if 0 < lowest.step != run.step:
            ends.append((f"lowest test<br>(step {lowest.step})", lowest))
    if run.step:
        ends.append((f"end<br>(step {run.step})", run.records[run.step]))
    rows = (
        ("training", "inner_loss", "c2", "/"),
        ("validation", "outer_loss", "c1", ""),
        ("test", "test_loss", "c3", "x"),
    )
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": [label for label, _ in ends],
            "y": [record[figure] for _, record in ends],
            "marker": {"color": color, "pattern": {"shape": shape}},
        }
        for name, figure, color, shape in rows
        if any(record[figure] is not None for _, record in ends)
    ]
    caption = (
        "The gap between what is trained on, tuned on and neither. A test loss far above the validation loss says "
    )
    caption += "that the hyperparameters have fitted the noise of the validation data."
    return Plot("gap", "Training, validation, test", caption, traces, {"barmode": "group", "yaxis": _titled("loss")})


def _trust(records: list[Record]) -> Plot:
    norm = _line(records, "hypergradient_norm", "norm of the hypergradient", "c1", width=3)
    shown = [record for record in records if record.hypergradient_norm and record.hypergradient_norm > 0.0]
    norm |= {
        "mode": "lines+markers",
        "marker": {
            "symbol": [SYMBOLS.get(record.verdict, "circle") for record in shown],
            "size": [12 if record.verdict == "untrusted" else 7 for record in shown],
            "color": ["c4" if record.verdict == "untrusted" else "c1" for record in shown],
        },
        "text": [record.verdict for record in shown],
        "hovertemplate": "step %{x}: %{y:.3g}, %{text}",
    }
    traces = [
        norm,
        _line(records, "error", "estimated relative error", "c3", dash="dash", positive=True),
        _line(records, "inner_residual", "inner residual", "c2", dash="dot", positive=True) | {"visible": "legendonly"},
        _line(records, "adjoint_residual", "adjoint residual", "c5", dash="dot", positive=True)
        | {"visible": "legendonly"},
    ]
    norm["x"], norm["y"] = [r.step for r in shown], [r.hypergradient_norm for r in shown]
    layout = _axes("outer step", "", [trace for trace in traces if trace["y"]], log=True)
    caption = (
        "The projected norm of the hypergradient falls to zero at an optimum. Symbols are verdicts: a circle is "
        "exact, a square approximate, a cross untrusted. Errors of exactly zero are left out."
    )
    return Plot("trust", "Hypergradient and its error", caption, [t for t in traces if t["y"]], layout)


def _cost(records: list[Record]) -> Plot:
    steps = [record.step for record in records]
    traces: list[Trace] = [
        {"type": "bar", "name": name, "x": steps, "y": [record[name] for record in records],
         "marker": {"color": color, "pattern": {"shape": shape}}}
        for name, color, shape in (("gradients", "c1", ""), ("products", "c3", "/"))
    ]  # fmt: skip
    traces.append(_line(records, "seconds", "seconds (right)", "c4", dash="dash") | {"yaxis": "y2"})
    layout = {
        "barmode": "stack",
        "xaxis": _titled("outer step"),
        "yaxis": _titled("gradients and products"),
        "yaxis2": {
            **_titled("seconds"),
            "overlaying": "y",
            "side": "right",
            "rangemode": "tozero",
            "showgrid": False,
            "tickmode": "auto",
        },
    }
    caption = (
        "What each outer step cost, its inner solves included: gradients and Hessian-vector products, and seconds."
    )
    return Plot("cost", "Cost of each step", caption, traces, layout)


def _hyperparameters(run: Seen) -> list[Plot]:
    start, end = run.records[0], run.records[run.step]
    few = [name for name, size in start.sizes.items() if size <= SHOWN_ONE_BY_ONE]
    many = [name for name in start.sizes if name not in few]
    found = [*([_few_bars(start, end, few), _few_lines(run.records, few)] if few else [])]
    for name in many[:TENSORS]:
        if name in run.values:
            found.append(_many(name, run.values[name]))
        found.append(_bands(run.records, name))
    return found


def _few_bars(start: Record, end: Record, names: list[str]) -> Plot:
    labels = [label for name in names for label in _labels(name, start.sizes[name])]
    before, after = ([value for name in names for value in record.hparams[name]] for record in (start, end))
    traces: list[Trace] = [
        {"type": "bar", "orientation": "h", "name": "end", "y": labels, "x": after, "marker": {"color": "c1"}},
        {"type": "scatter", "mode": "markers", "name": "start", "y": labels, "x": before,
         "marker": {"symbol": "line-ns-open", "size": 16, "color": "c4", "line": {"width": 3}}},
    ]  # fmt: skip
    layout = {
        "xaxis": _scaled(before + after) | {"title": {"text": "value"}},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "height": max(220, 90 + 26 * len(labels)),
    }
    return Plot("few", "Hyperparameters", "Natural values at the end; the mark is where each began.", traces, layout)


def _few_lines(records: list[Record], names: list[str]) -> Plot:
    steps = [record.step for record in records]
    traces: list[Trace] = []
    dashes = ("solid", "dash", "dot", "dashdot", "longdash")
    for name in names:
        for i, label in enumerate(_labels(name, records[0].sizes[name])):
            color, dash = len(traces) % 5, len(traces) // 5 % 5
            line = {"color": f"c{1 + color}", "dash": dashes[dash], "width": 2}
            values = [record.hparams[name][i] for record in records]
            traces.append({"type": "scatter", "mode": "lines", "name": label, "x": steps, "y": values, "line": line})
    layout = _axes("outer step", "value", traces)
    return Plot("values", "Hyperparameters along the run", "Natural values over the outer steps.", traces, layout)


def _bands(records: list[Record], name: str) -> Plot:
    steps, columns = [r.step for r in records], list(zip(*(r.hparams[name] for r in records), strict=True))
    middle = QUANTILES.index(0.5)
    hidden: Trace = {"type": "scatter", "mode": "lines", "x": steps, "line": {"width": 0}, "hoverinfo": "skip"}
    traces: list[Trace] = [
        {**hidden, "y": columns[0], "showlegend": False},
        {**hidden, "y": columns[-1], "fill": "tonexty", "fillcolor": "faint", "name": "range"},
        {**hidden, "y": columns[1], "showlegend": False},
        {**hidden, "y": columns[-2], "fill": "tonexty", "fillcolor": "strong", "name": "middle 80 %"},
        {"type": "scatter", "mode": "lines", "x": steps, "y": columns[middle], "name": "median",
         "line": {"color": "c1", "width": 3}},
    ]  # fmt: skip
    caption = f"Quantiles of the {records[0].sizes[name]:,} natural values of {name} over the outer steps."
    layout = _axes("outer step", "value", [{"y": [value for column in columns for value in column]}])
    return Plot(f"bands-{name}", f"{name} along the run", caption, traces, layout)


def _many(name: str, tensor: Tensor) -> Plot:
    """Return bars by index, a heat map, or a histogram: what its shape and size allow."""
    values = tensor.double().cpu().numpy()
    log = bool((values > 0).all()) and float(values.max()) > WIDE * float(values.min())
    shape = " x ".join(map(str, values.shape))
    if values.ndim == 2 and min(values.shape) > 1 and values.size <= CELLS:
        shown = np.log10(values) if log else values
        bar = {"title": {"text": "log10" if log else "value", "side": "right"}, "thickness": 12}
        trace: Trace = {"type": "heatmap", "z": shown.tolist(), "colorscale": "Viridis", "colorbar": bar}
        layout: dict[str, Any] = {"yaxis": {"autorange": "reversed"}, "xaxis": {}}
        caption = f"The {shape} natural values at the end{', as powers of ten' if log else ''}."
    elif values.size <= BARS:
        trace = {"type": "bar", "x": list(range(values.size)), "y": values.ravel().tolist(), "marker": {"color": "c1"}}
        layout = {"xaxis": _titled("index"), "yaxis": _scaled(values.ravel().tolist()) | {"title": {"text": "value"}}}
        caption = f"The {values.size} natural values at the end, by index."
    else:
        counts, edges = np.histogram(np.log10(values) if log else values, bins=60)
        centres = (edges[1:] + edges[:-1]) / 2
        trace = {"type": "bar", "x": centres.tolist(), "y": counts.tolist(), "marker": {"color": "c1"},
                 "width": float(edges[1] - edges[0])}  # fmt: skip
        layout = {"xaxis": _titled("log10 of the value" if log else "value"), "yaxis": _titled("how many"), "bargap": 0}
        caption = f"A histogram of the {values.size:,} natural values ({shape}) at the end."
    return Plot(f"end-{name}", f"{name} at the end", caption, [{**trace, "name": name, "showlegend": False}], layout)


def _labels(name: str, size: int) -> list[str]:
    return [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]


def _line(
    records: list[Record], figure: str, name: str, color: str, *, dash: str = "solid", width: int = 2,
    positive: bool = False,
) -> Trace:  # fmt: skip
    shown = [
        (record.step, record[figure])
        for record in records
        if record[figure] is not None and math.isfinite(record[figure]) and (record[figure] > 0.0 or not positive)
    ]
    return {
        "type": "scatter",
        "mode": "lines" if len(shown) > 1 else "markers",
        "name": name,
        "x": [step for step, _ in shown],
        "y": [value for _, value in shown],
        "line": {"color": color, "dash": dash, "width": width},
    }


def _axes(x: str, y: str, traces: list[Trace], log: bool = False) -> dict[str, Any]:
    values = [value for trace in traces for value in trace["y"]]
    return {"xaxis": _titled(x), "yaxis": _scaled(values, log) | {"title": {"text": y}}}


def _scaled(values: list[float], log: bool = False) -> dict[str, Any]:
    """Return an axis: logarithmic where all values are positive and decades apart."""
    if not values or not min(values) > 0.0 or not (log or max(values) > WIDE * min(values)):
        return {"type": "log" if log else "linear"}
    low, high = math.log10(min(values)), math.log10(max(values))
    room = 0.05 * (high - low) + 0.1
    ticks = max(1, math.ceil((high - low) / 6))  # decades between two of them
    return {"type": "log", "dtick": ticks, "exponentformat": "power", "range": [low - room, high + room]}


def _titled(text: str) -> dict[str, Any]:
    return {"title": {"text": text}}
