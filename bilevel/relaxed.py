"""Settings that torch takes as plain numbers, as smooth functions of tensors: dropout rates, label smoothing.

Dropout's mask jumps with its rate. The concrete relaxation is smooth in it: Gal, Hron and Kendall, Concrete dropout,
NeurIPS 2017, section 3, with

    z = sigmoid((logit(rate) + logit(u)) / temperature)      u ~ U(0, 1)      x (1 - z) / (1 - rate)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.hyperparameters import interval
from bilevel.patterns import Groups, Names, Values, shared_out, values_of
from bilevel.ranges import Hyperparameter

__all__ = ["cross_entropy", "dropout", "dropout_rates", "with_dropout"]

# Each kind of dropout, and how many of the last dimensions share one mask entry.
_SHARED = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


def dropout(x: Tensor, rate: float | Tensor, *, temperature: float = 0.1, shared: int = 0) -> Tensor:
    """Drop entries of x at a rate that can be differentiated, and scale the rest by 1 / (1 - rate).

    Args:
        x: any shape.
        rate: in (0, 1): a number, or a Tensor that broadcasts to x (a rate for each feature).
        temperature: larger is smoother, and further from zeros and ones. At 0.1 and a rate of 0.1, 8 % of the entries
            lie between (51 % at 0.5), and the mean is kept to 0.1 % (3 %).
        shared: how many of the last dimensions share one entry of the mask (2 for whole channels of images).
    """
    if not isinstance(rate, Tensor) and not 0.0 < rate < 1.0:
        raise InvalidValueError(f"relaxed.dropout: `rate` is {rate}, expected a number in (0, 1); at 0 leave it out")
    if not temperature > 0.0:
        raise InvalidValueError(f"relaxed.dropout: `temperature` is {temperature}, expected a number > 0")
    p = torch.as_tensor(rate).to(x)
    _within(p, x.shape, "relaxed.dropout: `rate`", "x")
    shape = (*x.shape[: x.dim() - shared], *[1] * shared)
    u = torch.rand(shape, dtype=x.dtype, device=x.device).clamp(torch.finfo(x.dtype).eps, 1 - torch.finfo(x.dtype).eps)
    z = torch.sigmoid((torch.logit(p) + torch.logit(u)) / temperature)
    return x * (1 - z) / (1 - p)


@contextmanager
def with_dropout(
    model: nn.Module, rates: Values, *, per: Groups | None = None, temperature: float = 0.1
) -> Iterator[None]:
    """Let the dropout layers of a module drop at these rates, inside of a loss::

        with relaxed.with_dropout(net, h["dropout"]):
            logits = net(x)

    In eval mode they let everything through, as always. Dropout that is no `nn.Dropout` (inside of fused attention)
    keeps its own rate.

    Args:
        model: the `params` of a loss, with `nn.Dropout`, `Dropout1d`, `Dropout2d` or `Dropout3d` in it.
        rates: a number or a Tensor for all of them, or a dict by names of these layers or of modules above them, by
            patterns, or by the labels of `per`. A layer that no key covers keeps its own.
        per: patterns by label.
        temperature: see `dropout`.
    """
    layers, names = _dropouts(model, "relaxed.with_dropout")
    found = values_of(names, rates, per, "relaxed.with_dropout: `rates`", "dropout layer")
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer, rate in zip(layers, found, strict=True):
        if rate is not None:
            _replace(layer, rate, temperature)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.__dict__["forward"] = own


def dropout_rates(model: nn.Module, value: float | None = None, per: str | Groups = "layer") -> Any:
    """Return typed hyperparameters in (0, 1) for `with_dropout`.

    Args:
        model: with dropout layers in it.
        value: where they start; None: at the rates that the layers have.
        per: "layer" (a dict by their names), "model" (one for all), or patterns by label.

    >>> dropout_rates(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.25)))
    {'1': interval(0.25)}
    """
    layers, names = _dropouts(model, "relaxed.dropout_rates")

    def start(own: list[float]) -> Hyperparameter:
        rate = sum(own) / len(own) if value is None else value
        if not 0.0 < rate < 1.0:
            raise InvalidValueError(
                f"relaxed.dropout_rates: a rate would start at {rate}, expected one in (0, 1); give `value`, "
                "0.1 for example"
            )
        return interval(rate, 0.0, 1.0)

    if per == "model":
        return start([float(layer.p) for layer in layers])
    if per == "layer":
        return {own[0]: start([float(layer.p)]) for own, layer in zip(names, layers, strict=True)}
    if isinstance(per, str):
        raise InvalidValueError(
            f'relaxed.dropout_rates: `per` is {per!r}, expected "layer", "model" or a dict of patterns'
        )
    labels = shared_out(names, list(per), per, "relaxed.dropout_rates: `per`", "dropout layer")
    by_label = {label: [float(x.p) for x, own in zip(layers, labels, strict=True) if own == label] for label in per}
    return {label: start(own) for label, own in by_label.items()}


def _dropouts(model: Any, what: str) -> tuple[list[Any], Names]:
    """Return the dropout layers with their names; several names where one layer is used twice."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            f"{what}: `model` is a {type(model).__name__}, expected an nn.Module with dropout layers"
        )
    found: dict[int, tuple[Any, tuple[str, ...]]] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        if type(part) in _SHARED:
            found[id(part)] = (part, (*found.get(id(part), (part, ()))[1], name.replace("_orig_mod.", "")))
    if not found:
        raise InvalidValueError(
            f"{what}: the {type(model).__name__} has no nn.Dropout layer; call relaxed.dropout(x, rate) in a "
            "forward of your own"
        )
    return [part for part, _ in found.values()], tuple(own for _, own in found.values())


def _replace(layer: Any, rate: Any, temperature: float) -> None:
    shared = _SHARED[type(layer)]

    def forward(x: Tensor) -> Tensor:
        return dropout(x, rate, temperature=temperature, shared=shared) if layer.training else x

    layer.__dict__["forward"] = forward


def _within(value: Tensor, shape: torch.Size, what: str, other: str) -> None:
    """Raise for a Tensor that would not broadcast to a shape, but blow up the other one or fail."""
    ends = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > len(shape) or any(n not in (1, m) for n, m in ends):
        raise InvalidValueError(
            f"{what} has shape {tuple(value.shape)}, expected a number or a shape that broadcasts to {tuple(shape)}, "
            f"that of `{other}`"
        )


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float | Tensor, *, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """Return the cross entropy with label smoothing that can be differentiated: (1 - ε) CE + ε mean over classes.

    The values are those of `torch.nn.functional.cross_entropy(..., label_smoothing=ε)`, which takes a number only.
    Use it in the inner loss; an outer loss with smoothing would be made small by the smoothing itself.

    Args:
        logits: `(n, classes)` or `(n, classes, ...)`.
        labels: whole numbers, `(n)` or `(n, ...)`.
        smoothing: ε in [0, 1]: a number, or a Tensor that broadcasts to `labels` (`h["smoothing"][labels]` for one of
            each class).
        reduction: "mean", "sum" or "none".
        ignore_index: label of entries that do not count.
    """
    if not isinstance(smoothing, Tensor) and not 0.0 <= smoothing <= 1.0:
        raise InvalidValueError(f"relaxed.cross_entropy: `smoothing` is {smoothing}, expected a number in [0, 1]")
    if labels.is_floating_point():
        raise InvalidTypeError(
            "relaxed.cross_entropy: `labels` are floating-point, expected whole numbers, a class each"
        )
    if isinstance(smoothing, Tensor):
        _within(smoothing, labels.shape, "relaxed.cross_entropy: `smoothing`", "labels")
    counts = labels != ignore_index
    logs = F.log_softmax(logits, dim=1)
    taken = logs.gather(1, labels.where(counts, 0).unsqueeze(1)).squeeze(1)
    losses = -((1 - smoothing) * taken + smoothing * logs.mean(dim=1)).where(counts, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / counts.sum()
    raise InvalidValueError(f'relaxed.cross_entropy: `reduction` is {reduction!r}, expected "mean", "sum" or "none"')
