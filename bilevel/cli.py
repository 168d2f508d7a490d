"""The command line: `bilevel demo`, `tune`, `check`, `compare`, `report`, `methods`, `completion`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import bilevel
from bilevel.check_command import add_check_command, run_check
from bilevel.compare_command import add_compare_command, run_compare
from bilevel.completion_command import add_completion_command, run_completion
from bilevel.errors import BilevelError, InvalidValueError
from bilevel.method_table import method_table
from bilevel.report_command import add_report_command, run_report
from bilevel.tune_command import add_tune_command, run_tune

GOOD, BAD_INPUT, INTERRUPTED = 0, 2, 130

DEMO = """\
Tune one L2 strength per weight of a logistic regression, and compare with
scikit-learn's default and with a grid search over one strength.

Without --data: on the breast-cancer and the digits data that come with
scikit-learn (30 and 640 strengths). With --data and --target: on your own CSV
file. Nothing is downloaded and no GPU is needed.
"""

DEMO_DETAILS = """\
A CSV file has a header line and is UTF-8. Numeric columns are used as they are;
text columns become one column per value (one-hot), each with a strength of its
own. The target is a column of 2 to 50 classes with 10 rows each or more. Nothing
is filled in or guessed: a file with missing values is refused.

exit codes: 0 done, 2 something is wrong with what was given, 130 stopped by Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(argv)
        if options.command is None:
            parser.print_help()
            return GOOD
        if options.command == "check":
            return run_check(options, print)
        if options.command == "methods":
            print(method_table())
            return GOOD
        if options.command == "compare":
            return run_compare(options, print)
        if options.command == "tune":
            return run_tune(options, lambda line: print(line, flush=True))
        if options.command == "report":
            return run_report(options, print)
        if options.command == "completion":
            return run_completion(options, parser, print)
        _demo(options)
    except SystemExit as exit_:  # argparse has said what is wrong, or has printed a help text
        return exit_.code if isinstance(exit_.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        print("bilevel: stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except BilevelError as error:
        print(f"bilevel: {error}", file=sys.stderr)
        return BAD_INPUT
    return GOOD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevel",
        description="Bilevel optimization in PyTorch: tune hyperparameters by gradients.",
        epilog="bilevel COMMAND --help has the options of a command, examples and exit codes.",
    )
    parser.add_argument("--version", action="version", version=f"bilevel {bilevel.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")
    demo = commands.add_parser(
        "demo",
        help="tune one L2 strength per weight of a logistic regression, on bundled data or your own CSV",
        description=DEMO,
        epilog=DEMO_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--data", metavar="TABLE.CSV", help="your own table; needs --target")
    demo.add_argument("--target", metavar="COLUMN", help="the column of --data to predict")
    demo.add_argument("--output", metavar="PNG", default="bilevel-demo.png", help="the picture (default: %(default)s)")
    demo.add_argument("--seed", type=_seed, default=0, help="of the test rows and the folds (default: %(default)s)")
    demo.add_argument("--steps", type=_steps, default=30, help="most outer steps (default: %(default)s)")
    add_tune_command(commands, _seed, _steps)
    add_check_command(commands)
    add_compare_command(commands)
    add_report_command(commands)
    commands.add_parser("methods", help="the table of methods: what each sees, needs and costs")
    add_completion_command(commands)
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**32 - 1")
    return int(text)


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _demo(options: argparse.Namespace) -> None:
    # Imported only now: scikit-learn takes a second, and `bilevel --version` shall not.
    from bilevel.demo import EXPLANATION, compare_models
    from bilevel.demo_plot import check_writable, save_picture
    from bilevel.table import bundled, read_table

    if (options.data is None) != (options.target is None):
        given, missing = ("--target", "--data") if options.data is None else ("--data", "--target")
        raise InvalidValueError(f"{given} needs {missing}; write: bilevel demo --data table.csv --target column")
    check_writable(options.output)
    tables = bundled() if options.data is None else [read_table(options.data, options.target)]
    print(EXPLANATION, flush=True)
    results = []
    for table in tables:
        print(flush=True)
        with warnings.catch_warnings():
            warnings.showwarning = _one_line
            results.append(compare_models(table, options.seed, options.steps))
    save_picture(results, options.output)
    print(f"\nThe losses over the steps and the learned strengths: {options.output}")


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
