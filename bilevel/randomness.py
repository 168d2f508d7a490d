"""torch's global random states, of the CPU and of the device in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
