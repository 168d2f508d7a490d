"""Which module cannot be differentiated twice: each call of a module is differentiated by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.errors import BilevelError
from bilevel.twice import silently_wrong

_Call = tuple[str, nn.Module, Any]


def module_at_fault(lend: Callable[[], AbstractContextManager[Any]], run: Callable[[], Any]) -> str | None:
    """Return the name and class of the innermost module whose own second derivative fails; None where none does.

    Args:
        lend: gives the user's structures with their tensors in place.
        run: evaluates the loss on them.
    """
    calls: list[_Call] = []
    with lend() as structures:
        leaves: list[Any] = optree.tree_leaves(structures)
        parts = [(n, p) for module in leaves if isinstance(module, nn.Module) for n, p in module.named_modules()]
    hooks = [part.register_forward_pre_hook(partial(_note, calls, name), with_kwargs=True) for name, part in parts]
    try:
        run()
    except BilevelError:
        return None  # the loss is refused as a whole, and says why
    finally:
        for hook in hooks:
            hook.remove()
    with lend():
        for name, part, given in sorted(calls, key=lambda call: -call[0].count(".") - bool(call[0])):
            if _fails(part, given):
                return f"{name or 'the module itself'} ({type(part).__name__})"
    return None


def _note(calls: list[_Call], name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
    given: Any = (args, kwargs)
    calls.append((name, part, optree.tree_map(_fresh, given)))


def _fresh(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _fails(part: nn.Module, given: Any) -> bool:
    # Copies go in: a module may write into its input, which torch forbids for what derivatives are taken of.
    copies: Any = optree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
    args, kwargs = copies
    sources = [x for x in [*optree.tree_leaves(given), *part.parameters()] if _has_gradient(x)]
    try:
        with torch.enable_grad():
            ends = [x for x in optree.tree_leaves(part(*args, **kwargs)) if _has_gradient(x)]
            if not ends or not sources:
                return False
            total = torch.stack([(x.double() ** 2).sum() for x in ends]).sum()
            if silently_wrong(total):
                return True
            found = torch.autograd.grad(total, sources, create_graph=True, allow_unused=True)
            bent = [(g.double() ** 2).sum() for g in found if g is not None and g.requires_grad]
            if bent:
                torch.autograd.grad(torch.stack(bent).sum(), sources, allow_unused=True)
    except RuntimeError:
        return True
    return False


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad
