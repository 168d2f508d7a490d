"""Global random states: torch's, of the CPU and of the device in use, and those of NumPy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

RandomState = dict[str, Tensor]


def get_random(device: torch.device) -> RandomState:
    """Return the state of the CPU's generator, and of the device's where it has its own."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random(states: RandomState) -> None:
    """Set what `get_random` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def fork_random(device: torch.device) -> Iterator[None]:
    """Put the global random states back at the end."""
    states = get_random(device)
    try:
        yield
    finally:
        set_random(states)


@contextmanager
def replayed(states: RandomState, device: torch.device) -> Iterator[None]:
    """Draw the random numbers that follow on these states, and put the global ones back at the end."""
    with fork_random(device):
        set_random(states)
        yield


def get_host() -> tuple[Any, Any]:
    """Return the states of `np.random` and `random`, which a loop of the user's may draw from."""
    return np.random.get_state(), random.getstate()


@contextmanager
def replayed_host(states: tuple[Any, Any]) -> Iterator[None]:
    """Draw what follows on these states of `np.random` and `random`, and put the global ones back at the end."""
    before = get_host()
    _set_host(states)
    try:
        yield
    finally:
        _set_host(before)


def _set_host(states: tuple[Any, Any]) -> None:
    np.random.set_state(states[0])
    random.setstate(states[1])
