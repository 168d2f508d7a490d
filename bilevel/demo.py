"""The main job, side by side: scikit-learn's default, its grid search over one C, and one strength per weight.

All three see the same rows: a fifth is set aside for testing, the others are folded five times for tuning, and the
model that is tested is trained on all of those.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from bilevel.logistic import FOLDS, STEPS, Split, Tuned, columns, log_losses, logits, split_rows, standardized, tune
from bilevel.table import Floats, Table

EXPLANATION = f"""\
Three models of each table. All see the same rows: a fifth is set aside for testing and looked at once, in the end; the
others are folded {FOLDS} times. "validation log loss" is the mean over the folds, trained on the others and measured on
the one: what the grid search and bilevel minimize (bilevel adds a weak prior that keeps the strengths alike). "test" is
one model, trained on all {FOLDS} folds with what was found. Features are standardized by the rows that are trained on.
Every model gets one thread."""

GRID = np.logspace(-4, 4, 17)  # two values of C a decade

# A gain on the validation rows of which less than this part is seen on the test rows is called overfitted.
KEPT = 0.5


@dataclass(frozen=True)
class Row:
    """One model: how it was found and how good it is.

    Attributes:
        name: how it was found.
        validation_loss: log loss, mean over the folds: trained on four of them, looked at on the fifth.
        test_loss: log loss on the test rows, of one model trained on all other rows.
        accuracy: of that model on the test rows.
        hyperparameters: how many were tuned.
        fits: models trained on the way, the tested one included.
        seconds: all of that.
        test_losses: log loss of each test row.
    """

    name: str
    validation_loss: float
    test_loss: float
    accuracy: float
    hyperparameters: int
    fits: int
    seconds: float
    test_losses: Floats = field(repr=False, compare=False)


@dataclass(frozen=True)
class Result:
    """The three models of one table.

    Attributes:
        table: what was learned from.
        split: the rows of each part.
        default: scikit-learn's LogisticRegression as it comes.
        grid: GridSearchCV over a single C.
        tuned: this library.
        model: this library's strengths, weights and run.
    """

    table: Table
    split: Split
    default: Row
    grid: Row
    tuned: Row
    model: Tuned

    @property
    def rows(self) -> tuple[Row, Row, Row]:
        """The rows of the printed table."""
        return self.default, self.grid, self.tuned


def compare_models(
    table: Table,
    seed: int = 0,
    steps: int = STEPS,
    progress: bool | None = None,
    log: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Result:
    """Train the three models of one table and say what is going on.

    Args:
        table: the rows.
        seed: of the test rows and the folds.
        steps: most outer steps.
        progress: a progress bar; None: where stderr is a terminal.
        log: gets each line.
    """
    split = split_rows(table, seed)
    log(
        f"{table.name}: {len(table.y)} rows, {len(table.features)} features, {split.classes} classes. "
        f"{len(split.y_test)} rows are set aside for testing, {len(split.y)} are folded {FOLDS} times for tuning."
    )
    with _one_thread():
        default, grid = _default(split), _grid_search(split)
        tuned, model = _tuned(split, steps, progress)
    result = Result(table, split, default, grid, tuned, model)
    log(f"\n{table_text(result)}\n")
    for line in notes(result):
        log(textwrap.fill(line, 118))
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give every model one thread.

    The matrices are small: on two cores with other work, threads that wait for one another made the grid search of the
    digits 70 times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


def _pipeline() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # The default of 100 iterations is not always enough, and says so in a warning.
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))


def _default(split: Split) -> Row:
    from sklearn.model_selection import cross_val_score

    begin = time.perf_counter()
    model = _pipeline().fit(split.x, split.y)
    seconds = time.perf_counter() - begin
    scores = cross_val_score(_pipeline(), split.x, split.y, scoring="neg_log_loss", cv=split.folds)
    return _tested("scikit-learn default, C = 1", -float(scores.mean()), model, split, 0, 1, seconds)


def _grid_search(split: Split) -> Row:
    from sklearn.model_selection import GridSearchCV

    begin = time.perf_counter()
    choices = {"logisticregression__C": GRID}
    search = GridSearchCV(_pipeline(), choices, scoring="neg_log_loss", cv=split.folds).fit(split.x, split.y)
    seconds = time.perf_counter() - begin
    name = f"GridSearchCV, C = {search.best_params_['logisticregression__C']:.3g}"
    return _tested(name, -float(search.best_score_), search, split, 1, len(GRID) * FOLDS + 1, seconds)


def _tested(
    name: str, validation_loss: float, model: Any, split: Split, hyperparameters: int, fits: int, seconds: float
) -> Row:
    losses = -model.predict_log_proba(split.x_test)[np.arange(len(split.y_test)), split.y_test]
    accuracy = float((model.predict(split.x_test) == split.y_test).mean())
    return Row(name, validation_loss, float(losses.mean()), accuracy, hyperparameters, fits, seconds, losses)


def _tuned(split: Split, steps: int, progress: bool | None) -> tuple[Row, Tuned]:
    begin = time.perf_counter()
    model = tune(split, steps, progress)
    seconds = time.perf_counter() - begin
    x, y = columns(standardized(split.x, split.x_test)), torch.from_numpy(split.y_test)
    accuracy = (logits(model.params, x)[0].argmax(0) == y).double().mean()
    losses = log_losses(model.params, x, y)[0].numpy()
    solves = sum(record.inner_solves for record in (model.solution.start, *model.solution.history))
    row = Row(
        "bilevel, one strength per weight",
        model.validation_loss,
        float(losses.mean()),
        float(accuracy),
        model.strengths.numel() + 1,  # and the common factor
        solves * FOLDS + 1,
        seconds,
        losses,
    )
    return row, model


def table_text(result: Result) -> str:
    """Return the three rows as a person reads them."""
    head = ("", "validation", "test", "test", "hyper-", "inner", "")
    under = ("model", "log loss", "log loss", "accuracy", "parameters", "fits", "seconds")
    lines = [head, under]
    for row in result.rows:
        losses = (f"{row.validation_loss:.4f}", f"{row.test_loss:.4f}", f"{100 * row.accuracy:.1f} %")
        lines.append((row.name, *losses, str(row.hyperparameters), str(row.fits), f"{row.seconds:.2f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    ruled = [*lines[:2], tuple("-" * width for width in widths), *lines[2:]]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in ruled
    )


def notes(result: Result) -> list[str]:
    """Return what a person should know about the numbers."""
    grid, tuned, model = result.grid, result.tuned, result.model
    gain, kept = grid.validation_loss - tuned.validation_loss, grid.test_loss - tuned.test_loss
    difference = grid.test_losses - tuned.test_losses
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    chance = ": within chance" if abs(kept) < 2.0 * error else ""
    lines = [
        f"Gap from validation to test log loss: {grid.test_loss - grid.validation_loss:+.4f} for the grid search, "
        f"{tuned.test_loss - tuned.validation_loss:+.4f} for bilevel.",
        f"Against the grid search, bilevel's log loss is {_compared(gain)} on the validation rows and "
        f"{_compared(kept)} on the test rows (standard error {error:.4f}{chance}).",
    ]
    if gain > 0.0 and kept < KEPT * gain:
        lines.append(
            f"Overfitted: most of the gain on the validation rows does not show on the test rows; "
            f"{model.strengths.numel()} strengths have in part fitted the noise of {len(result.split.y)} rows."
        )
    low, high = float(model.strengths.min()), float(model.strengths.max())
    lines.append(f"Strengths (1/C): {low:.3g} to {high:.3g}, common factor {model.common:.3g}.")
    status, verdict = model.solution.status.partition(":")[0], model.solution.certificate.verdict
    lines.append(f"The run {_ENDS[status]} {len(model.solution.history)} outer steps; last hypergradient: {verdict}.")
    return lines


_ENDS = {
    "converged": "converged in",
    "steps": "was cut off, not converged, after",
    "stalled": "stalled after",
    "untrusted": "ended before hypergradients that cannot be trusted, after",
}


def _compared(gain: float) -> str:
    return f"{abs(gain):.4f} {'lower' if gain >= 0.0 else 'higher'}"
