"""What a loss of the user's returns, and its gradient; or an error in the user's terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError, noting
from bilevel.vector import Vector, dense


def scalar(loss: Callable[..., Any], given: tuple[Any, ...], name: str) -> Tensor:
    """Return what a loss of the user's returns, checked; an error of its own gets a note where it came from."""
    try:
        with noting(name, ", ".join(("params", "hparams", "batch")[: len(given)]), given[1]):
            value = loss(*given)
    except RuntimeError as error:
        dtypes = {t.dtype for t in optree.tree_leaves(given[1]) if isinstance(t, Tensor)}
        if len(dtypes) == 1 and any(word in str(error) for word in ("dtype", "Double", "Half")):
            error.add_note(
                f"bilevel: `params` and `hparams` are {dtypes.pop()} here; give the data of `{name}` that dtype too, "
                "or `params` and `hparams` the dtype of the data (.double())"
            )
        if "in-place operation" in str(error):
            error.add_note(
                "bilevel: `params` and `hparams` are lent: write the form out of place (x * 2 for x.mul_(2))"
            )
        raise
    if not isinstance(value, Tensor):
        raise InvalidTypeError(f"`{name}` returned a {type(value).__name__}, expected a scalar Tensor; {_cure(value)}")
    if value.dim() > 0:
        raise InvalidValueError(
            f"`{name}` returned a tensor of shape {tuple(value.shape)}, expected a scalar (0-d); add .mean() or .sum()"
        )
    if not value.is_floating_point():
        raise InvalidTypeError(f"`{name}` returned a {value.dtype} tensor, expected a floating-point one")
    return value


def _cure(value: Any) -> str:
    if value is None:
        return "add a return statement"
    if hasattr(value, "loss"):  # a ModelOutput of transformers
        return (
            "return its .loss" if isinstance(value.loss, Tensor) else "give the model labels=..., and return its .loss"
        )
    if isinstance(value, (tuple, list, dict)):
        return "return the one part of it that is the loss"
    return "return the tensor itself, without .item()"


def gradient(value: Tensor, at: Vector, name: str, *, create_graph: bool) -> Vector:
    """Differentiate what the inner loss `name` returned; zero for a tensor that it does not use."""
    if not value.requires_grad:
        raise InvalidTypeError(
            f"`{name}` returned a tensor that does not depend on params; do not detach them, and use the `params` that "
            "the loss is called with"
        )
    grads = torch.autograd.grad(value, list(at.values()), create_graph=create_graph, allow_unused=True)
    if all(g is None for g in grads):
        raise InvalidTypeError(
            f"`{name}` does not depend on params; use the `params` that the loss is called with, not the ones from "
            "outside"
        )
    pairs = zip(at.items(), grads, strict=True)
    return {tensor: torch.zeros_like(x) if g is None else dense(g) for (tensor, x), g in pairs}
