"""Logs in files: CSV and JSON lines.

Each line is in the file before the next step begins. A run that goes on from a checkpoint may be some steps behind its
log, so the log is written anew up to there and then goes on: it always holds each step of the run once.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, TextIO

from bilevel.callbacks.figures import COSTS, LOSSES, TRUST, hyperparameters
from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.files import LOG, check_folder, replace_text
from bilevel.listening import Callback
from bilevel.solution import Record, Solution

FORMAT = 1


class _Log(Callback, ABC):
    """A text file with a first line, and a line for each record.

    Args:
        path: the file. A new run begins a log of an earlier one anew; a file of another kind is refused.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidTypeError(f"`path` is a {type(path).__name__}, expected the name of a file")
        check_folder(path, "path")
        self.path = os.fspath(path)
        self._file: TextIO | None = None
        self._refuse_others()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def begin(self, context: dict[str, Any], records: list[Record]) -> None:
        """Write all that is known so far."""
        self._refuse_others()
        replace_text(self._head(context, records[0]) + "".join(map(self._line, records)), self.path)
        self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - open until `end`

    def __call__(self, record: Record) -> None:
        self._write(self._line(record))

    def _write(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line)
        self._file.flush()

    def end(self, status: str, solution: Solution | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _refuse_others(self) -> None:
        """Raise where the file is there and no such log; an empty one will do."""
        if not os.path.exists(self.path):
            return
        with open(self.path, encoding="utf-8", errors="replace") as file:
            first = file.readline()
        if first and not self._begins(first):
            raise InvalidValueError(
                f"{self.path} is no log that {type(self).__name__} wrote; it is left as it is: give another path"
            )

    @abstractmethod
    def _begins(self, first: str) -> bool:
        """Say whether the first line is that of such a log."""

    @abstractmethod
    def _head(self, context: dict[str, Any], start: Record) -> str:
        """Return the first line."""

    @abstractmethod
    def _line(self, record: Record) -> str:
        """Return the line of a record."""


class CSV(_Log):
    """Write a row for each step, the starting point first, to a file that a spreadsheet opens.

    Args:
        path: the file. A new run begins a log of an earlier one anew; a file of another kind is refused.
    """

    COLUMNS = ("step", *LOSSES, "verdict", *TRUST, *COSTS)

    def _begins(self, first: str) -> bool:
        return first.startswith(",".join(self.COLUMNS))

    def _head(self, context: dict[str, Any], start: Record) -> str:
        return _row([*self.COLUMNS, *hyperparameters(start)])

    def _line(self, record: Record) -> str:
        return _row([*(record[name] for name in self.COLUMNS), *hyperparameters(record).values()])


class JSONLines(_Log):
    """Write a JSON object for each step, the starting point first, to a file that `bilevel report` reads at any time.

    The first line holds the context of the run (`Solution.context`), the last one, `"kind": "end"`, its status.

    Args:
        path: the file. A new run begins a log of an earlier one anew; a file of another kind is refused.
    """

    def _begins(self, first: str) -> bool:
        return first.startswith(f'{{"kind": "{LOG}"')

    def _head(self, context: dict[str, Any], start: Record) -> str:
        return _json({"kind": LOG, "format": FORMAT, "context": context})

    def _line(self, record: Record) -> str:
        return _json({"kind": "step", **asdict(record)})

    def end(self, status: str, solution: Solution | None) -> None:
        """Write how the run ended, and close the file."""
        end: dict[str, Any] = {"kind": "end", "status": status}
        if solution is not None:
            end |= {"step": solution.step, "certificate": asdict(solution.certificate)}
        if self._file is not None:
            self._write(_json(end))
        super().end(status, solution)


def _row(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _json(data: Any) -> str:
    """Return a line; what is not finite becomes null, which other readers of JSON ask for."""
    return json.dumps(_finite(data)) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
