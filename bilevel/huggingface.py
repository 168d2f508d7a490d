"""Hyperparameters that move while HuggingFace's Trainer trains: a callback around `bilevel.HyperOptimizer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch.utils.data import DataLoader

from bilevel.callbacks.figures import scalars
from bilevel.errors import BilevelError, InvalidTypeError, InvalidValueError
from bilevel.hyper_optimizer import HyperOptimizer, check_schedule

try:
    import_module("accelerate")  # its Trainer refuses to begin without
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise BilevelError(
        f'bilevel.huggingface needs transformers and accelerate ({error}); write: pip install "bilevel[huggingface]"'
    ) from error

FILE = "bilevel.pt"  # beside the Trainer's own files in a checkpoint


class HyperCallback(TrainerCallback):
    """Call `hyper.step` every few steps of HuggingFace's Trainer, and log what it says by `trainer.log`.

    Write `trainer.add_callback(HyperCallback(trainer, hyper))`. Batches are drawn from the Trainer's own datasets with
    its collator, by loaders and random numbers of their own, so that the order of training stays as it is. The state of
    `hyper` is saved in the Trainer's checkpoints and found by `trainer.train(resume_from_checkpoint=True)`. What
    `compute_loss` uses must be `hyper.hparams`, which is changed in place.

    Args:
        trainer: whose training this is.
        hyper: its losses get the model: `(model, hparams, batch) -> scalar`.
        every_n_steps: optimizer steps from one hypergradient to the next.
        after_n_steps: optimizer steps before the first one: hypergradients are for a trained model.
        validation: a dataset; None: `trainer.eval_dataset`.
    """

    def __init__(
        self,
        trainer: Trainer,
        hyper: HyperOptimizer,
        *,
        every_n_steps: int = 10,
        after_n_steps: int = 0,
        validation: Any = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise InvalidTypeError(
                f"`trainer` is a {type(trainer).__name__}, expected the Trainer that the callback is added to; write "
                "trainer.add_callback(HyperCallback(trainer, hyper))"
            )
        check_schedule(hyper, every_n_steps, after_n_steps)
        self.hyper, self._trainer, self._validation = hyper, trainer, validation
        self._every, self._after = every_n_steps, after_n_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that it can work, make loaders, and go on from the Trainer's checkpoint."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise InvalidValueError(
                f"the Trainer has {args.world_size} processes and {args.n_gpu} devices, and each would tune "
                "hyperparameters of its own; give it one (CUDA_VISIBLE_DEVICES=0)"
            )
        inner = outer = None
        if self.hyper.wants_outer_batch:
            outer = self._loader(self._trainer.get_eval_dataloader(self._checked()), args.eval_batch_size, args.seed)
        if self.hyper.wants_inner_batch:
            inner = self._loader(kwargs["train_dataloader"], args.train_batch_size, args.seed)
        self.hyper.draw_from(inner=inner, outer=outer)
        self.hyper.to(kwargs["model"])
        if state.global_step and not self.hyper.steps:
            self._resume(args, state)

    def _checked(self) -> Any:
        """Return the validation dataset."""
        data = self._trainer.eval_dataset if self._validation is None else self._validation
        if data is None or isinstance(data, dict):
            told = "no validation data" if data is None else f"several eval_datasets ({', '.join(data)})"
            raise InvalidValueError(
                f"HyperCallback has {told}: write Trainer(..., eval_dataset=dataset), or "
                "HyperCallback(trainer, hyper, validation=dataset)"
            )
        return data

    def _loader(self, own: Any, size: int, seed: int) -> Any:
        """Return a loader of the same samples as the Trainer's, which iterates beside it."""
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(own.dataset, size, shuffle=True, generator=generator, collate_fn=_plain(own.collate_fn))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a step of the hyperparameters where it is time."""
        if state.global_step >= self._after and state.global_step % self._every == 0:
            self._trainer.log(scalars(self.hyper.step(kwargs["model"])))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state of `hyper` into the Trainer's checkpoint."""
        torch.save(self.hyper.state_dict(), _file(args, state))

    def _resume(self, args: Any, state: Any) -> None:
        path = _file(args, state)
        if not os.path.exists(path):
            raise InvalidValueError(
                f"the Trainer goes on from step {state.global_step}, and {path} is not there, so the hyperparameters "
                "would begin anew; keep the checkpoint in `output_dir`, or call hyper.load_state_dict(...) before"
            )
        self.hyper.load_state_dict(torch.load(path, weights_only=True))


def _file(args: Any, state: Any) -> str:
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}", FILE)


def _plain(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a collator that makes plain dicts, whose tensors can be moved to the model."""

    def collated(rows: Any) -> Any:
        batch = collate(rows)
        return dict(batch) if isinstance(batch, Mapping) else batch

    return collated
