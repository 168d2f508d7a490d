"""`bilevel.parameters`: some parameters of a module are tuned, the others are constants."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from problems_variables import scalar

pytestmark = pytest.mark.usefixtures("seeded")


class Tied(nn.Module):
    """An embedding that is the head's weight too, with BatchNorm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.norm(self.embed(x)))))  # type: ignore[no-any-return]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2]], dim=1)


def network() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def fitted(net: Any, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    out: Tensor = net(batch[0])
    return (out - batch[1]).square().mean()


def decayed(net: Any, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalty: Tensor = net[2].weight.square().sum() + net[2].bias.square().sum()
    return fitted(net, h, batch) + h * penalty


def problem(net: nn.Module, *patterns: str, solver: Any = None) -> bilevel.BilevelProblem:
    chosen = bilevel.parameters(net, *patterns)
    return bilevel.BilevelProblem(decayed, fitted, chosen, bilevel.positive(0.1), solver, data(), data())


def test_the_others_are_constants() -> None:
    net = network()
    found = bilevel.hypergradient(problem(net, "2.*"))
    # Truth: ridge regression on the features of the body, which has a closed form; its derivative by finite
    # differences (central, 1e-5: truncation 1e-10, rounding 1e-11).
    x, y = data()
    with torch.no_grad():
        inside = torch.tanh(net[0](x))
    features = torch.cat([inside, torch.ones(20, 1, dtype=torch.float64)], dim=1)

    def outer(h: float) -> tuple[Tensor, float]:
        hessian = features.T @ features / y.numel() + h * torch.eye(5, dtype=torch.float64)
        w = torch.linalg.solve(hessian, features.T @ y / y.numel())
        return w, float((features @ w - y).square().mean())

    w, loss = outer(0.1)
    torch.testing.assert_close(found.params[2].weight, w[:4].T, rtol=0.0, atol=1e-8)
    assert found.outer_loss == pytest.approx(loss, abs=1e-10)
    assert found.gradient.item() == pytest.approx((outer(0.1 + 1e-5)[1] - outer(0.1 - 1e-5)[1]) / 2e-5, abs=1e-8)
    assert torch.equal(found.params[0].weight, net[0].weight)
    assert not found.params[0].weight.requires_grad
    assert net[0].weight.requires_grad and found.params[2].weight.requires_grad


def test_apply_writes_what_was_chosen() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    solution = bilevel.solve(problem(net, "2.*"), steps=2, progress=False)
    solution.apply_()
    after = net.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["2.weight", "2.bias"]
    assert torch.equal(after["2.weight"], solution.params[2].weight)


def test_a_loop_of_the_user_s_cannot_move_the_others() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())

    def fit(model: Any, h: Tensor, batch: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            decayed(model, h, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    found = bilevel.hypergradient(problem(net, "2.*", solver=fit), on_untrusted="ignore")
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(found.params[0].weight, net[0].weight)
    assert not torch.equal(found.params[2].weight, net[2].weight)

    def other(model: Any, h: Tensor, batch: Any) -> Any:
        model = copy.deepcopy(model)
        model[0].weight += 1.0
        return model

    with pytest.raises(bilevel.InvalidValueError, match=r"has another '0.weight' than `params`.*constant"):
        bilevel.hypergradient(problem(net, "2.*", solver=other))


def test_every_door_takes_it(tmp_path: Path) -> None:
    net = network()
    one = problem(net, "2.*")
    assert bilevel.check(one).ok
    assert bilevel.check_gradient(one, directions=1).passed
    assert bilevel.compare(one, ["direct", "cg"], memory=False, repeats=1).table()
    whole = bilevel.solve(problem(net, "2.*"), steps=3, progress=False, tol=1e-12)
    bilevel.solve(problem(net, "2.*"), steps=1, progress=False, tol=1e-12, checkpoint=tmp_path / "run.pt")
    again = bilevel.solve(problem(net, "2.*"), steps=3, progress=False, tol=1e-12, checkpoint=tmp_path / "run.pt")
    assert torch.equal(again.hparams, whole.hparams)
    given = bilevel.hypergradient(one, params=whole.params, hparams=whole.hparams)
    assert given.certificate.trusted
    members = bilevel.hypergradient(
        bilevel.over(
            bilevel.BilevelProblem(lambda w, h: decayed(w, h, data()), lambda w, h: fitted(w, h, data()), *_sides(net)),
            2,
        )
    )
    assert members.params["2.weight"].shape == (2, 2, 4)


def _sides(net: nn.Module) -> tuple[Any, Any]:
    return bilevel.parameters(net, "2.*"), bilevel.positive(0.1)


def test_argmin_takes_it_on_both_sides() -> None:
    net = network()
    h = scalar(0.1).requires_grad_()
    found = bilevel.argmin(lambda w, s: decayed(w, s, data()), bilevel.parameters(net, "2.*"), h)
    (slope,) = torch.autograd.grad(fitted(found, h, data()), h)
    expected = bilevel.hypergradient(problem(net, "2.*")).gradient
    torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-10)

    start, chosen = torch.zeros((), dtype=torch.float64), bilevel.parameters(net, "2.bias")
    shift = bilevel.argmin(lambda w, model: (w - model[2].bias.sum()) ** 2, start, chosen)
    assert torch.autograd.grad(shift, net[2].bias)[0].tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(bilevel.InvalidTypeError, match="`start` is a Selection"):
        bilevel.root(lambda x: x, chosen)


def test_hyperparameters_of_a_module_can_be_chosen() -> None:
    net, x = network(), data()[0]
    chosen: Any = bilevel.BilevelProblem(
        lambda w, h: ((x @ w - h(x)[:, 0]) ** 2).mean(),
        lambda w, h: (w**2).sum(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.parameters(net, "*.bias"),
    )
    assert list(bilevel.hypergradient(chosen).gradient) == ["0.bias", "2.bias"]


def test_tied_weights_are_chosen_by_any_name() -> None:
    net: Any = Tied().double()
    assert bilevel.parameters(net, "head.weight").names == ("embed.weight",)
    x = torch.arange(5)

    def loss(model: Any, h: Tensor) -> Tensor:
        assert model.head.weight is model.embed.weight
        found: Tensor = nn.functional.cross_entropy(model(x), x) + h * model.embed.weight.square().sum()
        return found

    one = bilevel.BilevelProblem(
        loss, loss, bilevel.parameters(net, "head.*"), scalar(0.1), bilevel.inner.SGD(lr=0.1, steps=3)
    )
    found = bilevel.hypergradient(one, "unroll")
    assert found.params.head.weight is found.params.embed.weight
    assert torch.equal(found.params.body.weight, net.body.weight)
    assert not torch.equal(found.params.norm.running_mean, net.norm.running_mean)  # buffers move as they do without
    solution = bilevel.solve(one, "unroll", steps=1, progress=False)
    solution.apply_()
    assert net.head.weight is net.embed.weight
    assert torch.equal(net.norm.running_mean, solution.params.norm.running_mean)


def test_patterns_choose_in_the_module_s_order() -> None:
    net = network()
    assert bilevel.parameters(net).names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert bilevel.parameters(net, "2.*", "0.bias", "*.bias").names == ("0.bias", "2.weight", "2.bias")
    net[0].weight.requires_grad_(False)
    assert bilevel.parameters(net, "0.*").names == ("0.bias",)
    assert [id(p) for p in bilevel.parameters(net, "0.*")] == [id(net[0].bias)]
    torch.optim.SGD(bilevel.parameters(net, "0.*"), lr=0.1)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("2",), r"is called '2'; did you mean \"2.\*\"\? There are 2.weight, 2.bias"),
        (("2.wieght",), r"near names are 2.weight"),
        (("decoder.*",), r"the names are 0.weight, 0.bias, 2.weight, 2.bias"),
        (("0.*", "2.*"), r"all parameters that '0.\*' fits are frozen \(0.weight, 0.bias\); unfreeze"),
        ((3,), r"a pattern is a int"),
    ],
)
def test_a_pattern_without_a_tensor_is_an_error(patterns: Any, message: str) -> None:
    net = network()
    net[0].requires_grad_(False)
    with pytest.raises(bilevel.BilevelError, match=message):
        bilevel.parameters(net, *patterns)


def test_something_else_than_a_module_is_an_error() -> None:
    with pytest.raises(bilevel.InvalidTypeError, match=r"`module` is a dict, expected an nn.Module"):
        bilevel.parameters({"a": torch.zeros(2)}, "a")  # type: ignore[arg-type]
    with pytest.raises(bilevel.InvalidValueError, match="the Tanh has no parameters"):
        bilevel.parameters(nn.Tanh())
    inside: Any = {"a": bilevel.parameters(network())}
    with pytest.raises(bilevel.InvalidTypeError, match=r"write bilevel.parameters\(...\) by itself"):
        bilevel.BilevelProblem(fitted, fitted, inside, scalar(1.0), None, data(), data())
