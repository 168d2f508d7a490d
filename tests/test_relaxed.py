"""Dropout rates and label smoothing as hyperparameters: formulas, limits, finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel
from bilevel import penalties, relaxed
from problems_variables import scalar, vector

pytestmark = pytest.mark.usefixtures("seeded")


def network() -> Any:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2), nn.Dropout(0.4)).double()


def test_dropout_is_the_concrete_relaxation() -> None:
    x, rate = torch.randn(50, 4, dtype=torch.float64), vector(0.1, 0.3, 0.5, 0.9)
    torch.manual_seed(1)
    found = relaxed.dropout(x, rate, temperature=0.2)
    torch.manual_seed(1)
    u = torch.rand(50, 4, dtype=torch.float64)
    z = torch.sigmoid((rate.log() - (1 - rate).log() + u.log() - (1 - u).log()) / 0.2)
    torch.testing.assert_close(found, x * (1 - z) / (1 - rate), rtol=1e-12, atol=1e-14)


def test_a_cold_dropout_is_dropout() -> None:
    x = torch.ones(4000, dtype=torch.float64)
    torch.manual_seed(1)
    found = relaxed.dropout(x, 0.3, temperature=1e-6)
    torch.manual_seed(1)
    kept = (torch.rand(4000, dtype=torch.float64) <= 0.7).double()
    torch.testing.assert_close(found, kept / 0.7, rtol=1e-6, atol=1e-6)


def test_channels_are_dropped_whole() -> None:
    net = nn.Sequential(nn.Dropout2d(0.5))
    with relaxed.with_dropout(net, 0.5):
        found = net(torch.ones(3, 4, 5, 5))
    assert torch.equal(found, found[:, :, :1, :1].expand(3, 4, 5, 5))
    assert len(found[:, :, 0, 0].unique()) > 6


def test_layers_are_lent_and_left_alone() -> None:
    net, x = network(), torch.randn(6, 3, dtype=torch.float64)
    own = net[4].forward = lambda y: y + 1.0  # somebody else's
    with relaxed.with_dropout(net, {"2": 0.9, "4": 0.5}):
        assert not torch.equal(net(x), net(x))
        net.eval()
        plain = net[3](net[1](net[0](x)))
        assert torch.equal(net(x), plain)
        net.train()
    assert net[4].__dict__["forward"] is own
    assert "forward" not in net[2].__dict__
    with pytest.raises(ZeroDivisionError), relaxed.with_dropout(net, 0.5):
        raise ZeroDivisionError
    assert "forward" not in net[2].__dict__
    inplace = nn.Sequential(nn.Dropout(0.5, inplace=True))
    y = torch.ones(5)
    with relaxed.with_dropout(inplace, 0.5):
        inplace(y)
    assert torch.equal(y, torch.ones(5))


@pytest.mark.parametrize("per", ["layer", "model", {"first": "0", "last": "2"}])
def test_rates_are_tuned(per: Any) -> None:
    """Under one seed the loss is a smooth function of the rates, so finite differences are the truth."""
    x = torch.randn(12, 3, dtype=torch.float64)
    net, y = nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 2), nn.Dropout(0.4)).double(), x[:, :2].tanh()
    groups = per if isinstance(per, dict) else None

    def inner(m: Any, h: Any) -> Tensor:
        with relaxed.with_dropout(m, h, per=groups, temperature=0.5):
            fit: Tensor = (m(x) - y).square().mean()
        return fit + penalties.l2(m, 0.05)

    def outer(m: Any, h: Any) -> Tensor:
        loss: Tensor = (m.eval()(x) - y).square().mean()
        return loss

    problem = bilevel.BilevelProblem(inner, outer, net, relaxed.dropout_rates(net, per=per))
    assert bilevel.check_gradient(problem, directions=1).passed


def test_rates_start_where_the_layers_are() -> None:
    net = network()
    assert [(k, v.value.item()) for k, v in relaxed.dropout_rates(net).items()] == [("2", 0.2), ("4", 0.4)]
    assert relaxed.dropout_rates(net, per="model").value.item() == pytest.approx(0.3)
    assert relaxed.dropout_rates(net, 0.1, {"a": "*"})["a"].value.item() == 0.1
    net[2] = net[4]  # one layer, used twice
    assert list(relaxed.dropout_rates(net)) == ["2"]
    with relaxed.with_dropout(net, {"4": 0.5}):
        assert "forward" in net[2].__dict__


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("places", [(), (3,)])
def test_smoothing_has_the_values_of_torch(reduction: Any, places: tuple[int, ...]) -> None:
    logits, labels = torch.randn(7, 5, *places, dtype=torch.float64), torch.randint(5, (7, *places))
    labels[2] = -100
    found = relaxed.cross_entropy(logits, labels, scalar(0.2), reduction=reduction)
    theirs = F.cross_entropy(logits, labels, label_smoothing=0.2, reduction=reduction)
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-14)


def test_smoothing_has_a_derivative() -> None:
    """Of two classes with the logit w: w* = log((1 - ε / 2) / (ε / 2)), so dw*/dε = -1/(2 (1 - ε/2)) - 1/ε."""
    labels = torch.zeros(3, dtype=torch.long)

    def inner(w: Tensor, e: Tensor) -> Tensor:
        return relaxed.cross_entropy(torch.stack([w, torch.zeros_like(w)]).expand(3, 2), labels, e)

    problem = bilevel.BilevelProblem(inner, lambda w, e: w, scalar(0.0), bilevel.interval(0.2, 0.0, 1.0))
    found = bilevel.hypergradient(problem)
    assert found.params.item() == pytest.approx(torch.tensor(9.0).log().item(), rel=1e-6)
    assert found.gradient.item() == pytest.approx(-1 / 1.8 - 1 / 0.2, rel=1e-7)
    each = vector(0.1, 0.5)[labels]
    assert relaxed.cross_entropy(torch.randn(3, 2).double(), labels, each, reduction="none").shape == (3,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: relaxed.dropout(torch.ones(2), 0.0), r"`rate` is 0.0, expected a number in \(0, 1\)"),
        (lambda net: relaxed.dropout(torch.ones(2), 0.5, temperature=0.0), r"`temperature` is 0.0"),
        (
            lambda net: relaxed.dropout_rates(nn.Linear(2, 2)),
            r"the Linear has no nn.Dropout layer; call relaxed.dropout",
        ),
        (lambda net: relaxed.dropout_rates(nn.Sequential(nn.Dropout(0.0))), r"start at 0.0.*give `value`"),
        (lambda net: relaxed.dropout_rates(net, per="tensor"), r'`per` is \'tensor\', expected "layer", "model"'),
        (
            lambda net: relaxed.with_dropout(net, {"3": 0.1}).__enter__(),
            r"has the key '3', which no dropout layer falls to",
        ),
        (lambda net: relaxed.with_dropout({}, 0.1).__enter__(), r"`model` is a dict"),  # type: ignore[arg-type]
        (lambda net: relaxed.cross_entropy(torch.ones(2, 2), torch.ones(2), 0.1), r"`labels` are floating-point"),
        (lambda net: relaxed.cross_entropy(torch.ones(2, 2), torch.ones(2).long(), 1.5), r"`smoothing` is 1.5"),
        (
            lambda net: relaxed.cross_entropy(torch.ones(2, 2), torch.ones(2).long(), 0.5, reduction="avg"),
            r"`reduction` is 'avg'",
        ),
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        call(network())


def test_a_column_of_rates_or_smoothings_is_refused_and_not_spread_over_all() -> None:
    logits, labels, column = torch.randn(3, 2), torch.tensor([0, 1, 1]), torch.full((3, 1), 0.1)
    with pytest.raises(bilevel.BilevelError, match=r"smoothing.*\(3, 1\).*\(3,\)"):
        relaxed.cross_entropy(logits, labels, column)
    with pytest.raises(bilevel.BilevelError, match=r"rate.*\(3, 1\).*\(3,\)"):
        relaxed.dropout(torch.ones(3), column)
