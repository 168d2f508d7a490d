"""A dry run under way: where it is, what it has found, and what can be seen before any loss is called."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.evaluation import check_decay, check_smooth, idle_solver
from bilevel.preflight.report import Costs, Finding, Level
from bilevel.problem import BilevelProblem
from bilevel.response import ProblemResponse
from bilevel.solvers import Estimator
from bilevel.solvers.about import about
from bilevel.solvers.base import OuterGradient, System
from bilevel.sparse import Design, is_sparse
from bilevel.vector import Vector, size
from bilevel.walk import Walk

# What a user's function may raise by mistake. Ctrl-C, and warnings that were turned into errors, go through.
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class DryRun:
    """What the checks share; a check leaves what later ones need.

    Attributes:
        outer: the gradient of the outer loss; None while it could not be had, like the others.
        system: the inner gradient with its graph.
        pulled: which hyperparameters the inner gradient uses.
        walk: a few steps of the inner solver.
        condition: largest over smallest eigenvalue of the inner Hessian.
        graph_bytes: what the graph of one inner gradient holds.
    """

    problem: BilevelProblem
    method: Estimator
    findings: list[Finding] = field(default_factory=list)
    response: ProblemResponse | None = None
    outer: OuterGradient | None = None
    system: System | None = None
    pulled: frozenset[str] | None = None
    walk: Walk | None = None
    condition: float | None = None
    graph_bytes: int = 0
    costs: Costs = field(default_factory=Costs)

    @property
    def lower(self) -> Vector:
        """The inner variables at their start."""
        return self.problem.params.start

    @property
    def upper(self) -> Vector:
        """The hyperparameters at their start, natural units."""
        return self.problem.hparams.layout.start

    @property
    def first(self) -> Tensor:
        """Any inner variable: all have its dtype and device."""
        return next(iter(self.lower.values()))

    @property
    def double(self) -> bool:
        """The problem is in float64."""
        return self.first.dtype == torch.float64

    def add(self, level: Level, subject: str, message: str, remedy: str = "") -> None:
        """Report something."""
        self.findings.append(Finding(level, subject, message, remedy))

    @contextmanager
    def tried(self, subject: str, remedy: str = "") -> Iterator[None]:
        """Turn what is raised inside into an error that is reported; a `BilevelError` says itself what to do."""
        try:
            yield
        except BilevelError as error:
            message, _, cure = str(error).partition("; ")
            self.add("error", subject, message, cure or remedy)
        except MISTAKES as error:
            first, where = (str(error).splitlines() or [""])[0], _where(error)
            if not where and not isinstance(error, RuntimeError):
                raise  # torch raises RuntimeError without the user's code on the stack; anything else is our own bug
            self.add("error", subject, f"{type(error).__name__}: {first}{where}", remedy or "mend the function")


def _where(error: BaseException) -> str:
    """Return the line of the user's code that raised: the last one outside of this library and of torch."""
    own = ("bilevel", "solvers", "torch", "contextlib", "optree", "torchopt")
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    outside = [f for f in frames if f.f_globals.get("__name__", "").split(".")[0] not in own]
    if not outside:
        return ""
    code = outside[-1].f_code
    return f" (in {code.co_name}, {code.co_filename.rsplit('/', 1)[-1]}, near line {outside[-1].f_lineno})"


def check_settings(dry: DryRun) -> None:
    """Report what the inner solver, the data and the dtype say before any loss is called."""
    _check_inner_solver(dry)
    _check_data(dry)
    if dry.double or about(dry.method).unrolls:
        return
    if about(dry.method).derivatives < 2:
        dry.add(
            "note" if dry.first.dtype == torch.float32 else "warning",
            "params",
            f"{dry.first.dtype}: differences of {'losses' * (about(dry.method).derivatives == 0) or 'gradients'} lose "
            "half of the digits or more",
            "for small problems use float64: .double() on params, hparams and data",
        )
    elif dry.first.dtype == torch.float32 and about(dry.method).begins == "last":
        pass  # no linear system is solved
    elif dry.first.dtype == torch.float32:
        dry.add(
            "note",
            "params",
            "float32: the linear solve of an implicit method ends at about 1e-5 times the condition number; "
            "bilevel.Implicit then takes the hypergradient again in float64",
            "for small problems use float64 from the start: .double() on params, hparams and data",
        )
    else:
        dry.add(
            "warning",
            "params",
            f"{dry.first.dtype} has too few digits for the linear solve of an implicit method",
            "keep params in float32 or float64 and use autocast in the losses",
        )


def _check_inner_solver(dry: DryRun) -> None:
    solver, problem = dry.problem.inner_solver, dry.problem
    name = type(solver).__name__
    if about(dry.method).unrolls and not hasattr(solver, "step"):
        dry.add(
            "error",
            "inner_solver",
            f"{name} has no steps that can be differentiated, and the method unrolls them",
            'inner_solver=bilevel.inner.SGD(lr=..., steps=...), or method="implicit"',
        )
    elif about(dry.method).begins == "last":
        _check_moving(dry)
    elif getattr(solver, "needs_fixed_loss", False) and not problem.inner_batches.deterministic:
        dry.add(
            "error",
            "inner_solver",
            f"{name} needs one fixed inner loss, and `inner_data` gives another batch at every call",
            "give one batch (Tensors, or a Dataset, which is read whole), or an optimizer of minibatches: "
            'inner_solver=bilevel.inner.Adam(lr=..., steps=...); or method="soba", which needs none',
        )
    try:
        check_decay(solver, dry.method)
    except BilevelError as error:
        message, _, cure = str(error).partition(". ")
        dry.add("error", "inner_solver", message, cure)


def _check_moving(dry: DryRun) -> None:
    """Say what becomes of the inner solver under a method that moves the inner variables itself."""
    solver = dry.problem.inner_solver
    try:
        check_smooth(solver, dry.method)
    except BilevelError as error:
        message, _, cure = str(error).partition("; ")
        dry.add("error", "inner_solver", message, cure)
        return
    if idle := idle_solver(solver, dry.method):
        dry.add("note", "inner_solver", idle, 'set the step size there (lr=...), or write method="implicit"')


def _check_data(dry: DryRun) -> None:
    inner, outer = dry.problem.inner_data, dry.problem.outer_data
    for role, data in (("inner_data", inner), ("outer_data", outer)):
        if isinstance(data, Iterator):
            dry.add(
                "warning",
                role,
                "is an iterator that cannot start again: this dry run took batches from it, and no run can be resumed",
                "give a DataLoader or another iterable that starts again",
            )
    shared = inner is not None and outer is not None and _sources(inner) & _sources(outer)
    if shared and dry.problem.members is None:  # what both levels of a family see may be masks of folds
        dry.add(
            "warning",
            "outer_data",
            "holds the same data as `inner_data`: hyperparameters that are judged by the training data are tuned to "
            "overfit",
            "give validation data that training does not see",
        )
    test = dry.problem.test_data
    if test is not None and any(_sources(test) & _sources(data) for data in (inner, outer) if data is not None):
        dry.add(
            "warning",
            "test_data",
            "holds the same data as `inner_data` or `outer_data`: its loss cannot show overfitted hyperparameters",
            "give data that nothing is trained or tuned on",
        )
    count, examples = size(dry.upper), _examples(outer, 1 if dry.problem.members is None else 2)
    if examples is not None and count > examples:
        dry.add(
            "note",
            "hparams",
            f"{count} hyperparameters and {examples} outer examples: they can fit the noise of the validation data",
            "keep a third set of data for testing (`test_data=`), stop early on it (`patience=`), or add a prior on "
            "hparams to the outer loss",
        )


def _sources(data: Any) -> set[int]:
    """Return the identities of a data set and of the tensors in it."""
    source = getattr(data, "dataset", data)
    tensors = getattr(source, "tensors", source if isinstance(source, (Tensor, dict, list, tuple)) else ())
    parts: list[Any] = optree.tree_leaves(tensors)  # type: ignore[arg-type]
    return {id(source), *(id(part) for part in parts if _is_matrix(part))}


def _is_matrix(data: Any) -> bool:
    return isinstance(data, (Tensor, Design)) or is_sparse(data)


def _examples(data: Any, dimensions: int) -> int | None:
    """Return how many examples there are, where that can be seen: the first dimensions of the first tensor."""
    source = getattr(data, "dataset", data)
    if isinstance(source, (dict, list, tuple)) or _is_matrix(source):
        parts: list[Any] = optree.tree_leaves(source)
        sizes = [math.prod(t.shape[:dimensions]) for t in parts if _is_matrix(t) and len(t.shape) > 0]
        return sizes[0] if sizes else None
    try:
        return len(source) if hasattr(source, "__getitem__") else None
    except TypeError:
        return None
