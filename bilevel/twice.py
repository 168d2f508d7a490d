"""What autograd cannot differentiate twice: the fix where there is one, a name where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.errors import NotTwiceDifferentiableError

# Beginnings or parts of torch's messages, and what to write instead. The text of the message names the operation.
_CURES = {
    "use_reentrant": "activation checkpointing must be non-reentrant: write checkpoint(..., use_reentrant=False)",
    "modified by an inplace operation": "an operation in place overwrote a value that a derivative needs: write the "
    "out-of-place form (x = x * 2 for x.mul_(2), F.relu(x) for inplace=True) in the loss or the module",
    "torch.compile": "a compiled function has no second derivative: give the loss the uncompiled function or module (a "
    "compiled `params` module is unwrapped by itself, one that the loss calls from outside is not)",
    "once_differentiable": "a custom autograd.Function is marked once_differentiable: write its backward with "
    "differentiable operations, or remove the mark",
    "is not implemented": "this operation has no second derivative in torch: replace it in the inner loss by "
    "operations that have one",
    "cudnn": "cuDNN's recurrent networks have no second derivative: wrap the loss in "
    "torch.backends.cudnn.flags(enabled=False)",
}


@contextlib.contextmanager
def twice_differentiable(module: nn.Module | None) -> Iterator[None]:
    """Run a loss so that it can be differentiated twice where torch has a way.

    Fused attention gives way to the math backend; cuDNN gives way to native kernels where `module` has a
    recurrent layer on a GPU.
    """
    recurrent = module is not None and any(isinstance(m, nn.RNNBase) and _on_gpu(m) for m in module.modules())
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), cudnn:
        yield


def _on_gpu(module: nn.Module) -> bool:
    return any(p.is_cuda for p in module.parameters())


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn torch's errors about missing derivatives into one that names the operation and the cure."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        for part, cure in _CURES.items():
            if part in text:
                message = f"{what} failed: {cure}. torch says: {text.splitlines()[0]}"
                raise NotTwiceDifferentiableError(message) from error
        raise


def custom_functions(value: Tensor) -> dict[str, bool]:
    """Return the user's own autograd Functions behind a tensor, and whether each is marked once_differentiable.

    A once-differentiable Function under a linear operation gives a gradient without a graph, and no error: its
    curvature would be missing from every product.
    """
    found: dict[str, bool] = {}
    seen = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        owner = getattr(type(node), "_forward_cls", None)
        if owner is not None and not owner.__module__.startswith("torch."):
            found[owner.__qualname__] = hasattr(owner.backward, "__wrapped__")
        waiting.extend(parent for parent, _ in node.next_functions)
    return found
