"""`bilevel check FILE.py:name`: the dry run of a problem that a Python file defines."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel.errors import BilevelError, InvalidTypeError, InvalidValueError
from bilevel.gradient_check import check_gradient
from bilevel.preflight import check
from bilevel.problem import BilevelProblem
from bilevel.solvers import estimator

GOOD, FOUND_ERRORS = 0, 1

DESCRIPTION = """\
Report before a long run what will not work or not be trusted, where, and what
to do. Runs the file, as an import does, and trains nothing.
"""

DETAILS = """\
examples:
  bilevel check examples/tune_regularization.py:problem
  bilevel check train.py:problem --method unroll --gradient

exit codes: 0 no error was found, 1 errors were found, 2 there is no such problem
"""

IMPORTED_AS = "bilevel_checked_file"  # not "__main__": what a script guards with that stays off


def add_check_command(commands: Any) -> None:
    """Add `check` to the commands of an argument parser."""
    parser = commands.add_parser(
        "check",
        help="report before a long run what will not work or not be trusted",
        description=DESCRIPTION,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="FILE.py:name", help="a Python file, and the BilevelProblem in it")
    parser.add_argument("--method", default="implicit", help="a name of `bilevel methods` (default: %(default)s)")
    parser.add_argument(
        "--gradient", action="store_true", help="also hold the hypergradient against finite differences (trains)"
    )


def run_check(options: argparse.Namespace, log: Callable[[str], None]) -> int:
    """Log the report, and the gradient check that was asked for; return the exit code."""
    estimator(options.method, "--method")
    problem = load_problem(options.target)
    report = check(problem, options.method)
    log(str(report))
    if not options.gradient:
        return GOOD if report.ok else FOUND_ERRORS
    if not report.ok:
        log("\nThe gradient is not checked, because of the errors above.")
        return FOUND_ERRORS
    try:
        gradient = check_gradient(problem, options.method)
    except BilevelError as error:
        log(f"\nThe gradient check failed: {error}")
        return FOUND_ERRORS
    log(f"\n{gradient}")
    return GOOD if gradient.passed else FOUND_ERRORS


def load_problem(target: str) -> BilevelProblem:
    """Import FILE.py and return what it calls `name`.

    Raises:
        BilevelError: there is no such file or name, the file fails, or the name is no problem.
    """
    path, _, name = target.rpartition(":")
    if not path or not name.isidentifier():
        raise InvalidValueError(f"{target!r} is no FILE.py:name; write for example: bilevel check train.py:problem")
    if not Path(path).is_file():
        raise InvalidValueError(f"there is no file {path}")
    module = _imported(Path(path))
    found = getattr(module, name, None)
    if isinstance(found, BilevelProblem):
        return found
    there = [key for key, value in vars(module).items() if isinstance(value, BilevelProblem)]
    hint = f"it has {', '.join(there)}" if there else "it has none at its top level"
    if not hasattr(module, name):
        raise InvalidValueError(f"{path} has no {name!r}; expected the name of a BilevelProblem, and {hint}")
    raise InvalidTypeError(f"{name!r} in {path} is a {type(found).__name__}, expected a BilevelProblem; {hint}")


def _imported(path: Path) -> ModuleType:
    """Run a file as a module, with its folder on the path, as Python does for a script."""
    spec = importlib.util.spec_from_file_location(IMPORTED_AS, path)
    if spec is None or spec.loader is None:
        raise InvalidValueError(f"{path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[IMPORTED_AS] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InvalidValueError(f"{path} cannot be imported: {_said(error, path)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _said(error: BaseException, path: Path) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"
