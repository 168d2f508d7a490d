"""`compare`: several methods on one problem, each held against a reference, with what it took."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from bilevel.bench import Bench
from bilevel.certificate import Certificate, Cost, Hypergradient
from bilevel.errors import BilevelError, InvalidTypeError, InvalidValueError
from bilevel.evaluation import check_problem
from bilevel.measure import milliseconds, peak_memory
from bilevel.problem import BilevelProblem
from bilevel.reference import Reference, best_reference
from bilevel.solvers import METHODS, Estimator, estimator
from bilevel.solvers.linear.base import check_count
from bilevel.vector import Vector, dot, norm, subtract

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Methods = Sequence[str | Estimator] | Mapping[str, str | Estimator]


@dataclass(frozen=True)
class ComparedMethod:
    """One line of a comparison.

    Attributes:
        method: its name, or its settings.
        error: |found - reference| / |reference|; None for a method that refused, and without a reference.
        cosine: between found and reference; None likewise.
        seconds: shortest time of up to `repeats` calls; without the inner solve that methods share.
        gradients: gradients of either loss, those of the method's own inner loop included.
        products: Hessian-vector and Jacobian-vector products.
        megabytes: peak of what it allocated; None with `memory=False`.
        verdict: the certificate's, or "refused".
        claimed: the certificate's estimate of `error`.
        refusal: why the method does not apply, in its own words; else empty.
        gradient: the hypergradient, in the structure of `hparams`; None for a method that refused.
    """

    method: str
    error: float | None
    cosine: float | None
    seconds: float
    gradients: int
    products: int
    megabytes: float | None
    verdict: str
    claimed: float | None
    refusal: str = ""
    gradient: Any = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: one for each method, in the order asked for.
        reference: what the errors are held against, in words; why there are none where nothing can be trusted.
        inner: the inner solve that methods share, in words; empty where every method runs a loop of its own.
        conditions: the seed, and what the whole comparison took, in words.
    """

    rows: tuple[ComparedMethod, ...]
    reference: str
    inner: str
    conditions: str = ""

    def table(self) -> str:
        """Return a table that reads well in a terminal and is Markdown, with what it is held against below."""
        lines = [_HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
        padded = [
            " | ".join(_aligned(cell, w, i) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        rule = "|".join("-" * (w + 1) + (":" if i in _RIGHT else "-") for i, w in enumerate(widths))
        text = [f"| {padded[0]} |", f"|{rule}|", *(f"| {line} |" for line in padded[1:]), ""]
        refusals: dict[str, list[str]] = {}
        for row in self.rows:
            if row.refusal:
                refusals.setdefault(row.refusal, []).append(row.method)
        text += [f"{', '.join(methods)}: {why}" for why, methods in refusals.items()]
        text.append(f"reference: {self.reference}")
        return "\n".join([*text, *(words for words in (self.inner, self.conditions) if words)])

    def plot(self, cost: str = "seconds") -> Figure:
        """Draw error against cost, both on log scales, one labelled mark a method.

        Args:
            cost: "seconds", "products" or "megabytes".
        """
        from bilevel.plotting import new_figure, plot_comparison

        if cost not in _COSTS:
            raise InvalidValueError(f"`cost` is {cost!r}, expected one of {', '.join(_COSTS)}")
        figure, (axes,) = new_figure(1, width=6.4, height=4.8)
        shown = [row for row in self.rows if row.error is not None and getattr(row, cost) is not None]
        if not shown:
            raise InvalidValueError(f"there is nothing to draw: no row has an error and {cost}; see `.table()`")
        plot_comparison(
            axes, [(row.method, getattr(row, cost), row.error or 0.0, row.verdict) for row in shown], _COSTS[cost]
        )
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without the gradients."""
        rows = [{name: value for name, value in asdict(row).items() if name != "gradient"} for row in self.rows]
        return {"rows": rows, "reference": self.reference, "inner": self.inner, "conditions": self.conditions}

    def __str__(self) -> str:
        return self.table()


_HEADER = ("method", "error", "claimed", "cosine", "seconds", "gradients", "products", "MB", "verdict")
_RIGHT = range(1, 8)
_COSTS = {
    "seconds": "seconds",
    "products": "Hessian-vector and Jacobian-vector products",
    "megabytes": "peak memory, MB",
}


def compare(
    problem: BilevelProblem,
    methods: Methods | None = None,
    *,
    reference: Any = None,
    hparams: Any = None,
    seed: int = 0,
    repeats: int = 3,
    memory: bool = True,
) -> Comparison:
    """Take one hypergradient by each method and hold it against a reference.

    Methods that differentiate the inner solution share one inner solve; methods that run a loop of their own do so. All
    begin at the same batches and random numbers. A method that refuses the problem is a line that says why. Nothing of
    the user's is changed, and no verdict warns: it is in the table.

    Args:
        problem: the problem.
        methods: names and estimator objects, or a dict from labels to these; None: every name in `bilevel.METHODS`.
        reference: a method, a `Hypergradient`, or a gradient in the structure of `hparams`. None: the implicit
            hypergradient over all data, at an inner solution that is trained on to the end of the digits, by the dense
            Hessian up to 2,000 inner variables; where that is untrusted or only the inner loop uses a hyperparameter (a
            learning rate), `"unroll"`, or `"zero-order"` for a loop of the user's; else there are no errors.
            `.reference` says which.
        hparams: where, in natural units and the structure of the problem's `hparams`; None: its start values.
        seed: of torch's random numbers in every run; the global random state is left as it was.
        repeats: most timed calls of each method; no further one once they have taken half a second.
        memory: measure peaks, which takes one more, slower call of each method.

    Returns:
        `.rows`, `.table()`, `.plot()`.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: ((w - 1) ** 2 + h * w**2).sum(), lambda w, h: (w**2).sum(),
    ...     params=torch.zeros(2, dtype=torch.float64), hparams=bilevel.positive(1.0))
    >>> comparison = bilevel.compare(problem, ["direct", "cg"])
    >>> [row.method for row in comparison.rows if row.error < 1e-8 and row.verdict == "exact"]
    ['direct', 'cg']
    """
    check_problem(problem)
    begin = time.perf_counter()
    chosen = _labelled(list(METHODS) if methods is None else methods)
    check_count(repeats, "repeats")
    upper = problem.hparams.layout.start if hparams is None else problem.hparams.read(hparams, "`hparams`")
    bench = Bench(problem, upper, seed)
    held_against = _reference(bench, reference)
    rows = [_row(bench, label, method, held_against.gradient, repeats, memory) for label, method in chosen.items()]
    why = "a timed call of each method" if repeats == 1 else f"up to {repeats} timed calls of each method"
    why += " and a slower one that watches its memory (memory=False leaves it out)" * memory
    conditions = f"seed {seed}; {time.perf_counter() - begin:.2g} s in all: the reference, {why}"
    return Comparison(tuple(rows), held_against.words, bench.words, conditions)


def _labelled(methods: Methods) -> dict[str, Estimator]:
    if isinstance(methods, Mapping):
        return {label: estimator(method) for label, method in methods.items()}
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise InvalidTypeError(
            f"`methods` is {methods!r}, expected a list of methods; write compare(problem, [{methods!r}])"
        )
    if not methods:
        raise InvalidValueError('`methods` is empty; write for example compare(problem, ["implicit", "neumann"])')
    return {_words(method): estimator(method) for method in methods}


def _words(method: str | Estimator) -> str:
    """Return the name, or the settings without the addresses of functions."""
    return method if isinstance(method, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(method))


def _reference(bench: Bench, given: Any) -> Reference:
    """Return the gradient that errors are held against, and what it is."""
    layout = bench.problem.hparams.layout
    if given is None:
        return best_reference(bench)
    if isinstance(given, Hypergradient):
        verdict = given.certificate.verdict
        return Reference(layout.read(given.gradient, "`reference`"), f"the hypergradient given, verdict {verdict}")
    if isinstance(given, str) or callable(given):
        found = bench.run(estimator(given, "reference"))
        verdict = found.certificate.verdict
        doubt = "" if found.certificate.trusted else ", so what stands under error is a distance from it"
        return Reference(found.gradient, f"{_words(given)}, verdict {verdict}{doubt}")
    if isinstance(given, (bool, int, float)):
        raise InvalidTypeError(
            f"`reference` is {given!r}, expected a method, a Hypergradient, or a gradient in the structure of `hparams`"
        )
    return Reference(layout.read(given, "`reference`"), "the gradient that was given")


def _row(
    bench: Bench, label: str, method: Estimator, exact: Vector | None, repeats: int, memory: bool
) -> ComparedMethod:
    device, found, peak = bench.device, [], None

    def run() -> None:
        found.append(bench.run(method))

    try:
        if memory:
            with peak_memory(device) as peak:
                run()
        seconds = milliseconds(run, device, repeats) / 1e3
    except (BilevelError, torch.OutOfMemoryError) as error:
        return ComparedMethod(label, None, None, math.nan, 0, 0, None, "refused", None, str(error))
    first = found[0]
    certificate: Certificate = first.certificate
    cost: Cost = first.cost
    return ComparedMethod(
        label,
        None if exact is None else _relative(first.gradient, exact),
        None if exact is None else _cosine(first.gradient, exact),
        seconds,
        cost.gradients,
        cost.products,
        None if peak is None else peak.bytes / 1e6,
        certificate.verdict,
        certificate.error,
        gradient=bench.problem.hparams.layout.shaped(first.gradient),
    )


def _relative(found: Vector, truth: Vector) -> float:
    whole = float(norm(truth))
    return float(norm(subtract(found, truth))) / (whole if whole > 0.0 else 1.0)


def _cosine(found: Vector, truth: Vector) -> float:
    sizes = float(norm(found)) * float(norm(truth))
    return float(dot(found, truth)) / sizes if sizes > 0.0 else math.nan


def _cells(row: ComparedMethod) -> tuple[str, ...]:
    if row.verdict == "refused":
        return (row.method, *["-"] * 7, row.verdict)
    return (
        row.method,
        _shown(row.error, ".1e"),
        _shown(row.claimed, ".1e"),
        _shown(row.cosine, ".4f"),
        f"{row.seconds:.2g}",
        f"{row.gradients:,}",
        f"{row.products:,}",
        _shown(row.megabytes, ".3g"),
        row.verdict,
    )


def _shown(figure: float | None, form: str) -> str:
    return "-" if figure is None else format(figure, form)


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column in _RIGHT else cell.ljust(width)
