"""`bilevel report RUN`: a page about a run that is in a file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilevel.reporting import report

GOOD = 0

DESCRIPTION = """\
Write a run as one page of HTML that needs no network: what happened in words,
both losses, the hypergradient with its error and verdict, hyperparameters,
cost, whether the validation data are overfitted, and how to reproduce it.
"""

DETAILS = """\
RUN is a file that solution.save(path) wrote, or a log of
bilevel.callbacks.JSONLines(path), also while its run goes on, or the checkpoint
of solve(checkpoint=path). Nothing in it is executed.

examples:
  bilevel report run.pt
  bilevel report run.jsonl -o progress.html

exit codes: 0 done, 2 there is no such run, or plotly is not installed
"""


def add_report_command(commands: Any) -> None:
    """Add `report` to the commands of an argument parser."""
    parser = commands.add_parser(
        "report",
        help="write a run as one page of HTML",
        description=DESCRIPTION,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a solution, a JSON-lines log or a checkpoint")
    parser.add_argument("-o", "--output", metavar="HTML", help="the page (default: RUN with .html for its ending)")


def run_report(options: argparse.Namespace, log: Callable[[str], None]) -> int:
    """Write the page, and return the exit code."""
    path = options.output or str(Path(options.run).with_suffix(".html"))
    report(options.run, path)
    log(f"report: {path}")
    return GOOD
