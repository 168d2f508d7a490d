"""`bilevel compare FILE.py:name`: several methods on a problem that a Python file defines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from bilevel.check_command import load_problem
from bilevel.comparison import compare
from bilevel.plotting import check_picture
from bilevel.solvers import estimator

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

exit codes: 0 done, 2 there is no such problem, method or kind of picture
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
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="names of `bilevel methods`; default: all")
    parser.add_argument("--reference", metavar="METHOD", help="default: as exact as can be had")
    parser.add_argument("--repeats", type=int, default=3, help="most timed calls of each method (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the slow call that measures memory")
    parser.add_argument("--plot", metavar="PICTURE", help="also draw error against seconds: .png, .pdf, .svg, ...")


def run_compare(options: argparse.Namespace, log: Callable[[str], None]) -> int:
    """Log the table, draw the picture that was asked for, and return the exit code."""
    for method in options.methods or ():
        estimator(method, "--methods")
    if options.reference is not None:
        estimator(options.reference, "--reference")
    if options.plot is not None:
        check_picture(options.plot, "--plot")
    comparison = compare(
        load_problem(options.target),
        options.methods,
        reference=options.reference,
        repeats=options.repeats,
        memory=not options.no_memory,
    )
    log(comparison.table())
    if options.plot is not None:
        comparison.plot().savefig(options.plot, dpi=150)
        log(f"\nerror against seconds: {options.plot}")
    return GOOD
