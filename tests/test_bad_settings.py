"""What a user gets wrong in methods, settings, points and data, and NaN on the way: each is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from problems_bad_input import Make, h0, inner, problem, refused, w0

# What is seen at the first call


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("implcit", r"`method` is 'implcit', expected one of implicit, "),
        ("", r"`method` is ''"),
        (None, r"`method` is None"),
        (3, r"`method` is 3"),
        (bilevel.Unroll, r"`method` is the class Unroll; write bilevel.Unroll\(\)"),
        (bilevel.Implicit, r"`method` is the class Implicit; write bilevel.Implicit\(\)"),
        (bilevel.Truncated, r"`method` is the class Truncated; write bilevel.Truncated\(steps=...\)"),
        (bilevel.CG, r"`method` is the class CG; write bilevel.Implicit\(bilevel.CG\(\)\)"),
        (bilevel.CG(), r"`method` is CG\(.*bilevel.Implicit\("),
        (bilevel.inner.SGD(lr=0.1, steps=1), r"`method` is SGD"),
        (lambda *a: None, r"`method` is <function"),
    ],
)
@pytest.mark.parametrize("call", [bilevel.hypergradient, bilevel.solve])
def test_methods(call: Callable[..., Any], method: Any, message: str) -> None:
    refused(lambda: call(problem(), method), message)


def test_what_cannot_be_unrolled() -> None:
    for method in ("unroll", "truncated"):
        refused(lambda method=method: bilevel.hypergradient(problem(), method), r"LBFGS has none.*inner.SGD.*implicit")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilevel.Truncated(steps=0), r"`steps` is 0"),
        (lambda: bilevel.Truncated(steps=1.5), r"`steps` is 1.5"),  # type: ignore[arg-type]
        (lambda: bilevel.Truncated(steps=True), r"`steps` is True"),
        (lambda: bilevel.CG(rtol=-1.0), r"`rtol` is -1.0"),
        (lambda: bilevel.CG(rtol=float("nan")), r"`rtol` is nan"),
        (lambda: bilevel.CG(rtol="1e-6"), r"`rtol` is '1e-6'"),  # type: ignore[arg-type]
        (lambda: bilevel.CG(max_steps=0), r"`max_steps` is 0"),
        (lambda: bilevel.CG(max_steps=1.5), r"`max_steps` is 1.5"),  # type: ignore[arg-type]
        (lambda: bilevel.Neumann(max_steps=0), r"`max_steps` is 0"),
        (lambda: bilevel.Neumann(max_steps=None), r"`max_steps` is None"),  # type: ignore[arg-type]
        (lambda: bilevel.Neumann(step_size=-1.0), r"`step_size` is -1.0"),
        (lambda: bilevel.FixedPoint(max_steps=0), r"`max_steps` is 0"),
        (lambda: bilevel.Implicit("cg"), r"`linear_solver` is 'cg'.*bilevel.CG"),  # type: ignore[arg-type]
        (lambda: bilevel.Implicit(bilevel.CG), r"`linear_solver` is the class CG.*CG\(\)"),  # type: ignore[arg-type]
    ],
)
def test_estimators(make: Make, message: str) -> None:
    refused(make, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"`steps` is 0"),
        ({"steps": -3}, r"`steps` is -3"),
        ({"steps": 2.5}, r"`steps` is 2.5"),
        ({"steps": "10"}, r"`steps` is '10'"),
        ({"steps": True}, r"`steps` is True"),
        ({"tol": -1.0}, r"`tol` is -1.0"),
        ({"tol": 1.0}, r"`tol` is 1.0"),
        ({"tol": float("nan")}, r"`tol` is nan"),
        ({"tol": "1e-3"}, r"`tol` is '1e-3'"),
        ({"seed": "1"}, r"`seed` is '1'"),
        ({"seed": 1.5}, r"`seed` is 1.5"),
        ({"seed": 2**70}, r"`seed` is 1180591620717411303424"),
        ({"callbacks": print}, r"`callbacks`.*callbacks=\[function\]"),
        ({"callbacks": [1]}, r"`callbacks`"),
        ({"callbacks": None}, r"`callbacks`"),
        ({"callbacks": 3}, r"`callbacks`"),
        ({"on_untrusted": "error"}, r"`on_untrusted` is 'error', expected one of warn, raise, ignore"),
        ({"on_untrusted": None}, r"`on_untrusted` is None"),
        ({"on_untrusted": ["warn"]}, r"`on_untrusted` is \['warn'\]"),
        ({"outer_optimizer": "adam"}, r"`outer_optimizer` is 'adam', expected \"lbfgs\", a torch.optim class"),
        ({"outer_optimizer": 3}, r"`outer_optimizer` is a int"),
        ({"outer_optimizer": torch.optim.Adam([w0()])}, r"`outer_optimizer` is a Adam object.*lambda tensors"),
        ({"outer_optimizer": lambda tensors: None}, r"`outer_optimizer` returned a NoneType.*lambda tensors"),
        ({"outer_optimizer": lambda: None}, r"`outer_optimizer`.*argument|`outer_optimizer` takes \(\)"),
        ({"outer_optimizer": lambda t: torch.optim.Adam([w0()])}, r"`outer_optimizer`.*other tensors"),
        ({"outer_optimizer": bilevel.inner.Adam(steps=1)}, r"`outer_optimizer` is a Adam.*torch.optim"),
    ],
)
def test_settings_of_solve(settings: dict[str, Any], message: str) -> None:
    refused(lambda: bilevel.solve(problem(), **({"progress": False} | settings)), message)


@pytest.mark.parametrize("call", [bilevel.hypergradient, bilevel.solve])
@pytest.mark.parametrize("wrong", [None, inner, bilevel.BilevelProblem, {"inner_loss": inner}])
def test_no_problem(call: Callable[..., Any], wrong: Any) -> None:
    refused(lambda: call(wrong), r"`problem` is .*expected a BilevelProblem; write bilevel.BilevelProblem\(")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"hparams": 1.0}, r"`hparams` is a float"),
        ({"hparams": w0()}, r"`hparams`: hparams has shape \(2,\), expected \(\)"),
        ({"hparams": {"a": h0()}}, r"`hparams` has 1 tensors for the 1.*missing"),
        ({"hparams": torch.ones(())}, r"hparams is torch.float32, expected torch.float64"),
        ({"hparams": torch.tensor(float("nan"), dtype=torch.float64)}, r"hparams.*NaN"),
        ({"params": torch.zeros(3, dtype=torch.float64)}, r"`params`: params has shape \(3,\), expected \(2,\)"),
        ({"params": [0.0, 0.0]}, r"`params` at '0' is a float"),
        ({"params": w0() * float("nan")}, r"params.*NaN"),
    ],
)
def test_points(point: dict[str, Any], message: str) -> None:
    refused(lambda: bilevel.hypergradient(problem(), **point), message)


def test_a_point_outside_of_the_range() -> None:
    p = problem(hparams=bilevel.positive(1.0))
    refused(
        lambda: bilevel.hypergradient(p, hparams=-h0()),
        r"hparams has values from -1 to -1, outside of the range of positive\(1\)",
    )
    p = problem(hparams=bilevel.interval(0.5, 0.0, 1.0))
    refused(
        lambda: bilevel.hypergradient(p, hparams=2 * h0()),
        r"hparams has values from 2 to 2, outside of the range of interval",
    )


def test_data_that_run_out() -> None:
    def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return inner(w, h)

    given: dict[str, Any] = {"inner_loss": loss, "inner_solver": bilevel.inner.SGD(lr=0.1, steps=5)}
    refused(
        lambda: bilevel.hypergradient(problem(**given, inner_data=(x for x in [w0()])), "unroll"),
        r"`inner_data` has no batch left.*DataLoader",
    )
    empty = DataLoader(TensorDataset(w0()), batch_size=4, drop_last=True)
    refused(lambda: bilevel.hypergradient(problem(**given, inner_data=empty), "unroll"), r"`inner_data` has no batch")
    refused(
        lambda: bilevel.hypergradient(
            problem(inner_loss=loss, inner_data=empty, inner_solver=bilevel.inner.SGD(lr=0.1, epochs=1)), "unroll"
        ),
        r"`inner_data` has no batch",
    )
    refused(
        lambda: bilevel.hypergradient(problem(outer_loss=loss, outer_data=iter(()))),
        r"`outer_data` has no batch",
    )


# NaN on the way


def test_a_diverging_inner_loop_names_the_learning_rate() -> None:
    p = problem(inner_solver=bilevel.inner.SGD(lr=1e3, steps=500))
    for method in ("implicit", "unroll"):
        with pytest.raises(bilevel.NonFiniteError, match="learning rate") as caught:
            bilevel.hypergradient(p, method)
        assert caught.value.quantity == "inner variables"


def test_a_nan_during_solve_keeps_the_last_good_step() -> None:
    def late(w: Tensor, h: Tensor) -> Tensor:
        # finite at the start h = 1, NaN once h has moved below 0.9
        return ((w - h) ** 2).sum() + torch.where(h < 0.9, torch.nan, 0.0)

    p = problem(inner_loss=late, hparams=bilevel.positive(1.0))
    with pytest.raises(bilevel.NonFiniteError, match=r"outer step \d+: the inner loss (became|is) nan") as caught:
        bilevel.solve(p, outer_optimizer=lambda t: torch.optim.SGD(t, lr=0.01), steps=50, progress=False)
    error = caught.value
    assert error.quantity == "inner loss"
    assert error.step is not None and error.step == len(error.solution.history) + 1
    assert error.solution.hparams.item() > 0.9


def test_a_nan_at_the_start_of_solve_has_no_solution() -> None:
    p = problem(inner_loss=lambda w, h: inner(w, h) * float("nan"))
    with pytest.raises(bilevel.NonFiniteError, match="outer step 0") as caught:
        bilevel.solve(p, progress=False)
    assert caught.value.step == 0
    assert caught.value.solution is None
