"""`python -m benchmarks`: the speed and memory of docs/performance.md, as Markdown.

    python -m benchmarks --quick                           every section, less than 5 minutes
    python -m benchmarks time-to-target --only a9a         one section, one problem
    python -m benchmarks --rivals-python ../rivals/bin/python --page docs/performance.md

Rivals that neither this interpreter nor `--rivals-python` has are left out, and named.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from benchmarks.report import Settings, surroundings
from benchmarks.rival_pythons import versions
from benchmarks.worker import WorkerError
from benchmarks.workloads import DATA

SECTIONS = {
    "one-hypergradient": "One hypergradient",
    "time-to-target": "Time until the optimum",
    "scaling": "Scaling",
    "unrolling": "Unrolling within a budget",
    "minibatches": "Minibatches",
    "overhead": "Overhead",
    "searches": "Searches of scikit-learn's estimators",
}
ELSEWHERE = ("searches",)  # on docs/sklearn.md; run where it is named


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory, as Markdown.")
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, less than 5 minutes")
    parser.add_argument("--small", action="store_true", help="tiny data, only to see whether it runs")
    parser.add_argument("--data", default=str(DATA), help="folder of the data sets; made-up data where it is missing")
    parser.add_argument("--rivals-python", action="append", default=[], help="an interpreter that has rivals (repeat)")
    parser.add_argument("--threads", type=int, default=1, help="of every contender")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="processor or wall-clock time")
    parser.add_argument("--repeats", type=int, help="turns of each contender")
    parser.add_argument("--limit", type=float, help="most seconds of a run until the target")
    parser.add_argument("--times", type=float, default=6.0, help="times bilevel's time that rivals get")
    parser.add_argument("--only", nargs="+", default=[], help="cases of a section, such as a9a")
    parser.add_argument("--contenders", nargs="+", default=[], help="of time-to-target beside bilevel, such as jaxopt")
    parser.add_argument("--page", type=Path, help="a Markdown file whose sections are replaced, plots beside it")
    given = parser.parse_args()
    unknown = [name for name in given.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    settings = Settings(
        quick=given.quick,
        small=given.small,
        data=given.data,
        rivals_python=tuple(given.rivals_python),
        threads=given.threads,
        clock=given.clock,
        repeats=given.repeats or (3 if given.quick else 7),
        limit=given.limit or (3.0 if given.quick else 300.0),
        times=given.times,
        only=tuple(given.only),
        contenders=tuple(given.contenders),
        images=None if given.page is None else given.page.parent / "images",
    )
    where = f"{surroundings(settings)}; {versions((settings.python, *settings.rivals_python))}"
    print(f"{where}\n", flush=True)
    for name in given.sections or [name for name in SECTIONS if name not in ELSEWHERE]:
        begin = time.perf_counter()
        try:
            text = importlib.import_module(f"benchmarks.{name.replace('-', '_')}").run(settings)
        except WorkerError as error:  # the other sections shall run
            text = f"failed: {error}"
        print(f"## {SECTIONS[name]}\n\n{text}\n\n({name}: {time.perf_counter() - begin:.0f} s)\n", flush=True)
        if given.page is not None:
            put(given.page, name, f"{text}\n\n{where}.")


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between a page's two comments "begin NAME" and "end NAME"."""
    held = page.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    before, _, rest = held.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no {begin.strip()} ... {end.strip()}")
    page.write_text(before + begin + "\n" + text.strip() + "\n\n" + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
