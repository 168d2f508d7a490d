"""The table of methods, made of what their classes declare."""

from __future__ import annotations

import inspect

from bilevel.solvers import BOME, METHODS, PBGD, About, Averaged, Estimator, about

# What has no name, because it is for fixed data or goes around another method.
OBJECTS: dict[str, Estimator] = {
    "bilevel.PBGD()": PBGD(),
    "bilevel.BOME()": BOME(),
    "bilevel.Averaged(batches=8)": Averaged(batches=8),
}

_SEES = {
    "losses": "losses",
    "step": "losses, and the fixed point of a step",
    "loop": "losses, learning rates, schedules",
}
_HEADER = ("`method`", "what it does", "sees", "needs", "cost", "memory", "error", "source")

LEGEND = """\
`sees`: which uses of a hyperparameter reach the hypergradient. What the losses use are regularization strengths, data
weights, priors, augmentations, parameters of the network's structure; a learning rate, a momentum or a schedule is seen
by methods that run the inner loop. `cost`: of one hypergradient, the inner solve of methods that need a converged inner
solution not among it. n inner variables, m hyperparameters, T inner steps, K steps of a window, k steps of a linear
solver or terms of a series, κ condition of the inner Hessian, ρ contraction of one inner step; a product is a
Hessian-vector product, two to three gradients dear. `error`: relative, at an exact inner solution."""


def method_table() -> str:
    """Return the table of all methods as Markdown, and what its letters mean.

    >>> print(method_table().splitlines()[0])
    | `method` | what it does | sees | needs | cost | memory | error | source |
    """
    named = [_line(f'`"{name}"`', make()) for name, make in METHODS.items()]
    lines = [_HEADER, *named, *(_line(f"`{written}`", method) for written, method in OBJECTS.items())]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(_HEADER), *text[1:], "", LEGEND])


def _line(name: str, method: Estimator) -> tuple[str, ...]:
    declared = about(method)
    terms = declared.terms
    return (
        name,
        _summary(method),
        _SEES[declared.sees],
        _needs(declared),
        terms.cost,
        terms.memory,
        terms.error,
        terms.source,
    )


def _summary(method: Estimator) -> str:
    """Return the first line of the docstring, of the linear solver where there is one."""
    described = getattr(method, "linear_solver", None) or method
    first = (inspect.getdoc(type(described)) or "").splitlines()[0].rstrip(".")
    return first[0].lower() + first[1:]


def _needs(declared: About) -> str:
    derivatives = {2: "two derivatives", 1: "one derivative", 0: "no derivative"}[declared.derivatives]
    where = {
        "solution": "a converged inner solution",
        "start": "differentiable steps" if declared.derivatives else "nothing of the inner loop",
        "last": "nothing solved",
    }[declared.begins]
    return f"{derivatives}, {where}"
