"""`bilevel compare FILE.py:name`: several methods on a problem that a Python file defines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilevel.check_command import load_problem
from bilevel.comparison import compare
from bilevel.errors import InvalidValueError
from bilevel.solvers import METHODS

GOOD = 0

DESCRIPTION = """\
Take one hypergradient by each method, and print how far each is from the exact
one, what it took, and what its certificate says. Runs the file, as an import
does, and the inner solver of the problem.
"""

DETAILS = """\
examples:
  bilevel compare examples/compare_estimators.py:ridge
  bilevel compare train.py:problem --methods implicit unroll truncated --plot methods.png

exit codes: 0 done, 2 there is no such problem
"""


def add_compare_command(commands: Any) -> None:
    """Add `compare` to the commands of an argument parser."""
    parser = commands.add_parser(
        "compare",
        help="take one hypergradient by each method: error, cost, verdict",
        description=DESCRIPTION,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="FILE.py:name", help="a Python file, and the BilevelProblem in it")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="default: all of them")
    parser.add_argument("--reference", choices=list(METHODS), metavar="METHOD", help="default: as exact as can be had")
    parser.add_argument("--plot", metavar="PNG", help="also draw error against seconds")


def run_compare(options: argparse.Namespace, log: Callable[[str], None]) -> int:
    """Log the table, draw the picture that was asked for, and return the exit code."""
    if options.plot is not None and not Path(options.plot).absolute().parent.is_dir():
        raise InvalidValueError(f"--plot {options.plot}: there is no folder {Path(options.plot).parent}")
    comparison = compare(load_problem(options.target), options.methods, reference=options.reference)
    log(comparison.table())
    if options.plot is not None:
        comparison.plot().savefig(options.plot, dpi=150)
        log(f"\nerror against seconds: {options.plot}")
    return GOOD
