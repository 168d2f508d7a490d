"""Modules as variables: lent to the losses, and the user's own objects stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from problems_variables import scalar, vector


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Frozen(nn.Module):
    """A frozen layer, a parameter of its own, and a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.head = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(()))
        self.constant = torch.full((2,), 0.5, dtype=torch.float64)
        self.nothing: nn.Parameter | None = None
        self.register_parameter("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.head(self.frozen(x)) + self.constant  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Modules in modules, lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2)])
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        self.scales = nn.ParameterList([torch.ones(2), torch.ones(())])

    def forward(self, x: Tensor) -> Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = scale * block(x)
        return self.heads["a"](x) + self.heads["b"](x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """An LSTM or a GRU, whose flat weights live outside of `_parameters` too."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None, :])[0][:, -1]  # type: ignore[no-any-return]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 2),
    "tied": Tied,
    "frozen": Frozen,
    "deep": Deep,
    "batch norm": lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "parametrized": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2), orthogonal_map="cayley"),
}


def module(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[kind]().double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 0]], dim=1)


def decayed(model: Any, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalty = sum((p.square().sum() for p in model.parameters() if p.requires_grad), torch.zeros(()))
    return fitted(model, h, batch) + h * penalty


def fitted(model: Any, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    out: Tensor = model(batch[0])
    return (out - batch[1]).square().mean()


def module_problem(net: nn.Module, solver: Any = None) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(decayed, fitted, net, bilevel.positive(0.1), solver, data(), data())


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def assert_unchanged(net: nn.Module, before: dict[str, Tensor], flags: list[bool]) -> None:
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [m.training for m in net.modules()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert all(isinstance(p, nn.Parameter) for m in net.modules() for p in m._parameters.values() if p is not None)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules_are_lent_and_left_alone(kind: str, training: bool) -> None:
    net = module(kind).train(training)
    before, flags = state(net), [m.training for m in net.modules()]
    solver = bilevel.inner.SGD(lr=0.05, momentum=0.5, steps=4)
    found = bilevel.hypergradient(module_problem(net, solver), "unroll")
    assert_unchanged(net, before, flags)
    assert type(found.params) is type(net)
    assert [name for name, _ in found.params.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert [m.training for m in found.params.modules()] == flags

    # Truth: torch.optim on a copy, and central differences of it. Rounding 1e-16 / 1e-5 leaves 1e-10.
    def end(h: float) -> tuple[nn.Module, float]:
        model = copy.deepcopy(net)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            decayed(model, torch.tensor(h, dtype=torch.float64), data()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        trained = copy.deepcopy(model)
        return trained, float(fitted(model, torch.zeros(()), data()).detach())

    model, loss = end(0.1)
    assert found.outer_loss == pytest.approx(loss, abs=1e-10)
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(found.params.named_parameters())[name], p, rtol=0.0, atol=1e-10)
    slope = (end(0.1 + 1e-5)[1] - end(0.1 - 1e-5)[1]) / 2e-5
    assert found.gradient.item() == pytest.approx(slope, abs=1e-8)


def test_tied_weights_stay_tied() -> None:
    net: Any = module("tied")
    found = bilevel.hypergradient(module_problem(net), on_untrusted="ignore")
    assert found.params.first.weight is found.params.second.weight
    assert found.params.first.weight is not net.first.weight
    solution = bilevel.solve(module_problem(net), steps=1, progress=False, on_untrusted="ignore")
    solution.apply_()
    assert net.first.weight is net.second.weight
    assert torch.equal(net.first.weight, solution.params.first.weight)


def test_frozen_parameters_are_no_variables() -> None:
    net: Any = module("frozen")
    problem = module_problem(net)
    assert list(problem.params.start) == ["gain", "head.weight", "head.bias"]
    found = bilevel.hypergradient(problem, on_untrusted="ignore")
    assert torch.equal(found.params.frozen.weight, net.frozen.weight)
    assert not found.params.frozen.weight.requires_grad


def test_a_loss_sees_the_current_tensors_everywhere() -> None:
    net = module("deep")

    def loss(model: Any, h: Tensor) -> Tensor:
        by_name = dict(model.named_parameters())
        assert by_name["heads.a.weight"] is model.heads["a"].weight
        assert {id(p) for p in model.parameters()} == {id(p) for p in by_name.values()}
        assert model.state_dict().keys() == net.state_dict().keys()
        return sum((((p - h) ** 2).sum() for p in model.parameters()), torch.zeros(()))

    problem = bilevel.BilevelProblem(loss, lambda m, h: m.scales[1], net, scalar(0.3))
    assert bilevel.hypergradient(problem).gradient.item() == pytest.approx(1.0, abs=1e-8)


def test_training_flags_that_a_loss_sets_are_undone() -> None:
    net = module("batch norm")

    def outer(model: nn.Module, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return fitted(model.eval(), h, batch)

    def inner(model: nn.Module, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert model.training
        return decayed(model, h, batch)

    solver = bilevel.inner.SGD(lr=0.05, steps=3)
    problem = bilevel.BilevelProblem(inner, outer, net, bilevel.positive(0.1), solver, data(), data())
    before, flags = state(net), [m.training for m in net.modules()]
    first, second = (bilevel.hypergradient(problem, "unroll", on_untrusted="ignore") for _ in range(2))
    assert_unchanged(net, before, flags)
    assert first.params.training
    # Buffers that moved in the first would make the second another function.
    assert first.outer_loss == second.outer_loss
    assert torch.equal(first.gradient, second.gradient)


def test_apply_writes_parameters_and_buffers() -> None:
    net = module("batch norm")
    start = state(net)
    solution = bilevel.solve(
        module_problem(net, bilevel.inner.SGD(lr=0.05, steps=3)), "unroll", steps=1, progress=False
    )
    assert all(torch.equal(t, start[name]) for name, t in net.state_dict().items())
    solution.apply_()
    for name, t in solution.params.state_dict().items():
        assert torch.equal(net.state_dict()[name], t), name
    assert not torch.equal(net.state_dict()["0.weight"], start["0.weight"])


def test_a_module_of_hyperparameters() -> None:
    weighting = nn.Linear(2, 1).double()
    before = state(weighting)
    x, y = data()

    def inner(w: Tensor, h: nn.Module) -> Tensor:
        return (torch.sigmoid(h(x))[:, 0] * (x @ w - y[:, 0]) ** 2).mean() + 0.1 * w.square().sum()

    problem = bilevel.BilevelProblem(inner, lambda w, h: (x @ w - y[:, 1]).square().mean(), vector(0.0, 0.0), weighting)
    found = bilevel.hypergradient(problem)
    assert {name: t.shape for name, t in found.gradient.items()} == {name: t.shape for name, t in before.items()}
    assert bilevel.check_gradient(problem).passed
    solution = bilevel.solve(problem, steps=3, progress=False, tol=0.5)
    assert isinstance(solution.hparams, nn.Linear)
    assert_unchanged(weighting, before, [True])
    solution.apply_()
    assert torch.equal(weighting.weight, solution.hparams.weight)


def test_weight_norm_is_refused() -> None:
    """torch's fused second derivative of it is wrong: gradgradcheck fails, without an error in a run."""
    net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).double()
    problem = module_problem(net, bilevel.inner.SGD(lr=0.05, steps=4))
    for method in ("unroll", "cg"):
        with pytest.raises(bilevel.NotTwiceDifferentiableError, match="weight_norm"):
            bilevel.hypergradient(problem, method)
