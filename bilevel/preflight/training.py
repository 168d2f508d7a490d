"""The checks of a dry run that look at the steps of the inner solver, at what the method sees, and at the curvature."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bilevel.errors import NotTwiceDifferentiableError
from bilevel.measure import free_memory, milliseconds
from bilevel.memory import taken
from bilevel.preflight.dryrun import DryRun
from bilevel.preflight.probes import random_vector
from bilevel.preflight.report import Costs
from bilevel.response import ProblemResponse
from bilevel.solvers.about import Sizes, Sweep, about
from bilevel.solvers.base import outer_gradient
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.solvers.recorded import fixed_bytes, floats
from bilevel.vector import size
from bilevel.walk import Walk, walk

CONDITION = {torch.float64: 1e6, torch.float32: 1e3}  # above, the digits of the type get scarce (field notes, fp32)
FLAT = {torch.float64: 1e-12, torch.float32: 1e-6}  # smallest over largest eigenvalue that counts as zero
MANY = 30  # hyperparameters; with as many products a step forward mode is slower than any unrolling
EXPLODES = 1e3  # growth of an adjoint over the inner loop, or over 100 steps of it


def check_steps(dry: DryRun, response: ProblemResponse) -> None:
    """Report inner steps that fail, blow up, or hold more memory than there is."""
    solver = dry.problem.inner_solver
    if not hasattr(solver, "step") or getattr(solver, "whole_loop", False) or dry.system is None:
        return
    with dry.tried("inner_solver", "mend the setting of the inner solver that is a function"):
        adjoint = random_vector(dry.lower, 2) if dry.outer is None else dry.outer.lower
        try:
            walked = dry.walk = walk(response, dry.lower, dry.upper, adjoint)
        except NotTwiceDifferentiableError:
            if about(dry.method).derivatives == 2:
                raise
            return
        if about(dry.method).begins == "last":
            return  # the steps are looked at for what they use; they are not going to be taken
        if walked.broke_at is not None:
            dry.add(
                "error",
                "inner_solver",
                f"the inner variables are NaN or infinite after step {walked.broke_at}",
                "lower the learning rate",
            )
            return
        _check_growth(dry, response, walked)
        if about(dry.method).unrolls:
            with dry.tried("method"):
                _check_work(dry, walked.total)
                _check_memory(dry, walked.bytes_per_step)


def _check_growth(dry: DryRun, response: ProblemResponse, walked: Walk) -> None:
    """Report a loop that expands and climbs.

    Expansion alone says little: Adam's normalization expands wherever an entry of the gradient is close to zero.
    """
    growth = max(1.0, walked.growth)
    if min(walked.total, 100) * math.log(growth) <= math.log(EXPLODES):
        return
    batch = response.draw()
    before, after = (response.value_and_gradient(w, dry.upper, batch, pinned=True)[0] for w in (dry.lower, walked.end))
    if float(after.detach()) <= float(before.detach()):
        return
    dry.add(
        "warning",
        "inner_solver",
        f"at the start one of the {walked.total} inner steps stretches differences {growth:.3g}-fold, and the inner "
        "loss rises: the loop diverges, and a gradient through it explodes",
        "lower the learning rate (below 2 / the largest curvature), or start at a better point",
    )


def _check_work(dry: DryRun, total: int) -> None:
    """Report a method whose work grows with the number of hyperparameters, where there are many."""
    count = size(dry.upper)
    refusal = getattr(dry.method, "refusal", None)
    refused = None if refusal is None else refusal(total, count, size(dry.lower))
    if refused is not None:
        message, _, remedy = refused.partition("; ")
        dry.add("error", "method", message, remedy)
        return
    products = unrolled(dry).products
    if about(dry.method).exact and products > MANY * total:
        dry.add(
            "note",
            "method",
            f"takes {products:,} products: one for every inner step and each of {count} hyperparameters",
            f'method="unroll" takes {total:,}, where the graph of all steps fits into the memory; or fewer, random '
            "directions: bilevel.Forward(directions=16)",
        )


def _check_memory(dry: DryRun, per_step: int) -> None:
    """Report graphs that take more than half of the free memory, and a method that takes steps again to avoid it."""
    sweep, free = unrolled(dry), free_memory(dry.first.device)
    needed = held_bytes(dry, per_step, sweep)
    if sweep.again:
        dry.add(
            "note",
            "method",
            f"{sweep.again:,} inner steps are taken again, because the graphs of {sweep.graphs} steps and the starts "
            f"of {sweep.states} fit into the memory that may be taken",
            "bilevel.Unroll(memory=...) with more is faster, where there is more",
        )
    if free is None or needed <= free / 2:
        return
    fitting = max(1, int(free / 2 / per_step))
    dry.add(
        "warning",
        "method",
        f"the graph of {sweep.graphs} steps {f'and {sweep.tangents} tangents take' if sweep.tangents else 'takes'} "
        f"{needed / 1e6:.3g} MB ({per_step / 1e6:.3g} MB a step), of {free / 1e6:.3g} MB that are free",
        f"bilevel.Truncated(steps={fitting}), activation checkpointing in the loss, smaller batches, or an implicit "
        "method",
    )


def unrolled(dry: DryRun) -> Sweep:
    """Return what a method that unrolls takes; all steps where it does not say."""
    total = 0 if dry.walk is None else dry.walk.total
    sweep = getattr(dry.method, "sweep", None)
    return Sweep(total, total) if sweep is None else sweep(total, size(dry.upper), _sizes(dry))


def _sizes(dry: DryRun) -> Sizes | None:
    """Return what a step takes, as `Unroll` measures it."""
    if dry.walk is None or dry.response is None:
        return None
    state = dry.response.initial_state(dry.lower)
    free, graph = free_memory(dry.first.device), dry.walk.bytes_per_step
    return Sizes(
        graph=graph,
        state=taken((dry.lower, state, dry.response.mark())),
        fixed=fixed_bytes(taken((dry.lower, floats(state))), taken(dry.upper), graph),
        free=None if free is None else free // 2,
    )


def held_bytes(dry: DryRun, per_step: int, sweep: Sweep) -> int:
    """Return the memory of the graphs, the starts of steps, and the tangents, which follow the state too."""
    held = per_step * sweep.graphs
    if dry.response is None:
        return held
    state = dry.response.initial_state(dry.lower) if sweep.states or sweep.tangents else {}
    if sweep.states:
        held += sweep.states * taken((dry.lower, state, dry.response.mark()))
    return held + sweep.tangents * taken((dry.lower, floats(state)))


def check_hyperparameters(dry: DryRun) -> None:
    """Report every hyperparameter that the method cannot see, and the method that can."""
    if dry.pulled is None or dry.outer is None:
        return
    by_losses = dry.pulled | {name for name, g in dry.outer.upper.items() if g is not None}
    solver = dry.problem.inner_solver
    for name in sorted(dry.upper.keys() - by_losses):
        label = dry.problem.hparams.layout.label(name)
        if getattr(solver, "whole_loop", False):
            _report_for_own_loop(dry, label)
        elif getattr(solver, "hidden_settings", False) and about(dry.method).sees != "loop":
            dry.add(
                "error",
                label,
                f"at most a setting of inner.{type(solver).__name__} uses it, and no derivative goes through those",
                "a differentiable optimizer (inner_solver=bilevel.inner.Adam(lr=lambda h: ..., steps=...)) with "
                'method="unroll", or method="zero-order"',
            )
        elif dry.walk is None and about(dry.method).sees == "loop":
            pass  # no step could be looked at
        elif dry.walk is None or name not in dry.walk.seen:
            dry.add(
                "error",
                label,
                "has no path to the outer loss: neither the outer loss, nor the gradient of the inner loss, nor a "
                "setting of the inner solver uses it",
                "use it (lr=lambda h: h[...]), or take it out of hparams",
            )
        elif about(dry.method).sees == "step":
            dry.add(
                "note",
                label,
                "only a setting of the inner solver uses it, and this method sees the fixed point of a step: a "
                "learning rate or a momentum does not move that, so its gradient is zero",
                'method="unroll" for a learning rate',
            )
        elif about(dry.method).sees == "losses":
            dry.add(
                "error",
                label,
                "only a setting of the inner solver uses it (a learning rate?), and an implicit method sees the losses "
                "alone",
                'method="unroll", or "truncated" for a long inner loop',
            )


def _report_for_own_loop(dry: DryRun, label: str) -> None:
    message = "neither the outer loss nor the gradient of the inner loss uses it"
    if about(dry.method).sees == "loop":
        dry.add("note", label, f"{message}; whether your own training loop does is not seen without training")
        return
    dry.add(
        "error",
        label,
        f"{message}, and an implicit method sees nothing else",
        'if your training loop uses it: method="unroll", with a loop that returns tensors with their graph; else take '
        "it out of hparams",
    )


def check_curvature(dry: DryRun) -> None:
    """Report negative, vanishing and badly scaled curvature at the starting point, for implicit methods."""
    if dry.system is None or about(dry.method).unrolls or about(dry.method).derivatives < 2:
        return
    with dry.tried("inner_loss"):
        low, high = extreme_eigenvalues(dry.system.operator, steps=min(30, size(dry.lower)))
        flat = FLAT.get(dry.first.dtype, 1e-3) * max(abs(low), abs(high))
        if low > flat:
            dry.condition = high / low
            _check_condition(dry, high / low)
        elif low < -flat:
            dry.add(
                "note",
                "inner_loss",
                f"has negative curvature at the starting point ({low:.2g}, the largest is {high:.2g}); where training "
                f"ends it must have none{_NEED.get(about(dry.method).begins, '')}",
                "regularize the inner loss, train to a minimum, or read the certificate",
            )
        elif getattr(dry.problem.inner_solver, "penalties", ()):
            dry.add(
                "note",
                "inner_loss",
                "has directions without curvature at the starting point, which does no harm if the penalty holds "
                "enough entries where training ends: only the others need curvature",
                "read the certificate",
            )
        else:
            dry.add(
                "warning",
                "inner_loss",
                f"has directions without curvature at the starting point (the largest curvature is {high:.2g}): if "
                "they are still flat where training ends, the inner solution is not unique",
                "add a little regularization to the inner loss: + 1e-6 * (w**2).sum()",
            )


_NEED = {"solution": " for conjugate gradients, and MINRES takes over otherwise", "last": ", or nothing is trusted"}


def _check_condition(dry: DryRun, condition: float) -> None:
    if condition <= CONDITION.get(dry.first.dtype, 1e2):
        return
    cure = 'regularize the inner loss, scale its variables alike, or method="direct" (up to some thousand of them)'
    dry.add(
        "warning",
        "inner_loss",
        f"its Hessian has a condition number of at least {condition:.1e} at the starting point: linear solvers are "
        "slow and lose digits",
        cure if dry.double else f"use float64 (.double()); {cure}",
    )


def measure(dry: DryRun, response: ProblemResponse, costs: Costs) -> Costs:
    """Add the milliseconds of one inner gradient, one product and one outer gradient to `costs`."""
    device = dry.first.device
    if dry.system is not None:
        system, batch, v = dry.system, response.draw(), random_vector(dry.lower, 1)
        gradient = milliseconds(lambda: response.value_and_gradient(dry.lower, dry.upper, batch), device)
        product = milliseconds(lambda: system.operator(v), device)
        costs = replace(costs, inner_gradient_ms=gradient, product_ms=product)
    if dry.outer is not None:
        gradient = milliseconds(lambda: outer_gradient(response, dry.lower, dry.upper), device)
        costs = replace(costs, outer_gradient_ms=gradient)
    return costs
