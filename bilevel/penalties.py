"""Ready-made penalties for a loss, on any module or structure of tensors, and their strengths as hyperparameters.

    l2      Σ s w² / 2        its gradient is s w, torch.optim's `weight_decay=s` (SGD, Adam; AdamW's is decoupled)
    l1      Σ s |w|           or smooth: Σ s (√(w² + δ²) - δ)
    group   Σ s |w of a group|

The factors are those of `bilevel.prox`. A penalty that shall hold weights at zero belongs there, into the inner solver:
a kink has no second derivative, and a smooth form only makes weights small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.errors import InvalidTypeError, InvalidValueError, meant
from bilevel.hyperparameters import positive
from bilevel.param_groups import On, groups, param_groups
from bilevel.patterns import Groups, Selection, Values, as_tensors, chosen, fitting, shared_out, values_of
from bilevel.ranges import Hyperparameter

__all__ = ["elastic_net", "group", "groups", "l1", "l2", "param_groups", "strengths"]

Per = Literal["model", "layer", "tensor", "weight"]


def l2(model: Any, strengths: Values, *, per: Groups | None = None, on: On = None) -> Tensor:
    """Return Σ s w² / 2, whose gradient s w is that of `weight_decay=s` in torch.optim.

    Args:
        model: the `params` of a loss: an `nn.Module`, a Tensor, or a nested dict/list/tuple of Tensors. Constants
            (frozen parameters) are left out.
        strengths: a number or a 0-d Tensor for all tensors, or a dict of them. Its keys are names of tensors
            ("head.weight"), of modules ("head": all tensors in it) or patterns ("encoder.*.bias"); the most specific
            one counts, and a tensor that no key covers has no penalty. A Tensor of a weight's shape is a strength for
            each of its entries.
        per: patterns by label, where the keys of `strengths` are labels: `{"head": "head.*", "rest": "*"}`; a label
            that has a tensor's own name counts, else the first one that fits.
        on: which tensors it is on: None for all, as in torch.optim, biases and the gains of norm layers among them;
            "matrices" for those of two dimensions and more, which leaves both out; or names and patterns of names
            ("weight" stands for every "....weight").

    Raises:
        BilevelError: a key, a label or a pattern that no tensor falls to; a strength of a wrong shape.

    >>> import torch
    >>> l2({"a": torch.tensor([3.0]), "b": torch.tensor([1.0, 2.0])}, {"a": 2.0, "b": torch.tensor([0.0, 1.0])})
    tensor(11.)
    """
    return _total(model, strengths, per, on, "l2", lambda w: w.square() / 2)


def l1(model: Any, strengths: Values, *, smooth: float = 0.0, per: Groups | None = None, on: On = None) -> Tensor:
    """Return Σ s |w|, or its smooth form.

    Args:
        model: see `l2`; so are `strengths`, `per` and `on`.
        smooth: δ of √(w² + δ²) - δ, in the unit of the weights, for L-BFGS and implicit methods: a thousandth of a
            typical weight, say. 0: |w| itself, for unrolled loops.
    """
    delta = _width(smooth, "l1")
    return _total(model, strengths, per, on, "l1", lambda w: _rounded(w.square(), delta) if delta else w.abs())


def elastic_net(
    model: Any, l1: Values, l2: Values, *, smooth: float = 0.0, per: Groups | None = None, on: On = None
) -> Tensor:
    """Return Σ l1 |w| + l2 w² / 2; see `l1` and `l2` for the arguments. `per` serves both strengths."""
    delta = _width(smooth, "elastic_net")
    linear = _total(model, l1, per, on, "elastic_net", lambda w: _rounded(w.square(), delta) if delta else w.abs())
    return linear + _total(model, l2, per, on, "elastic_net", lambda w: w.square() / 2)


def group(
    model: Any,
    strengths: Values,
    groups: Literal["rows", "columns", "tensor"] = "rows",
    *,
    smooth: float = 0.0,
    per: Groups | None = None,
    on: On = "matrices",
) -> Tensor:
    """Return Σ over groups: s |w of the group|, or its smooth form Σ s (√(|w|² + δ²) - δ).

    Args:
        model: see `l2`; so are `strengths`, `per` and `on`, which is "matrices" here. A strength may be a Tensor with
            an entry for each group.
        groups: "rows" (a group for each index of the first dimension: the outputs of an `nn.Linear`), "columns" (of
            the last: its inputs) or "tensor".
        smooth: see `l1`. At 0 a group of zeros has no second derivative.
    """
    if groups not in ("rows", "columns", "tensor"):
        raise InvalidValueError(f'penalties.group: `groups` is {groups!r}, expected "rows", "columns" or "tensor"')
    delta = _width(smooth, "group")

    def norms(w: Tensor) -> Tensor:
        if groups == "tensor" or w.dim() == 0:
            squares = w.square().sum()
        else:
            kept = 0 if groups == "rows" else w.dim() - 1
            others = [d for d in range(w.dim()) if d != kept]
            squares = w.square().sum(others) if others else w.square()
        return _rounded(squares, delta) if delta else _root(squares)

    return _total(model, strengths, per, on, "group", norms)


def strengths(
    module: nn.Module | Selection,
    value: float,
    per: Per | Groups = "layer",
    *,
    on: On = None,
    make: Callable[..., Hyperparameter] = positive,
) -> Any:
    """Return typed hyperparameters for the penalties of this module: a part of `hparams`.

    Args:
        module: any `nn.Module`, or what `bilevel.parameters` chose of one; a structure of Tensors too, whose layers are
            its containers.
        value: where they start.
        per: "model": one; "layer": a dict with one for each module that holds tensors itself; "tensor": a dict with
            one for each tensor; "weight": a dict of Tensors of the weights' shapes; or patterns by label,
            `{"head": "head.*", "rest": "*"}`: a dict with one for each label, to go with `per=` of the penalty.
        on: as in the penalty; the same for both.
        make: the kind of hyperparameter, for example `lambda value, shape: bilevel.positive(value, shape, high=1.0)`.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> list(strengths(network, 1e-3)), list(strengths(network, 1e-3, per="tensor", on="matrices"))
    (['0', '2'], ['0.weight', '2.weight'])
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(f"penalties.strengths: `value` is a {type(value).__name__}, expected a number")
    if isinstance(per, Optimizer):
        raise InvalidTypeError(
            f"penalties.strengths: `per` is a {type(per).__name__}; write per=penalties.groups(model, optimizer), "
            "and give the same to the penalty"
        )
    tensors, names = chosen(*as_tensors(module, "penalties.strengths"), on, "penalties.strengths")
    if isinstance(per, Mapping):
        shared_out(names, list(per), per, "penalties.strengths: `per`")
        return {label: make(value, ()) for label in per}
    if per == "model":
        return make(value, ())
    if per == "layer":
        return {layer: make(value, ()) for layer in dict.fromkeys(_layer(own[0]) for own in names)}
    if per == "tensor":
        return {own[0]: make(value, ()) for own in names}
    if per == "weight":
        return {own[0]: make(value, tuple(t.shape)) for own, t in zip(names, tensors, strict=True)}
    raise InvalidValueError(
        f"penalties.strengths: `per` is {per!r}, expected one of {', '.join(get_args(Per))}, or a dict of patterns"
        f"{meant(per, get_args(Per))}"
    )


def _layer(name: str) -> str:
    """Return the module that holds a tensor; its own name where that is the root."""
    return name.rpartition(".")[0] or name


def _total(
    model: Any, values: Values, per: Groups | None, on: On, name: str, measure: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the sum over tensors of strength times measure."""
    what = f"penalties.{name}: `strengths`"
    tensors, names = chosen(*as_tensors(model, f"penalties.{name}"), on, f"penalties.{name}")
    terms = []
    for w, own, s in zip(tensors, names, values_of(names, values, per, what), strict=True):
        if s is None:
            continue
        if not isinstance(s, Tensor) and not 0.0 <= s < float("inf"):
            raise InvalidValueError(f"{what} are {s} for {own[0]!r}, expected finite numbers >= 0")
        measured = measure(w)
        terms.append((fitting(s, tuple(measured.shape), what, own[0]) * measured).sum())
    return torch.stack(terms).sum()


def _width(smooth: Any, name: str) -> float:
    if isinstance(smooth, bool) or not isinstance(smooth, (int, float)) or not 0.0 <= smooth < float("inf"):
        raise InvalidValueError(f"penalties.{name}: `smooth` is {smooth!r}, expected a finite number >= 0")
    return float(smooth)


def _rounded(squares: Tensor, delta: float) -> Tensor:
    # x² / (√(x² + δ²) + δ), which does not cancel where x is small.
    return squares / ((squares + delta**2).sqrt() + delta)


def _root(squares: Tensor) -> Tensor:
    """Return the root, with the derivative 0 at 0."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
