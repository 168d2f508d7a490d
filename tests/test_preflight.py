"""`bilevel.check`: each thing that does not work is found where it is, and what works is left alone."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import check_command, inner
from bilevel.cli import main
from bilevel.measure import free_memory
from bilevel.preflight import losses, training
from bilevel.solvers import estimator
from bilevel.solvers.about import about
from bilevel.testing import known_problems

GENERATOR = torch.Generator().manual_seed(0)
X, XV = (torch.randn(20, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
Y, YV = (torch.randn(20, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
METHODS = sorted(bilevel.METHODS)
SEES_LOSSES_ALONE = [m for m in METHODS if about(estimator(m)).sees == "losses"]


def train(w: Tensor, h: Tensor) -> Tensor:
    return ((X @ w - Y) ** 2).mean() + (h * w**2).sum()


def validate(w: Tensor, h: Tensor) -> Tensor:
    return ((XV @ w - YV) ** 2).mean()


def problem_of(
    inner_loss: Callable[..., Any] = train,
    outer_loss: Callable[..., Any] = validate,
    params: Any = None,
    hparams: Any = None,
    **more: Any,
) -> bilevel.BilevelProblem:
    """Ridge regression, but for what is given."""
    params = torch.full((4,), 0.1, dtype=torch.float64) if params is None else params
    return bilevel.BilevelProblem(inner_loss, outer_loss, params, hparams or bilevel.positive(0.1), **more)


def findings(problem: Any, method: Any = "implicit", *levels: str) -> list[bilevel.Finding]:
    """Return the findings of these levels; of all without."""
    return [f for f in bilevel.check(problem, method).findings if not levels or f.level in levels]


def only(problem: Any, method: Any = "implicit") -> bilevel.Finding:
    found = findings(problem, method)
    assert len(found) == 1, found
    return found[0]


# What works


@pytest.mark.parametrize("known", known_problems(), ids=lambda known: known.name)
@pytest.mark.parametrize("method", ["implicit", "cg", "fixed-point", "unroll", "truncated"])
def test_nothing_is_found_on_healthy_problems(known: Any, method: str) -> None:
    problem = known.problem(inner.SGD(lr=0.05, steps=30) if method in ("unroll", "truncated") else None)
    found = findings(problem, method)
    if known.name == "softmax regression, free bias" and method not in ("unroll", "truncated"):
        assert [f.message.split()[:4] for f in found] == [["has", "directions", "without", "curvature"]]
        return
    # Twenty weights and thirty examples inside of closures: nobody sees how many there are.
    assert not [f for f in found if f.level != "note"], found
    assert bilevel.check(problem, method).ok


def test_a_report_is_a_table_and_data() -> None:
    solver = inner.SGD(lr=lambda h: h["lr"], steps=10)
    hparams = {"l2": bilevel.positive(0.1), "lr": bilevel.positive(0.01)}
    problem = problem_of(lambda w, h: train(w, h["l2"]), hparams=hparams, inner_solver=solver)
    report = bilevel.check(problem)
    text = str(report)
    assert not report.ok and text.startswith("NOT OK: 1 error")
    assert "hparams['lr']" in text and '-> method="unroll"' in text and "inner gradient" in text
    assert max(map(len, text.splitlines()[3:])) <= 120
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False and data["findings"][0]["subject"] == "hparams['lr']"
    assert data["costs"]["product_ms"] > 0.0
    assert bilevel.check(problem).findings == report.findings


def sweep(window: int, before: int) -> int:
    """Products of a truncated sweep: its window, up to 8 steps before it five times each, and 10 more for the tail."""
    return window + 5 * min(8, before) + 10


def test_costs_are_counted() -> None:
    solver = inner.SGD(lr=0.1, steps=10)
    costs = bilevel.check(problem_of(inner_solver=solver), "unroll").costs
    assert (costs.gradients, costs.products) == (10, 10)
    assert bilevel.check(problem_of(inner_solver=solver), bilevel.Truncated(steps=4)).costs.products == sweep(4, 6)
    # A step holds a handful of vectors of 20 (residuals) and of 4 (variables).
    assert costs.megabytes is not None and 10 * 24 * 8 / 1e6 < costs.megabytes < 10 * 24 * 8 * 10 / 1e6
    costs = bilevel.check(problem_of(), "direct").costs
    assert (costs.gradients, costs.products) == (None, 4)
    for time in (costs.inner_gradient_ms, costs.product_ms, costs.outer_gradient_ms):
        assert time is not None and 0.0 < time < 1e3


@pytest.mark.parametrize("method", ["implicit", "unroll"])
def test_the_users_things_are_as_before(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=own)
    problem = problem_of(
        lambda m, h, batch: ((m(batch[0])[:, 0] - batch[1]) ** 2).mean() + h * m[0].weight.square().sum(),
        lambda m, h, batch: ((m(batch[0])[:, 0] - batch[1]) ** 2).mean(),
        model,
        inner_solver=inner.SGD(lr=0.01, steps=5),
        inner_data=loader,
        outer_data=(XV, YV),
    )
    problem.inner_batches.draw()
    problem.inner_batches.draw()
    position = problem.position()
    third = problem.inner_batches.draw()[0]
    problem.go_to(position)
    inside = problem.params.buffers()
    random, state = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    bilevel.check(problem, method)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training and all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, inside[name]) for name, t in problem.params.buffers().items())
    assert torch.equal(problem.inner_batches.draw()[0], third)
    problem.go_to(position)


def test_nothing_is_trained() -> None:
    calls = 0

    def fit(w: Tensor, h: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return w

    for method in ("implicit", "unroll", "fixed-point"):
        bilevel.check(problem_of(inner_solver=fit), method)
    assert calls == 0


# Methods, losses, and what they use


def test_a_wrong_problem_is_raised_and_a_wrong_method_found() -> None:
    with pytest.raises(TypeError, match="BilevelProblem"):
        bilevel.check(train)  # type: ignore[arg-type]
    for method in ("newton", bilevel.Implicit, 3):
        found = only(problem_of(), method)
        assert (found.level, found.subject) == ("error", "method") and "implicit" in found.remedy.lower()


def no_return(w: Tensor, h: Tensor) -> None:
    pass


def with_a_bug(w: Tensor, h: dict[str, Tensor]) -> Tensor:
    return (w * h["l3"]).sum()


@pytest.mark.parametrize(
    ("loss", "message", "remedy"),
    [
        (no_return, "returned a NoneType", "return statement"),
        (lambda w, h: (w * h) ** 2, r"shape \(4,\)", "mean"),
        (lambda w, h: (w * h).sum() / 0.0, "is .*nan|is inf|is -inf", ""),
        (lambda w, h: h * torch.tensor([1.0]).double()[5], r"IndexError: .*\(in <lambda>, test_preflight.py", ""),
        (lambda w, h: torch.ones(3) @ w, "RuntimeError: .*", "mend"),
        (lambda w, h: w.detach().sum() * h, "params", "do not detach them"),
    ],
)
@pytest.mark.parametrize("role", ["inner_loss", "outer_loss"])
def test_a_loss_that_fails_is_an_error(role: str, loss: Any, message: str, remedy: str) -> None:
    problem = problem_of(**{role: loss})
    for method in ("implicit", "cg"):
        errors = [f for f in findings(problem, method, "error") if f.subject == role]
        assert len(errors) == 1, errors
        assert re.search(message, errors[0].message), errors[0]
        assert remedy in errors[0].remedy


def test_a_gradient_that_is_not_finite_is_named() -> None:
    params = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    problem = problem_of(
        lambda p, h: p["a"].norm() * 0.0 + p["a"].abs().sqrt().sum() + h * (p["b"] ** 2).sum(),
        lambda p, h: p["b"].sum() + p["a"].sum(),
        params,
    )
    found = only(problem)
    assert found.level == "error" and "params['a']" in found.message and "params['b']" not in found.message


def test_a_second_derivative_that_is_not_finite_is_found() -> None:
    params = torch.zeros(2, dtype=torch.float64)
    problem = problem_of(lambda w, h: (w.abs() ** 1.5).sum() + h * w.sum(), lambda w, h: w.sum(), params)
    assert [f.message for f in findings(problem, "implicit", "error") if "second derivative" in f.message]


def test_unused_params_are_named() -> None:
    params = {name: torch.ones(2, dtype=torch.float64) for name in ("used", "idle", "wanted")}
    problem = problem_of(
        lambda p, h: h * (p["used"] ** 2).sum(),
        lambda p, h: (p["used"] * p["wanted"]).sum(),
        params,
        inner_solver=inner.SGD(lr=0.1, steps=3),
    )
    found = {f.subject: f.level for f in findings(problem, "implicit") if "does not use it" in f.message}
    assert found == {"params['idle']": "warning", "params['wanted']": "error"}
    found = {f.subject: f.level for f in findings(problem, "unroll")}
    assert found == {"params['idle']": "warning", "params['wanted']": "warning"}


def test_an_outer_loss_without_params_is_an_error() -> None:
    found = only(problem_of(outer_loss=lambda w, h: h**2))
    assert (found.level, found.subject) == ("error", "outer_loss") and "does not depend on params" in found.message
    # Stationary is not independent.
    assert bilevel.check(problem_of(outer_loss=lambda w, h: (w - w.detach()).square().sum())).ok


def test_hyperparameters_that_nobody_uses_are_errors() -> None:
    hparams = {"l2": bilevel.positive(0.1), "idle": bilevel.positive(1.0), "constant": bilevel.positive(1.0)}
    problem = problem_of(
        lambda w, h: train(w, h["l2"]) + h["constant"] ** 2, hparams=hparams, inner_solver=inner.SGD(lr=0.1, steps=3)
    )
    for method in METHODS:
        found = {f.subject: f for f in findings(problem, method, "error")}
        assert sorted(found) == ["hparams['constant']", "hparams['idle']"], method
        assert "no path" in found["hparams['idle']"].message
        with pytest.raises(bilevel.UnseenHyperparameterError):
            bilevel.hypergradient(problem, method)


SETTINGS: dict[str, Any] = {
    "lr": inner.SGD(lr=lambda h: h["s"], steps=12),
    "late": inner.SGD(lr=lambda h, step: h["s"] if step == 11 else 0.1, steps=12),
    "momentum": inner.SGD(lr=0.1, momentum=lambda h: h["s"], steps=12),
    "adam": inner.Adam(lr=lambda h: h["s"], steps=12),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_inner_solver_needs_unrolling(name: str) -> None:
    hparams = {"l2": bilevel.positive(0.1), "s": bilevel.positive(0.05)}
    problem = problem_of(lambda w, h: train(w, h["l2"]), hparams=hparams, inner_solver=SETTINGS[name])
    for method in SEES_LOSSES_ALONE:
        (found,) = findings(problem, method, "error")
        assert (found.level, found.subject) == ("error", "hparams['s']") and "unroll" in found.remedy
    found = only(problem, "fixed-point")
    assert found.level == "note" and "unroll" in found.remedy
    assert not findings(problem, "unroll")


def test_what_ones_own_loop_uses_is_not_known() -> None:
    hparams = {"l2": bilevel.positive(0.1), "s": bilevel.positive(0.05)}
    problem = problem_of(lambda w, h: train(w, h["l2"]), hparams=hparams, inner_solver=lambda w, h: w - h["s"] * w)
    assert only(problem, "implicit").level == "error" and "graph" in only(problem, "implicit").remedy
    assert only(problem, "unroll").level == "note"


# Second derivatives


class Detached(torch.autograd.Function):
    """x^3 with a backward whose own derivative is missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = 3.0 * x.detach() ** 2 * g
        return slope


class Skewed(torch.autograd.Function):
    """The sum of squares with a gradient that is no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x**2).sum() / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wrong: Tensor = g * (x + torch.roll(x, 1))
        return wrong


def apply(function: Any, x: Tensor) -> Tensor:
    y: Tensor = function.apply(x)
    return y


@pytest.mark.parametrize("method", ["implicit", "unroll"])
def test_a_backward_that_detaches_is_an_error(method: str) -> None:
    problem = problem_of(
        lambda w, h: apply(Detached, X @ w).mean() + h * (w**2).sum(), inner_solver=inner.SGD(lr=0.1, steps=3)
    )
    found = [f for f in findings(problem, method, "error") if "off by" in f.message]
    assert len(found) == 1 and "Detached" in found[0].message and "detaches" in found[0].remedy


def test_a_skewed_second_derivative_is_an_error() -> None:
    problem = problem_of(lambda w, h: apply(Skewed, w) + h * (w**2).sum())
    found = [f for f in findings(problem, "implicit", "error") if "not symmetric" in f.message]
    assert len(found) == 1 and "Skewed" in found[0].message


def network(activation: nn.Module, dtype: torch.dtype = torch.float64) -> bilevel.BilevelProblem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), activation, nn.Linear(64, 1)).to(dtype)
    x, y, xv, yv = (t.to(dtype) for t in (X, Y, XV, YV))
    return problem_of(
        lambda m, h: ((m(x)[:, 0] - y) ** 2).mean() + h * sum((p**2).sum() for p in m.parameters()),
        lambda m, h: ((m(xv)[:, 0] - yv) ** 2).mean(),
        model,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Softplus(), nn.GELU(), nn.ReLU(), nn.LeakyReLU()])
def test_kinks_are_a_note_and_smooth_networks_have_none(activation: nn.Module, dtype: torch.dtype) -> None:
    found = [f for f in findings(network(activation, dtype)) if "jumps" in f.message or "off by" in f.message]
    if not isinstance(activation, nn.ReLU | nn.LeakyReLU):
        assert not found
    elif dtype == torch.float64:
        assert [f.level for f in found] == ["note"]
    else:  # float32 has no steps that are short enough to tell
        assert [f.level for f in found] in (["note"], ["warning"])


def test_a_start_on_a_kink_is_a_warning() -> None:
    problem = problem_of(
        lambda w, h: ((X @ w - Y) ** 2).mean() + h * w.abs().sum(), params=torch.zeros(4, dtype=torch.float64)
    )
    found = [f for f in findings(problem) if "off by" in f.message]
    assert [f.level for f in found] == ["warning"] and "kink" in found[0].message


def test_what_torch_cannot_differentiate_twice_is_named() -> None:
    problem = problem_of(lambda w, h: torch.cdist(X * w, X, p=1.0).mean() + h * (w**2).sum())
    found = [f for f in findings(problem, "implicit", "error") if "_cdist_backward" in f.message]
    assert len(found) == 1 and found[0].subject == "inner_loss"


def test_scales_do_not_matter() -> None:
    """The same problem with a loss of 1e-12 and variables of 1e6 times the size."""
    for loss, size in ((1e-12, 1.0), (1.0, 1e6), (1e12, 1e-6)):
        problem = problem_of(
            lambda w, h, loss=loss, size=size: loss * train(w / size, h),
            lambda w, h, loss=loss, size=size: loss * validate(w / size, h),
            torch.full((4,), 0.1 * size, dtype=torch.float64),
        )
        assert not findings(problem)


# Randomness and buffers


def test_dropout_is_a_note_and_under_lbfgs_a_warning() -> None:
    def noisy(w: Tensor, h: Tensor) -> Tensor:
        return ((F.dropout(X, 0.5) @ w - Y) ** 2).mean() + h * (w**2).sum()

    found = findings(problem_of(noisy, inner_solver=inner.Adam(lr=0.1, steps=5)))
    assert [(f.level, f.subject) for f in found] == [("note", "inner_loss")] and "pins" in found[0].message
    found = findings(problem_of(noisy))
    assert [(f.level, f.subject) for f in found] == [("warning", "inner_solver"), ("note", "inner_loss")]
    outer = only(problem_of(outer_loss=lambda w, h: ((F.dropout(XV, 0.5) @ w - YV) ** 2).mean()))
    assert (outer.level, outer.subject) == ("note", "outer_loss")


def test_batch_norm_in_training_mode_is_a_note() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    losses: Any = (
        lambda m, h: ((m(X)[:, 0] - Y) ** 2).mean() + h * sum((p**2).sum() for p in m.parameters()),
        lambda m, h: ((m(XV)[:, 0] - YV) ** 2).mean(),
    )
    found = [f for f in findings(problem_of(losses[0], losses[1], model)) if "buffers" in f.message]
    assert [f.level for f in found] == ["note"] and "running_mean" in found[0].message
    assert not [f for f in findings(problem_of(losses[0], losses[1], model.eval())) if "buffers" in f.message]


# The inner solver


def test_an_inner_solver_that_does_not_fit_is_an_error() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)

    def loss(w: Tensor, h: Tensor, batch: list[Tensor]) -> Tensor:
        return ((batch[0] @ w - batch[1]) ** 2).mean() + h * (w**2).sum()

    found = only(problem_of(loss, inner_data=loader))
    assert (found.level, found.subject) == ("error", "inner_solver") and "inner.Adam" in found.remedy
    found = only(problem_of(), "unroll")
    assert (found.level, found.subject) == ("error", "inner_solver") and "inner.SGD" in found.remedy


@pytest.mark.parametrize("decay", [0.1, lambda h: h], ids=["number", "function"])
@pytest.mark.parametrize("solver", [inner.AdamW, inner.Adam, inner.SGD])
def test_a_decay_outside_of_the_loss_is_an_error(solver: Any, decay: Any) -> None:
    problem = problem_of(inner_solver=solver(lr=0.05, weight_decay=decay, steps=5))
    found = only(problem, "cg")
    assert (found.level, found.subject) == ("error", "inner_solver")
    assert "weight_decay" in found.message and "`inner_loss`" in found.remedy and "unroll" in found.remedy
    assert not findings(problem, "unroll")


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_return_wrong_things_are_errors(method: str) -> None:
    solver = inner.SGD(lr=lambda h: h["lr"], steps=5)
    problem = problem_of(
        lambda w, h: train(w, h["l2"]),
        hparams={"lr": bilevel.positive(0.1, shape=(5,)), "l2": bilevel.positive(0.1)},
        inner_solver=solver,
    )
    found = [f for f in findings(problem, method, "error") if f.subject == "inner_solver"]
    assert len(found) == 1 and "`lr` returned" in found[0].message
    solver = inner.SGD(lr=lambda h: h["rate"], steps=5)
    found = [f for f in findings(problem_of(inner_solver=solver), method, "error") if f.subject == "inner_solver"]
    assert len(found) == 1 and "`lr` has no entry for step 0" in found[0].message


def test_a_loop_that_diverges_is_a_warning() -> None:
    for lr, levels in ((0.05, []), (10.0, ["warning"])):
        found = findings(problem_of(inner_solver=inner.SGD(lr=lr, steps=100)), "unroll")
        assert [f.level for f in found] == levels
    assert "lower the learning rate" in found[0].remedy
    assert not findings(problem_of(inner_solver=inner.Adam(lr=1e-3, steps=1000)), "unroll")
    stretching = network(nn.Tanh())  # by Adam's normalization alone, while the loss falls
    stretching.inner_solver = inner.Adam(lr=1e-3, steps=1000)
    assert not findings(stretching, "unroll", "error", "warning")
    found = findings(problem_of(inner_solver=inner.SGD(lr=1e200, steps=100)), "unroll")
    assert [(f.level, f.subject) for f in found] == [("error", "inner_solver")] and "after step" in found[0].message


def test_a_graph_that_does_not_fit_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(inner_solver=inner.SGD(lr=0.1, steps=1000))
    method = bilevel.Truncated(steps=1000)
    megabytes = bilevel.check(problem, method).costs.megabytes
    assert megabytes is not None
    monkeypatch.setattr(training, "free_memory", lambda device: int(1.9e6 * megabytes))
    found = only(problem, method)
    assert (found.level, found.subject) == ("warning", "method") and "Truncated(steps=9" in found.remedy
    assert not findings(problem, "truncated")
    assert not findings(problem, "implicit")
    monkeypatch.setattr(training, "free_memory", lambda device: int(2.1e6 * megabytes))
    assert not findings(problem, method)


def test_steps_that_unrolling_takes_again_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(inner_solver=inner.SGD(lr=0.1, steps=1000))
    whole = bilevel.check(problem, "unroll").costs
    assert whole.megabytes is not None and whole.gradients == 1000
    monkeypatch.setattr(training, "free_memory", lambda device: int(1e6 * whole.megabytes))
    found = only(problem, "unroll")
    assert (found.level, found.subject) == ("note", "method") and "inner steps are taken again" in found.message
    costs = bilevel.check(problem, "unroll").costs
    assert costs.megabytes is not None and costs.megabytes <= whole.megabytes / 2
    assert costs.gradients is not None and 1400 < costs.gradients < 2000 and costs.products == 1000
    report = bilevel.check(problem, bilevel.Unroll(memory=1000))
    assert not report.ok and "expected" in str(report) and "at least" in str(report)


def test_memory_that_all_steps_share_counts_once() -> None:
    """Every step's graph holds the same data; ten thousand rows of it are no reason to fear a hundred steps."""
    data = torch.ones(10_000, 4, dtype=torch.float64)
    problem = problem_of(lambda w, h: ((data @ w) ** 2).mean() + h * (w**2).sum(), inner_solver=inner.SGD(0.1, steps=1))
    first = bilevel.check(problem, "unroll").costs.megabytes
    problem.inner_solver = inner.SGD(lr=0.1, steps=100)
    hundred = bilevel.check(problem, "unroll").costs.megabytes
    assert first is not None and hundred is not None
    assert first > data.nbytes / 1e6  # data and the vectors of its length
    assert hundred < 100 * data.nbytes / 1e6


def test_free_memory_is_known_here() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 1e6
    assert free_memory(torch.device("meta")) is None


# Curvature and precision


def quadratic(scales: list[float], dtype: torch.dtype = torch.float64) -> bilevel.BilevelProblem:
    a = torch.tensor(scales, dtype=dtype)
    return problem_of(
        lambda w, h: (a * w**2).sum() / 2 + h * w.sum(), lambda w, h: (w**2).sum(), torch.ones(len(a), dtype=dtype)
    )


@pytest.mark.parametrize(
    ("scales", "dtype", "expected"),
    [
        ([1.0, 1e5], torch.float64, []),
        ([1.0, 1e7], torch.float64, [("warning", "condition number of at least 1.0e+07")]),
        ([1.0, 1e2], torch.float32, [("note", "float32")]),
        ([1.0, 1e4], torch.float32, [("warning", "condition number"), ("note", "float32")]),
        ([-1.0, 10.0], torch.float64, [("note", "negative curvature")]),
        ([0.0, 1.0], torch.float64, [("warning", "without curvature")]),
    ],
)
def test_curvature_at_the_start(scales: list[float], dtype: torch.dtype, expected: list[tuple[str, str]]) -> None:
    found = findings(quadratic(scales, dtype))
    assert [f.level for f in found] == [level for level, _ in expected]
    assert all(words in f.message for f, (_, words) in zip(found, expected, strict=True))
    if dtype == torch.float32:
        assert all("float64" in f.remedy for f in found)


def test_precision_does_not_matter_to_unrolled_methods() -> None:
    problem = quadratic([1.0, 1e4], torch.float32)
    problem.inner_solver = inner.SGD(lr=1e-5, steps=3)
    assert not findings(problem, "unroll")


def test_methods_that_move_the_inner_variables_are_told_of_no_linear_system() -> None:
    found = findings(quadratic([-1.0, 10.0], torch.float32), "soba")
    assert [f.subject for f in found] == ["inner_loss"]
    assert "negative curvature" in found[0].message and "conjugate" not in found[0].message


def test_the_examples_of_a_family_are_those_of_all_members() -> None:
    folds = (X.reshape(5, 4, 4), Y.reshape(5, 4))
    member = problem_of(
        lambda w, h, b: ((b[0] @ w - b[1]) ** 2).mean() + (h * w).square().sum(),
        lambda w, h, b: ((b[0] @ w - b[1]) ** 2).mean(),
        hparams=bilevel.positive(1.0, shape=(7, 1)),
        inner_data=folds,
        outer_data=folds,  # masks of folds are the same at both levels
    )
    assert not findings(bilevel.over(member, 5))  # 7 hyperparameters for 5 folds of 4 rows


def test_half_precision_is_a_warning() -> None:
    found = [f for f in findings(quadratic([1.0, 2.0], torch.bfloat16), "cg") if f.subject == "params"]
    assert [f.level for f in found] == ["warning"] and "autocast" in found[0].remedy


# Data


def losses_of_batches() -> tuple[Any, Any]:
    def loss(w: Tensor, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((batch[0] @ w - batch[1]) ** 2).mean()

    return lambda w, h, batch: loss(w, h, batch) + (h * w**2).sum(), loss


@pytest.mark.parametrize("shared", ["tuple", "tensor", "dataset", "loader"])
def test_training_data_as_validation_data_are_a_warning(shared: str) -> None:
    batch, dataset = (X, Y), TensorDataset(X, Y)
    pairs: dict[str, Any] = {
        "tuple": (batch, batch),
        "tensor": ((X, Y), (X, YV)),
        "dataset": (dataset, DataLoader(dataset, batch_size=20)),
        "loader": (batch, DataLoader(dataset, batch_size=20)),
    }
    inner_data, outer_data = pairs[shared]
    found = only(problem_of(*losses_of_batches(), inner_data=inner_data, outer_data=outer_data))
    assert (found.level, found.subject) == ("warning", "outer_data") and "validation data" in found.remedy
    assert not findings(problem_of(*losses_of_batches(), inner_data=(X, Y), outer_data=(XV, YV)))


@pytest.mark.parametrize("kind", ["batch", "loader"])
def test_more_hyperparameters_than_outer_examples_are_a_note(kind: str) -> None:
    data: Any = (XV[:3], YV[:3]) if kind == "batch" else DataLoader(TensorDataset(XV[:3], YV[:3]), batch_size=3)
    problem = problem_of(
        *losses_of_batches(), hparams=bilevel.positive(0.1, shape=(4,)), inner_data=(X, Y), outer_data=data
    )
    found = only(problem)
    assert (found.level, found.subject) == ("note", "hparams") and "4 hyperparameters and 3" in found.message


def test_data_that_cannot_start_again_are_a_warning() -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield X, Y

    solver = inner.SGD(lr=0.05, steps=5)
    problem = problem_of(*losses_of_batches(), inner_solver=solver, inner_data=endless(), outer_data=(XV, YV))
    assert (only(problem).level, only(problem).subject) == ("warning", "inner_data")
    exhausted: Iterator[Any] = iter([])
    problem = problem_of(*losses_of_batches(), inner_solver=solver, inner_data=exhausted, outer_data=(XV, YV))
    assert [f.subject for f in findings(problem, "implicit", "error")] == ["problem"]


# The command line

FILE = """
import torch, bilevel
if __name__ == "__main__":
    raise AssertionError("a script's own run is not the check's business")
w = torch.ones(3, dtype=torch.float64)
def of(solver=None, idle=False):
    hparams = {"l2": bilevel.positive(0.1)} | ({"idle": bilevel.positive(1.0)} if idle else {})
    return bilevel.BilevelProblem(
        lambda w, h: ((w - 1) ** 2).sum() + h["l2"] * (w**2).sum(), lambda w, h: (w**2).sum(), w, hparams, solver)
good, bad = of(), of(idle=True)
other = 3
"""


@pytest.mark.parametrize(
    ("text", "arguments", "code", "words"),
    [
        (FILE, ["f.py:good"], 0, "ok: nothing found"),
        (FILE, ["f.py:good", "--method", "unroll"], 1, "has no steps"),
        (FILE, ["f.py:bad"], 1, "hparams['idle']"),
        (FILE, ["f.py:good", "--gradient"], 0, "passed"),
        (FILE, ["f.py:bad", "--gradient"], 1, "not checked"),
        (FILE, ["f.py:nothing"], 2, "has good, bad"),
        (FILE, ["f.py:other"], 2, "is a int, expected a BilevelProblem"),
        (FILE, ["f.py"], 2, "FILE.py:name"),
        (FILE, ["g.py:good"], 2, "there is no file"),
        (FILE, ["f.py:good", "--method", "newton"], 2, "expected one of"),
        ("x = 1\ny = x / 0\n", ["f.py:good"], 2, "ZeroDivisionError: division by zero (line 2)"),
        ("x = (", ["f.py:good"], 2, "SyntaxError"),
    ],
)
def test_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "f.py").write_text(text)
    before = list(sys.path)
    assert main(["check", *arguments]) == code
    out, err = capsys.readouterr()
    assert words in (err if code == 2 else out)
    assert (out == "") == (code == 2) and (err == "") == (code != 2)
    assert sys.path == before


def test_a_wrong_gradient_ends_in_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.py").write_text(FILE)
    check_gradient = bilevel.check_gradient
    monkeypatch.setattr(
        check_command, "check_gradient", lambda *given: dataclasses.replace(check_gradient(*given), passed=False)
    )
    assert main(["check", f"{tmp_path / 'f.py'}:good", "--gradient"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_bugs_of_this_library_are_not_blamed_on_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "outer_gradient", operator.itemgetter(0))  # raises without a line of the user's
    with pytest.raises(TypeError, match="itemgetter"):
        bilevel.check(problem_of())
