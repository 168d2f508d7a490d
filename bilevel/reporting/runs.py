"""What a report is made of: a solution, the file of one, a log of a run, or its checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from bilevel.certificate import Certificate
from bilevel.errors import BilevelError, InvalidTypeError, InvalidValueError
from bilevel.files import LOG, read
from bilevel.solution import Record, Solution
from bilevel.variables import variables
from bilevel.vector import Vector


@dataclass(frozen=True)
class Seen:
    """A run, as far as it is known.

    Attributes:
        name: what it was read from.
        records: the starting point, then the steps.
        status: why the run ended; None while it goes on, or where it was killed.
        step: the step whose point was returned.
        certificate: of that point; None where it is not known.
        values: the natural values there; empty where only summaries are known.
        context: see `Solution.context`.
    """

    name: str
    records: list[Record]
    status: str | None
    step: int
    certificate: Certificate | None
    values: Vector
    context: dict[str, Any]

    @property
    def count(self) -> int:
        """Number of hyperparameters."""
        return sum(self.records[0].sizes.values())


def seen(run: Solution | str | os.PathLike[str]) -> Seen:
    """Return what is known of a run.

    Raises:
        BilevelError: it is no run, or no file of one.
    """
    if isinstance(run, Solution):
        return _of_solution(run, run.context.get("script") or "a run")
    if not isinstance(run, (str, os.PathLike)):
        raise InvalidTypeError(
            f"`run` is a {type(run).__name__}, expected a Solution, or the path of what `Solution.save`, "
            "`callbacks.JSONLines` or `solve(checkpoint=)` wrote"
        )
    path = os.fspath(run)
    if not os.path.isfile(path):
        raise InvalidValueError(f"there is no file {path}")
    if _first_bytes(path).startswith(b"{"):
        return _of_log(path)
    try:
        data = read(path)
    except BilevelError as error:
        raise InvalidValueError(f"{path} is no run; {_EXPECTED}") from error
    if data.get("kind") == "checkpoint":
        return _of_checkpoint(path, data)
    if data.get("kind") != "solution":
        raise InvalidValueError(f"{path} is no run; {_EXPECTED}")
    return _of_solution(Solution.load(path), path)


_EXPECTED = (
    "expected a file that solution.save(path), callbacks.JSONLines(path) or solve(checkpoint=path) wrote (a CSV log "
    "does not say how the run was made: use JSONLines beside it)"
)


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def _of_solution(solution: Solution, name: str) -> Seen:
    records = [solution.start, *solution.history]
    step = solution.step % len(records)
    return Seen(
        name, records, solution.status, step, solution.certificate, _named(solution, records[0]), solution.context
    )


def _named(solution: Solution, record: Record) -> Vector:
    """Return the natural values by the names that records have."""
    found: dict[str, Tensor] = variables(solution.hparams, "hparams").start
    return {name: t.detach() for name, t in found.items()} if found.keys() == record.sizes.keys() else {}


def _of_checkpoint(path: str, data: dict[str, Any]) -> Seen:
    state = data["state"]
    records = [Record(**record) for record in (state["start"], *state["history"])]
    accepted = state["accepted"]
    certificate = Certificate.from_dict(accepted["evaluation"]["hypergradient"]["certificate"])
    return Seen(path, records, None, len(records) - 1, certificate, dict(accepted["natural"]), {})


def _of_log(path: str) -> Seen:
    lines = _lines(path)
    if not lines or lines[0].get("kind") != LOG:
        raise InvalidValueError(f"{path} is no run; {_EXPECTED}")
    known = {field.name for field in fields(Record)}
    steps = [line for line in lines if line.get("kind") == "step"]
    if not steps:
        raise InvalidValueError(f"{path} has no step yet; its run has not got to its starting point")
    try:
        records = [Record(**{name: value for name, value in line.items() if name in known}) for line in steps]
        end = next((line for line in lines if line.get("kind") == "end"), {})
        certificate = Certificate.from_dict(end["certificate"]) if "certificate" in end else None
        last = int(end.get("step", len(records) - 1))
        return Seen(path, records, end.get("status"), last, certificate, {}, dict(lines[0]["context"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValueError(f"{path} was damaged after JSONLines wrote it: {error}") from error


def _lines(path: str) -> list[dict[str, Any]]:
    """Return the lines of a log; the last one may have been cut by a kill, or is being written."""
    with open(path, encoding="utf-8", errors="replace") as file:
        texts = [line for line in file if line.strip()]
    found: list[dict[str, Any]] = []
    for i, text in enumerate(texts):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if i == len(texts) - 1 and found:
                break
            raise InvalidValueError(f"{path}, line {i + 1}, is no JSON; {_EXPECTED}") from error
        if not isinstance(line, dict):
            raise InvalidValueError(f"{path}, line {i + 1}, is no JSON object; {_EXPECTED}")
        found.append(line)
    return found
