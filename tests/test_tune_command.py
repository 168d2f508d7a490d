"""`bilevel tune`: a table becomes a fitted pipeline of scikit-learn's, its report and its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.cli import main
from bilevel.errors import InvalidValueError
from bilevel.tabular import read_data, tune

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
pytest.importorskip("plotly")


def table(rows: int = 80) -> Any:
    """Return columns of numbers and text, with gaps, and what can be predicted from them."""
    rng = np.random.default_rng(0)
    size, color = rng.normal(size=rows), rng.choice(["red", "green", "blue"], rows)
    price = 3.0 * size + 2.0 * (color == "red") + rng.normal(size=rows)
    frame = pd.DataFrame({"size": size, "color": color, "noise": rng.normal(size=rows), "number": np.arange(rows) % 7})
    frame.loc[3, "size"] = frame.loc[5, "color"] = None
    frame["sunny"] = rng.random(rows) < 0.5
    frame["name"], frame["always"], frame["never"] = [f"row {i}" for i in range(rows)], 1, None
    return frame.assign(price=price, kind=np.where(price > 0.0, "dear", "cheap"))


def saved(frame: Any, folder: Path) -> str:
    frame.to_csv(folder / "table.csv", index=False)
    return str(folder / "table.csv")


def test_classes_are_tuned_and_the_pipeline_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sio = pytest.importorskip("skops.io")
    frame, folder = table(), tmp_path / "out"
    code = main(["tune", saved(frame.drop(columns="price"), tmp_path), "--target", "kind", "--output", str(folder)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "Classification of 'kind' (the target holds text): logistic regression" in out
    for left_out in ("'name' (text of 80 different values", "'always' (one value only)", "'never' (no value)"):
        assert f"Left out: {left_out}" in out
    assert sorted(path.name for path in folder.iterdir()) == ["model.skops", "report.html", "run.pt", "settings.json"]
    trusted = sio.get_untrusted_types(file=folder / "model.skops")
    assert str(trusted) in out  # the line that loads it says so
    assert all(name.split(".")[0] in ("numpy", "scipy", "sklearn") for name in trusted)
    model = sio.load(folder / "model.skops", trusted=trusted)
    new = pd.DataFrame({"size": [2.0, -2.0, np.nan], "color": ["red", "violet", None], "noise": 0.0, "number": 3})
    assert list(model.predict(new.assign(sunny=True)))[:2] == ["dear", "cheap"]  # a color never seen, and a gap
    chances = [model.predict_proba(new.assign(sunny=sunny))[0, 0] for sunny in (True, False)]
    assert chances[0] != chances[1]  # True and False are what they are in the file
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["test_loss"] < 0.7 * settings["baseline_loss"] and settings["test_score"] > 0.7
    assert settings["columns"]["numbers"] == ["size", "noise", "number"] and settings["columns"]["texts"] == [
        "color",
        "sunny",
    ]
    assert len(settings["strengths"]) == 3 + 4 + 2 and settings["verdict"] == "exact"  # three colors and a gap
    page = (folder / "report.html").read_text()
    assert "bilevel tune" in page and "Test log loss" in page
    again = read_data(tmp_path / "table.csv", "kind")
    assert tune(again).loss == settings["test_loss"]  # the same rows, the same result


def test_a_quantity_is_tuned_and_saved_by_joblib(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joblib = pytest.importorskip("joblib")
    frame, folder = table(), tmp_path / "deep" / "out"
    options = ["--target", "price", "--penalties", "shared", "--format", "joblib", "--output", str(folder)]
    assert main(["tune", saved(frame.drop(columns="kind"), tmp_path), *options]) == 0
    out = capsys.readouterr().out
    assert "Regression of 'price' (the target holds fractions): ridge regression" in out and "joblib.load" in out
    model = joblib.load(folder / "model.joblib")
    inputs = frame[["size", "color", "noise", "number", "sunny"]]
    residuals = frame["price"] - model.predict(inputs)
    assert 0.5 < float((residuals**2).mean()) < 1.5  # the noise has variance 1
    assert json.loads((folder / "settings.json").read_text())["strengths"] == {}


def test_the_task_follows_the_target(tmp_path: Path) -> None:
    frame = table()
    frame["grade"], frame["count"], frame["yes"] = np.arange(80) % 4, np.arange(80), np.arange(80) % 2 == 0
    path = saved(frame, tmp_path)
    tasks = {name: read_data(path, name).task for name in ("kind", "price", "grade", "count", "yes")}
    assert tasks == {"kind": "classification", "price": "regression", "grade": "classification", "count": "regression",
                     "yes": "classification"}  # fmt: skip
    assert read_data(path, "grade", "regression").task == "regression"
    assert "different whole numbers" in read_data(path, "grade").why
    assert list(read_data(path, "yes").target[:2]) == [True, False]


FRAME = table()
BAD: list[tuple[str, Any, list[str], str]] = [
    ("wrong target", FRAME, ["--target", "prize"], "no column 'prize'; did you mean \"price\"?; its"),
    ("gaps in the target", FRAME, ["--target", "size"], "the target 'size' is missing in 1 of 80 rows"),
    ("few rows", FRAME[:30], ["--target", "price"], "has 30 rows, too few"),
    ("text as a quantity", FRAME, ["--target", "kind", "--task", "regression"], "--task regression needs a target of"),
    ("fractions as classes", FRAME, ["--target", "price", "--task", "classification"], "holds fractions"),
    ("no other column", FRAME[["price", "always", "name"]], ["--target", "price"], "no column to predict 'price' from"),
    ("infinite", FRAME.assign(size=np.where(FRAME.index > 0, np.inf, 1.0)), ["--target", "price"],
     "column 'size' holds infinite values"),
    ("small class", FRAME.assign(kind=["rare"] * 3 + ["often"] * 77), ["--target", "kind"], "classes of fewer than 10"),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "options", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_tables_are_named(
    frame: Any, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", saved(frame, tmp_path), *options, "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("bilevel: ") and said in err
    assert not (tmp_path / "out").exists()


def test_bad_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(FRAME, tmp_path)
    for options, said in (
        (["--target", "price", "--holdout", "2"], "'2' is no part of the rows"),
        (["--target", "price", "--output", path], "is a file; name a folder"),
        ([], "--target"),
    ):
        assert main(["tune", path, *options]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(InvalidValueError, match="cannot read"):
        read_data(tmp_path / "none.csv", "price")


def test_a_missing_package_is_named_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skops.io", None)
    assert main(["tune", "none.csv", "--target", "price"]) == 2
    assert 'needs skops, which is not installed; write: pip install "bilevel[tune]"' in capsys.readouterr().err
