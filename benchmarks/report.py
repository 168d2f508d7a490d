"""What every section is told, and how its tables are written."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        quick: fewer and smaller cases; the whole in less than 5 minutes.
        small: tiny data, to see whether a section runs.
        data: the folder of the data sets.
        rivals_python: interpreters in which rivals are looked for, beside this one.
        threads: of every contender.
        clock: "cpu", processor time, which other work on the machine changes little, or "wall".
        repeats: turns of each contender.
        limit: most seconds of a run until the target.
        times: how many times as long as the first contender takes the others get.
        only: problems or cases; empty: the section's own.
        contenders: how the names begin of those that run until the target beside the first; empty: all.
        images: folder for the plots; None: no plots.
    """

    quick: bool = False
    small: bool = False
    data: str = ""
    rivals_python: tuple[str, ...] = ()
    threads: int = 1
    clock: str = "cpu"
    repeats: int = 7
    limit: float = 300.0
    times: float = 6.0
    only: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    images: Path | None = None
    python: str = field(default=sys.executable)

    def chosen(self, names: tuple[str, ...], quick: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return the cases to run."""
        names = quick if self.quick and quick is not None else names
        return tuple(name for name in names if not self.only or name in self.only)

    def python_of(self, contender: str) -> str:
        """Return the interpreter of a contender: the first that has its library; ours where none does."""
        from benchmarks.rival_pythons import python_of

        return python_of(contender, (self.python, *self.rivals_python))


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; columns but the first are figures."""
    lines = [f"{title}:", "", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def duration(seconds: float) -> str:
    """Return a time with two or three digits: 3.1 ms, 0.42 s, 17 s."""
    if seconds < 0.1:
        return f"{1e3 * seconds:.2g} ms" if seconds < 0.01 else f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10.0 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Return bytes with three digits: 61.3 MB."""
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def surroundings(settings: Settings) -> str:
    """Return date, machine and settings in one line."""
    clock = "processor time" if settings.clock == "cpu" else "wall-clock time"
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}"
    names = f"Python {platform.python_version()}, torch {torch.__version__}, bilevel {version('bilevel')}"
    day = datetime.now(UTC).strftime("%-d %B %Y")
    return f"{day}, {_processor()} ({os.cpu_count()} cores), {threads}, {clock}, {names}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
