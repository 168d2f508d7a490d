"""What autograd cannot differentiate twice: the fix where there is one, a name where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.errors import NotTwiceDifferentiableError

# Beginnings or parts of torch's messages, and what to write instead. The text of the message names the operation.
_LINE = " (inside torch.autograd.set_detect_anomaly(True) torch prints the line that calls it)"
_CURES = {
    "use_reentrant": "activation checkpointing must be non-reentrant: write checkpoint(..., use_reentrant=False)",
    "modified by an inplace operation": "an operation in place overwrote a value that a derivative needs: write the "
    f"out-of-place form (x = x * 2 for x.mul_(2), F.relu(x) for inplace=True) in the loss or the module{_LINE}",
    "torch.compile": "a compiled function has no second derivative: give the loss the uncompiled function or module (a "
    "compiled `params` module is unwrapped by itself, one that the loss calls from outside is not)",
    "once_differentiable": "a custom autograd.Function is marked once_differentiable: write its backward with "
    "differentiable operations, or remove the mark",
    "is not implemented": "this operation has no second derivative in torch: replace it in the inner loss by "
    f"operations that have one{_LINE}",
    "cudnn": "cuDNN's recurrent networks have no second derivative: wrap the loss in "
    "torch.backends.cudnn.flags(enabled=False)",
}
INSTEAD = 'Or choose method="finite-difference" or "penalty", which need first derivatives only'


@contextlib.contextmanager
def twice_differentiable(recurrent_on_gpu: bool) -> Iterator[None]:
    """Run losses so that they can be differentiated twice where torch has a way.

    Fused attention gives way to the math backend; cuDNN to native kernels where a recurrent layer runs on a GPU.
    """
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent_on_gpu else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), cudnn:
        yield


@contextlib.contextmanager
def explained(what: str, instead: str = "") -> Iterator[None]:
    """Turn torch's errors about missing derivatives into one that names the operation and the cures."""
    try:
        yield
    except RuntimeError as error:
        explain(error, what, instead)
        raise


def explain(error: RuntimeError, what: str, instead: str = "") -> None:
    """Raise what `explained` makes of an error; return where that is nothing."""
    text = str(error)
    for part, cure in _CURES.items():
        if part in text:
            message = f"{what} failed: {cure}. {instead}torch says: {text.splitlines()[0]}"
            raise NotTwiceDifferentiableError(message) from error


def custom_functions(value: Tensor) -> dict[str, bool]:
    """Return the user's own autograd Functions behind a tensor, and whether each is marked once_differentiable."""
    owners = [getattr(type(node), "_forward_cls", None) for node in nodes(value)]
    own = [owner for owner in owners if owner is not None and not owner.__module__.startswith(("torch.", "bilevel."))]
    return {owner.__qualname__: hasattr(owner.backward, "__wrapped__") for owner in own}


def silently_wrong(value: Tensor) -> list[str]:
    """Return what torch differentiates twice wrongly and without an error, each with its cure.

    A custom Function that is marked once_differentiable, under a linear operation, gives a gradient without a graph:
    its curvature would be missing from every product. Fused weight_norm fails torch's own gradgradcheck (torch 2.13).
    """
    found = [
        f"{name}, marked once_differentiable: write its backward with differentiable operations and remove the mark"
        for name, marked in custom_functions(value).items()
        if marked
    ]
    if any(node.name().startswith("WeightNormInterface") for node in nodes(value)):
        found.append("torch's fused weight_norm: write the normalization out (g * v / v.norm(...))")
    return found


def reentrant(value: Tensor) -> bool:
    """Say whether a reentrant activation checkpoint is behind a tensor.

    torch.autograd.grad leaves out the parameters that are used inside of one, without an error where it need not go
    through it to reach others.
    """
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes(value))


def nodes(value: Tensor) -> Iterator[Any]:
    """Walk the graph behind a tensor, each node once."""
    seen = set()
    waiting: list[Any] = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            yield node
