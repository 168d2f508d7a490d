"""Estimators that need first derivatives only, on what autograd cannot differentiate twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import CG, FiniteDifference, Penalty, hypergradient, twice
from bilevel.testing import relative_error
from problems_first_order import XV, YV, X, Y


class Once(torch.autograd.Function):
    """tanh, marked once_differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1.0 - y**2)  # type: ignore[no-any-return]


def once(p: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = Once.apply(p(x))  # type: ignore[no-untyped-call]
    return y


def normalized() -> nn.Module:
    torch.manual_seed(1)
    module: nn.Module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, dtype=torch.float64))
    return module


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 4, dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x[None], x[None], x[None], need_weights=self.need_weights)[0][0]
        return y


def problem_of(module: nn.Module, forward: Any = lambda p, x: p(x)) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(
        lambda p, h: ((forward(p, X) - Y) ** 2).mean() + h * sum(((t - 0.1) ** 2).sum() for t in p.parameters()),
        lambda p, h: ((forward(p, XV) - YV) ** 2).mean(),
        params=module,
        hparams=bilevel.positive(1.0),
    )


def by_hand(p: nn.Module, x: Tensor) -> Tensor:
    named = dict(p.named_parameters())
    g, v = (named[f"parametrizations.weight.original{i}"] for i in (0, 1))
    y: Tensor = x @ (g * v / v.norm(dim=1, keepdim=True)).T + named["bias"]
    return y


ONCE: dict[str, tuple[bilevel.BilevelProblem, bilevel.BilevelProblem]] = {
    "once_differentiable": (problem_of(linear(), once), problem_of(linear(), lambda p, x: torch.tanh(p(x)))),
    "weight_norm": (problem_of(normalized()), problem_of(normalized(), by_hand)),
    "fused attention": (problem_of(Attention(False)), problem_of(Attention(True))),
}


@pytest.mark.parametrize("name", ONCE)
def test_first_derivatives_are_enough(name: str) -> None:
    """From the inner solve to the certificate, against the same function written with twice differentiable ops."""
    problem, twin = ONCE[name]
    expected = hypergradient(twin, "cg", on_untrusted="raise")
    found = hypergradient(problem, FiniteDifference(CG(rtol=1e-9)), on_untrusted="raise")
    assert relative_error(found.gradient, expected.gradient) <= 1e-7
    found = hypergradient(problem, "penalty", on_untrusted="raise")
    assert relative_error(found.gradient, expected.gradient) <= 1e-6
    for method in ("finite-difference", "penalty"):
        assert not [f for f in bilevel.check(problem, method).findings if f.level == "error"]


@pytest.mark.parametrize("name", ["once_differentiable", "weight_norm"])
def test_the_refusal_of_second_derivatives_names_the_methods_that_work(name: str) -> None:
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match='method="finite-difference" or "penalty"'):
        hypergradient(ONCE[name][0], "cg")
    problem = bilevel.BilevelProblem(
        lambda w, h: torch.cdist(X @ w, X, p=1.0).mean() + h * (w**2).sum(),
        lambda w, h: (XV @ w).sum(),
        params=torch.eye(4, dtype=torch.float64),
        hparams=bilevel.positive(1.0),
    )
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match='method="finite-difference" or "penalty"'):
        hypergradient(problem, "cg")


def test_fused_kernels_stay_fused_for_first_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The math backend of attention is for second derivatives alone."""
    entered: list[bool] = []
    real: Any = twice.twice_differentiable

    def watched(gpu: bool) -> Any:
        entered.append(True)
        return real(gpu)

    monkeypatch.setattr("bilevel.response.twice_differentiable", watched)
    problem = ONCE["fused attention"][0]
    start = problem.params.export(problem.params.start)
    hypergradient(problem, "finite-difference", params=start, on_untrusted="ignore")
    assert not entered
    hypergradient(problem, "cg", params=start, on_untrusted="ignore")
    assert entered


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteDifference(CG), "`linear_solver`.*expected an object"),  # type: ignore[arg-type]
        (lambda: FiniteDifference(step_size=0.0), "`step_size` is 0.0, expected a number above 0"),
        (lambda: FiniteDifference(step=-1e-3), "`step` is -0.001"),
        (lambda: Penalty(0.0), "`sigma` is 0.0, expected a number above 0"),
        (lambda: Penalty(form="both"), "`form` is 'both', expected one of central"),  # type: ignore[arg-type]
        (lambda: FiniteDifference(CG(), step_size=0.1), "leave one out"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        make()
