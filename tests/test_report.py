"""The report: what it reads, what it says in words, and that a browser draws it without an error."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.callbacks import CSV, JSONLines
from bilevel.context import script_name
from bilevel.reporting.figures import plots
from bilevel.reporting.runs import Seen, seen
from bilevel.reporting.words import in_short, overfitted, warnings
from problems_solve import Doubtful, sgd

pytest.importorskip("plotly")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=8000",
]  # fmt: skip
X = torch.arange(1.0, 24.0, dtype=torch.float64)


def inner_loss(w: Tensor, h: Any) -> Tensor:
    grid = (h["grid"].reshape(-1)[:23] * w**2).mean()
    value: Tensor = ((w - X) ** 2).mean() + h["l2 <b>"] * (w**2).mean() + (h["each"] * w**2).mean() + grid
    return value


def problem() -> bilevel.BilevelProblem:
    """A number whose name is no HTML, a vector and a matrix of many."""
    hparams = {
        "l2 <b>": bilevel.positive(1.0),
        "each": bilevel.positive(1.0, shape=23),
        "grid": bilevel.positive(torch.logspace(-3, 3, 30, dtype=torch.float64).reshape(5, 6)),
    }
    start = torch.zeros(23, dtype=torch.float64)
    return bilevel.BilevelProblem(
        inner_loss,
        lambda w, h: ((w - X / 2) ** 2).mean(),
        start,
        hparams,
        test_loss=lambda w, h: ((w - X / 3) ** 2).mean(),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[bilevel.Solution, Path]:
    folder = tmp_path_factory.mktemp("run")
    solution = bilevel.solve(
        problem(), steps=3, seed=4, outer_optimizer=sgd,
        callbacks=[JSONLines(folder / "run.jsonl"), CSV(folder / "run.csv")],
        checkpoint=bilevel.Checkpoint(folder / "checkpoint.pt", steps=1),
    )  # fmt: skip
    solution.save(folder / "solution.pt")
    return solution, folder


def text_of(page: str) -> str:
    """Return what a reader of the page sees, without plotly.js."""
    return html.unescape(re.sub(r"<script>.*?</script>|<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))


def test_every_file_of_a_run_is_read(run: tuple[bilevel.Solution, Path]) -> None:
    solution, folder = run
    records = [solution.start, *solution.history]
    for source in (solution, folder / "solution.pt", folder / "run.jsonl"):
        found = seen(source)
        assert (found.records, found.status, found.step) == (records, solution.status, 3)
        assert found.certificate == solution.certificate and found.context == solution.context
    going = seen(folder / "checkpoint.pt")  # the state before the last step
    assert going.records == records[: len(going.records)] and going.status is None
    assert torch.equal(seen(solution).values["grid"], solution.hparams["grid"])


def test_a_log_of_a_run_that_goes_on(run: tuple[bilevel.Solution, Path], tmp_path: Path) -> None:
    lines = (run[1] / "run.jsonl").read_text().splitlines()
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([*lines[:3], lines[3][:50]]))  # cut in the middle of a line
    found = seen(log)
    assert [record.step for record in found.records] == [0, 1] and found.status is None
    assert any("goes on, or was killed: step 1 is the last" in line for line in in_short(found))
    bilevel.report(log, tmp_path / "report.html")
    assert "goes on" in text_of((tmp_path / "report.html").read_text())


def test_the_page_needs_no_network_and_says_all(run: tuple[bilevel.Solution, Path], tmp_path: Path) -> None:
    solution, _ = run
    solution.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=(?!\"data:)", page)
    assert '<meta name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert "<b>" not in page.split('id="data"')[0]  # the name of a hyperparameter is no HTML
    text = text_of(page)
    assert "54 hyperparameters were tuned in 3 steps" in text and "The test loss" in text
    assert "seed=4" in text and f"torch=={torch.__version__}" in text and solution.context["problem"] in text
    assert f"{solution.history[-1].outer_loss:.4g}" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert data["losses"]["traces"][0]["y"] == [r.outer_loss for r in (solution.start, *solution.history)]
    assert [trace["name"] for trace in data["losses"]["traces"]] == ["validation", "training", "test"]


def test_a_program_without_a_name_gives_no_title(monkeypatch: pytest.MonkeyPatch) -> None:
    for argument, name in (("-", ""), ("-c", ""), ("", ""), ("/home/me/tune.py", "tune.py")):
        monkeypatch.setattr("sys.argv", [argument])
        assert script_name() == name


def test_plots_fit_the_number_of_hyperparameters(run: tuple[bilevel.Solution, Path]) -> None:
    drawn = {plot.name: plot for plot in plots(seen(run[0]))}
    assert set(drawn) == {
        "losses",
        "gap",
        "trust",
        "few",
        "values",
        "end-each",
        "bands-each",
        "end-grid",
        "bands-grid",
        "cost",
    }
    assert drawn["few"].traces[0]["x"] == [float(run[0].hparams["l2 <b>"])]
    assert drawn["end-each"].traces[0]["y"] == run[0].hparams["each"].tolist()
    assert drawn["end-grid"].traces[0]["type"] == "heatmap"
    many = dataclasses.replace(seen(run[0]), values={"each": torch.rand(1000) + 1.0})
    histogram = {plot.name: plot for plot in plots(many)}["end-each"].traces[0]
    assert sum(histogram["y"]) == 1000 and len(histogram["x"]) < 100


def test_no_two_lines_look_alike() -> None:
    start = bilevel.positive(1.0, shape=12)
    few = bilevel.BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2 + h * w**2).sum(), lambda w, h: (w**2).sum(), torch.zeros(12).double(), start
    )
    lines = {plot.name: plot for plot in plots(seen(bilevel.solve(few, steps=1)))}["values"].traces
    assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in lines}) == 12


def made(outer: list[float], test: list[float | None], count: int = 30, samples: int | None = None) -> Seen:
    """Return a run with these losses."""
    known: dict[str, Any] = dict.fromkeys(("inner_loss", "inner_residual", "adjoint_residual"))
    costs = dict.fromkeys(("inner_steps", "inner_solves", "gradients", "products"), 1)
    records = [
        bilevel.Record(
            step=i, outer_loss=f, hypergradient_norm=1.0, error=1e-9, verdict="exact", seconds=1.0,
            hparams={"l2": [1.0] * 5}, sizes={"l2": count}, test_loss=t, **known, **costs,
        )
        for i, (f, t) in enumerate(zip(outer, test, strict=True))
    ]  # fmt: skip
    return Seen("run", records, "steps: all", len(records) - 1, None, {}, {"samples": {"validation": samples}})


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (made([2.0, 1.0, 0.9, 0.5], [2.5, 1.5, 1.4, 1.6]), "since step 2 the validation loss fell from 0.9 to 0.5"),
        (made([2.0, 1.0], [2.0, 1.8]), "the validation loss gained 1, the test loss 0.2, less than half"),
        (made([2.0, 1.0], [2.0, 2.3]), "since step 0 .* rose from 2 to 2.3"),
        (made([-2.0, -3.0, -4.0], [-2.0, -2.9, -2.0]), "since step 1"),
        (made([2.0, 1.0, 0.9], [2.5, 1.5, 1.501]), None),  # a rise of nothing
        (made([2.0, 1.0], [2.5, 1.5]), None),
        (made([1.0, 1.0], [1.5, 1.5]), None),
        (made([2.0, 1.0], [None, None], 30, 40), "30 hyperparameters are chosen by 40 validation examples"),
        (made([2.0, 1.0], [None, None], 30, 4000), None),
        (made([2.0, 1.0], [None, None], 1, 4), None),
        (made([2.0], [2.0]), None),
    ],
)
def test_overfitting_is_said_where_the_losses_show_it(run: Seen, said: str | None) -> None:
    found = overfitted(run)
    assert (not found) if said is None else re.search(said, found[0])


def test_untrusted_hypergradients_are_warned_of() -> None:
    solution = bilevel.solve(problem(), Doubtful(), steps=3, outer_optimizer=sgd, on_untrusted="ignore")
    found = seen(solution)
    assert "The last hypergradient cannot be trusted: a bad feeling." in warnings(found)[0]
    assert any("2 of 4 hypergradients cannot be trusted, the first one at step 2" in line for line in in_short(found))


def test_what_is_no_run_is_refused(run: tuple[bilevel.Solution, Path], tmp_path: Path) -> None:
    solution, folder = run
    other = tmp_path / "other"
    cases: list[tuple[str | bytes, str]] = [
        ('{"kind": "thesis"}\n', "is no run"), ("Call me Ishmael.\n", "is no run"), ("", "is no run"),
        ('{"kind": "bilevel log", "context": {}}\n', "has no step yet"),
        ('{"kind": "bilevel log", "context": {}}\n{"kind": "step", "step": 0}\n', "was damaged"),
        ('{"kind": "bilevel log"}\n[1]\n', "line 2, is no JSON object"), ("{\n{\n", "line 1, is no JSON"),
    ]  # fmt: skip
    for text, said in cases:
        other.write_text(str(text))
        with pytest.raises(bilevel.InvalidValueError, match=said):
            bilevel.report(other, tmp_path / "report.html")
    with pytest.raises(bilevel.InvalidValueError, match=r"is no run; .*use JSONLines"):
        bilevel.report(folder / "run.csv", tmp_path / "report.html")
    with pytest.raises(bilevel.InvalidValueError, match="there is no file"):
        bilevel.report(tmp_path / "none", tmp_path / "report.html")
    with pytest.raises(bilevel.InvalidTypeError, match="`run` is a int"):
        bilevel.report(3, tmp_path / "report.html")  # type: ignore[arg-type]
    with pytest.raises(bilevel.InvalidValueError, match=r"`path` is .*there is no folder"):
        solution.report(tmp_path / "none" / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_missing_plotly_is_named_with_its_extra(
    run: tuple[bilevel.Solution, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(bilevel.BilevelError, match=r'pip install "bilevel\[report\]"'):
        run[0].report(tmp_path / "report.html")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_browser_draws_it_without_an_error(run: tuple[bilevel.Solution, Path], tmp_path: Path) -> None:
    solution, _ = run
    solution.report(tmp_path / "report.html")
    browse: Callable[..., Any] = subprocess.run
    done = browse(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/report.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    places = done.stdout.split('data-plot="')[1:]
    assert len(places) == len(plots(seen(solution)))
    for place in places:
        assert 'class="main-svg"' in place, f"{place[:40]} was not drawn"
        assert re.search(r'class="(trace|points|point|hm|heatmaplayer mlayer)', place), place[:40]
