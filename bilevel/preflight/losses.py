"""The checks of a dry run that look at the two losses and their derivatives."""

from __future__ import annotations

import math

import torch

from bilevel.measure import saved_memory
from bilevel.preflight.dryrun import DryRun
from bilevel.preflight.probes import against_differences, asymmetry, custom_functions, random_vector
from bilevel.response import ProblemResponse
from bilevel.solvers.about import about
from bilevel.solvers.base import Linearization, System, outer_gradient
from bilevel.solvers.differences import Differences, partial
from bilevel.vector import Vector, is_finite, leaves

SYMMETRIC = {torch.float64: 1e-8, torch.float32: 1e-3}  # asymmetry of a product: rounding is 1e-16 and 1e-7


def check_outer_loss(dry: DryRun, response: ProblemResponse) -> None:
    """Report an outer loss that fails, is not finite, or does not depend on params."""
    with dry.tried("outer_loss"):
        dry.outer = outer_gradient(response, dry.lower, dry.upper)
        w, h = leaves(dry.lower), leaves(dry.upper)
        loss = response.loss(w, h)
        with response.at(w, h):
            grads = torch.autograd.grad(loss, list(w.values()), allow_unused=True)
        if all(g is None for g in grads):
            dry.add(
                "error",
                "outer_loss",
                "does not depend on params, so what training does cannot matter to it",
                "use the `params` that the loss is called with, not the ones from outside, and do not detach them",
            )
        if _noise(dry, *(_unpinned_outer(dry, response) for _ in range(2))):
            dry.add("note", "outer_loss", "is random (dropout?): each hypergradient pins its random numbers", _EVAL)


_EVAL = "switch dropout off with params.eval() if the randomness is not meant"


def _unpinned_outer(dry: DryRun, response: ProblemResponse) -> float:
    batches = dry.problem.outer_batches
    batch = batches.draw() if batches.deterministic else None
    if batches.given and batch is None:
        return 0.0  # a stream: two draws differ anyway
    with torch.no_grad(), response.at(dry.lower, dry.upper) as structures:
        return float(dry.problem.outer_loss(*structures, *([batch] if batches.given else [])))


def _noise(dry: DryRun, first: float, second: float) -> bool:
    """Say whether two values differ by more than the order of sums on a GPU explains."""
    rounding = 1e3 * torch.finfo(dry.first.dtype).eps
    return abs(first - second) > rounding * max(abs(first), abs(second))


def check_inner_loss(dry: DryRun, response: ProblemResponse) -> None:
    """Report an inner loss that fails, is not finite, random, or leaves params out."""
    params = dry.problem.params
    with dry.tried("inner_loss"):
        batch, before = response.draw(), params.buffers()
        attached, gradient = response.value_and_gradient(dry.lower, dry.upper, batch)
        again, _ = response.value_and_gradient(dry.lower, dry.upper, batch)
        value, after = float(attached.detach()), params.buffers()
        if not math.isfinite(value):
            remedy = "look for NaN in the data, log or sqrt at 0, or a starting point that is too large"
            dry.add("error", "inner_loss", f"is {value} at the starting point", remedy)
            return
        bad = [name for name, g in gradient.items() if not is_finite({name: g})]
        if bad:
            named = ", ".join(params.label(name) for name in bad)
            remedy = "sqrt, norm and pow have no slope at 0: add a small number inside, or start elsewhere"
            dry.add("error", "inner_loss", f"its gradient for {named} is NaN or infinite at the starting point", remedy)
            return
        with saved_memory() as saved:
            dry.system = _linearized(dry, response)
        dry.graph_bytes = sum(saved.storages.values())
        _check_randomness(dry, value, float(again.detach()))
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        if moved:
            dry.add(
                "note",
                "params",
                f"training moves buffers ({', '.join(moved[:3])}{', ...' * (len(moved) > 3)}), as BatchNorm in "
                "training mode does: a batch's statistics couple its examples; the buffers stand still within a "
                "hypergradient",
            )
        _check_unused(dry, response)


def _linearized(dry: DryRun, response: ProblemResponse) -> System | None:
    """Return the inner gradient with the products that the method makes of it."""
    derivatives = about(dry.method).derivatives
    if derivatives == 2:
        return Linearization(response, dry.lower, dry.upper)
    if response.has_kinks and derivatives == 0:
        return None
    return Differences(response, dry.lower, dry.upper)


def _check_randomness(dry: DryRun, value: float, again: float) -> None:
    if not _noise(dry, value, again):
        return
    dry.add("note", "inner_loss", "is random (dropout?): each hypergradient pins its random numbers", _EVAL)
    if getattr(dry.problem.inner_solver, "needs_fixed_loss", False) and about(dry.method).begins != "last":
        dry.add(
            "warning",
            "inner_solver",
            f"{type(dry.problem.inner_solver).__name__} needs a fixed loss, so it trains under one draw of the random "
            "numbers (one dropout mask) and fits that",
            "switch dropout off with params.eval(), or write inner_solver=bilevel.inner.Adam(lr=..., steps=...)",
        )


def _check_unused(dry: DryRun, response: ProblemResponse) -> None:
    w = leaves(dry.lower)
    if about(dry.method).derivatives == 2:
        attached = response.residual(w, leaves(dry.upper))
        unused = [name for name, r in attached.items() if not r.requires_grad and not bool(r.any())]
    else:
        unused = [name for name, g in partial(response, w, dry.upper, w).items() if g is None]
    for name in unused:
        needed = dry.outer is not None and bool(dry.outer.lower[name].any())
        label = dry.problem.params.label(name)
        if needed and not about(dry.method).unrolls:
            dry.add(
                "error",
                label,
                "`inner_loss` does not use it and `outer_loss` does: nothing determines it, and an implicit method has "
                "no answer there",
                "use it in the inner loss, or take it out of params (requires_grad_(False) in a module)",
            )
        else:
            dry.add(
                "warning",
                label,
                "`inner_loss` does not use it, so training leaves it where it starts",
                "use it, or take it out of params (requires_grad_(False) in a module)",
            )


def check_second_derivatives(dry: DryRun, response: ProblemResponse) -> None:
    """Report products that fail, are not symmetric, or are not the slope of the gradient."""
    system, dry.system = dry.system, None  # later checks need products that work
    if system is None:
        return
    if about(dry.method).derivatives < 2:
        pulled = system.pull_back(random_vector(dry.lower, 1))
        dry.pulled, dry.system = frozenset(n for n, g in pulled.items() if g is not None), system
        return
    with dry.tried("inner_loss", "replace the operation in the inner loss by one that can be differentiated twice"):
        u, v = (random_vector(dry.lower, seed) for seed in (0, 1))
        of_u, of_v = system.operator(u), system.operator(v)
        dry.pulled = frozenset(n for n, g in system.pull_back(v).items() if g is not None)
        if not (is_finite(of_u) and is_finite(of_v)):
            remedy = "add a small number inside of sqrt, norm or pow, or start elsewhere"
            dry.add("error", "inner_loss", "its second derivative is NaN or infinite at the starting point", remedy)
            return
        skew = asymmetry(u, of_u, v, of_v)
        if skew > SYMMETRIC.get(dry.first.dtype, 0.1):
            dry.add(
                "error",
                "inner_loss",
                f"its second derivative is not symmetric (u·Hv and v·Hu differ by {skew:.1e}), so what autograd "
                f"returns is not the gradient of the loss{_suspects(dry, response)}",
                "mend the backward of the custom autograd.Function",
            )
        _check_differences(dry, response, v, of_v)
        dry.system = system


def _check_differences(dry: DryRun, response: ProblemResponse, v: Vector, product: Vector) -> None:
    found = against_differences(response, dry.lower, dry.upper, v, product)
    if found.agrees and found.kinks:
        dry.add(
            "note",
            "inner_loss",
            "its gradient jumps near the starting point, as that of ReLU, max-pooling or abs does: autograd drops that "
            "curvature, and the hypergradient is that of the piece where training ends",
            f"use a smooth activation (Softplus, GELU, Tanh) if the hypergradient shall see it; {_PENALTY}",
        )
    elif not found.agrees and found.settled and dry.double:
        dry.add(
            "error",
            "inner_loss",
            f"its Hessian-vector product is off by {found.mismatch:.0%} from differences of its gradient at every step "
            f"size: autograd loses curvature{_suspects(dry, response)}",
            "a backward that detaches or uses .data, .item() or numpy has no second derivative: write it with "
            "differentiable operations",
        )
    elif not found.agrees:
        dry.add(
            "warning",
            "inner_loss",
            f"its Hessian-vector product is off by {found.mismatch:.0%} from differences of its gradient, at every "
            f"step size that this dtype allows: kinks at the starting point, or a backward that loses curvature"
            f"{_suspects(dry, response)}",
            "run this check in float64"
            if not dry.double
            else f"start away from the kink, or use smooth operations; {_PENALTY}",
        )


_PENALTY = "a penalty on params with a kink (l1) belongs into inner_solver=bilevel.inner.Proximal(bilevel.prox.L1(...))"


def _suspects(dry: DryRun, response: ProblemResponse) -> str:
    value, _ = response.value_and_gradient(leaves(dry.lower), dry.upper, response.draw(), create_graph=True)
    names = custom_functions(value)
    return f" (custom functions in it: {', '.join(names)})" if names else ""
