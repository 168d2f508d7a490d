"""The arguments of `argmin`, `root` and `fixed_point`: any structure of tensors and modules, constants beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import optree
from torch import Tensor, nn

from bilevel.errors import InvalidTypeError
from bilevel.layout import Lent
from bilevel.modules import ModuleVariables
from bilevel.patterns import named_parameters
from bilevel.ranges import Hyperparameter
from bilevel.selection import Selection
from bilevel.vector import Vector, detach


class Arguments(Lent):
    """Where each tensor that requires a gradient sits in the user's arguments; everything else is a constant.

    Attributes:
        given: these tensors with their graphs.
        values: the same without.
    """

    role = "args"

    def __init__(self, args: tuple[Any, ...]) -> None:
        flat: tuple[list[Any], list[Any], Any] = optree.tree_flatten_with_path(args, none_is_leaf=True)  # type: ignore[arg-type]
        paths, self._leaves, self._spec = flat
        self._tensors: dict[int, str] = {}
        self._modules: dict[int, tuple[str, ModuleVariables]] = {}
        self.given: Vector = {}
        for i, (path, leaf) in enumerate(zip(paths, self._leaves, strict=True)):
            name = self.role + "".join(f"[{entry!r}]" for entry in path)
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._tensors[i] = name
                self.given[name] = _real(leaf, name)
            elif isinstance(leaf, Selection) or (
                isinstance(leaf, nn.Module) and any(p.requires_grad for p in leaf.parameters())
            ):
                module = ModuleVariables(leaf, name)
                parameters = named_parameters(leaf.module if isinstance(leaf, Selection) else leaf)
                self._modules[i] = (name, module)
                self.given |= {f"{name}.{n}": _real(parameters[n], name) for n in module.start}
            elif isinstance(leaf, Hyperparameter):
                raise InvalidTypeError(
                    f"`{name}` is {leaf!r}, expected a Tensor; typed hyperparameters belong into `hparams` of a "
                    "BilevelProblem, whose losses get natural values that can be handed on"
                )
        self.values = detach(self.given)

    @contextmanager
    def bound(self, vector: Vector, *, keep_buffers: bool = False) -> Iterator[tuple[Any, ...]]:
        """See `Lent.bound`; a tensor that `vector` does not have is a constant. Buffers never move."""
        current = self.values | vector
        leaves = list(self._leaves)
        with ExitStack() as stack:
            for i, name in self._tensors.items():
                leaves[i] = current[name]
            for i, (name, module) in self._modules.items():
                leaves[i] = stack.enter_context(module.bound({n: current[f"{name}.{n}"] for n in module.start}))
            yield optree.tree_unflatten(self._spec, leaves)  # type: ignore[misc]

    def label(self, name: str) -> str:
        """Names are labels already: `args[0]['l2']`."""
        return name


def _real(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_complex():
        raise InvalidTypeError(f"`{name}` is {tensor.dtype}, expected a real dtype; write torch.view_as_real(tensor)")
    return tensor
