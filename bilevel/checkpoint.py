"""Checkpoints: a run that was killed goes on from its file and ends as if it had not been.

See `bilevel/files.py` for how files are written and read.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import optree
import torch

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.files import check_folder, read, write
from bilevel.run import Run

FORMAT = 1
SHARE = 0.1  # of the time that writing may take where neither steps nor seconds are asked for


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often `solve` writes its state.

    Args:
        path: the file; a call that finds it goes on from there.
        steps: write every so many outer steps; or
        seconds: write at the first step after so many seconds. Neither: as often as costs a tenth of the time.
    """

    path: str | os.PathLike[str]
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)):
            raise InvalidTypeError(f"`checkpoint` is a {type(self.path).__name__}, expected a path or a Checkpoint")
        if self.steps is not None and self.seconds is not None:
            raise InvalidValueError("give a Checkpoint either `steps` or `seconds`")
        if (self.steps is not None and self.steps < 1) or (self.seconds is not None and self.seconds < 0.0):
            raise InvalidValueError("a Checkpoint needs `steps` of at least 1, or `seconds` of at least 0")


class Keeper:
    """Writes and reads the state of one run; does nothing without a `Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint | None, label: str) -> None:
        if checkpoint is not None:
            check_folder(checkpoint.path, "checkpoint")
        self._checkpoint, self._label = checkpoint, label
        self._written_at, self._cost, self._steps = time.perf_counter(), 0.0, 0

    @property
    def active(self) -> bool:
        """There is a file to write."""
        return self._checkpoint is not None

    def resume(self, run: Run) -> dict[str, Any] | None:
        """Bring `run` to the state in the file and return the walker's part of it; None without a file."""
        if self._checkpoint is None or not os.path.exists(self._checkpoint.path):
            return None
        data = read(self._checkpoint.path)
        path = os.fspath(self._checkpoint.path)
        if data.get("kind") != "checkpoint" or data.get("format") != FORMAT:
            raise InvalidValueError(f"{path} is no checkpoint of bilevel.solve; it is left as it is: give another path")
        expected = [self._label, run.layout()]
        if data["run"] != expected:
            raise InvalidValueError(
                f"{path} belongs to another run ({data['run'][0]}, variables {data['run'][1]}; this one: "
                f"{expected[0]}, {expected[1]}); it is left as it is: give another path, or delete it"
            )
        run.restore(_to(data["state"], next(iter(run.free_start.values())).device))
        walker: dict[str, Any] = data["walker"]
        return walker

    def after_step(self, run: Run, walker: dict[str, Any]) -> None:
        """Write where it is time. Called between two outer steps."""
        self._steps += 1
        if self._checkpoint is None or not self._due(self._checkpoint):
            return
        begin = time.perf_counter()
        data = {
            "kind": "checkpoint",
            "format": FORMAT,
            "run": [self._label, run.layout()],
            "state": run.state(),
            "walker": walker,
        }
        write(data, self._checkpoint.path)
        self._written_at, self._steps = time.perf_counter(), 0
        self._cost = self._written_at - begin

    def _due(self, checkpoint: Checkpoint) -> bool:
        waited = time.perf_counter() - self._written_at
        if checkpoint.steps is not None:
            return self._steps >= checkpoint.steps
        if checkpoint.seconds is not None:
            return waited >= checkpoint.seconds
        return waited >= self._cost * (1.0 / SHARE - 1.0)


def _to(state: Any, device: torch.device) -> Any:
    """Move what was on the device back to it; random states (bytes) stay on the CPU."""

    def move(x: Any) -> Any:
        return x.to(device) if isinstance(x, torch.Tensor) and x.dtype != torch.uint8 else x

    return optree.tree_map(move, state)
