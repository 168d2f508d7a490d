"""Right, flagged or silently wrong: random problems and traps under every method.

    python -m benchmarks.trust [--problems 5000] [--seed 0] [--rivals]
    python -m benchmarks.trust --part 1/10 --save 1.jsonl      (one tenth of the problems)
    python -m benchmarks.trust --sum *.jsonl                   (the tables of all parts)

Every hypergradient falls into one class:
- right: trusted, and its true relative error is at most 1e-2 (verdict "exact") or 0.5 (verdict "approximate");
- flagged: the verdict is "untrusted", or the library refused with an error of its own;
- silently wrong: trusted, and its true error is larger, or there is no right answer;
- crashed: any other exception.
A healthy problem is wrongly flagged when the answer was right all the same: a true error below 1e-3 (a method that is
exact in the limit) or 0.5 (one that approximates by design).
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.cases import NO_TRUTH, Case, Run, error_of
from benchmarks.traps import draw_case
from bilevel import METHODS, hypergradient
from bilevel.errors import BilevelError
from bilevel.solvers import Estimator, about

WRONG_ABOVE = {"exact": 1e-2, "approximate": 0.5}
FINE_BELOW = {True: 0.5, False: 1e-3}  # by whether the method approximates by design
Outcome = Literal["right", "flagged", "silently wrong", "crashed"]


@dataclass(frozen=True)
class Verdict:
    """What became of one hypergradient."""

    case: str
    seed: int
    healthy: bool
    method: str
    outcome: Outcome
    fine: bool
    detail: str


def by_design(method: Estimator) -> bool:
    """Say whether the method approximates by design."""
    return not about(method).exact


def judge_run(case: Case, run: Run, seed: int) -> Verdict:
    """Ask for one hypergradient and judge it."""

    def verdict(outcome: Outcome, fine: bool, detail: str) -> Verdict:
        return Verdict(case.name, seed, case.healthy, run.method, outcome, fine, f"{run.estimator}: {detail}")

    torch.manual_seed(case.seed)
    try:
        found = hypergradient(run.problem, run.estimator, params=run.params, on_untrusted="ignore")
    except BilevelError as refused:
        return verdict("flagged", False, str(refused))
    except Exception:  # noqa: BLE001  a crash is one of the outcomes that are counted
        return verdict("crashed", False, traceback.format_exc(limit=-3))
    error = float("inf") if run.truth is NO_TRUTH else error_of(found.gradient, run.truth)
    certificate = found.certificate
    detail = f"error {error:.1e}, {certificate}"
    if not certificate.trusted:
        return verdict("flagged", error < FINE_BELOW[by_design(run.estimator)], detail)
    return verdict("right" if error <= WRONG_ABOVE[certificate.verdict] else "silently wrong", True, detail)


def verdicts(
    problems: int, seed: int, part: tuple[int, int] = (1, 1), only: str = "", methods: Sequence[str] = ()
) -> Iterator[Verdict]:
    """Yield the outcome of every method on random problems.

    Args:
        problems: how many, all parts together.
        seed: another one draws other problems.
        part: `(k, n)` takes every n-th problem, from the k-th on.
        only: a part of the names of the cases to run; empty: all.
        methods: the methods to ask; empty: all.
    """
    first = seed * 1_000_003
    for i in range(first + part[0] - 1, first + problems, part[1]):
        case = draw_case(i)
        for run in case.runs if only in case.name else ():
            if not methods or run.method in methods:
                yield judge_run(case, run, i)


def summary(found: Sequence[Verdict], seconds: float) -> str:
    """Return both tables, and what they count, as Markdown."""
    count = len({v.seed for v in found})
    head = f"{count} problems, {len(found)} hypergradients, {seconds:.0f} s"
    return "\n\n".join([head, table(found, "method"), table(found, "case")])


def save(path: Path, found: Sequence[Verdict], seconds: float) -> None:
    """Write verdicts, one a line, below a line with the time they took."""
    lines = [json.dumps({"seconds": seconds}), *(json.dumps(asdict(v)) for v in found)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(paths: Sequence[Path]) -> tuple[list[Verdict], float]:
    """Return the verdicts of saved parts, in the order of their seeds, and the time they took together.

    Where two files hold the same problem under the same method, the later one counts.
    """
    found: dict[tuple[int, str], list[Verdict]] = {}
    seconds = 0.0
    for path in paths:
        head, *rest = path.read_text(encoding="utf-8").splitlines()
        seconds += json.loads(head)["seconds"]
        for (seed, method), same in groupby((Verdict(**json.loads(line)) for line in rest), _problem_and_method):
            found[seed, method] = list(same)
    return sorted(chain.from_iterable(found.values()), key=lambda v: v.seed), seconds


def _problem_and_method(verdict: Verdict) -> tuple[int, str]:
    return verdict.seed, verdict.method


def _part(text: str) -> tuple[int, int]:
    k, n = (int(word) for word in text.split("/"))
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"--part is {text}, expected k/n with 1 <= k <= n, for example 1/10")
    return k, n


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else "-"


def table(found: Sequence[Verdict], by: Literal["method", "case"]) -> str:
    """Return the counts as Markdown."""
    lines = [
        f"| {by} | healthy: right | flagged | wrongly flagged | traps: right | flagged | silently wrong | crashed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    keys = METHODS if by == "method" else dict.fromkeys(v.case for v in sorted(found, key=lambda v: not v.healthy))
    for key in [*keys, "all"]:
        mine = [v for v in found if key in ("all", getattr(v, by))]
        if not mine:
            continue
        count = Counter((v.healthy, v.outcome) for v in mine)
        healthy = sum(v.healthy for v in mine)
        wrongly = sum(v.healthy and v.outcome == "flagged" and v.fine for v in mine)
        name = f"`{key}`" if by == "method" and key != "all" else key
        bad = [sum(count[h, outcome] for h in (True, False)) for outcome in ("silently wrong", "crashed")]
        lines.append(
            f"| {name} | {count[True, 'right']} | {count[True, 'flagged']} | {_share(wrongly, healthy)} "
            f"| {count[False, 'right']} | {count[False, 'flagged']} | {bad[0]} | {bad[1]} |"
        )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="right, flagged or silently wrong")
    parser.add_argument("--problems", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rivals", action="store_true", help="the same problems through TorchOpt, betty-ml and BOAT")
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="K/N", help="every N-th problem, from the K-th on"
    )
    parser.add_argument("--only", default="", help="only cases with this in their names")
    parser.add_argument("--methods", nargs="*", default=(), help="only these methods")
    parser.add_argument("--save", type=Path, help="write the verdicts to this file")
    parser.add_argument("--sum", type=Path, nargs="+", help="run nothing; the tables of saved files together")
    parser.add_argument(
        "--show", type=int, default=0, help="print this many of the verdicts that are not as they should"
    )
    return parser.parse_args()


def main() -> None:
    """Run the study."""
    options = _options()
    if options.rivals:
        from benchmarks import rivals

        print(rivals.study(options.problems, options.seed))
        return
    begin = time.perf_counter()
    if options.sum:
        found, seconds = load(options.sum)
    else:
        found = list(verdicts(options.problems, options.seed, options.part, options.only, options.methods))
        seconds = time.perf_counter() - begin
    if options.save:
        save(options.save, found, seconds)
    print(summary(found, seconds))
    bad: list[Any] = [v for v in found if v.outcome in ("silently wrong", "crashed")]
    bad += [v for v in found if v.healthy and v.outcome == "flagged" and v.fine]
    for v in bad[: options.show]:
        print(f"\n{v.outcome}, seed {v.seed}, {v.case}, {v.method}, {v.detail}")


if __name__ == "__main__":
    main()
