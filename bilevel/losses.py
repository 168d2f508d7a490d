"""What a loss of the user's returns: a scalar, or an error in the user's terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError


def scalar(loss: Callable[..., Any], given: tuple[Any, ...], name: str) -> Tensor:
    """Return what a loss of the user's returns, checked; an error of its own gets a note where it came from."""
    try:
        value = loss(*given)
    except Exception as error:
        arguments = ", ".join(("params", "hparams", "batch")[: len(given)])
        error.add_note(f"bilevel: while evaluating `{name}`, called with ({arguments})")
        raise
    if not isinstance(value, Tensor):
        hint = "add a return statement" if value is None else "return the tensor itself, without .item()"
        raise InvalidTypeError(f"`{name}` returned a {type(value).__name__}, expected a scalar Tensor; {hint}")
    if value.dim() > 0:
        raise InvalidValueError(
            f"`{name}` returned a tensor of shape {tuple(value.shape)}, expected a scalar (0-d); add .mean() or .sum()"
        )
    if not value.is_floating_point():
        raise InvalidTypeError(f"`{name}` returned a {value.dtype} tensor, expected a floating-point one")
    return value
