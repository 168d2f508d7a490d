"""Families: many inner problems of one kind that share the hyperparameters, solved and differentiated together.

    w_i*(λ) ∈ argmin g(w, λ; inner data i)      F(λ) = mean of f(w_i*(λ), λ; outer data i)      i = 1 ... n

Meta-learning tasks, folds of a cross-validation. The sum of the n inner losses is one inner problem whose Hessian has a
block for each member, so every estimator works as it is, and one vectorized evaluation serves all members.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.data import Batches
from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.losses import scalar
from bilevel.modules import ModuleVariables
from bilevel.problem import BilevelProblem
from bilevel.solvers.linear.base import check_count
from bilevel.variables import variables


def over(problem: BilevelProblem, n: int, starts: Any = None) -> BilevelProblem:
    """Return n inner problems like this one, which share its hyperparameters, as one problem.

    Every tensor of the inner variables gets a leading dimension n, and both losses are called by `torch.func.vmap`,
    each member with its own variables and its own slice of the data. So they must not look at numbers (`.item()`,
    `if loss > 1`). The inner loss is the sum over members, the outer one the mean.

    Args:
        problem: one member. Its `inner_data`, `outer_data` and `test_data`, where given, hold all members: every tensor
            of a batch has a leading dimension n. What members share, losses close over.
        n: number of members.
        starts: where each member begins, stacked: in the structure of `params`, for a module a dict by its names. None:
            all begin where the problem does.

    Returns:
        A problem whose inner variables are `params` stacked, in their structure; for a module, a dict by its names.

    >>> import torch, bilevel
    >>> one = bilevel.BilevelProblem(
    ...     lambda w, h, a: ((w - a) ** 2 + h * w**2).sum(), lambda w, h, a: ((w - a) ** 2).sum(),
    ...     params=torch.zeros((), dtype=torch.float64), hparams=bilevel.positive(1.0),
    ...     inner_data=torch.tensor([1.0, 3.0]).double(), outer_data=torch.tensor([1.0, 3.0]).double())
    >>> found = bilevel.hypergradient(bilevel.over(one, 2))  # w_i = a_i / (1 + h), dF/dh = mean 2 a_i^2 h / (1 + h)^3
    >>> found.params.tolist(), round(found.gradient.item(), 6)
    ([0.5, 1.5], 1.25)
    """
    check_count(n, "n")
    if not isinstance(problem, BilevelProblem):
        raise InvalidTypeError(f"`problem` is a {type(problem).__name__}, expected the BilevelProblem of one member")
    groups = [penalty for penalty in getattr(problem.inner_solver, "penalties", ()) if hasattr(penalty, "groups")]
    if groups:
        raise InvalidValueError(
            f"`inner_solver` has the penalty {groups[0]!r}, whose groups would run over the members of the family; "
            "penalties of single entries (L1, ElasticNet, Box) can be taken"
        )
    family = copy.copy(problem)
    family.members = n
    stacked = {name: t.expand(n, *t.shape).clone() for name, t in problem.params.start.items()}
    if starts is None:
        module = isinstance(problem.params, ModuleVariables)
        starts = stacked if module else problem.params.shaped(stacked)
    family.params = variables(starts, problem.params.role)
    wanted, given = ({name: tuple(t.shape) for name, t in v.items()} for v in (stacked, family.params.start))
    if wanted != given:
        raise InvalidValueError(f"`starts` holds tensors of shapes {given}, expected a slice for each member: {wanted}")
    family.inner_batches, family.outer_batches = problem.inner_batches.twin(), problem.outer_batches.twin()
    family.pinned_batches = family.inner_batches.twin()
    family.inner_loss = _members(problem, problem.inner_loss, family.inner_batches, "inner", n, torch.sum)
    family.outer_loss = _members(problem, problem.outer_loss, family.outer_batches, "outer", n, torch.mean)
    if problem.test_loss is not None:
        family.test_loss = _members(problem, problem.test_loss, family.test_batches, "test", n, torch.mean)
    return family


def _members(
    problem: BilevelProblem,
    loss: Callable[..., Tensor],
    batches: Batches,
    side: str,
    n: int,
    joined: Callable[[Tensor], Tensor],
) -> Callable[..., Tensor]:
    """Return a loss over stacked variables: the sum or the mean of the members' losses."""
    name = f"{side}_loss"

    def whole(params: Any, hparams: Any, *batch: Any) -> Tensor:
        leaves: list[Any] = optree.tree_leaves(batch)  # type: ignore[arg-type]
        for leaf in leaves:
            if getattr(leaf, "shape", (n,))[:1] != (n,) or not isinstance(leaf, Tensor):
                shape = f"of shape {tuple(leaf.shape)}" if hasattr(leaf, "shape") else f"({type(leaf).__name__})"
                raise InvalidValueError(
                    f"`{side}_data` of a family of {n} holds something {shape}, expected Tensors whose first dimension "
                    f"is {n}, a slice for each member; close over what members share"
                )

        def member(w: Any, *one: Any) -> Tensor:
            if not isinstance(problem.params, ModuleVariables):
                return scalar(loss, (w, hparams, *one), name)
            with problem.params.bound(w) as lent:
                return scalar(loss, (lent, hparams, *one), name)

        values: Tensor = torch.func.vmap(member, randomness="different")(params, *batch)
        return joined(values)

    return whole
