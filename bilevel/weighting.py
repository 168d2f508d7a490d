"""Weights as hyperparameters: of the tasks of a training loss, and of its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError, meant

__all__ = ["examples", "tasks", "uncertain_tasks"]

Losses = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


def tasks(losses: Losses, weights: Any) -> Tensor:
    """Return Σ weight · loss over several tasks.

    Only ratios of weights matter to the inner problem, so `bilevel.simplex(n)` is the hyperparameter to take, or
    `bilevel.positive` with one task left at 1.

    Args:
        losses: a scalar for each task: a dict, a list, or a 1-d Tensor.
        weights: a dict with the same keys, or as many in a list or a 1-d Tensor.

    >>> tasks({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, {"b": torch.tensor(10.0), "a": torch.tensor(1.0)})
    tensor(32.)
    """
    found, given = _paired(losses, weights, "weights", "weighting.tasks")
    return (found * given).sum()


def uncertain_tasks(losses: Losses, scales: Any) -> Tensor:
    """Return Σ loss / (2 σ²) + log σ: the negative log likelihood of several tasks with a noise scale for each.

    Kendall, Gal and Cipolla, Multi-task learning using uncertainty to weigh losses, CVPR 2018, equation 7. There the
    scales are trained along with the weights, by the same loss: with losses L they end at σ² = L. As hyperparameters of
    an inner loss they act by 1 / (2 σ²) alone, since log σ is constant for the weights.

    Args:
        losses: see `tasks`.
        scales: σ > 0 of each, in the same forms; `bilevel.positive(1.0)`.
    """
    found, sigma = _paired(losses, scales, "scales", "weighting.uncertain_tasks")
    return (found / (2 * sigma.square()) + sigma.log()).sum()


def examples(losses: Tensor, weights: Tensor, index: Tensor | None = None, *, normalize: bool = False) -> Tensor:
    """Return the mean of weight · loss over examples: data weights, by index where they come in batches.

    Args:
        losses: `(n)`, one for each example of the batch (`reduction="none"`).
        weights: `(n)`, or `(all)` with `index`.
        index: `(n)` whole numbers: which example each one is.
        normalize: divide by the sum of the weights, not by n. Then their size does not matter, only their ratios.

    >>> examples(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 9.0, 3.0]), torch.tensor([0, 2]))
    tensor(3.5000)
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        shape = f"of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise InvalidValueError(
            f'weighting.examples: `losses` are {shape}, expected (n), one for each example; reduction="none" gives them'
        )
    if not isinstance(weights, Tensor):
        raise InvalidTypeError(
            f"weighting.examples: `weights` are a {type(weights).__name__}, expected a Tensor, one number an example"
        )
    if index is not None and (index.is_floating_point() or index.shape != losses.shape or index.dtype == torch.bool):
        raise InvalidValueError(
            f"weighting.examples: `index` is a {index.dtype} tensor of shape {tuple(index.shape)}, expected whole "
            f"numbers, {len(losses)} of them: which example each loss belongs to"
        )
    taken = weights if index is None else weights[index]
    if taken.shape != losses.shape:
        raise InvalidValueError(
            f"weighting.examples: {tuple(taken.shape)} weights for {tuple(losses.shape)} losses; with weights of all "
            "examples say by `index` which of them are in the batch"
        )
    return (taken * losses).sum() / (taken.sum() if normalize else len(losses))


def _paired(losses: Any, values: Any, name: str, what: str) -> tuple[Tensor, Tensor]:
    if isinstance(losses, Mapping):
        if not isinstance(values, Mapping) or set(values) != set(losses):
            shown = list(values) if isinstance(values, Mapping) else f"a {type(values).__name__}"
            hint = ""
            if isinstance(values, Mapping):
                odd = next((k for k in values if k not in losses), None)
                hint = meant(odd, map(str, losses)) if odd is not None else ""
            raise InvalidValueError(f"{what}: `{name}` are {shown}, expected a dict with the keys {list(losses)}{hint}")
        values = [values[key] for key in losses]
        losses = list(losses.values())
    found, given = _stacked(losses, "losses", what), _stacked(values, name, what)
    if found.shape != given.shape or not found.numel():
        raise InvalidValueError(f"{what}: {given.numel()} {name} for {found.numel()} losses, expected one for each")
    return (found, given.to(found)) if found.is_floating_point() else (found.to(given), given)


def _stacked(values: Any, name: str, what: str) -> Tensor:
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise InvalidValueError(f"{what}: `{name}` has shape {tuple(values.shape)}, expected (tasks)")
        return values
    if not isinstance(values, (list, tuple)):
        raise InvalidTypeError(
            f"{what}: `{name}` is a {type(values).__name__}, expected a dict, a list or a 1-d Tensor"
        )
    parts = [torch.as_tensor(v) for v in values]
    wrong = next((p for p in parts if p.dim()), None)
    if wrong is not None:
        raise InvalidValueError(
            f"{what}: one of `{name}` has shape {tuple(wrong.shape)}, expected scalars; add .mean()"
        )
    like = next((p for p in parts if p.is_floating_point()), None)
    return torch.stack([p if like is None else p.to(like) for p in parts]) if parts else torch.zeros(0)
