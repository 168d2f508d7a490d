"""Priors over weights and over strengths, as negative log densities with their normalizers.

    gaussian     Σ τ (w - μ)² / 2 - log(τ) / 2 + log(2π) / 2       w ~ N(μ, 1 / τ)
    log_normal   Σ (log λ - log m)² / (2 σ²) + log(σ) + log(2π) / 2   log λ ~ N(log m, σ²)

The normalizer is constant for the inner problem. It counts where the outer loss has a prior in it: in an evidence, and
in a hierarchy, where strengths have a prior of their own. MacKay, Bayesian interpolation, Neural Computation 4 (1992).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.hyperparameters import real
from bilevel.patterns import Groups, Selection, Values, as_tensors, chosen, fitting, values_of
from bilevel.ranges import Hyperparameter

__all__ = ["gaussian", "log_normal", "means"]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def gaussian(
    model: Any,
    mean: Values = 0.0,
    precision: Values = 1.0,
    *,
    per: Groups | None = None,
    on: str | Sequence[str] | None = None,
) -> Tensor:
    """Return -log N(w; mean, 1 / precision), summed over the weights.

    A training loss that is a mean over n examples takes it divided by n; a sum of negative log likelihoods takes it as
    it is, and then the minimum is the most probable w.

    Args:
        model: the `params` of a loss; see `bilevel.penalties.l2`, also for the dicts, for `per` and `on`.
        mean: μ: a number, or a dict of numbers and Tensors. Where `precision` gives a tensor a prior, it must too.
        precision: τ > 0, one over the variance, in the patterns of `bilevel.penalties.strengths`, which makes it. A
            tensor that its dict does not cover has no prior.
        per: patterns by label, where the keys of `precision` are labels. Those of `mean` may be the same labels, or
            names.
        on: which tensors it is on.

    >>> round(gaussian(torch.zeros(2), mean=torch.tensor([0.0, 2.0]), precision=1.0).item(), 4)  # 2 + log(2π)
    3.8379
    """
    tensors, names = chosen(*as_tensors(model, "priors.gaussian"), on, "priors.gaussian")
    same = isinstance(mean, Mapping) and per is not None and set(mean) == set(per)
    means = values_of(names, mean, per if same else None, "priors.gaussian: `mean`")
    precisions = values_of(names, precision, per, "priors.gaussian: `precision`")
    terms = []
    for w, own, m, tau in zip(tensors, names, means, precisions, strict=True):
        if tau is None:
            continue
        if m is None:
            raise InvalidValueError(
                f"priors.gaussian: `precision` covers {own[0]!r} and `mean` does not; give it a mean, 0.0 for example"
            )
        if not isinstance(tau, Tensor) and not 0.0 < tau < math.inf:
            raise InvalidValueError(f"priors.gaussian: `precision` is {tau} for {own[0]!r}, expected finite and > 0")
        m = fitting(m, tuple(w.shape), "priors.gaussian: `mean`", own[0])
        tau = torch.as_tensor(fitting(tau, tuple(w.shape), "priors.gaussian: `precision`", own[0])).to(w)
        terms.append((tau * (w - m).square() / 2 - tau.log() / 2 + HALF_LOG_2PI).sum())
    return torch.stack(terms).sum()


def log_normal(strengths: Any, median: float | Tensor, spread: float | Tensor) -> Tensor:
    """Return -log N(log λ; log median, spread²), summed over every number in `strengths`: a prior of strengths.

    In the outer loss it keeps many strengths together that few validation data cannot tell apart; `median` and `spread`
    can be hyperparameters, which makes the model hierarchical. It is a density of log λ, in which `solve` walks, so its
    mode is the median.

    Args:
        strengths: positive Tensors in any structure, such as `h["decay"]`.
        median: where it is centred, > 0.
        spread: standard deviation of log λ, > 0; 1 stands for a factor of 2.7 either way.

    >>> round(log_normal({"a": torch.tensor(1.0)}, 1.0, 1.0).item(), 4)  # log(2π) / 2
    0.9189
    """
    leaves: list[Any] = optree.tree_leaves(strengths, none_is_leaf=True)
    strange = next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None)
    if not leaves or strange is not None:
        raise InvalidTypeError(
            f"priors.log_normal: `strengths` hold {'nothing' if not leaves else f'a {type(strange).__name__}'}, "
            "expected Tensors; take the hyperparameters that a loss gets"
        )
    for name, value in (("median", median), ("spread", spread)):
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise InvalidTypeError(
                f"priors.log_normal: `{name}` is a {type(value).__name__}, expected a number or a Tensor"
            )
        if not isinstance(value, Tensor) and not 0.0 < value < math.inf:
            raise InvalidValueError(f"priors.log_normal: `{name}` is {value}, expected a finite number > 0")
    m, s = (torch.as_tensor(value).to(leaves[0]) for value in (median, spread))
    terms = []
    for t in leaves:
        own = [
            fitting(value, tuple(t.shape), f"priors.log_normal: `{name}`", "one of `strengths`")
            for name, value in (("median", m), ("spread", s))
        ]
        terms.append((((t / own[0]).log() / own[1]).square() / 2 + own[1].log() + HALF_LOG_2PI).expand(t.shape).sum())
    return torch.stack(terms).sum()


def means(module: nn.Module | Selection, *, on: str | Sequence[str] | None = None) -> dict[str, Hyperparameter]:
    """Return a mean for each weight as hyperparameters that start at the module's own weights, for `gaussian`.

    With fixed means instead, `{name: p.detach().clone() for name, p in model.named_parameters()}`, fine-tuning stays
    near the pretrained weights.
    """
    tensors, names = chosen(*as_tensors(module, "priors.means"), on, "priors.means")
    return {own[0]: real(t.detach().clone()) for own, t in zip(names, tensors, strict=True)}
