"""Hyperparameters that move while Lightning's Trainer trains: a callback around `bilevel.HyperOptimizer`.

Both packages that Lightning comes in are served, `lightning` and `pytorch_lightning`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from bilevel.callbacks.figures import scalars
from bilevel.errors import BilevelError, InvalidValueError
from bilevel.hyper_optimizer import HyperOptimizer, check_schedule

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[Any, ...]:
    """Return the base of callbacks in each package that is in use, or in the first one that is installed."""
    used = [name for name in PACKAGES if name in sys.modules]
    for name in used or PACKAGES:
        try:
            found = [import_module(one).Callback for one in (used or [name])]
        except ImportError:
            continue
        return tuple(dict.fromkeys(found))
    raise BilevelError(
        'bilevel.lightning needs Lightning, which is not installed; write: pip install "bilevel[lightning]"'
    )


class HyperCallback(*_bases()):  # type: ignore[misc]
    """Call `hyper.step` every few steps of Lightning's Trainer, and log what it says to the Trainer's loggers.

    The training batch is the one that was just trained on; validation batches are drawn in turn. `hyper` is part of the
    Trainer's checkpoints. What `training_step` uses must be `hyper.hparams`, which is changed in place.

    Args:
        hyper: its losses get the LightningModule: `(module, hparams, batch) -> scalar`.
        every_n_steps: optimizer steps from one hypergradient to the next.
        after_n_steps: optimizer steps before the first one: hypergradients are for a trained model.
        validation: a loader; None: the Trainer's validation loader.
    """

    def __init__(
        self, hyper: HyperOptimizer, *, every_n_steps: int = 10, after_n_steps: int = 0, validation: Any = None
    ) -> None:
        super().__init__()
        check_schedule(hyper, every_n_steps, after_n_steps)
        self.hyper, self._every, self._after, self._validation = hyper, every_n_steps, after_n_steps, validation
        self._last = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that it can work, and hand over the validation loader."""
        if not pl_module.automatic_optimization:
            raise InvalidValueError(
                f"{type(pl_module).__name__} has automatic_optimization=False, so only its training_step knows when a "
                "step is done; call hyper.step(self, validation_batch, batch) there instead of this callback"
            )
        if trainer.world_size > 1:
            raise InvalidValueError(
                f"the Trainer has {trainer.world_size} processes, and each would tune hyperparameters of its own; "
                "write Trainer(devices=1)"
            )
        if self.hyper.wants_outer_batch:
            self.hyper.draw_from(outer=self._loader(trainer))
        self.hyper.to(pl_module)

    def _loader(self, trainer: Any) -> Any:
        loaders = self._validation if self._validation is not None else trainer.val_dataloaders
        several = isinstance(loaders, (list, tuple))
        if several and len(loaders) > 1:
            raise InvalidValueError(
                f"the Trainer has {len(loaders)} validation loaders; say which one: "
                "HyperCallback(hyper, validation=loader)"
            )
        loader = loaders[0] if several and loaders else loaders
        if loader is None or (several and not loaders):
            raise InvalidValueError(
                "HyperCallback has no validation data: give the Trainer some, trainer.fit(module, train_loader, "
                "val_loader), or write HyperCallback(hyper, validation=loader)"
            )
        return loader

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take a step of the hyperparameters where it is time."""
        step = trainer.global_step
        if step == self._last or step < max(self._after, 1) or step % self._every:  # the same: gradients accumulate
            return
        self._last = step
        record = self.hyper.step(pl_module, inner_batch=batch if self.hyper.wants_inner_batch else None)
        for logger in trainer.loggers:
            logger.log_metrics(scalars(record), step=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `hyper`, for the Trainer's checkpoints."""
        return {"hyper": self.hyper.state_dict(), "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint of the Trainer."""
        self.hyper.load_state_dict(state_dict["hyper"])
        self._last = state_dict["last"]
