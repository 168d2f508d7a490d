"""Other people's trackers: TensorBoard, Weights & Biases, MLflow. Each is imported where it is used, and optional."""

from __future__ import annotations

import importlib
import json
import os
import re
from typing import Any

from bilevel.callbacks.figures import scalars
from bilevel.errors import BilevelError, InvalidTypeError
from bilevel.listening import Callback
from bilevel.solution import Record, Solution


class TensorBoard(Callback):
    """Write scalars to a folder that `tensorboard --logdir` shows.

    A run that goes on from a checkpoint may go on in the same folder: each step is shown once. So a new run needs a
    folder of its own.

    Args:
        folder: where the event files go; made if it is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise InvalidTypeError(f"`folder` is a {type(folder).__name__}, expected the name of a folder")
        self._writer_type = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.folder = os.fspath(folder)
        self._writer: Any = None

    def __repr__(self) -> str:
        return f"TensorBoard({self.folder!r})"

    def begin(self, context: dict[str, Any], records: list[Record]) -> None:
        """Open the folder, and write all that is known so far in place of what was there."""
        self._writer = self._writer_type(self.folder, purge_step=0)
        self._writer.add_text("context", f"```json\n{json.dumps(context, indent=2)}\n```", 0)
        for record in records:
            self(record)

    def __call__(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def end(self, status: str, solution: Solution | None) -> None:
        """Write the status, and close the file."""
        self._writer.add_text("status", status, 0 if solution is None else len(solution.history))
        self._writer.close()


class WandB(Callback):
    """Log to Weights & Biases.

    Args:
        run: a run of yours, which stays open; None: one is made by `wandb.init` and finished in the end.
        arguments: of `wandb.init`: `project="..."`, `mode="offline"`, `dir="..."`. A run that shall go on after a kill
            gets `id="..."` and `resume="allow"`.
    """

    def __init__(self, run: Any = None, **arguments: Any) -> None:
        if run is not None and (arguments or not hasattr(run, "log")):
            raise InvalidTypeError(
                "`run` is expected to be what wandb.init returned, without other arguments; write WandB(run), or "
                'WandB(project="...", mode="offline")'
            )
        self._wandb = None if run is not None else _imported("wandb", "wandb")
        self._run, self._arguments = run, arguments

    def __repr__(self) -> str:
        return "WandB(run)" if self._wandb is None else f"WandB({_settings(self._arguments)})"

    def begin(self, context: dict[str, Any], records: list[Record]) -> None:
        """Open a run unless there is one, and log all that is known so far."""
        if self._wandb is not None:
            self._run = self._wandb.init(**self._arguments)
            self._run.define_metric("*", step_metric="outer_step")
        self._run.config.update({"bilevel": context}, allow_val_change=True)
        for record in records:
            self(record)

    def __call__(self, record: Record) -> None:
        # A step of its own: wandb's only goes forward, and a run of the user's may have others.
        self._run.log({"outer_step": record.step, "hypergradient/verdict": record.verdict, **scalars(record)})

    def end(self, status: str, solution: Solution | None) -> None:
        """Write the status, and finish the run if it was made here."""
        self._run.summary["status"] = status
        if self._wandb is not None:
            self._run.finish(exit_code=0 if solution is not None else 1)


class MLflow(Callback):
    """Log to MLflow, by its client: its global settings and its active run stay as they are.

    Args:
        experiment: the name of the experiment; made if it is missing.
        run_id: go on in this run, behind the last step in it, after a kill or in a run of your own
            (`mlflow.active_run().info.run_id`); it stays open. None: a new one, which is terminated in the end.
        tracking_uri: the store, for example "sqlite:///mlflow.db" or "http://..."; None: MLflow's own setting.
    """

    def __init__(
        self, experiment: str = "bilevel", *, run_id: str | None = None, tracking_uri: str | None = None
    ) -> None:
        if not isinstance(experiment, str):
            raise InvalidTypeError(f"`experiment` is a {type(experiment).__name__}, expected its name")
        self._mlflow = _imported("mlflow", "mlflow")
        self.experiment, self.run_id, self.tracking_uri = experiment, run_id, tracking_uri
        self._own, self._seen = run_id is None, -1
        self._client = self._mlflow.MlflowClient(tracking_uri)
        self._client.get_experiment_by_name(experiment)  # a store that cannot be used says so now, not after a step

    def __repr__(self) -> str:
        settings = {"experiment": self.experiment, "run_id": self.run_id, "tracking_uri": self.tracking_uri}
        return f"MLflow({_settings(settings)})"

    def begin(self, context: dict[str, Any], records: list[Record]) -> None:
        """Open a run unless there is one, and log what is not in it yet."""
        client = self._client
        if self._own:
            found = client.get_experiment_by_name(self.experiment)
            place = client.create_experiment(self.experiment) if found is None else found.experiment_id
            self.run_id = client.create_run(place).info.run_id
        else:
            before = client.get_metric_history(self.run_id, "loss/outer")
            self._seen = max((metric.step for metric in before), default=-1)
        for name in ("call", "problem", "script", "device"):
            client.set_tag(self.run_id, f"bilevel.{name}", str(context.get(name, "")))
        for record in records:
            self(record)

    def __call__(self, record: Record) -> None:
        if record.step <= self._seen:
            return
        make = self._mlflow.entities.Metric
        now = int(self._mlflow.utils.time.get_current_time_millis())
        figures = [make(_allowed(name), value, now, record.step) for name, value in scalars(record).items()]
        self._client.log_batch(self.run_id, metrics=figures)

    def end(self, status: str, solution: Solution | None) -> None:
        """Write the status, and terminate the run if it was made here."""
        self._client.set_tag(self.run_id, "bilevel.status", status)
        if self._own:
            self._client.set_terminated(self.run_id, "FINISHED" if solution is not None else "FAILED")


def _allowed(name: str) -> str:
    """Return a name that MLflow takes."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def _settings(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BilevelError(
            f'this callback needs {extra}, which is not installed; write: pip install "bilevel[{extra}]"'
        ) from error
