"""What a training loop that stays the user's hands over: batches, and a model that may be another one each time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import InvalidTypeError
from bilevel.patterns import named_parameters
from bilevel.selection import Selection


class Handed:
    """A stream of the batch that was handed over last."""

    batch: Any = None

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.batch


def first_tensor(like: Any) -> Tensor:
    """Return a tensor of the dtype and the device that hyperparameters take."""
    if like is None:
        return torch.zeros(())
    found = next(iter(like.parameters()), None) if isinstance(like, nn.Module) else like
    if not isinstance(found, Tensor):
        raise InvalidTypeError(f"`like` is a {type(like).__name__}, expected a Tensor or a module with parameters")
    return found


def trained(params: Any) -> Any:
    """Return what tells models apart: another one, or other trainable parameters, need another evaluator."""
    if isinstance(params, Selection):
        return id(params.module), params.names
    if isinstance(params, nn.Module):
        return id(params), tuple(name for name, p in named_parameters(params).items() if p.requires_grad)
    return None


def takes_batch(loss: Callable[..., Any]) -> bool:
    """Say whether a loss needs three arguments."""
    try:
        inspect.signature(loss).bind(None, None)
    except TypeError:
        return True
    except ValueError:  # a builtin without a signature
        return False
    return False
