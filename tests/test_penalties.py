"""Penalties on modules against the sums that they stand for, and against torch.optim's own weight decay."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import penalties
from problems_variables import vector

pytestmark = pytest.mark.usefixtures("seeded")


def network() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()


def half_square(*tensors: Tensor) -> float:
    return sum(float(t.detach().square().sum()) / 2 for t in tensors)


def test_l2_is_the_weight_decay_of_torch() -> None:
    net, x = network(), torch.randn(5, 3, dtype=torch.float64)
    theirs = copy.deepcopy(net)
    (net(x).square().mean() + penalties.l2(net, 0.3)).backward()
    theirs(x).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=0.3).step()
    for ours, other in zip(net.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-14)


def test_keys_are_tensors_modules_and_patterns() -> None:
    net = network()
    found = penalties.l2(net, {"*.bias": 5.0, "0": 2.0, "3.weight": torch.tensor(3.0), "*": 7.0})
    expected = (
        2.0 * half_square(net[0].weight, net[0].bias)  # a module's name before a pattern
        + 3.0 * half_square(net[3].weight)
        + 5.0 * half_square(net[1].bias, net[3].bias)
        + 7.0 * half_square(net[1].weight)
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)
    # A key that is not there means no penalty.
    assert penalties.l2(net, {"3": 1.0}).item() == pytest.approx(half_square(net[3].weight, net[3].bias), rel=1e-12)


def test_labels_go_by_the_first_pattern() -> None:
    net = network()
    per = {"head": ["3.*"], "rest": "*"}
    made = penalties.strengths(net, 2.0, per)
    assert {key: h.value.item() for key, h in made.items()} == {"head": 2.0, "rest": 2.0}
    found = penalties.l2(net, {"head": 1.0, "rest": 10.0}, per=per)
    rest = half_square(net[0].weight, net[0].bias, net[1].weight, net[1].bias)
    assert found.item() == pytest.approx(half_square(net[3].weight, net[3].bias) + 10.0 * rest, rel=1e-12)
    own = penalties.l2(net, {"rest": 0.0, "one": 1.0}, per={"rest": "*", "one": "0.bias"})
    assert own.item() == pytest.approx(half_square(net[0].bias), rel=1e-12)


@pytest.mark.parametrize(
    ("per", "expected"),
    [
        ("model", None),
        ("layer", {"0": (), "1": (), "3": ()}),
        ("tensor", dict.fromkeys(["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"], ())),
        (
            "weight",
            {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,), "3.weight": (2, 4), "3.bias": (2,)},
        ),
    ],
)
def test_strengths_fit_the_penalty(per: Any, expected: Any) -> None:
    net = network()
    made = penalties.strengths(net, 0.1, per)
    if expected is None:
        values: Any = made.value
    else:
        assert {key: tuple(h.value.shape) for key, h in made.items()} == expected
        values = {key: h.value for key, h in made.items()}
    whole = 0.1 * half_square(*net.parameters())
    assert penalties.l2(net, values).item() == pytest.approx(whole, rel=1e-12)


def test_on_leaves_out_biases_and_gains() -> None:
    net = network()
    matrices = half_square(net[0].weight, net[3].weight)
    assert penalties.l2(net, 1.0, on="matrices").item() == pytest.approx(matrices, rel=1e-12)
    assert penalties.l2(net, 1.0, on=["0.weight", "3.w*"]).item() == pytest.approx(matrices, rel=1e-12)
    assert penalties.l2(net, 1.0, on="bias").item() == pytest.approx(
        half_square(net[0].bias, net[1].bias, net[3].bias), rel=1e-12
    )
    assert list(penalties.strengths(net, 1.0, on="matrices")) == ["0", "3"]


def test_constants_are_left_out_and_tied_tensors_counted_once() -> None:
    net = network()
    net[0].requires_grad_(False)
    net[3].weight = net[0].weight  # frozen, too
    assert penalties.l2(net, 1.0).item() == pytest.approx(
        half_square(net[1].weight, net[1].bias, net[3].bias), rel=1e-12
    )
    tied = network()
    tied[2] = nn.Linear(3, 4, bias=False).double()
    tied[2].weight = tied[0].weight
    assert penalties.l2(tied, {"2": 1.0}).item() == pytest.approx(half_square(tied[0].weight), rel=1e-12)
    with torch.no_grad():
        assert penalties.l2(tied, {"2": 1.0}).item() == pytest.approx(half_square(tied[0].weight), rel=1e-12)


def test_strengths_of_chosen_parameters() -> None:
    net = network()
    head = bilevel.parameters(net, "3.*")
    assert list(penalties.strengths(head, 1.0)) == ["3"]
    assert [len(g["params"]) for g in penalties.param_groups(head, {"3": 1.0})] == [2]
    assert penalties.l2(head, 1.0).item() == penalties.l2(net, {"3": 1.0}).item()


def test_tensors_and_structures() -> None:
    w = vector(3.0, -4.0)
    assert penalties.l2(w, vector(2.0, 1.0)).item() == 17.0
    assert penalties.l2({"a": w, "b": [w, w[:1]]}, {"b": 2.0}).item() == 34.0
    assert penalties.l1(w, 2.0).item() == 14.0
    assert penalties.elastic_net(w, 2.0, vector(2.0, 1.0)).item() == 31.0


def test_groups() -> None:
    w = torch.tensor([[3.0, 4.0], [0.0, 5.0]], dtype=torch.float64)
    assert penalties.group(w, vector(1.0, 2.0)).item() == 15.0
    assert penalties.group(w, 1.0, "columns").item() == pytest.approx(3.0 + math.sqrt(41.0))
    assert penalties.group(w, 1.0, "tensor").item() == pytest.approx(math.sqrt(50.0))
    # As in bilevel.prox, whose penalty it is.
    assert penalties.group(w, 0.7).item() == pytest.approx(bilevel.prox.GroupL1(0.7).value(w).item())
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(penalties.group(zero, 1.0), zero)
    assert torch.equal(slope, torch.zeros_like(zero))


def test_smooth_forms_can_be_differentiated_twice_everywhere() -> None:
    # Exact values: sqrt(w² + δ²) - δ, which is w² / (2 δ) near 0 and |w| - δ far away.
    w = vector(0.0, 1e-9, 0.4, -3.0).requires_grad_()
    found = penalties.l1(w, 1.0, smooth=0.3)
    exact = 1e-18 / 0.6 + (0.5 - 0.3) + (math.sqrt(9.09) - 0.3)
    assert found.item() == pytest.approx(exact, rel=1e-12)
    hessian = torch.autograd.functional.hessian(lambda t: penalties.l1(t, 1.0, smooth=0.3), w)  # type: ignore[no-untyped-call]
    expected = 0.09 / (w.detach() ** 2 + 0.09) ** 1.5
    torch.testing.assert_close(hessian.diagonal(), expected, rtol=1e-10, atol=1e-12)
    rows = torch.zeros(2, 3, dtype=torch.float64)
    bent = torch.autograd.functional.hessian(lambda t: penalties.group(t, 1.0, smooth=0.5), rows)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(bent.reshape(6, 6), 2.0 * torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("per", ["model", "layer", "tensor", "weight"])
def test_a_problem_tunes_them(per: Any) -> None:
    """w_i* = a_i / (1 + s_i) for a loss (w - a)² / 2, so F = Σ (w - 1)² / 2 has a slope of its own for each."""
    net = nn.Linear(2, 1).double()
    target = vector(2.0, -1.0, 0.5)

    def entries(model: Any) -> Tensor:
        return torch.cat([model.weight.flatten(), model.bias])

    problem = bilevel.BilevelProblem(
        lambda m, h: (entries(m) - target).square().sum() / 2 + penalties.l2(m, h),
        lambda m, h: (entries(m) - 1.0).square().sum() / 2,
        net,
        penalties.strengths(net, 0.5, per),
    )
    found = bilevel.hypergradient(problem)
    each = -(target / 1.5 - 1.0) * target / 1.5**2
    if per == "model":
        torch.testing.assert_close(found.gradient, each.sum(), rtol=1e-8, atol=1e-10)
        return
    # A tensor that the root itself holds is a layer of its own.
    weight, bias = found.gradient["weight"], found.gradient["bias"]
    torch.testing.assert_close(weight, each[:2].reshape(1, 2) if per == "weight" else each[:2].sum(), rtol=1e-8, atol=0)
    torch.testing.assert_close(bias.reshape(1), each[2:], rtol=1e-8, atol=0.0)


def test_a_family_of_modules() -> None:
    net = nn.Linear(2, 1).double()
    one = bilevel.BilevelProblem(
        lambda m, h, a: (m(a) - 1.0).square().sum() + penalties.l2(m, h, on="matrices"),
        lambda m, h, a: m(a).square().sum(),
        bilevel.parameters(net, "weight"),
        penalties.strengths(net, 0.5, on="weight"),
        inner_data=torch.randn(3, 2, dtype=torch.float64),
        outer_data=torch.randn(3, 2, dtype=torch.float64),
    )
    assert bilevel.hypergradient(bilevel.over(one, 3)).certificate.verdict == "exact"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"5": 1.0},), r"has the key '5', which no trained tensor falls to"),
        ((1.0, {"on": []}), r"`on` is \[\], expected a pattern of names"),
        (({"a": 1.0}, {"per": {"a": 3}}), r"`per`\['a'\] is 3, expected a pattern of names"),
        (({"0.wieght": 1.0},), r"key '0.wieght'.*near names are 0.weight"),
        (({"0": bilevel.positive(1.0)},), r"positive\(1\) is a typed hyperparameter; give it to `hparams`"),
        (({"0": {"weight": 1.0}},), r"\['0'\]: got a dict, expected a number or a Tensor"),
        (({},), r"are an empty dict"),
        ((torch.ones(7, 3),), r"has shape \(7, 3\) for '0.weight', expected a number or a shape that broadcasts"),
        ((-1.0,), r"are -1.0 for '0.weight', expected finite numbers >= 0"),
        ((1.0, {"per": "layer"}), r"`per` is 'layer', expected a dict of patterns"),
        ((1.0, {"per": {"a": "*"}}), r"are a float, expected a dict with the keys of `per`"),
        (({"b": 1.0}, {"per": {"a": "*"}}), r"has the keys \['b'\], but `per` has \['a'\]"),
        (({"a": 1.0}, {"per": {"a": "heads.*"}}), r"group 'a' with heads.\*, which no trained tensor falls to"),
        ((1.0, {"on": "wieght"}), r"`on` names 'wieght'"),
    ],
)
def test_messages(arguments: Any, message: str) -> None:
    strengths, settings = (*arguments, {})[:2]
    with pytest.raises(bilevel.BilevelError, match=message):
        penalties.l2(network(), strengths, **settings)


def test_messages_of_the_others() -> None:
    with pytest.raises(bilevel.InvalidTypeError, match=r"first argument is a str"):
        penalties.l2("net", 1.0)
    with pytest.raises(bilevel.InvalidValueError, match=r"no parameter that is trained"):
        penalties.l2(network().requires_grad_(False), 1.0)
    with pytest.raises(bilevel.InvalidValueError, match=r"`per` is 'layers'.*did you mean \"layer\""):
        penalties.strengths(network(), 1.0, "layers")  # type: ignore[arg-type]
    with pytest.raises(bilevel.InvalidTypeError, match=r"write per=penalties.groups\(model, optimizer\)"):
        penalties.strengths(network(), 1.0, torch.optim.SGD(network().parameters()))  # type: ignore[arg-type]
    with pytest.raises(bilevel.InvalidTypeError, match=r"`value` is a str"):
        penalties.strengths(network(), "1.0")  # type: ignore[arg-type]
    with pytest.raises(bilevel.InvalidValueError, match=r"`smooth` is -1"):
        penalties.l1(network(), 1.0, smooth=-1)
    with pytest.raises(bilevel.InvalidValueError, match=r"`groups` is 'cols'"):
        penalties.group(network(), 1.0, "cols")  # type: ignore[arg-type]
    with pytest.raises(bilevel.InvalidValueError, match=r"no tensor has two dimensions"):
        penalties.l2(nn.LayerNorm(3), 1.0, on="matrices")
