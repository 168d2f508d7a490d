"""Callbacks: logs that survive a kill and a resume, and other people's trackers, offline."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, callbacks, solve
from bilevel.callbacks.figures import hyperparameters, scalars
from problems_solve import sgd

X = torch.arange(1.0, 14.0, dtype=torch.float64)


def inner_loss(w: Tensor, h: Any) -> Tensor:
    value: Tensor = (
        ((w - X) ** 2).mean() + (h["l2"] * w**2).mean() + (h["each"] * w**2).mean() + h["two"].sum() * (w**2).mean()
    )
    return value


def problem() -> BilevelProblem:
    hparams = {
        "l2": bilevel.positive(1.0),
        "two": bilevel.positive(1.0, shape=2),
        "each": bilevel.positive(1.0, shape=13),
    }
    start = torch.zeros(13, dtype=torch.float64)
    test = {"test_loss": lambda w, h: ((w - X / 3) ** 2).mean()}
    return BilevelProblem(inner_loss, lambda w, h: ((w - X / 2) ** 2).mean(), start, hparams, **test)


def tuned(*listeners: Any, **arguments: Any) -> bilevel.Solution:
    return solve(problem(), outer_optimizer=sgd, steps=arguments.pop("steps", 4), callbacks=listeners, **arguments)


class Heard(callbacks.Callback):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, context: dict[str, Any], records: list[bilevel.Record]) -> None:
        self.told.append(("begin", context["call"], [r.step for r in records]))

    def __call__(self, record: bilevel.Record) -> None:
        self.told.append(record.step)

    def end(self, status: str, solution: bilevel.Solution | None) -> None:
        self.told.append(("end", status.partition(":")[0], solution is not None))


def test_a_callback_hears_of_beginning_steps_and_end(tmp_path: Path) -> None:
    place = bilevel.Checkpoint(tmp_path / "run.pt", steps=1)
    first, second, third = Heard(), Heard(), Heard()
    tuned(first, steps=2, checkpoint=place, seed=3)
    (name, call, steps), *rest = first.told
    assert (name, steps, rest) == ("begin", [0], [1, 2, ("end", "steps", True)])
    assert call.startswith(
        "bilevel.solve(problem, method='implicit', steps=2, outer_optimizer=problems_solve.sgd, seed=3"
    )
    tuned(second, steps=4, checkpoint=place)
    assert second.told[0][2] == [0, 1] and second.told[1:] == [2, 3, 4, ("end", "steps", True)]
    tuned(third, steps=4, checkpoint=place)
    assert third.told[-1] == ("end", "steps", True) and third.told[0][2][:4] == [0, 1, 2, 3]


def test_all_hear_of_an_end_by_an_error() -> None:
    class Fails(Heard):
        def __call__(self, record: bilevel.Record) -> None:
            raise ValueError("out of paper")

        def end(self, status: str, solution: bilevel.Solution | None) -> None:
            super().end(status, solution)
            raise RuntimeError("no end")

    one, two = Fails(), Heard()
    with pytest.raises(RuntimeError, match="no end"):
        tuned(one, two)
    assert one.told[-1] == two.told[-1] == ("end", "stopped", False)


def test_the_context_says_how_a_run_was_made(tmp_path: Path) -> None:
    log = callbacks.CSV(tmp_path / "log.csv")
    made = solve(problem(), bilevel.Implicit(bilevel.CG(rtol=1e-6)), steps=1, seed=7, callbacks=[log])
    context = made.context
    assert context["call"] == (
        "bilevel.solve(problem, method=bilevel.Implicit(linear_solver=bilevel.CG(rtol=1e-06)), steps=1, seed=7, "
        f"callbacks=[bilevel.callbacks.CSV({str(tmp_path / 'log.csv')!r})])"
    )
    assert context["versions"]["torch"] == torch.__version__ and context["versions"]["bilevel"] == bilevel.__version__
    assert context["hyperparameters"] == {
        "l2": "positive(1)",
        "two": "positive(shape=(2,))",
        "each": "positive(shape=(13,))",
    }
    made.save(tmp_path / "solution.pt")
    assert bilevel.Solution.load(tmp_path / "solution.pt").context == context == json.loads(json.dumps(context))


def test_figures_of_a_record_are_named() -> None:
    solution = tuned()
    record = solution.history[-1]
    names = ["l2", "two.0", "two.1", "each.q0", "each.q0.1", "each.q0.5", "each.q0.9", "each.q1"]
    assert sorted(hyperparameters(record)) == sorted(names)
    assert hyperparameters(record)["two.1"] == float(solution.hparams["two"][1])
    assert hyperparameters(record)["each.q1"] == float(solution.hparams["each"].max())
    figures = scalars(record)
    assert figures["loss/outer"] == solution.outer_loss and figures["loss/test"] == solution.test_loss
    assert {"hypergradient/norm", "hypergradient/error", "hypergradient/trusted", "cost/gradients", "cost/products",
            "cost/seconds", "loss/inner", "hparams/l2"} <= figures.keys()  # fmt: skip


def csv_steps(path: Path) -> list[tuple[int, float]]:
    with open(path, newline="") as file:
        return [(int(row["step"]), float(row["outer_loss"])) for row in csv.DictReader(file)]


def json_steps(path: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], line["outer_loss"]) for line in lines if line["kind"] == "step"]


LOGS = pytest.mark.parametrize(("log", "steps"), [(callbacks.CSV, csv_steps), (callbacks.JSONLines, json_steps)])


@LOGS
def test_a_log_holds_each_step_once_after_a_kill_and_a_resume(tmp_path: Path, log: Any, steps: Any) -> None:
    class Killed(Exception):
        pass

    def kill(record: bilevel.Record) -> None:
        if record.step == 3:
            assert len(steps(path)) == 4  # each line is in the file before the next step
            raise Killed

    path = tmp_path / "log"
    place = bilevel.Checkpoint(tmp_path / "run.pt", steps=1)
    with pytest.raises(Killed):
        tuned(log(path), kill, checkpoint=place)
    with open(path, "a") as file:
        file.write('{"kind": "st')  # as a kill in the middle of a line leaves it
    solution = tuned(log(path), checkpoint=place)
    assert steps(path) == [(r.step, r.outer_loss) for r in (solution.start, *solution.history)]
    tuned(log(path), steps=1)  # a run without its checkpoint is a new one
    assert len(steps(path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "run.pt"]


@LOGS
def test_files_that_are_no_log_are_left_alone(tmp_path: Path, log: Any, steps: Any) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("Call me Ishmael.\n")
    with pytest.raises(bilevel.InvalidValueError, match=r"no log that .* wrote; it is left as it is"):
        log(path)
    assert path.read_text() == "Call me Ishmael.\n"
    with pytest.raises(bilevel.InvalidValueError, match=r"`path` is .*there is no folder"):
        log(tmp_path / "none" / "log")
    with pytest.raises(bilevel.InvalidTypeError, match="`path` is a int"):
        log(3)
    with pytest.raises(bilevel.InvalidTypeError, match=r"`callbacks` holds the class .*, expected an object"):
        tuned(log)


def test_json_lines_are_valid_json_with_context_and_end(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    solution = tuned(callbacks.JSONLines(path))
    lines = [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in path.read_text().splitlines()]
    assert lines[0]["kind"] == "bilevel log" and lines[0]["context"] == solution.context
    assert lines[-1] == {**lines[-1], "kind": "end", "status": solution.status, "step": 4}
    assert lines[-1]["certificate"]["verdict"] == "exact"


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    solution = tuned(callbacks.TensorBoard(tmp_path / "board"), checkpoint=bilevel.Checkpoint(tmp_path / "a", steps=1))
    tuned(callbacks.TensorBoard(tmp_path / "board"), checkpoint=tmp_path / "a")  # goes on from the last steps
    seen = EventAccumulator(str(tmp_path / "board"))
    seen.Reload()
    events = seen.Scalars("loss/outer")
    assert [event.step for event in events] == [0, 1, 2, 3, 4]
    assert events[-1].value == pytest.approx(solution.outer_loss, rel=1e-6)  # float32
    assert "hparams/each.q0.5" in seen.Tags()["scalars"]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = callbacks.WandB(project="bilevel", mode="offline", dir=str(tmp_path))
    solution = tuned(log)
    assert repr(log) == f"WandB(project='bilevel', mode='offline', dir={str(tmp_path)!r})"
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written, deadline = b"", time.monotonic() + 30.0
    while b"outer steps were taken" not in written and time.monotonic() < deadline:  # its service writes when it can
        time.sleep(0.05)
        written = wandb_payload(path.read_bytes())
    for record in (solution.start, *solution.history):
        assert json.dumps(record.outer_loss).encode() in written
    assert b"hparams/each.q0.5" in written and b"hypergradient/verdict" in written


def wandb_payload(data: bytes) -> bytes:
    """Return what the records of an offline run hold: a LevelDB log, blocks of 32 kB behind a header of 7 bytes."""
    payload, at = b"", 7
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
    return payload


def test_a_run_of_the_users_stays_open() -> None:
    class Run:
        def __init__(self) -> None:
            self.rows: list[Any] = []
            self.config: dict[str, Any] = {}
            self.summary: dict[str, Any] = {}
            self.config = type("Config", (dict,), {"update": lambda self, d, **_: dict.update(self, d)})()

        def log(self, row: Any) -> None:
            self.rows.append(row)

    run = Run()
    solution = tuned(callbacks.WandB(run))
    assert len(run.rows) == 5 and run.summary["status"] == solution.status
    with pytest.raises(bilevel.InvalidTypeError, match=r"`run` is expected to be what wandb.init returned"):
        callbacks.WandB("my project")


def test_mlflow_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    place = {"tracking_uri": (tmp_path / "runs").as_uri()}
    log = callbacks.MLflow("ridge", **place)
    solution = tuned(log, steps=3)
    client = mlflow.MlflowClient(**place)
    run = client.get_run(log.run_id)
    assert run.info.status == "FINISHED"
    assert (
        run.data.tags["bilevel.status"] == solution.status and run.data.tags["bilevel.call"] == solution.context["call"]
    )
    assert run.data.metrics["hparams/two.1"] == float(solution.hparams["two"][1])
    assert sorted(m.step for m in client.get_metric_history(log.run_id, "loss/test")) == [0, 1, 2, 3]
    tuned(callbacks.MLflow("ridge", run_id=log.run_id, **place), steps=4)  # as after a kill: each step stays once
    assert sorted(m.step for m in client.get_metric_history(log.run_id, "loss/outer")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (lambda: callbacks.TensorBoard("runs"), "torch.utils.tensorboard", "tensorboard"),
        (lambda: callbacks.WandB(), "wandb", "wandb"),
        (lambda: callbacks.MLflow(), "mlflow", "mlflow"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    make: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(bilevel.BilevelError, match=rf'pip install "bilevel\[{extra}\]"'):
        make()
    assert not os.path.exists("runs")
