"""The problems of the trust study through TorchOpt, betty-ml and BOAT, where they can express them.

Each is given the same inner point, so that only its hypergradient is looked at, in its default settings and in the best
ones that its documentation knows (as many conjugate-gradient steps as there are variables; hundreds of Neumann terms).
Both losses are scaled to size 1 first: the largest inner curvature is 1, which suits every default step and tolerance,
and so is the outer gradient. None says how far its answer can be trusted, so an answer is right or wrong by the most
lenient bar of this library, 0.5 for a method that approximates by design and 1e-2 for the others. The direct term of
the outer loss, which betty-ml adds elsewhere, is added for it.

betty-ml and BOAT: `pip install --no-deps betty-ml boat-torch higher`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import optree
import torch
from torch import Tensor

from benchmarks.cases import NO_TRUTH, Case, error_of
from benchmarks.traps import draw_case
from bilevel import hypergradient
from bilevel.errors import BilevelError

BAR, BAR_BY_DESIGN = 1e-2, 0.5


@dataclass(frozen=True)
class Task:
    """One problem in the form that all three take: lists of tensors.

    Attributes:
        inner_loss: `(params, hparams) -> scalar` on lists; so is outer_loss.
        params: the inner point.
        hparams: natural values.
        unit: what the outer loss was divided by.
    """

    inner_loss: Callable[[Any, Any], Tensor]
    outer_loss: Callable[[Any, Any], Tensor]
    params: list[Tensor]
    hparams: list[Tensor]
    unit: float

    @property
    def size(self) -> int:
        """Number of inner variables."""
        return sum(t.numel() for t in self.params)

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return both as new leaves."""
        return [t.clone().requires_grad_() for t in self.params], [t.clone().requires_grad_() for t in self.hparams]


def task_of(case: Case) -> Task:
    """Return the problem of a case at its inner point, the exact solution where it has none."""
    assert case.drawn is not None
    known = case.drawn.known
    point = known.truth.params if case.params is None else case.params
    params, params_spec = optree.tree_flatten(point)
    leaves, hparams_spec = optree.tree_flatten(known.hparams)
    hparams = [getattr(leaf, "value", leaf).detach() for leaf in leaves]

    def on_lists(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        return lambda w, h: loss(
            optree.tree_unflatten(params_spec, list(w)), optree.tree_unflatten(hparams_spec, list(h))
        )

    inner_loss = on_lists(known.inner_loss)
    hessian: Any = torch.autograd.functional.hessian(lambda *w: inner_loss(w, hparams), tuple(params))
    rows = [torch.cat([b.reshape(p.numel(), -1) for b in row], dim=1) for p, row in zip(params, hessian, strict=True)]
    largest = float(torch.linalg.eigvalsh(torch.cat(rows)).abs().max())
    outer_loss = on_lists(known.outer_loss)
    w = [p.detach().requires_grad_() for p in params]
    slope = torch.autograd.grad(outer_loss(w, hparams), w, materialize_grads=True)
    unit = max(float(torch.cat([g.reshape(-1) for g in slope]).norm()), 1e-300)
    return Task(
        lambda w, h: inner_loss(w, h) / largest,
        lambda w, h: outer_loss(w, h) / unit,
        [p.detach() for p in params],
        hparams,
        unit,
    )


# TorchOpt: custom_root(optimality, argnums, solve)


def _torchopt(solve: Callable[[Task], Any]) -> Callable[[Task], list[Tensor]]:
    def run(task: Task) -> list[Tensor]:
        import torchopt

        _, h = task.leaves()
        argnums = tuple(range(1, 1 + len(h)))

        def fit(w: Any, *h: Tensor) -> Any:
            return tuple(task.params)

        def optimality(w: Any, *h: Tensor) -> Any:
            return torch.func.grad(lambda w: task.inner_loss(w, h))(w)

        given = solve(task)
        root = torchopt.diff.implicit.custom_root(optimality, argnums=argnums, **({} if given is None else given))
        w = root(fit)(tuple(task.params), *h)
        grads = torch.autograd.grad(task.outer_loss(w, h), h)
        return list(grads)

    return run


def _torchopt_solver(name: str, **options: Any) -> Callable[[Task], Any]:
    def build(task: Task) -> Any:
        import torchopt

        named = {key: value(task) if callable(value) else value for key, value in options.items()}
        return {"solve": getattr(torchopt.linear_solve, name)(**named)}

    return build


# betty-ml: its hypergradient functions on a stand-in for its Problem


def _betty(kind: str, **options: Any) -> Callable[[Task], list[Tensor]]:
    def run(task: Task) -> list[Tensor]:
        from betty.configs import Config
        from betty.hypergradient import jvp_fn_mapping

        w, h = task.leaves()
        settings = {key: value(task) if callable(value) else value for key, value in options.items()}
        inner = types.SimpleNamespace(
            paths=[],
            config=Config(type=kind, **settings),
            cur_batch=None,
            training_step_exec=lambda batch: task.inner_loss(w, h),
            trainable_parameters=lambda: w,
            parameters=lambda: w,
        )
        outer = types.SimpleNamespace(trainable_parameters=lambda: h)
        grads = torch.autograd.grad(task.outer_loss(w, h), [*w, *h], materialize_grads=True)
        through = jvp_fn_mapping[kind](grads[: len(w)], inner, outer)
        return [t if d is None else t + d for t, d in zip(through, grads[len(w) :], strict=True)]

    return run


# BOAT: the functions behind its operators "CG" and "NS", on a gradient step


def _boat(kind: str, steps: Callable[[Task], int]) -> Callable[[Task], list[Tensor]]:
    def run(task: Task) -> list[Tensor]:
        from boat_torch.utils import op_utils

        w, h = task.leaves()
        inner, outer = task.inner_loss(w, h), task.outer_loss(w, h)

        def step(params: list[Tensor], loss: Tensor) -> list[Tensor]:
            grads = torch.autograd.grad(loss, params, create_graph=True)
            return [p - g for p, g in zip(params, grads, strict=True)]

        return list(getattr(op_utils, kind)(w, h, outer, inner, steps(task), step, 1e-10))

    return run


# Library, settings -> whether the method approximates by design, and the function.
RIVALS: dict[tuple[str, str], tuple[bool, Callable[[Task], list[Tensor]]]] = {
    ("torchopt", "default (normal CG)"): (False, _torchopt(lambda task: None)),
    ("torchopt", "CG, more steps than variables"): (
        False,
        _torchopt(_torchopt_solver("solve_cg", maxiter=lambda t: 2 * t.size + 10, atol=1e-12)),
    ),
    ("torchopt", "inverse"): (False, _torchopt(_torchopt_solver("solve_inv"))),
    ("torchopt", "Neumann, default"): (True, _torchopt(_torchopt_solver("solve_inv", ns=True))),
    ("torchopt", "Neumann, 500 terms"): (
        True,
        _torchopt(_torchopt_solver("solve_inv", ns=True, maxiter=500)),
    ),
    ("betty-ml", "default (darts)"): (True, _betty("darts")),
    ("betty-ml", "Neumann, default"): (True, _betty("neumann")),
    ("betty-ml", "Neumann, 500 terms"): (
        True,
        _betty("neumann", neumann_iterations=500),
    ),
    ("betty-ml", "CG, default"): (False, _betty("cg")),
    ("betty-ml", "CG, as many steps as variables"): (False, _betty("cg", cg_iterations=lambda t: t.size)),
    ("boat-torch", "CG, k = 10"): (False, _boat("conjugate_gradient", lambda t: 10)),
    ("boat-torch", "CG, more steps than variables"): (
        False,
        _boat("conjugate_gradient", lambda t: 2 * t.size + 10),
    ),
    ("boat-torch", "NS, k = 10"): (True, _boat("neumann", lambda t: 10)),
    ("boat-torch", "NS, k = 500"): (True, _boat("neumann", lambda t: 500)),
}
OURS = ("implicit", "cg", "neumann", "fixed-point")
MODULES = {"torchopt": "torchopt", "betty-ml": "betty", "boat-torch": "boat_torch"}


def _installed(library: str) -> bool:
    try:
        importlib.import_module(MODULES[library])
    except ImportError:
        return False
    return True


def _outcome(case: Case, task: Task, by_design: bool, method: Callable[[Task], list[Tensor]]) -> str:
    """Return "right", "wrong" or "refused"."""
    truth = case.runs[0].truth
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            found = method(task)
    except Exception:  # noqa: BLE001  a rival may refuse in any way
        return "refused"
    if truth is not NO_TRUTH and error_of([task.unit * g for g in found], truth) <= (
        BAR_BY_DESIGN if by_design else BAR
    ):
        return "right"
    return "refused" if any(issubclass(w.category, RuntimeWarning) for w in warned) else "wrong"


def _ours(case: Case, method: str) -> str:
    assert case.drawn is not None
    params = case.drawn.known.truth.params if case.params is None else case.params
    truth = case.runs[0].truth
    try:
        found = hypergradient(case.drawn.known.problem(), method, params=params, on_untrusted="ignore")
    except BilevelError:
        return "refused"
    if not found.certificate.trusted:
        return "refused"
    good = truth is not NO_TRUTH and error_of(found.gradient, truth) <= (BAR_BY_DESIGN if method == "neumann" else BAR)
    return "right" if good else "wrong"


def _rows(problems: int, seed: int) -> Iterator[tuple[tuple[str, str], bool, str]]:
    rivals = {key: value for key, value in RIVALS.items() if _installed(key[0])}
    for i in range(seed * 1_000_003, seed * 1_000_003 + problems):
        case = draw_case(i)
        if case.drawn is None:
            continue
        task = task_of(case)
        for method in OURS:
            yield ("bilevel", method), case.healthy, _ours(case, method)
        for key, (by_design, rival) in rivals.items():
            yield key, case.healthy, _outcome(case, task, by_design, rival)


def study(problems: int, seed: int) -> str:
    """Return the table as Markdown, with the versions."""
    count: Counter[Any] = Counter()
    for key, healthy, outcome in _rows(problems, seed):
        count[key, healthy, outcome] += 1
    lines = [
        "| library | settings | healthy: right | refused or flagged | wrong in silence | traps: right "
        "| refused or flagged | wrong in silence |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for key in dict.fromkeys(key for key, _, _ in count):
        cells = [f"{count[key, h, outcome]}" for h in (True, False) for outcome in ("right", "refused", "wrong")]
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} |")
    names = ["torch", *(library for library in MODULES if _installed(library))]
    missing = [library for library in MODULES if not _installed(library)]
    lines.append("\n" + ", ".join(f"{name} {version(name)}" for name in names))
    return "\n".join(lines + ([f"not installed: {', '.join(missing)}"] if missing else []))
