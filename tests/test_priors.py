"""Priors against torch.distributions, and an evidence against its closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

import bilevel
from bilevel import penalties, priors
from problems_variables import scalar, vector

pytestmark = pytest.mark.usefixtures("seeded")


def log_density(w: Tensor, mean: Any, precision: Any) -> float:
    spread = torch.as_tensor(precision, dtype=w.dtype) ** -0.5
    normal = Normal(torch.as_tensor(mean, dtype=w.dtype), spread)
    found: Tensor = normal.log_prob(w.detach())  # type: ignore[no-untyped-call]
    return float(found.sum())


def network() -> Any:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def test_gaussian_is_the_density_of_torch() -> None:
    net = network()
    everything = sum(log_density(p, 0.3, 2.0) for p in net.parameters())
    assert priors.gaussian(net, 0.3, 2.0).item() == pytest.approx(-everything, rel=1e-12)
    found = priors.gaussian(net, {"0.weight": torch.ones(3, 2), "0.bias": 0.5}, {"0": torch.tensor(4.0).double()})
    expected = log_density(net[0].weight, 1.0, 4.0) + log_density(net[0].bias, 0.5, 4.0)
    assert found.item() == pytest.approx(-expected, rel=1e-12)
    per = {"head": "2.*", "rest": "*"}
    labelled = priors.gaussian(net, {"head": 1.0, "rest": 0.0}, {"head": 9.0, "rest": 1.0}, per=per, on="matrices")
    expected = log_density(net[2].weight, 1.0, 9.0) + log_density(net[0].weight, 0.0, 1.0)
    assert labelled.item() == pytest.approx(-expected, rel=1e-12)


def test_the_evidence_of_a_linear_model() -> None:
    """-log N(y; 0, σ² I + X Xᵀ / τ) is loss + prior at w*, and half the log determinant of their Hessian."""
    x, sigma = torch.randn(12, 3, dtype=torch.float64), 0.5
    y = x @ vector(1.0, -2.0, 0.0) + sigma * torch.randn(12, dtype=torch.float64)

    def joint(w: Tensor, tau: Tensor) -> Tensor:
        noise = ((x @ w - y) / sigma).square().sum() / 2 + 12 * (math.log(sigma) + math.log(2 * math.pi) / 2)
        return noise + priors.gaussian(w, 0.0, tau)

    def evidence(w: Tensor, tau: Tensor) -> Tensor:
        hessian = x.T @ x / sigma**2 + tau * torch.eye(3, dtype=torch.float64)
        return joint(w, tau) + torch.logdet(hessian) / 2 - 3 * math.log(2 * math.pi) / 2

    tau = scalar(0.7).requires_grad_()
    cover = sigma**2 * torch.eye(12, dtype=torch.float64) + x @ x.T / tau
    marginal = MultivariateNormal(torch.zeros(12, dtype=torch.float64), cover)
    exact = -marginal.log_prob(y)  # type: ignore[no-untyped-call]
    (slope,) = torch.autograd.grad(exact, tau)
    start = torch.zeros(3, dtype=torch.float64)
    problem = bilevel.BilevelProblem(joint, evidence, start, bilevel.positive(0.7))
    found = bilevel.hypergradient(problem)
    assert found.outer_loss == pytest.approx(exact.item(), rel=1e-10)
    assert found.gradient.item() == pytest.approx(slope.item(), rel=1e-8)


def test_means_pull_the_weights() -> None:
    """w* = (a + τ μ) / (1 + τ) for a loss (w - a)² / 2: dF/dμ = τ / (1 + τ) for F = Σ w."""
    net: Any = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, 4.0]]))
    hparams = {"mean": priors.means(net), "precision": penalties.strengths(net, 2.0, "model")}
    assert torch.equal(hparams["mean"]["weight"].value, net.weight)
    problem = bilevel.BilevelProblem(
        lambda m, h: (m.weight - 1.0).square().sum() / 2 + priors.gaussian(m, h["mean"], h["precision"]),
        lambda m, h: m.weight.sum(),
        net,
        hparams,
    )
    found = bilevel.hypergradient(problem)
    expected = torch.tensor([[7.0, 9.0]], dtype=torch.float64) / 3
    torch.testing.assert_close(found.params.weight.detach(), expected, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(found.gradient["mean"]["weight"], torch.full_like(expected, 2 / 3), rtol=1e-8, atol=0.0)
    assert found.gradient["precision"].item() == pytest.approx((2.0 + 3.0) / 9, rel=1e-8)


def test_log_normal_is_the_density_of_the_logarithm() -> None:
    strengths = {"a": scalar(0.3), "b": [vector(1.0, 7.0)]}
    logs = torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64).log()
    expected = -float(Normal(scalar(2.0).log(), scalar(0.5)).log_prob(logs).sum())  # type: ignore[no-untyped-call]
    assert priors.log_normal(strengths, 2.0, 0.5).item() == pytest.approx(expected, rel=1e-12)
    median, spread = scalar(2.0).requires_grad_(), scalar(0.5).requires_grad_()
    slopes = torch.autograd.grad(priors.log_normal(strengths, median, spread), (median, spread))
    apart = logs - math.log(2.0)
    assert slopes[0].item() == pytest.approx(-float(apart.sum()) / 0.25 / 2.0, rel=1e-10)
    assert slopes[1].item() == pytest.approx(float(3 / 0.5 - apart.square().sum() / 0.125), rel=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: priors.gaussian(net, {"0": 0.0}, {"0": 1.0, "2": 1.0}), r"covers '2.weight' and `mean` does not"),
        (lambda net: priors.gaussian(net, 0.0, 0.0), r"`precision` is 0.0 for '0.weight', expected finite and > 0"),
        (lambda net: priors.gaussian(net, torch.ones(5), 1.0), r"`mean` has shape \(5,\) for '0.weight'"),
        (lambda net: priors.gaussian(net, 0.0, {"1": 1.0}), r"`precision` has the key '1'"),
        (lambda net: priors.log_normal({"a": 1.0}, 1.0, 1.0), r"`strengths` hold a float, expected Tensors"),
        (lambda net: priors.log_normal({}, 1.0, 1.0), r"`strengths` hold nothing"),
        (lambda net: priors.log_normal(scalar(1.0), -1.0, 1.0), r"`median` is -1.0, expected a finite number > 0"),
        (lambda net: priors.log_normal(scalar(1.0), 1.0, "1"), r"`spread` is a str"),  # type: ignore[arg-type]
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        call(network())


def test_a_median_counts_each_strength_once() -> None:
    strengths = torch.ones(2, 1)
    with pytest.raises(bilevel.BilevelError, match=r"median.*\(2,\).*\(2, 1\)"):
        priors.log_normal(strengths, torch.tensor([1.0, 2.0]), 1.0)  # would be four terms
    each = priors.log_normal(torch.ones(2), 1.0, torch.tensor([1.0, 2.0]))
    assert float(each) == pytest.approx(math.log(2.0 * math.pi) + math.log(2.0))
