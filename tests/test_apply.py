"""`Solution.apply_` writes settings into the param groups of an optimizer, all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import penalties

pytestmark = pytest.mark.usefixtures("seeded")

PER = {"head": "2.*", "rest": "*"}


def solved(net: Any, decay: Any, lr: Any = None, penalty: Callable[..., Tensor] = penalties.l2) -> bilevel.Solution:
    x = torch.randn(12, 3, dtype=torch.float64)
    y = x.prod(dim=1, keepdim=True)
    hparams = {"decay": decay, "lr": bilevel.positive(0.05) if lr is None else lr}
    problem = bilevel.BilevelProblem(
        lambda m, h: (m(x) - y).square().mean() + penalty(m, h["decay"]),
        lambda m, h: (m(x[:6]) - 2 * y[:6]).square().mean(),
        net,
        hparams,
        bilevel.inner.SGD(lr=lambda h, step: h["lr"].expand(3)[step], steps=3),
    )
    return bilevel.solve(problem, "unroll", steps=1, progress=False)


def network() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def two_groups(net: Any) -> torch.optim.Optimizer:
    rest = [p for name, p in net.named_parameters() if not name.startswith("2.")]
    return torch.optim.SGD([{"params": list(net[2].parameters())}, {"params": rest}], lr=0.1, weight_decay=0.7)


def test_one_number_goes_into_all_groups() -> None:
    net = network()
    solution = solved(net, bilevel.positive(0.01))
    optimizer = two_groups(net)
    solution.apply_(optimizer, weight_decay="decay", lr=lambda h: h["lr"] / 2)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == solution.hparams["decay"].item()
        assert group["lr"] == solution.hparams["lr"].item() / 2
    assert torch.equal(net[0].weight, solution.params[0].weight)


def test_a_dict_goes_by_names_and_labels() -> None:
    net = network()
    solution = solved(net, penalties.strengths(net, 0.01))
    decay = {key: value.item() for key, value in solution.hparams["decay"].items()}
    assert decay["0"] != decay["2"]
    optimizer = two_groups(net)
    solution.apply_(optimizer, weight_decay="decay")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay["2"], decay["0"]]

    per = penalties.groups(net, optimizer)
    assert per == {"group 0": ["2.weight", "2.bias"], "group 1": ["0.weight", "0.bias"]}
    labelled = solved(net, penalties.strengths(net, 0.01, per), penalty=lambda m, h: penalties.l2(m, h, per=per))
    labelled.apply_(optimizer, weight_decay="decay")
    found = [group["weight_decay"] for group in optimizer.param_groups]
    assert found == [labelled.hparams["decay"][f"group {i}"].item() for i in range(2)]

    patterns = solved(net, penalties.strengths(net, 0.01, PER), penalty=lambda m, h: penalties.l2(m, h, per=PER))
    patterns.apply_(optimizer, weight_decay="decay", per=PER)
    found = [group["weight_decay"] for group in optimizer.param_groups]
    assert found == [patterns.hparams["decay"]["head"].item(), patterns.hparams["decay"]["rest"].item()]


def test_param_groups_make_the_optimizer() -> None:
    net = network()
    groups = penalties.param_groups(net, {"2": torch.tensor(0.3), "0.weight": 0.1})
    assert [(g["name"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        ("0.weight", 0.1, [(4, 3)]),
        ("2", pytest.approx(0.3), [(1, 4), (1,)]),
        ("no weight_decay", 0.0, [(4,)]),
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    # One step without a loss shrinks by lr * decay, as one on penalties.l2 does.
    weight = net[2].weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(net[2].weight.detach(), weight * (1 - 0.1 * 0.3), rtol=1e-7, atol=0.0)
    assert penalties.param_groups(net, 0.2)[0]["weight_decay"] == 0.2
    assert [g["name"] for g in penalties.param_groups(net, {"head": 1.0, "rest": 2.0}, per=PER)] == ["rest", "head"]
    only = penalties.param_groups(net, {"head": 1.0, "rest": 2.0}, per=PER, on="matrices")
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in only] == [
        ("rest", 2.0, 1),
        ("head", 1.0, 1),
        ("no weight_decay", 0.0, 2),
    ]
    with pytest.raises(bilevel.InvalidValueError, match=r"\['0.weight'\] holds 12 values, and a param group takes one"):
        penalties.param_groups(net, {"0.weight": torch.ones(4, 3)})


def test_one_value_for_each_group_and_tensor_settings() -> None:
    net = network()
    solution = solved(net, bilevel.positive(0.01), lr=bilevel.positive(0.05, shape=(3,)))
    optimizer = torch.optim.SGD([{"params": [p]} for p in list(net.parameters())[:3]], lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    held = optimizer.param_groups[0]["lr"]
    solution.apply_(optimizer, lr="lr")
    assert [float(group["lr"]) for group in optimizer.param_groups] == solution.hparams["lr"].tolist()
    assert optimizer.param_groups[0]["lr"] is held
    with pytest.raises(bilevel.InvalidValueError, match=r"`lr` has 3 values for 2 param group\(s\).*LambdaLR"):
        solution.apply_(two_groups(net), lr="lr")


def test_groups_of_other_tensors_stay_as_they_are() -> None:
    """As many recipes have it: one group of matrices with a decay, one of biases without."""
    net = network()
    matrices: list[Any] = [p for p in net.parameters() if p.dim() == 2]
    biases = [p for p in net.parameters() if p.dim() == 1]
    halves: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.7}, {"params": biases}]
    optimizer = torch.optim.SGD(halves, lr=0.1)
    one = solved(net, bilevel.positive(0.01), penalty=lambda m, h: penalties.l2(m, h, on="matrices"))
    one.apply_(optimizer, on="matrices", weight_decay="decay")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [one.hparams["decay"].item(), 0.0]
    layers = solved(
        net, penalties.strengths(net, 0.01, on="matrices"), penalty=lambda m, h: penalties.l2(m, h, on="matrices")
    )
    each = torch.optim.SGD([{"params": matrices[:1]}, {"params": matrices[1:]}, {"params": biases}], lr=0.1)
    layers.apply_(each, on="matrices", weight_decay="decay")
    decay = layers.hparams["decay"]
    assert [group["weight_decay"] for group in each.param_groups] == [decay["0"].item(), decay["2"].item(), 0.0]
    with pytest.raises(bilevel.InvalidValueError, match=r"for '0.weight', none for '0.bias'"):
        one.apply_(torch.optim.SGD(net.parameters()), on="matrices", weight_decay="decay")


def _scheduled(net: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda net: None, {"lr": "lr"}, r"`lr` is a setting of an optimizer; write apply_\(optimizer, lr=...\)"),
        (lambda net: torch.optim.SGD(net.parameters()), {}, r"an optimizer and no setting"),
        (lambda net: net, {"lr": "lr"}, r"`optimizer` is a Sequential, expected a torch.optim.Optimizer"),
        (lambda net: torch.optim.SGD(net.parameters()), {"weight_dcay": "decay"}, r"did you mean \"weight_decay\""),
        (
            lambda net: torch.optim.SGD(net.parameters()),
            {"lr": "learning"},
            r"'learning', which is no key of `hparams`",
        ),
        (lambda net: torch.optim.SGD(net.parameters()), {"lr": 0.1}, r"`lr` is a float, expected the key of `hparams`"),
        (lambda net: torch.optim.SGD(net.parameters()), {"nesterov": "lr"}, r"is False, no number; set it by hand"),
        (_scheduled, {"lr": "lr"}, r"a learning rate scheduler is attached"),
        (
            lambda net: torch.optim.SGD(net.parameters()),
            {"lr": "lr", "weight_decay": "decay"},
            r"`weight_decay` differs within group 0 of `optimizer`: .* for '0.weight', .* for '2.weight'; make the "
            r"optimizer with a group for each value: torch.optim.SGD\(bilevel.penalties.param_groups",
        ),
        (lambda net: torch.optim.SGD(network().parameters()), {"weight_decay": "decay"}, r"shape \(4, 3\) that is not"),
        (lambda net: torch.optim.SGD(net.parameters()), {"weight_decay": "decay.7"}, r"there are \['0', '2'\]"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(make: Any, settings: Any, message: str) -> None:
    net = network()
    solution = solved(net, penalties.strengths(net, 0.01))
    before, optimizer = net[0].weight.detach().clone(), make(net)
    held = [dict(group) for group in getattr(optimizer, "param_groups", [])]
    with pytest.raises(bilevel.BilevelError, match=message):
        solution.apply_(optimizer, **settings)
    assert torch.equal(net[0].weight, before)
    for group, was in zip(getattr(optimizer, "param_groups", []), held, strict=True):
        assert (group["lr"], group["weight_decay"]) == (was["lr"], was["weight_decay"])


def test_plain_tensors_have_names_too() -> None:
    w, b = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    problem = bilevel.BilevelProblem(
        lambda p, h: (p["w"] - 1.0).square().sum() + (p["b"] + 1.0).square().sum() + penalties.l2(p, h),
        lambda p, h: (p["w"] - 0.5).square().sum() + p["b"].square().sum(),
        {"w": w, "b": b},
        {"w": bilevel.positive(0.1), "b": bilevel.positive(0.2)},
    )
    solution = bilevel.solve(problem, steps=1, progress=False)
    optimizer = torch.optim.SGD([{"params": [b.requires_grad_()]}, {"params": [w.requires_grad_()]}])
    solution.apply_(optimizer, weight_decay=lambda h: h)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [solution.hparams[k].item() for k in "bw"]


def test_groups_of_another_model() -> None:
    with pytest.raises(bilevel.InvalidValueError, match="holds tensors that are no parameters of the Sequential"):
        penalties.groups(network(), torch.optim.SGD(network().parameters()))
    with pytest.raises(bilevel.InvalidTypeError, match=r"`optimizer` is a Sequential, expected a torch.optim one"):
        penalties.groups(network(), network())


def test_one_number_goes_with_labels_of_another_setting() -> None:
    net = network()
    solution = solved(
        net,
        penalties.strengths(net, 0.01, PER, on="matrices"),
        penalty=lambda m, h: penalties.l2(m, h, per=PER, on="matrices"),
    )
    groups = [{"params": [net[0].weight]}, {"params": [net[2].weight]}, {"params": [net[0].bias, net[2].bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.7)
    solution.apply_(optimizer, weight_decay="decay", lr="lr", per=PER, on="matrices")
    assert [g["lr"] for g in optimizer.param_groups] == [solution.hparams["lr"].item()] * 2 + [0.7]
