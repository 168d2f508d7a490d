"""The main job: its numbers against scikit-learn and against a computation of their own, and its picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from bilevel.demo import Result, compare_models, notes, table_text
from bilevel.demo_plot import draw, save_picture
from bilevel.logistic import Split, columns, log_losses, logits, split_rows, standardized, train
from bilevel.table import Floats, Table, bundled

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def tables() -> list[Table]:
    return bundled()


@pytest.fixture(scope="module")
def results(tables: list[Table]) -> list[Result]:
    """Both tables, the digits thinned to every third row."""
    cancer, digits = tables
    digits = replace(digits, x=digits.x[::3], y=digits.y[::3])
    said: list[str] = []
    found = [compare_models(table, seed=1, steps=2, progress=False, log=said.append) for table in (cancer, digits)]
    assert table_text(found[0]) in "\n".join(said)
    return found


def probabilities(result: Result, x: Floats) -> Floats:
    """Predict with nothing but NumPy."""
    weight, bias = (result.model.params[name][0].numpy() for name in ("weight", "bias"))
    scores = x @ weight.T
    if len(weight) == 1:
        scores = np.hstack([np.zeros_like(scores), scores])
    scores = scores + np.concatenate([[0.0], bias])
    raised = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))


def test_bundled_tables_are_the_ones_of_the_main_job(tables: list[Table]) -> None:
    assert [table.x.shape for table in tables] == [(569, 30), (1797, 64)]
    assert [len(table.classes) for table in tables] == [2, 10]


def test_rows_agree_with_the_returned_parameters(results: list[Result]) -> None:
    for result in results:
        split, row = result.split, result.tuned
        mean, deviation = split.x.mean(0), split.x.std(0)
        x = (split.x_test - mean) / np.where(deviation == 0.0, 1.0, deviation)
        predicted = probabilities(result, x)
        assert row.test_loss == pytest.approx(log_loss(split.y_test, predicted), abs=1e-9)
        assert row.accuracy == pytest.approx((predicted.argmax(1) == split.y_test).mean())
        k = 1 if split.classes == 2 else split.classes
        assert result.model.strengths.shape == (k, split.x.shape[1])
        assert row.hyperparameters == result.model.strengths.numel() + 1


def test_validation_loss_is_the_mean_over_the_folds(results: list[Result]) -> None:
    for result in results:
        split, params = result.split, result.model.solution.params
        losses = []
        for fold, (training, validation) in enumerate(split.folds):
            own = {name: t[fold : fold + 1] for name, t in params.items()}
            x = columns(standardized(split.x[training], split.x[validation]))
            losses.append(float(log_losses(own, x, torch.from_numpy(split.y[validation])).mean()))
        assert result.tuned.validation_loss == pytest.approx(np.mean(losses), abs=1e-12)


def test_tuning_improves_the_outer_loss_from_scikit_learns_default(results: list[Result]) -> None:
    for result in results:
        solution = result.model.solution
        # All strengths start at 1, where the prior is 0: scikit-learn's default, whose solver stops 5e-4 away from it.
        assert solution.start.outer_loss == pytest.approx(result.default.validation_loss, abs=1e-3)
        assert solution.outer_loss < solution.start.outer_loss
        assert result.tuned.validation_loss <= solution.outer_loss
        assert solution.certificate.verdict == "exact"


@pytest.mark.parametrize("which", [0, 1])
def test_train_agrees_with_scikit_learn_at_a_common_strength(tables: list[Table], which: int) -> None:
    split = split_rows(tables[which], seed=0)
    x, c = standardized(split.x, split.x)[:400], 0.3
    y = split.y[:400]
    model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, y)
    strengths = torch.full((1 if which == 0 else 10, x.shape[1]), 1.0 / c, dtype=torch.float64)
    params = train(columns(x), torch.from_numpy(y), strengths)
    mine = logits(params, columns(x))[0].softmax(0).T.numpy()
    # scikit-learn's solver stops by its own rules; 1e-5 is what it reaches here.
    np.testing.assert_allclose(mine, model.predict_proba(x), atol=1e-5)


def test_no_test_row_is_used_for_tuning(tables: list[Table]) -> None:
    split: Split = split_rows(tables[0], seed=3)
    seen = {row.tobytes() for row in split.x}
    assert not any(row.tobytes() in seen for row in split.x_test)
    assert len(split.x) + len(split.x_test) == 569
    for training, validation in split.folds:
        assert sorted([*training, *validation]) == list(range(len(split.x)))


def test_the_same_seed_gives_the_same_numbers(results: list[Result], tables: list[Table]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = compare_models(tables[0], seed=1, steps=2, progress=False, log=lambda _: None)
    for one, other in zip(again.rows, results[0].rows, strict=True):
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    assert torch.equal(again.model.strengths, results[0].model.strengths)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_are_as_they_were(tables: list[Table]) -> None:
    before = torch.get_num_threads()
    compare_models(tables[0], steps=1, progress=False, log=lambda _: None)
    assert torch.get_num_threads() == before


def test_table_shows_each_number(results: list[Result]) -> None:
    for result in results:
        lines = table_text(result).splitlines()
        assert len({len(line) for line in lines}) == 1
        for row, line in zip(result.rows, lines[-3:], strict=True):
            assert line.startswith(row.name)
            shown = line[len(row.name) :].split()
            assert shown[:2] == [f"{row.validation_loss:.4f}", f"{row.test_loss:.4f}"]
            assert shown[-3:-1] == [str(row.hyperparameters), str(row.fits)]


def test_notes_name_the_gap_and_call_overfitting_by_its_name(results: list[Result]) -> None:
    result = results[0]
    n = len(result.split.y_test)
    grid = replace(result.grid, validation_loss=0.2, test_loss=0.2, test_losses=np.full(n, 0.2))
    spread = np.linspace(-0.01, 0.01, n)
    overfitted = replace(result.tuned, validation_loss=0.1, test_loss=0.3, test_losses=0.3 + spread)
    text = "\n".join(notes(replace(result, grid=grid, tuned=overfitted)))
    assert "+0.0000 for the grid search, +0.2000 for bilevel" in text
    assert "0.1000 lower on the validation rows" in text
    assert "0.1000 higher on the test rows" in text
    assert "within chance" not in text
    assert "Overfitted" in text
    honest = replace(overfitted, test_loss=0.1, test_losses=0.1 + spread)
    assert "Overfitted" not in "\n".join(notes(replace(result, grid=grid, tuned=honest)))


def test_picture_shows_both_tables(results: list[Result], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    save_picture(results, str(path))
    data = path.read_bytes()
    assert data.startswith(PNG)
    assert 50_000 < len(data) < 300_000
    titles = [axes.get_title() for axes in draw(results).axes]
    assert set("0123456789") <= set(titles)


@pytest.mark.parametrize(("features", "classes"), [(70, 2), (4, 3), (70, 3)])
def test_picture_of_other_shapes(results: list[Result], features: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, features)), np.arange(90) % classes
    names = tuple(f"a column with a rather long name, number {i}" for i in range(features))
    table = Table("table.csv", x, y, names, tuple(f"class {c}" for c in range(classes)))
    rows = 1 if classes == 2 else classes
    strengths = torch.from_numpy(np.exp(rng.normal(size=(rows, features))))
    result = replace(results[0], table=table, model=replace(results[0].model, strengths=strengths, common=1.0))
    figure = draw([result])
    figure.canvas.draw()
    title = figure.axes[1].get_title()
    assert ("of 70" in title) == (features == 70)
