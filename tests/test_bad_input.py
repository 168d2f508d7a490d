"""Whatever a user gets wrong: a BilevelError that names the argument, what was expected, what came, what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bilevel
from problems_bad_input import h0, inner, outer, problem, refused, w0

# What is seen at construction


SPARSE = torch.eye(2, dtype=torch.float64).to_sparse()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (None, r"`params` is a NoneType, expected a Tensor; write"),
        (1.0, r"`params` is a float.*torch.tensor\(1.0\)"),
        (True, r"`params` is a bool"),
        ("w", r"`params` is a str"),
        (np.zeros(2), r"`params` is a ndarray.*torch.from_numpy\(array\)"),
        (np.float64(1.0), r"`params` is a float64"),
        ([np.zeros(2)], r"`params` at '0' is a ndarray"),
        ({}, r"`params` holds no number"),
        ([], r"`params` holds no number"),
        (torch.zeros(0), r"`params` holds no number"),
        (torch.zeros(2, dtype=torch.int64), r"params is torch.int64.*\.float\(\) or \.double\(\)"),
        (torch.zeros(2, dtype=torch.bool), r"params is torch.bool"),
        (torch.zeros(2, dtype=torch.complex64), r"params is torch.complex64.*view_as_real"),
        (SPARSE, r"params is a torch.sparse_coo tensor; write .to_dense\(\)"),
        (torch.zeros(2, device="meta"), r"params.*meta"),
        ({"a": w0(), "b": w0().float()}, r"params\['b'\] is torch.float32.*params\['a'\] is torch.float64"),
        ({"a": w0(), "b": torch.zeros(2, dtype=torch.float64, device="meta")}, r"params\['b'\].*meta"),
        (torch.tensor([float("nan")]), r"params holds NaN or infinity"),
        (torch.tensor([float("inf")]), r"params holds NaN or infinity"),
        ({w0()}, r"`params` is a set"),
        ((p for p in [w0()]), r"`params` is a generator.*(list|dict)"),
        (nn.Linear(2, 2).parameters(), r"`params` is a generator"),
        (nn.ReLU(), r"`params` is a ReLU without a parameter that requires a gradient"),
        (nn.Linear(2, 2).requires_grad_(False), r"`params` is a Linear without.*\.requires_grad_\(\)"),
        (nn.Linear, r"`params` is the class Linear.*Linear\(\.\.\.\)"),
        (bilevel.positive(1.0), r"`params` is a Positive.*`hparams`"),
        (nn.LazyLinear(2), r"`params`.*LazyLinear.*forward|`params`.*uninitialized"),
    ],
)
def test_params(params: Any, message: str) -> None:
    refused(lambda: problem(params=params), message)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (None, r"`hparams` is a NoneType"),
        (0.1, r"`hparams` is a float.*bilevel.positive\(0.1\), bilevel.real\(0.1\) or torch.tensor\(0.1\)"),
        (-0.1, r"`hparams` is a float, expected a Tensor; write bilevel.real\(-0.1\)"),
        ({"lr": 0.1}, r"`hparams` at 'lr' is a float"),
        ({"on": True}, r"`hparams` at 'on' is a bool"),
        (np.ones(2), r"`hparams` is a ndarray"),
        ([], r"`hparams` holds no number"),
        (torch.ones((), dtype=torch.int64), r"hparams is torch.int64.*a choice among whole numbers has no gradient"),
        (torch.ones(()), r"hparams is torch.float32 but `params` are torch.float64.*\.to\(torch.float64\)"),
        (torch.ones((), dtype=torch.float64, device="meta"), r"hparams.*meta"),
        (bilevel.positive(torch.ones(2)), r"hparams is torch.float32"),
        ([bilevel.positive(1.0), torch.ones(())], r"hparams\['1'\].*torch.float32"),
        (torch.tensor(float("nan"), dtype=torch.float64), r"hparams holds NaN"),
        (nn.Linear(2, 2), r"hparams\['weight'\] is torch.float32"),
        (nn.Linear(2, 2).double().requires_grad_(False), r"`hparams` is a Linear without"),
        (bilevel.positive, r"`hparams` is a function.*positive\(\.\.\.\)"),
        ([w0(), None], r"`hparams` at '1' is a NoneType"),
    ],
)
def test_hparams(hparams: Any, message: str) -> None:
    refused(lambda: problem(hparams=hparams), message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inner_loss": None}, r"`inner_loss` is a NoneType, expected a function \(params, hparams\)"),
        ({"outer_loss": w0()}, r"`outer_loss` is a Tensor, expected a function"),
        ({"inner_loss": lambda w: w}, r"`inner_loss` takes \(w\), but is called with \(params, hparams\)"),
        ({"inner_loss": lambda w, h, b: w}, r"`inner_loss` takes \(w, h, b\).*`inner_data` is not given"),
        ({"inner_data": w0()}, r"`inner_loss` takes.*\(params, hparams, batch\) because `inner_data` is given"),
        ({"outer_data": w0()}, r"`outer_loss` takes.*\(params, hparams, batch\) because `outer_data` is given"),
        ({"inner_loss": nn.MSELoss}, r"`inner_loss` is the class MSELoss"),
    ],
)
def test_losses_at_construction(changed: dict[str, Any], message: str) -> None:
    refused(lambda: problem(**changed), message)


# What is seen at the first call


@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize("method", ["implicit", "unroll"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda w: None, r"returned a NoneType, expected a scalar Tensor; add a return"),
        (lambda w: w.sum().item(), r"returned a float.*without .item\(\)"),
        (lambda w: w, r"returned a tensor of shape \(2,\), expected a scalar.*\.mean\(\) or \.sum\(\)"),
        (lambda w: w.sum().reshape(1), r"returned a tensor of shape \(1,\)"),
        (lambda w: w.sum().long(), r"returned a torch.int64 tensor, expected a floating-point one"),
        (lambda w: w.sum().detach(), r"returned a tensor that.*depend.*detach"),
        (lambda w: w.data.sum(), r"returned a tensor that.*depend.*detach"),
        (lambda w: w.detach().numpy().sum(), r"returned a float64"),
        (lambda w: (w.sum(), w.sum()), r"returned a tuple"),
        (lambda w: {"loss": w.sum()}, r"returned a dict"),
        (lambda w: w.sum() * float("nan"), r"NaN|nan|not finite"),
        (lambda w: w.sum() + float("inf"), r"inf|not finite"),
        (lambda w: w.sum().to(torch.complex128), r"returned a torch.complex128"),
    ],
)
def test_losses_at_the_first_call(which: str, method: str, returned: Callable[[Tensor], Any], message: str) -> None:
    def loss(w: Tensor, h: Tensor) -> Any:
        return returned(w * h)

    p = problem(**{which: loss}, inner_solver=bilevel.inner.SGD(lr=0.1, steps=3))
    refused(lambda: bilevel.hypergradient(p, method), message)


def test_an_inner_loss_of_other_tensors() -> None:
    other = w0().requires_grad_()
    refused(lambda: bilevel.hypergradient(problem(inner_loss=lambda w, h: other.sum())), r"does not depend on params")


def test_an_outer_loss_of_other_tensors() -> None:
    other = w0().requires_grad_()
    refused(lambda: bilevel.hypergradient(problem(outer_loss=lambda w, h: other.sum())), r"`outer_loss`.*depends on")


def test_a_loss_under_no_grad() -> None:
    refused(
        lambda: bilevel.hypergradient(problem(inner_loss=torch.no_grad()(inner))), r"`inner_loss`.*depend on params"
    )
    refused(lambda: bilevel.hypergradient(problem(outer_loss=torch.no_grad()(outer))), r"`outer_loss`.*no_grad")


def test_an_outer_loss_without_a_gradient() -> None:
    refused(
        lambda: bilevel.hypergradient(problem(outer_loss=lambda w, h: (w > 0.5).double().mean())),
        r"`outer_loss`.*accuracies, as every comparison, have no gradient",
    )


def test_a_call_under_no_grad_or_inference_mode_works_or_says_so() -> None:
    truth = bilevel.hypergradient(problem()).gradient
    with torch.no_grad():
        assert torch.equal(bilevel.hypergradient(problem()).gradient, truth)
    with torch.inference_mode():
        refused(lambda: bilevel.hypergradient(problem()), r"inference_mode")


def test_params_made_under_inference_mode() -> None:
    with torch.inference_mode():
        w = w0()
    truth = bilevel.hypergradient(problem()).gradient
    torch.testing.assert_close(bilevel.hypergradient(problem(params=w)).gradient, truth, rtol=0.0, atol=1e-12)


def test_errors_of_the_users_own_code_come_through() -> None:
    def broken(w: Tensor, h: Tensor) -> Tensor:
        raise KeyError("mine")

    for which in ("inner_loss", "outer_loss"):
        with pytest.raises(KeyError, match="mine") as caught:
            bilevel.hypergradient(problem(**{which: broken}))
        assert caught.value.__notes__ == [f"bilevel: while evaluating `{which}`, called with (params, hparams)"]


def test_a_shape_error_says_in_which_loss() -> None:
    X = torch.ones(3, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"size|shape") as caught:
        bilevel.hypergradient(
            problem(
                outer_loss=lambda w, h, batch: (batch @ torch.ones(7, dtype=torch.float64)).sum() * w.sum(),
                outer_data=X,
            )
        )
    assert "`outer_loss`, called with (params, hparams, batch)" in caught.value.__notes__[0]


def test_a_schedule_that_is_too_short() -> None:
    p = problem(
        hparams={"lr": torch.full((3,), 0.1, dtype=torch.float64)},
        inner_loss=lambda w, h: (w**2).sum(),
        outer_loss=lambda w, h: (w**2).sum(),
        inner_solver=bilevel.inner.SGD(lr=lambda h, step: h["lr"][step], steps=5),
    )
    refused(lambda: bilevel.hypergradient(p, "unroll"), r"inner.SGD: `lr` has no entry for step 3.*one entry for each")


def test_a_nan_comes_with_advice() -> None:
    nan = problem(outer_loss=lambda w, h: (w**2).sum() * float("nan"))
    refused(lambda: bilevel.hypergradient(nan), r"outer loss is nan; look for NaN in the data.*detect_anomaly")


@pytest.mark.parametrize("method", ["implicit", "cg", "direct", "neumann", "fixed-point", "unroll", "truncated"])
def test_a_hyperparameter_that_nothing_uses(method: str) -> None:
    p = problem(
        inner_loss=lambda w, h: inner(w, h["used"]),
        hparams={"used": h0(), "idle": h0()},
        inner_solver=bilevel.inner.SGD(lr=0.1, steps=50),
    )
    with pytest.raises(bilevel.UnseenHyperparameterError, match=r"hparams\['idle'\] has no path.*out of `hparams`"):
        bilevel.hypergradient(p, method, on_untrusted="ignore")


@pytest.mark.parametrize("method", ["implicit", "cg", "direct", "neumann"])
def test_a_learning_rate_under_an_implicit_method(method: str) -> None:
    p = problem(
        inner_loss=lambda w, h: inner(w, 0.5),
        hparams={"lr": bilevel.positive(0.1)},
        inner_solver=bilevel.inner.SGD(lr=lambda h: h["lr"], steps=100),
    )
    with pytest.raises(bilevel.UnseenHyperparameterError, match=r"hparams\['lr'\].*learning rate.*method=\"unroll\""):
        bilevel.hypergradient(p, method, on_untrusted="ignore")
    assert bilevel.hypergradient(p, "unroll").gradient["lr"].isfinite()
