"""The one door between the user's structures and named tensors.

A `Tensor`, a nested dict/list/tuple of tensors or an `nn.Module` goes in; inside there is only a
`Vector`. Losses get back what the user gave: the same structure, or the same module with the current
tensors in place of its parameters.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError
from bilevel.vector import Vector, is_finite


class Variables(ABC):
    """The layout of one side of a problem: where each named tensor sits in the user's structure.

    Attributes:
        role: the argument's name in messages, "params" or "hparams".
        start: the user's values, copied; `Vector`.
    """

    role: str
    start: Vector

    @abstractmethod
    @contextmanager
    def bound(self, vector: Vector, *, keep_buffers: bool = False) -> Iterator[Any]:
        """Lend the user's structure with the tensors of `vector` in it (no copy, graphs intact).

        Args:
            vector: the current tensors.
            keep_buffers: let buffers (BatchNorm statistics) move, as they do in training; else what
                moves is undone at the end.
        """
        yield

    @abstractmethod
    def export(self, vector: Vector) -> Any:
        """Return a structure of the user's own kind that holds copies of `vector`."""

    @abstractmethod
    def shaped(self, vector: Vector) -> Any:
        """Return the tensors of `vector` in the user's structure; a dict by parameter names for a module."""

    @abstractmethod
    def read(self, structure: Any, source: str) -> Vector:
        """Return the tensors of what a user's function returned; raise in the user's terms."""

    def rewind(self) -> None:  # noqa: B027
        """Put the buffers of a module back to where the user's are; training has moved them."""

    @abstractmethod
    def write_back(self, vector: Vector) -> None:
        """Copy `vector` into the user's own tensors, in place."""

    def label(self, name: str) -> str:
        """Return how messages call a tensor: `params['layer.weight']`, or `params` if it is alone."""
        return self.role if name == self.role else f"{self.role}['{name}']"

    def check(self, vector: Vector, source: str) -> Vector:
        """Raise unless `vector` has the names, shapes, dtypes and devices of `start`."""
        missing = [name for name in self.start if name not in vector]
        extra = [name for name in vector if name not in self.start]
        if missing or extra:
            told = [f"missing: {missing}"] * bool(missing) + [f"not expected: {extra}"] * bool(extra)
            raise InvalidValueError(
                f"{source} has {len(vector)} tensors for the {len(self.start)} of `{self.role}` "
                f"({'; '.join(told)}); give the structure that `{self.role}` has"
            )
        for name, expected in self.start.items():
            _check_like(vector[name], expected, f"{source}: {self.label(name)}")
        return {name: vector[name] for name in self.start}


def _check_like(tensor: Tensor, expected: Tensor, source: str) -> None:
    if tensor.shape != expected.shape:
        raise InvalidValueError(f"{source} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
    if tensor.dtype != expected.dtype:
        raise InvalidValueError(f"{source} is {tensor.dtype}, expected {expected.dtype}; write .to({expected.dtype})")
    if tensor.layout != torch.strided:
        raise InvalidTypeError(f"{source} is a {tensor.layout} tensor, expected a dense one; write .to_dense()")
    if tensor.device != expected.device:
        raise InvalidValueError(
            f"{source} is on {tensor.device}, expected {expected.device}; write .to('{expected.device}')"
        )


class StructureVariables(Variables):
    """A tensor, or a nested dict/list/tuple/namedtuple of tensors."""

    def __init__(self, structure: Any, role: str) -> None:
        self.role = role
        self._original = structure
        names, tensors, self._spec = _named_leaves(structure, role, f"`{role}`")
        self.start = _checked_start(dict(zip(names, tensors, strict=True)), self)

    @contextmanager
    def bound(self, vector: Vector, *, keep_buffers: bool = False) -> Iterator[Any]:
        """See `Variables.bound`; plain tensors have no buffers to keep."""
        yield self.shaped(vector)

    def export(self, vector: Vector) -> Any:
        """See `Variables.export`."""
        return self.shaped({name: t.detach().clone() for name, t in vector.items()})

    def shaped(self, vector: Vector) -> Any:
        """See `Variables.shaped`."""
        return optree.tree_unflatten(self._spec, [vector[name] for name in self.start])

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


class ModuleVariables(Variables):
    """The trainable parameters of an `nn.Module`; buffers and frozen parameters come along.

    The library works on a copy of the module whose parameters are swapped for the current tensors,
    so that `params(x)`, `params.layer.weight` and `params.named_parameters()` all see them. Tied
    parameters stay tied. Frozen parameters (`requires_grad=False`) are shared with the user's module
    and never written. A `torch.compile`d module is replaced by its original in the copy.
    """

    def __init__(self, module: nn.Module, role: str) -> None:
        self.role = role
        self._original = module
        trainable: Vector = {name: p for name, p in _named_parameters(module).items() if p.requires_grad}
        if not trainable:
            raise InvalidValueError(
                f"`{role}` is a {type(module).__name__} without a parameter that requires a gradient; "
                "unfreeze some with .requires_grad_()"
            )
        self._module, self._slots = self._copy()
        self._buffers_at_start = self._lend_buffers()
        self.start = _checked_start(trainable, self)

    def _copy(self, source: nn.Module | None = None) -> tuple[nn.Module, list[tuple[nn.Module, str, str]]]:
        """Copy a module (the user's by default) and list where each trainable tensor sits in it."""
        module = self._original if source is None else source
        names = {id(p): name for name, p in _named_parameters(module).items() if p.requires_grad}
        shared: dict[int, Any] = {id(p): p for p in module.parameters() if not p.requires_grad}
        try:
            copied = copy.deepcopy(module, shared)
        except RuntimeError as error:
            raise InvalidValueError(
                f"`{self.role}` ({type(module).__name__}) cannot be copied: {error}; keep no tensor with a "
                "graph as an attribute of the module"
            ) from error
        slots = [
            (inside, attribute, names[id(p)])
            for owner, inside in zip(module.modules(), copied.modules(), strict=True)
            for attribute, p in owner._parameters.items()
            if p is not None and id(p) in names
        ]
        _uncompile(copied)
        return getattr(copied, "_orig_mod", copied), slots

    @contextmanager
    def bound(self, vector: Vector, *, keep_buffers: bool = False) -> Iterator[Any]:
        """See `Variables.bound`. Training flags are restored at the end."""
        at_rest = [owner._parameters[attribute] for owner, attribute, _ in self._slots]
        flags = [(module, module.training) for module in self._module.modules()]
        buffers = [] if keep_buffers else self._lend_buffers()
        for owner, attribute, name in self._slots:
            owner._parameters[attribute] = vector[name]  # type: ignore[assignment]
        try:
            yield self._module
        finally:
            for (owner, attribute, _), parameter in zip(self._slots, at_rest, strict=True):
                owner._parameters[attribute] = parameter
            for module, training in flags:
                module.training = training
            for module, attribute, buffer in buffers:
                module._buffers[attribute] = buffer

    def _lend_buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Put clones in place of the buffers and return the originals with their places.

        Rebinding, not copying back: a graph may have saved the clone.
        """
        lent = []
        for module in self._module.modules():
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    lent.append((module, attribute, buffer))
                    module._buffers[attribute] = buffer.clone()
        return lent

    def export(self, vector: Vector) -> nn.Module:
        """Return a new module with copies of `vector` as parameters and the current buffers."""
        with self.bound({name: nn.Parameter(t.detach().clone()) for name, t in vector.items()}) as module:
            return self._copy(module)[0]

    def shaped(self, vector: Vector) -> Any:
        """See `Variables.shaped`."""
        return dict(vector)

    def read(self, structure: Any, source: str) -> Vector:
        """Read a module of the same parameters, and take over its buffers."""
        if not isinstance(structure, nn.Module):
            raise InvalidTypeError(
                f"{source} is a {type(structure).__name__}, expected the {type(self._original).__name__} "
                "that came in (trained in place), or nothing"
            )
        found = _named_parameters(structure)
        tensors = {name: found[name] for name in self.start if name in found}
        vector = self.check({name: t.detach().clone() for name, t in tensors.items()}, source)
        trained = dict(structure.named_buffers())
        with torch.no_grad():
            for name, buffer in self._module.named_buffers():
                if name in trained:
                    buffer.copy_(trained[name])
        return vector

    def rewind(self) -> None:
        """See `Variables.rewind`."""
        for module, attribute, buffer in self._buffers_at_start:
            module._buffers[attribute] = buffer.clone()

    def write_back(self, vector: Vector) -> None:
        """See `Variables.write_back`; buffers are written too."""
        parameters = _named_parameters(self._original)
        buffers = dict(self._original.named_buffers())
        with torch.no_grad():
            for name, tensor in vector.items():
                parameters[name].copy_(tensor)
            for name, buffer in self._module.named_buffers():
                buffers[name].copy_(buffer)


def _named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that they have in the uncompiled module."""
    return {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters()}


def _uncompile(module: nn.Module) -> None:
    """Put the original in place of every compiled submodule: a compiled one has no second derivative."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            original = getattr(child, "_orig_mod", None)
            if isinstance(original, nn.Module) and name != "_orig_mod":
                parent._modules[name] = original


def variables(structure: Any, role: str) -> Variables:
    """Return the door for whatever the user gave as `params` or `hparams`."""
    if isinstance(structure, nn.Module):
        return ModuleVariables(structure, role)
    return StructureVariables(structure, role)


def _named_leaves(structure: Any, role: str, source: str) -> tuple[list[str], list[Tensor], Any]:
    """Flatten a structure of tensors; a lone tensor is called by its role."""
    paths, leaves, spec = optree.tree_flatten_with_path(structure, none_is_leaf=True)
    names = [".".join(str(entry) for entry in path) or role for path in paths]
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            where = source if name == role else f"{source} at '{name}'"
            raise InvalidTypeError(
                f"{where} is a {type(leaf).__name__}, expected a Tensor; write {_instead(leaf, role)}"
            )
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidValueError(f"{source} names {twice} twice (a dot in a key?); rename the keys")
    return names, leaves, spec


def _instead(leaf: Any, role: str) -> str:
    if isinstance(leaf, (int, float)) and role == "hparams":
        return f"bilevel.positive({leaf}), bilevel.real({leaf}) or torch.tensor({float(leaf)})"
    if isinstance(leaf, (int, float)):
        return f"torch.tensor({float(leaf)})"
    if type(leaf).__module__ == "numpy":
        return "torch.from_numpy(array)"
    return "a Tensor, a nested dict/list/tuple of Tensors or an nn.Module"


def _checked_start(tensors: Vector, variables: Variables) -> Vector:
    """Copy the start values after checking that they can be optimized together."""
    if not tensors or not sum(t.numel() for t in tensors.values()):
        raise InvalidValueError(f"`{variables.role}` holds no number; give at least one non-empty Tensor")
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        label = variables.label(name)
        if not tensor.is_floating_point():
            raise InvalidTypeError(f"{label} is {tensor.dtype}, which has no gradient; write .float() or .double()")
        if tensor.layout != torch.strided:
            raise InvalidTypeError(f"{label} is a {tensor.layout} tensor; write .to_dense()")
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise InvalidValueError(
                f"{label} is {tensor.dtype} on {tensor.device} while {variables.label(first_name)} is "
                f"{first.dtype} on {first.device}; give all of `{variables.role}` one dtype and one device"
            )
    start = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name, tensor in start.items():
        if not is_finite({name: tensor}):
            raise NonFiniteError(f"{variables.label(name)} holds NaN or infinity at the start", variables.role)
    return start
