"""The one door between the user's structures and named tensors.

A `Tensor`, a nested dict/list/tuple of tensors or an `nn.Module` goes in; inside there is only a `Vector`. Losses get
back what the user gave: the same structure, or the same module with the current tensors in place of its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.layout import Variables, checked_start
from bilevel.modules import ModuleVariables
from bilevel.ranges import Hyperparameter
from bilevel.selection import Selection
from bilevel.vector import Vector


def variables(structure: Any, role: str) -> Variables:
    """Return the door for whatever the user gave as `params` or `hparams`."""
    if isinstance(structure, (nn.Module, Selection)):
        return ModuleVariables(structure, role)
    return StructureVariables(structure, role)


class StructureVariables(Variables):
    """A tensor, or a nested dict/list/tuple/namedtuple of tensors."""

    def __init__(self, structure: Any, role: str) -> None:
        self.role = role
        self._original = structure
        names, tensors, self._spec = _named_leaves(structure, role, f"`{role}`")
        self.start = checked_start(dict(zip(names, tensors, strict=True)), self)
        self.start_buffers = {}

    @contextmanager
    def bound(self, vector: Vector, *, keep_buffers: bool = False) -> Iterator[Any]:
        """See `Variables.bound`; plain tensors have no buffers to keep."""
        yield self.shaped(vector)

    def buffers(self) -> Vector:
        """Plain tensors have none."""
        return {}

    def set_buffers(self, buffers: Vector) -> None:
        """Plain tensors have none."""

    def export(self, vector: Vector) -> Any:
        """See `Variables.export`."""
        return self.shaped({name: t.detach().clone() for name, t in vector.items()})

    def shaped(self, vector: Vector) -> Any:
        """See `Variables.shaped`."""
        return optree.tree_unflatten(self._spec, [vector[name] for name in self.start])

    def filled(self, vector: Vector) -> Any:
        """See `Variables.filled`."""
        return self.shaped(vector)

    def read(self, structure: Any, source: str) -> Vector:
        """See `Variables.read`."""
        names, tensors, _ = _named_leaves(structure, self.role, source)
        return self.check(dict(zip(names, tensors, strict=True)), source)

    def write_back(self, vector: Vector) -> None:
        """See `Variables.write_back`."""
        _, tensors, _ = _named_leaves(self._original, self.role, f"`{self.role}`")
        with torch.no_grad():
            for tensor, name in zip(tensors, self.start, strict=True):
                tensor.copy_(vector[name])

    def own_names(self) -> dict[int, tuple[str, ...]]:
        """See `Variables.own_names`."""
        names, tensors, _ = _named_leaves(self._original, self.role, f"`{self.role}`")
        return {id(tensor): (name,) for tensor, name in zip(tensors, names, strict=True)}


def _named_leaves(structure: Any, role: str, source: str) -> tuple[list[str], list[Tensor], Any]:
    """Flatten a structure of tensors; a lone tensor is called by its role."""
    paths, leaves, spec = optree.tree_flatten_with_path(structure, none_is_leaf=True)
    names = [".".join(str(entry) for entry in path) or role for path in paths]
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            where = source if name == role else f"{source} at '{name}'"
            raise InvalidTypeError(f"{where} is {_kind(leaf)}, expected a Tensor; write {_instead(leaf, role)}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidValueError(f"{source} names {twice} twice (a dot in a key?); rename the keys")
    return names, leaves, spec


def _instead(leaf: Any, role: str) -> str:
    if isinstance(leaf, (int, float)) and role == "hparams":
        typed = f"bilevel.positive({leaf}), bilevel.real({leaf})" if leaf > 0 else f"bilevel.real({leaf})"
        return f"{typed} or torch.tensor({float(leaf)})"
    if isinstance(leaf, (int, float)):
        return f"torch.tensor({float(leaf)})"
    if type(leaf).__module__ == "numpy":
        return "torch.from_numpy(array)"
    if isinstance(leaf, Iterator):
        return "list(...) around it, or give the module itself"
    if isinstance(leaf, Selection):
        return "bilevel.parameters(...) by itself, not inside of a structure"
    if isinstance(leaf, Hyperparameter):
        return "a Tensor here; typed hyperparameters belong into `hparams`"
    if callable(leaf):
        return f"{leaf.__name__}(...)" if hasattr(leaf, "__name__") else "what it returns"
    return "a Tensor, a nested dict/list/tuple of Tensors or an nn.Module"


def _kind(leaf: Any) -> str:
    return f"the class {leaf.__name__}" if isinstance(leaf, type) else f"a {type(leaf).__name__}"
