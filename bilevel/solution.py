"""What a run returns: the tuned hyperparameters, how it went, and why it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bilevel.certificate import Certificate
from bilevel.errors import InvalidValueError
from bilevel.files import check_folder, read, write
from bilevel.param_groups import On, Where, write_settings
from bilevel.patterns import Groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1  # of saved files

# Up to this many values of a tensor are kept in a record one by one, above that their quantiles.
SHOWN_ONE_BY_ONE = 12
LAST = 10  # steps whose outer losses are averaged, where each is that of other batches
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Record:
    """The state of a run after one outer step.

    Attributes:
        step: 1 for the first step; 0 for the starting point (`Solution.start`).
        outer_loss: F(λ).
        inner_loss: the inner loss at the inner solution; None where the method did not look.
        hypergradient_norm: norm of the projected hypergradient over the unconstrained values.
        inner_residual: see `Certificate`; so are adjoint_residual, error and verdict.
        inner_steps: steps of the inner solver, all inner solves of this outer step together.
        inner_solves: inner solves of this outer step (a line search may need several).
        gradients: gradients of either loss, spent in this step.
        products: Hessian-vector products, spent in this step.
        seconds: wall-clock time of this step.
        hparams: natural values by tensor: all of them up to 12, else the quantiles 0, 0.1, 0.5, 0.9, 1.
        sizes: number of values by tensor.
        test_loss: the loss of the third split; None without one.
    """

    step: int
    outer_loss: float
    inner_loss: float | None
    hypergradient_norm: float
    inner_residual: float | None
    adjoint_residual: float | None
    error: float | None
    verdict: str
    inner_steps: int
    inner_solves: int
    gradients: int
    products: int
    seconds: float
    hparams: dict[str, list[float]]
    sizes: dict[str, int]
    test_loss: float | None = None

    def __getitem__(self, name: str) -> Any:
        """Return a figure by its name, so that a record also reads like a dict."""
        return getattr(self, name)


def summarize(tensor: Tensor) -> list[float]:
    """Return the values of a tensor, or their quantiles where they are many."""
    flat = tensor.detach().flatten().cpu()
    if flat.numel() <= SHOWN_ONE_BY_ONE:
        return [float(x) for x in flat]
    places = [round(q * (flat.numel() - 1)) for q in QUANTILES]
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32)).numpy()  # NumPy has no bfloat16
    ordered = np.partition(wide, places)  # sorting was a tenth of a step of SOBA
    return [float(ordered[i]) for i in places]


@dataclass(frozen=True)
class Solution:
    """The end of a run.

    Attributes:
        hparams: natural values, plain tensors in the user's structure.
        params: the inner solution at `hparams`, in the user's structure.
        outer_loss: F at `hparams`.
        history: one record a step.
        status: why the run stopped, a sentence that begins with "converged", "steps", "stalled", "untrusted",
            "patience" or "interrupted".
        certificate: of the last hypergradient.
        start: the record of the starting point.
        step: the outer step whose point this is: the last one, or with `patience` that of the lowest test loss.
        test_loss: the loss of the third split there; None without one.
        context: how the run was made, plain values: the call of `solve`, the problem, script, versions, machine.
    """

    hparams: Any
    params: Any
    outer_loss: float
    history: list[Record] = field(repr=False)
    status: str
    certificate: Certificate
    start: Record = field(repr=False)
    step: int = -1
    test_loss: float | None = None
    context: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _write_back: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    _names: Callable[[], dict[int, tuple[str, ...]]] | None = field(default=None, repr=False, compare=False)

    @property
    def converged(self) -> bool:
        """The projected hypergradient fell below `tol`."""
        return self.status.startswith("converged")

    def apply_(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        per: Groups | None = None,
        on: On = None,
        **settings: Where,
    ) -> None:
        """Write the results into the user's own `params` and `hparams`, in place, and settings into an optimizer.

        Tensors and module parameters (buffers too) get the new values; a typed hyperparameter gets a new start value.

        Args:
            optimizer: of the same params; its param groups get the settings.
            per: patterns by label, where the values of a setting are a dict by labels.
            on: which tensors the settings are for, as in `bilevel.penalties`: None for all, "matrices", or patterns. A
                group of others stays as it is.
            settings: for each setting of the groups the key of `hparams` that holds its value ("decay",
                "decays.head"), or a function of `hparams`: `apply_(optimizer, weight_decay="decay", lr="lr")`. The
                value is a number for all groups, one for each group, or a dict by group names or by the names that
                `bilevel.penalties` knows; groups that the dict does not cover stay as they are.

        Raises:
            BilevelError: a setting that does not fit; nothing has been written then.
        """
        if self._write_back is None:
            raise InvalidValueError(
                "this solution was loaded from a file and belongs to no problem in memory; for a module write "
                "model.load_state_dict(solution.params)"
            )
        if optimizer is None and settings:
            first = next(iter(settings))
            raise InvalidValueError(
                f"apply_(): `{first}` is a setting of an optimizer; write apply_(optimizer, {first}=...)"
            )
        if optimizer is not None and not settings:
            raise InvalidValueError(
                'apply_(): an optimizer and no setting; write for example apply_(optimizer, weight_decay="decay")'
            )
        if optimizer is not None:
            names = {} if self._names is None else self._names()
            write_settings(optimizer, self.hparams, settings, names, per, on)
        self._write_back()

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a table of the run, for people."""
        records = [self.start, *self.history]
        last = records[self.step]
        rows = [
            ("status", self.status),
            ("outer loss", self._told_loss()),
            *self._told_test(),
            ("hypergradient norm", f"{self.start.hypergradient_norm:.2e} -> {last.hypergradient_norm:.2e}"),
            ("verdict", self.certificate.verdict),
        ]
        if self.certificate.error is not None:
            rows.append(("estimated relative error", f"{self.certificate.error:.1e}"))
        untrusted = sum(record.verdict == "untrusted" for record in records)
        if untrusted:
            rows.append(("untrusted hypergradients", f"{untrusted} of {len(records)}"))
        rows += [
            ("outer steps", str(len(self.history))),
            ("inner solves", str(sum(r.inner_solves for r in records))),
            ("gradients", str(sum(r.gradients for r in records))),
            ("Hessian-vector products", str(sum(r.products for r in records))),
            ("seconds", f"{sum(r.seconds for r in records):.2f}"),
        ]
        rows += [(name, _shown(values, last.sizes[name])) for name, values in last.hparams.items()]
        rows += [("!", reason) for reason in self.certificate.reasons]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _told_loss(self) -> str:
        """Return the outer loss at both ends; where each step has batches of its own, a mean over the last ones."""
        if self.certificate.standard_error is None or not self.history:
            return f"{self.start.outer_loss:.6g} -> {self.outer_loss:.6g}"
        last = [record.outer_loss for record in self.history[-LAST:]]
        mean = sum(last) / len(last)
        return f"{self.start.outer_loss:.6g} -> {mean:.6g} (mean over the batches of the last {len(last)} steps)"

    def _told_test(self) -> list[tuple[str, str]]:
        """Return the test loss at both ends, and the lowest where that is neither."""
        seen = [record for record in (self.start, *self.history) if record.test_loss is not None]
        if self.test_loss is None or not seen:
            return []
        lowest = min(seen, key=lambda record: record.test_loss or 0.0)
        ends = f"{seen[0].test_loss:.6g} -> {self.test_loss:.6g}"
        if lowest.step in (seen[0].step, (self.start, *self.history)[self.step].step):
            return [("test loss", ends)]
        return [("test loss", f"{ends} (lowest: {lowest.test_loss:.6g} at step {lowest.step})")]

    def plot(self) -> Figure:
        """Draw the losses, the residuals and the hyperparameters over the steps; needs matplotlib."""
        from bilevel.plotting import plot_run

        return plot_run([self.start, *self.history])

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write the run as one page of HTML that needs no network; needs plotly. See `bilevel.report`."""
        from bilevel.reporting import report

        report(self, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the link to the user's objects to a file.

        Modules are saved as dicts from names to tensors.
        """
        data = {
            "kind": "solution",
            "format": FORMAT,
            "hparams": _plain(self.hparams),
            "params": _plain(self.params),
            "outer_loss": self.outer_loss,
            "history": [asdict(record) for record in self.history],
            "status": self.status,
            "certificate": asdict(self.certificate),
            "start": asdict(self.start),
            "step": self.step,
            "test_loss": self.test_loss,
            "context": self.context,
        }
        check_folder(path, "path")
        write(data, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Solution:
        """Read a saved solution; nothing in the file is executed.

        Raises:
            BilevelError: the file is no saved solution, or cut short.
        """
        data = read(path)
        if data.get("kind") != "solution" or data.get("format") != FORMAT:
            raise InvalidValueError(f"{os.fspath(path)} is no file that Solution.save wrote")
        try:
            return Solution(
                data["hparams"],
                data["params"],
                data["outer_loss"],
                [Record(**record) for record in data["history"]],
                data["status"],
                Certificate.from_dict(data["certificate"]),
                Record(**data["start"]),
                data.get("step", -1),
                data.get("test_loss"),
                data.get("context", {}),
            )
        except (KeyError, TypeError) as error:
            raise InvalidValueError(f"{os.fspath(path)} was damaged after Solution.save wrote it: {error}") from error


def _shown(values: list[float], count: int) -> str:
    shown = "  ".join(f"{value:.4g}" for value in values)
    return shown if count <= SHOWN_ONE_BY_ONE else f"{shown}  (quantiles 0, 0.1, 0.5, 0.9, 1 of {count})"


def _plain(structure: Any) -> Any:
    if isinstance(structure, torch.nn.Module):
        return dict(structure.state_dict())
    return structure
