"""The layout of one side of a problem: what every door between the user's structures and named tensors offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError, meant
from bilevel.vector import Vector, is_finite


class Lent(ABC):
    """Tensors in the user's structure, with others in their place while one of the user's functions runs.

    Attributes:
        role: the argument's name in messages, "params" or "hparams".
    """

    role: str

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

    def label(self, name: str) -> str:
        """Return how messages call a tensor: `params['layer.weight']`, or `params` if it is alone."""
        return self.role if name == self.role else f"{self.role}['{name}']"


class Variables(Lent):
    """The layout of one side of a problem: where each named tensor sits in the user's structure.

    Attributes:
        start: the user's values, copied; `Vector`.
        start_buffers: the buffers (BatchNorm statistics) that came with them; empty without a module.
    """

    start: Vector
    start_buffers: Vector

    @abstractmethod
    def export(self, vector: Vector) -> Any:
        """Return a structure of the user's own kind that holds copies of `vector`."""

    @abstractmethod
    def shaped(self, vector: Vector) -> Any:
        """Return the tensors of `vector` in the user's structure; a dict by parameter names for a module."""

    @abstractmethod
    def filled(self, vector: Vector) -> Any:
        """Return a structure of the user's own kind with the tensors of `vector` in it (no copy, graphs intact)."""

    @abstractmethod
    def read(self, structure: Any, source: str) -> Vector:
        """Return the tensors of what a user's function returned; raise in the user's terms."""

    def rewind(self) -> None:
        """Put the buffers back to where they were at the start; training has moved them."""
        self.set_buffers(self.start_buffers)

    @abstractmethod
    def write_back(self, vector: Vector) -> None:
        """Copy `vector` into the user's own tensors, in place."""

    @abstractmethod
    def own_names(self) -> dict[int, tuple[str, ...]]:
        """Return the names of the user's own tensors by their ids; several where weights are tied."""

    @abstractmethod
    def buffers(self) -> Vector:
        """Return copies of the buffers that training moves (BatchNorm statistics); none without a module."""

    @abstractmethod
    def set_buffers(self, buffers: Vector) -> None:
        """Set what `buffers` returned."""

    def has_recurrent_layers_on_gpu(self) -> bool:
        """Say whether a module has an RNN, LSTM or GRU on a GPU; cuDNN's have no second derivative."""
        return False

    def check(self, vector: Vector, source: str) -> Vector:
        """Raise unless `vector` is finite and has the names, shapes, dtypes and devices of `start`."""
        missing = [name for name in self.start if name not in vector]
        extra = [name for name in vector if name not in self.start]
        if missing or extra:
            told = [f"missing: {missing}"] * bool(missing) + [f"not expected: {extra}"] * bool(extra)
            instead = meant(extra[0], missing) if extra else ""
            raise InvalidValueError(
                f"{source} has {len(vector)} tensors for the {len(self.start)} of `{self.role}` "
                f"({'; '.join(told)}); give the structure that `{self.role}` has{instead}"
            )
        for name, expected in self.start.items():
            _check_like(vector[name], expected, f"{source}: {self.label(name)}")
            if not is_finite({name: vector[name]}):
                raise NonFiniteError(f"{source}: {self.label(name)} holds NaN or infinity", self.role)
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


def checked_start(tensors: Vector, variables: Variables) -> Vector:
    """Copy the start values after checking that they can be optimized together."""
    if not tensors or not sum(t.numel() for t in tensors.values()):
        raise InvalidValueError(f"`{variables.role}` holds no number; give at least one non-empty Tensor")
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        label = variables.label(name)
        if not tensor.is_floating_point():
            instead = "torch.view_as_real(tensor)" if tensor.is_complex() else ".float() or .double()"
            discrete = (
                "; a choice among whole numbers has no gradient: search it around this, by Optuna for instance"
                if variables.role == "hparams" and not tensor.is_complex()
                else ""
            )
            raise InvalidTypeError(
                f"{label} is {tensor.dtype}, expected a real floating-point dtype; write {instead}{discrete}"
            )
        if tensor.layout != torch.strided:
            raise InvalidTypeError(f"{label} is a {tensor.layout} tensor; write .to_dense()")
        if tensor.is_meta:
            raise InvalidValueError(f"{label} is on the device meta, which holds no numbers; give real tensors")
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
