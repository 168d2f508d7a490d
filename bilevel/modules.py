"""The door for an `nn.Module`: its trainable parameters as named tensors, and other tensors in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.layout import Variables, checked_start
from bilevel.patterns import all_names, named_parameters
from bilevel.selection import Selection
from bilevel.vector import Vector
from bilevel.widening import widened


class ModuleVariables(Variables):
    """The trainable parameters of an `nn.Module`, or some of them; buffers and the other parameters come along.

    The library works on a copy of the module whose parameters are swapped for the current tensors,
    so that `params(x)`, `params.layer.weight` and `params.named_parameters()` all see them. Tied
    parameters stay tied. Frozen parameters (`requires_grad=False`) are shared with the user's module
    and never written; those that `bilevel.parameters` did not choose are frozen in the copy. A
    `torch.compile`d module is replaced by its original in the copy.
    """

    def __init__(self, given: nn.Module | Selection, role: str) -> None:
        self.role = role
        module = given.module if isinstance(given, Selection) else given
        self._original = module
        chosen = set(given.names) if isinstance(given, Selection) else None
        trainable: Vector = {
            name: p
            for name, p in named_parameters(module).items()
            if p.requires_grad and (chosen is None or name in chosen)
        }
        self._names = frozenset(trainable)
        if not trainable:
            raise InvalidValueError(
                f"`{role}` is a {type(module).__name__} without a parameter that requires a gradient; "
                "unfreeze some with .requires_grad_()"
            )
        lazy = [name for name, p in module.named_parameters() if is_lazy(p)]
        if lazy:
            raise InvalidValueError(
                f"`{role}` is a {type(module).__name__} whose {lazy} have no shape yet; run one batch "
                "through its forward before"
            )
        self._module, self._slots = self._copy()
        self.start_buffers = self.buffers()
        self.start = checked_start(trainable, self)

    def _copy(self, source: nn.Module | None = None) -> tuple[nn.Module, list[tuple[nn.Module, str, str]]]:
        """Copy a module (the user's by default) and list where each trainable tensor sits in it."""
        module = self._original if source is None else source
        named = named_parameters(module)
        names = {id(p): name for name, p in named.items() if name in self._names}
        # Constants are shared; so are tensors with a graph, which have been lent by another level and are swapped for
        # others before use.
        shared: dict[int, Any] = {id(p): p for p in named.values() if not (p.requires_grad and p.is_leaf)}
        shared |= {
            id(p): nn.Parameter(p.detach(), requires_grad=False)
            for name, p in named.items()
            if name not in self._names and p.requires_grad and p.is_leaf
        }
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
        buffers = [] if keep_buffers else self._lend_buffers(wide=not _same_dtype(vector, self.start))
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

    def has_recurrent_layers_on_gpu(self) -> bool:
        """See `Variables.has_recurrent_layers_on_gpu`."""
        layers = [module for module in self._module.modules() if isinstance(module, nn.RNNBase)]
        return any(p.is_cuda for layer in layers for p in layer.parameters())

    def buffers(self) -> Vector:
        """See `Variables.buffers`."""
        return {name: buffer.clone() for name, buffer in self._module.named_buffers()}

    def set_buffers(self, buffers: Vector) -> None:
        """See `Variables.buffers`."""
        for name, buffer in self._module.named_buffers():
            buffer.copy_(buffers[name])

    def _lend_buffers(self, *, wide: bool) -> list[tuple[nn.Module, str, Tensor]]:
        """Put clones (`wide`: in float64) in place of the buffers and return the originals with their places.

        Rebinding, not copying back: a graph may have saved the clone.
        """
        lent = []
        for module in self._module.modules():
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    lent.append((module, attribute, buffer))
                    module._buffers[attribute] = widened(buffer.clone()) if wide else buffer.clone()
        return lent

    def export(self, vector: Vector) -> nn.Module:
        """Return a new module with copies of `vector` as parameters and the current buffers."""
        with self.bound({name: nn.Parameter(t.detach().clone()) for name, t in vector.items()}) as module:
            return self._copy(module)[0]

    def shaped(self, vector: Vector) -> Any:
        """See `Variables.shaped`."""
        return dict(vector)

    def filled(self, vector: Vector) -> nn.Module:
        """See `Variables.filled`: a new module, whose parameters are these tensors."""
        module, slots = self._copy(self._module)
        for owner, attribute, name in slots:
            owner._parameters[attribute] = vector[name]  # type: ignore[assignment]
        return module

    def read(self, structure: Any, source: str) -> Vector:
        """Read a module of the same parameters, and take over its buffers."""
        structure = structure.module if isinstance(structure, Selection) else structure
        if not isinstance(structure, nn.Module):
            raise InvalidTypeError(
                f"{source} is a {type(structure).__name__}, expected the {type(self._original).__name__} "
                "that came in (trained in place), or nothing"
            )
        found = named_parameters(structure)
        for name, constant in named_parameters(self._module).items():
            if name not in self.start and name in found and not _same(found[name], constant):
                raise InvalidValueError(
                    f"{source} has another '{name}' than `{self.role}`, where it is a constant (frozen, or not chosen "
                    "by bilevel.parameters); leave it as it is, or choose it as well"
                )
        tensors = {name: found[name] for name in self.start if name in found}
        vector = self.check({name: t.detach().clone() for name, t in tensors.items()}, source)
        trained = dict(structure.named_buffers())
        with torch.no_grad():
            for name, buffer in self._module.named_buffers():
                if name in trained:
                    buffer.copy_(trained[name])
        return vector

    def follow(self, module: nn.Module) -> None:
        """Take over what a module of the user's has been set to: numbers, flags and strings, `training` among them."""
        own = {_plain(name): copied for name, copied in self._module.named_modules()}
        for name, other in module.named_modules():
            copied = own.get(_plain(name))
            if copied is not None and type(copied) is type(other):
                set_to = {
                    key: value for key, value in vars(other).items() if isinstance(value, (bool, int, float, str))
                }
                vars(copied).update(set_to)

    def write_back(self, vector: Vector) -> None:
        """See `Variables.write_back`; buffers are written too."""
        parameters = named_parameters(self._original)
        buffers = dict(self._original.named_buffers())
        with torch.no_grad():
            for name, tensor in vector.items():
                parameters[name].copy_(tensor)
            for name, buffer in self._module.named_buffers():
                buffers[name].copy_(buffer)

    def own_names(self) -> dict[int, tuple[str, ...]]:
        """See `Variables.own_names`."""
        return all_names(self._original)


def _plain(name: str) -> str:
    """Return the name of a part of a module in the uncompiled one."""
    return f"{name}.".replace("_orig_mod.", "").strip(".")


def _same_dtype(a: Vector, b: Vector) -> bool:
    return next(iter(a.values())).dtype == next(iter(b.values())).dtype


def _same(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.shape == b.shape:
        return True
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _uncompile(module: nn.Module) -> None:
    """Put the original in place of every compiled submodule: a compiled one has no second derivative."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            original = getattr(child, "_orig_mod", None)
            if isinstance(original, nn.Module) and name != "_orig_mod":
                parent._modules[name] = original
