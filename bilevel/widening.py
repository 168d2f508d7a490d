"""Run a function that was written in float32 in float64, whatever tensors it has captured.

A mode over torch's functions, so derivatives of any order are those of the float64 function. What would lose digits or
lose a side effect on the way is refused with `CannotWidenError`: writing into a captured float32 tensor, leaving torch
(NumPy, pointers), going back to fewer digits.
"""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.errors import BilevelError
from bilevel.sparse import Design


class CannotWidenError(BilevelError, TypeError):
    """A function does something that has no counterpart in float64."""


_LEAVES_TORCH = {"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}
# They look at a shape or the like: no need to convert a whole data set for that.
_LOOKS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "__len__"}
# These draw other numbers in float64 than in float32. (Dropout draws the same on a CPU.)
_DRAWS = {"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "poisson", "binomial", "multinomial"}
_DRAWS_INTO = {"bernoulli_", "uniform_", "normal_", "exponential_", "cauchy_", "log_normal_", "geometric_", "random_"}
_WRITES = {"__setitem__", "__set__", "__delete__", "grad", "backward"}
_FEWER_DIGITS = (torch.float32, torch.float16, torch.bfloat16)


class InFloat64(TorchFunctionMode):
    """Promotes float32 tensors and dtypes among the arguments of every torch function, and float32 results.

    >>> X = torch.tensor([0.5])
    >>> with InFloat64():
    ...     (X * X.new_ones(1)).dtype
    torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` on promoted arguments."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LOOKS:
            return func(*args, **kwargs)
        if name == "__get__":
            return widened(func(*args, **kwargs))
        if name in _LEAVES_TORCH:
            raise CannotWidenError(f"Tensor.{name}() leaves torch")
        _refuse_writing(name, args, kwargs)
        if name in _DRAWS:
            return widened(func(*_narrowed(args), **_narrowed(kwargs)))
        if name in _DRAWS_INTO:
            return args[0].copy_(func(torch.empty_like(args[0], dtype=torch.float32), *args[1:], **kwargs))
        args, kwargs = widened(args), widened(kwargs)
        found = (torch.Tensor.double if name == "float" else func)(*args, **kwargs)
        if _holds(found, _FEWER_DIGITS) and _holds((args, kwargs), (torch.float64,)):
            raise CannotWidenError(f"{name}() goes back from float64 to fewer digits")
        return widened(found)


def _refuse_writing(name: str, args: Any, kwargs: Any) -> None:
    """Raise for an operation in place on a float32 tensor: only a promoted copy would see it."""
    writes = name in _WRITES or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    writes = writes or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))
    # autograd.grad has no target, but a float32 tensor in it is not the one that was promoted for the loss.
    targets = args if name in ("grad", "backward") else (args[:1] if writes else (), kwargs.get("out"))
    if (writes or "out" in kwargs) and _holds(targets, (torch.float32,)):
        raise CannotWidenError(f"{name}() works on a float32 tensor in place")


def _holds(structure: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    leaves = optree.tree_leaves(structure, none_is_leaf=True)
    return any(isinstance(leaf, Tensor) and leaf.dtype in dtypes for leaf in leaves)


def widened(structure: Any) -> Any:
    """Return a structure with float32 tensors and dtypes made float64, differentiably."""
    return _mapped(structure, torch.float32, torch.float64)


def _narrowed(structure: Any) -> Any:
    return _mapped(structure, torch.float64, torch.float32)


def _mapped(structure: Any, old: torch.dtype, new: torch.dtype) -> Any:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, (Tensor, Design)):
            return leaf.to(new) if leaf.dtype == old else leaf
        return new if leaf is old else leaf

    if isinstance(structure, Tensor):
        return convert(structure)
    return optree.tree_map(convert, structure, none_is_leaf=True)
