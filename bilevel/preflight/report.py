"""What a dry run reports: findings with what to do about them, and costs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Level = Literal["error", "warning", "note"]

WIDTH = 110  # of a printed line


@dataclass(frozen=True)
class Finding:
    """One thing that a dry run found.

    Attributes:
        level: "error" (the run would fail or be wrong), "warning" (it may not be trusted), "note" (worth knowing).
        subject: what it is about, for example "hparams['lr']".
        message: what is the matter.
        remedy: what to do; empty where there is nothing to do.
    """

    level: Level
    subject: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Costs:
    """Measured times at the starting point, and what one hypergradient is going to take; None where it cannot be said.

    Attributes:
        inner_gradient_ms: one gradient of the inner loss, on one batch.
        product_ms: one Hessian-vector product.
        outer_gradient_ms: one gradient of the outer loss.
        gradients: inner gradients of one hypergradient, its inner solve included.
        products: Hessian-vector products of one hypergradient.
        megabytes: what its graph and its matrices hold.
    """

    inner_gradient_ms: float | None = None
    product_ms: float | None = None
    outer_gradient_ms: float | None = None
    gradients: int | None = None
    products: int | None = None
    megabytes: float | None = None

    def __str__(self) -> str:
        return "\n".join(
            _lines("measured", self._measured()) + _lines("a hypergradient takes about", self._predicted())
        )

    def _measured(self) -> Iterable[str]:
        times = (
            ("inner gradient", self.inner_gradient_ms),
            ("Hessian-vector product", self.product_ms),
            ("outer gradient", self.outer_gradient_ms),
        )
        return (f"{name} {value:.3g} ms" for name, value in times if value is not None)

    def _predicted(self) -> Iterable[str]:
        counts = (("inner gradients", self.gradients), ("Hessian-vector products", self.products))
        yield from (f"{value} {name}" for name, value in counts if value is not None)
        if self.megabytes is not None:
            yield f"{self.megabytes:.3g} MB"


@dataclass(frozen=True)
class Report:
    """The outcome of `bilevel.check`; `str()` of it is what a person reads.

    Attributes:
        problem: the problem, in words.
        method: the method, in words.
        findings: errors first, then warnings, then notes.
        costs: times and counts.
    """

    problem: str
    method: str
    findings: tuple[Finding, ...]
    costs: Costs = field(default_factory=Costs)

    @property
    def ok(self) -> bool:
        """No error was found."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        return {"ok": self.ok, **asdict(self), "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        counts = {level: sum(f.level == level for f in self.findings) for level in get_args(Level)}
        told = [f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count]
        lines = [f"{'ok' if self.ok else 'NOT OK'}: {', '.join(told) or 'nothing found'}", self.problem]
        lines.append(f"method: {self.method}")
        if self.findings:
            lines += ["", *_table(self.findings)]
        if costs := str(self.costs):
            lines += ["", costs]
        return "\n".join(lines)


def by_level(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return errors first, then warnings, then notes; in each, the order of finding."""
    return tuple(sorted(findings, key=lambda finding: get_args(Level).index(finding.level)))


def _table(findings: Iterable[Finding]) -> list[str]:
    rows = [("level", "subject", "what, and what to do", "")]
    rows += [(f.level, f.subject, f.message, f.remedy) for f in findings]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    indent = first + second + 4
    lines = []
    for level, subject, message, remedy in rows:
        wrapped = _wrapped(message, indent) + [
            ("   " if i else "-> ") + line for i, line in enumerate(_wrapped(remedy, indent + 3))
        ]
        head = f"{level:<{first}}  {subject:<{second}}  "
        lines += [(head if i == 0 else " " * indent) + line for i, line in enumerate(wrapped)]
    rule = "  ".join("-" * n for n in (first, second, max(20, WIDTH - indent)))
    return [lines[0], rule, *lines[1:]]


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, max(40, WIDTH - indent), break_long_words=False, break_on_hyphens=False)


def _lines(head: str, parts: Iterable[str]) -> list[str]:
    joined = ", ".join(parts)
    return [f"{head}: {joined}"] if joined else []
