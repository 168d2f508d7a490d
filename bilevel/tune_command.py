"""`bilevel tune TABLE.csv --target COLUMN`: a tuned scikit-learn pipeline for a table, its report and its settings."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError, InvalidValueError
from bilevel.files import replace_text
from bilevel.reporting import report
from bilevel.tabular import MODELS, TASKS, Data, Tuned, read_data, tune

GOOD = 0
FORMATS = ("skops", "joblib")

DESCRIPTION = """\
Fit a linear model to a CSV file, with a strength of its own for each column,
tuned by the gradient of the cross-validation loss. Writes a folder:

  model.skops    a fitted scikit-learn pipeline, trained on all rows
  report.html    how it was tuned; needs no network
  settings.json  what was found, on which columns, and how good it is
  run.pt         the run, for `bilevel report`
"""

DETAILS = """\
The file has a header line and is UTF-8. Missing numbers become the median, missing
text a category of its own; text becomes one column per value (one-hot); numbers
are standardized. Columns with one value, and text of more than 50 different ones,
are left out, and named. The target is classified where it holds text, or up to 10
different whole numbers; else it is a quantity. A fifth of the rows is set aside,
and looked at once in the end.

examples:
  bilevel tune houses.csv --target price
  bilevel tune patients.csv --target outcome --penalties shared --output model

exit codes: 0 done, 2 something is wrong with what was given, 130 stopped by Ctrl-C
"""


def add_tune_command(commands: Any, seed: Callable[[str], int], steps: Callable[[str], int]) -> None:
    """Add `tune` to the commands of an argument parser."""
    parser = commands.add_parser(
        "tune",
        help="fit and tune a scikit-learn pipeline to your own CSV",
        description=DESCRIPTION,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="TABLE.csv", help="the file")
    parser.add_argument("--target", metavar="COLUMN", required=True, help="the column to predict")
    parser.add_argument("--task", choices=TASKS, default="auto", help="(default: %(default)s, by the target)")
    parser.add_argument(
        "--penalties",
        choices=("per-feature", "per-group", "shared"),
        default="per-feature",
        help="a strength for each feature, each column of the table, or one (default: %(default)s)",
    )
    parser.add_argument(
        "--holdout", type=_part, default=0.2, metavar="PART", help="of rows to test on (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FOLDER", default="bilevel-tune", help="(default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, default="skops", help="of the model (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of the rows to test on (default: %(default)s)")
    parser.add_argument("--steps", type=steps, default=50, help="most outer steps (default: %(default)s)")


def _part(text: str) -> float:
    try:
        part = float(text)
    except ValueError:
        part = 0.0
    if not 0.0 < part < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no part of the rows, such as 0.2")
    return part


def run_tune(options: argparse.Namespace, log: Callable[[str], None]) -> int:
    """Read, tune, write, and return the exit code."""
    _check_tools(options.format)
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise InvalidValueError(f"--output {folder} is a file; name a folder")
    data = read_data(options.table, options.target, options.task)
    log(_begin(options, data))
    tuned = tune(data, options.penalties, holdout=options.holdout, seed=options.seed, steps=options.steps)
    log(f"\n{_found(data, tuned)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    loading = _write_model(tuned.model, folder, options.format)
    run = _run(options, data, tuned)
    run.save(folder / "run.pt")
    report(run, folder / "report.html")
    settings = _settings(options, data, tuned)
    replace_text(json.dumps(settings, indent=2, default=float, ensure_ascii=False) + "\n", folder / "settings.json")
    log(f"{folder / f'model.{options.format}'}: the pipeline, trained on all rows. Load it by:\n{loading}")
    log(f"{folder / 'report.html'}: how it was tuned\n{folder / 'settings.json'}: what was found")
    return GOOD


def _check_tools(kind: str) -> None:
    """Raise now rather than after the work."""
    missing = 'bilevel tune needs {}, which is not installed; write: pip install "bilevel[tune]"'
    for module in ("sklearn", "pandas", "plotly", *(["skops.io"] if kind == "skops" else [])):
        try:
            __import__(module)
        except ImportError as error:
            raise BilevelError(missing.format(module.partition(".")[0])) from error


def _begin(options: argparse.Namespace, data: Data) -> str:
    lines = [
        f"{os.path.basename(options.table)}: {len(data.target)} rows, {len(data.numbers)} columns of numbers, "
        f"{len(data.texts)} of text.",
        f"{data.task.capitalize()} of {options.target!r} ({data.why}): {MODELS[data.task]}.",
    ]
    lines += [f"Left out: {name!r} ({reason})." for name, reason in data.left_out.items()]
    return "\n".join(lines)


def _found(data: Data, tuned: Tuned) -> str:
    search = tuned.search
    certificate = search.solution_.certificate
    lines = [
        f"Strengths: {len(_strengths(search)) or 1}, tuned on {tuned.rows} rows in {search.n_splits_} folds.",
        f"Validation {_NAMES[data.task][0]}: {-search.best_score_:.4g}, the mean over the folds.",
        _tested(data, tuned),
        f"The run: {search.solution_.status}. The last hypergradient is {certificate.verdict}.",
    ]
    if tuned.loss >= tuned.baseline:
        lines.append("The model is no better than predicting without the columns: they tell little about the target.")
    return "\n".join(lines)


_NAMES = {
    "classification": ("log loss", "accuracy", "frequencies of the classes"),
    "regression": ("mean squared error", "R^2", "mean"),
}


def _tested(data: Data, tuned: Tuned) -> str:
    loss, score, constant = _NAMES[data.task]
    return (
        f"Test {loss}: {tuned.loss:.4g} on {tuned.tested} rows set aside ({score} {tuned.score:.3g}); always "
        f"predicting the {constant} gives {tuned.baseline:.4g}."
    )


def _strengths(search: Any) -> dict[str, float]:
    """Return the strength of each feature or group; empty where they share one."""
    return next((value for value in search.best_params_.values() if isinstance(value, dict)), {})


def _write_model(model: Any, folder: Path, kind: str) -> str:
    """Write the pipeline, and return the code that loads it."""
    path = folder / f"model.{kind}"
    if kind == "joblib":
        import joblib

        joblib.dump(model, path)
        return f'  import joblib\n  model = joblib.load("{path}")  # executes what is in the file: only your own'
    import skops.io

    skops.io.dump(model, path)
    trusted = skops.io.get_untrusted_types(file=path)
    named = "" if not trusted else f", trusted={trusted}"
    return f'  import skops.io\n  model = skops.io.load("{path}"{named})'


def _run(options: argparse.Namespace, data: Data, tuned: Tuned) -> Any:
    """Return the outer run, told as what the user called."""
    solution = tuned.search.solution_
    words = ["bilevel", "tune", options.table, "--target", options.target, "--task", data.task]
    words += ["--penalties", options.penalties, "--holdout", str(options.holdout)]
    words += ["--seed", str(options.seed), "--steps", str(options.steps)]
    told: dict[str, Any] = {"command": shlex.join(words), "script": os.path.basename(options.table)}
    told["problem"] = f"{MODELS[data.task]}, {tuned.search.n_splits_} folds of {tuned.rows} rows"
    told["samples"] = {"training and validation": tuned.rows, "test": tuned.tested}
    told["notes"] = [_tested(data, tuned)]
    if _strengths(tuned.search):
        told["notes"].append(
            '"strength" is the common strength, and "own" holds the factors that each column has on it.'
        )
    return replace(solution, context={**solution.context, **told})


def _settings(options: argparse.Namespace, data: Data, tuned: Tuned) -> dict[str, Any]:
    search = tuned.search
    versions = dict(search.solution_.context["versions"])
    for name in ("sklearn", "pandas"):
        versions[name] = __import__(name).__version__
    return {
        "table": os.path.basename(options.table),
        "target": options.target,
        "task": data.task,
        "columns": {"numbers": data.numbers, "texts": data.texts, "left_out": data.left_out},
        "model": MODELS[data.task],
        "penalties": options.penalties,
        "parameters": {k: v for k, v in search.best_params_.items() if not isinstance(v, dict)},
        "strengths": _strengths(search),
        "validation_loss": -search.best_score_,
        "test_loss": tuned.loss,
        "test_score": tuned.score,
        "baseline_loss": tuned.baseline,
        "rows": {"tuned": tuned.rows, "tested": tuned.tested, "model": tuned.rows + tuned.tested},
        "status": search.solution_.status,
        "verdict": search.solution_.certificate.verdict,
        "seed": options.seed,
        "holdout": options.holdout,
        "steps": options.steps,
        "versions": versions,
    }
