"""Who hears of a run: plain functions of a `Record`, and callbacks that hear of its beginning and end too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from bilevel.solution import Record, Solution


class Callback:
    """Base of callbacks that hear of a run's beginning and end; each method does nothing until it is overridden.

    To end a run from a callback, raise KeyboardInterrupt: `solve` then returns the solution so far.
    """

    def begin(self, context: dict[str, Any], records: list[Record]) -> None:
        """Hear of a run: once, before its first step is heard of.

        Args:
            context: see `Solution.context`.
            records: the starting point; of a run that goes on from a checkpoint, the steps up to there too.
        """

    def __call__(self, record: Record) -> None:
        """Hear of a step."""

    def end(self, status: str, solution: Solution | None) -> None:
        """Hear of the end: the status, and the solution; None where an error ended the run."""


class Listeners:
    """The callbacks of one run."""

    def __init__(self, callbacks: Sequence[Callable[[Record], Any]], context: dict[str, Any]) -> None:
        self._callbacks, self._context, self._begun = callbacks, context, False
        self._to_end: list[Any] = []  # the callbacks that were told of the beginning

    def begin(self, records: list[Record]) -> None:
        """Tell of the beginning, once."""
        if self._begun:
            return
        self._begun = True
        for callback in self._callbacks:
            if isinstance(callback, Callback):
                callback.begin(self._context, list(records))
                self._to_end.append(callback)

    def step(self, start: Record, history: list[Record]) -> None:
        """Tell of the last step."""
        self.begin([start, *history[:-1]])
        for callback in self._callbacks:
            try:
                callback(history[-1])
            except StopIteration as error:  # SciPy would take it for its own
                raise RuntimeError("a callback raised StopIteration; to end a run, raise KeyboardInterrupt") from error

    def until_end(self, walk: Callable[[], Solution]) -> Solution:
        """Return the solution that `walk` comes to, and tell of the end, whatever it is."""
        try:
            solution = replace(walk(), context=self._context)
        except BaseException as error:
            self._end(f"stopped: {type(error).__name__}: {error}", None)
            raise
        self.begin([solution.start, *solution.history])
        self._end(solution.status, solution)
        return solution

    def _end(self, status: str, solution: Solution | None) -> None:
        with ExitStack() as all_of_them:  # also where one of them fails
            for callback in reversed(self._to_end):
                all_of_them.callback(callback.end, status, solution)
