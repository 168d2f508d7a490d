"""`bilevel.check`: second derivatives, random numbers, curvature and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel
from bilevel import inner
from problems_preflight import XV, YV, X, Y, findings, network, only, problem_of, train, validate

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
