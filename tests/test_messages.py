"""Words that are misspelt get a hint, and errors of the user's functions say which function it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import CG, BilevelError, BilevelProblem, Implicit, InvalidTypeError, InvalidValueError, inner, prox
from bilevel.errors import meant

LINEAR: Any = CG()  # where an inner solver is wanted
NAME: Any = "lbfgs"
ZERO = torch.zeros(2, dtype=torch.float64)


def problem(solver: Any = None, key: str = "l2") -> BilevelProblem:
    return BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() + h[key] * (w**2).sum(),
        lambda w, h: (w**2).sum(),
        ZERO,
        {"l2": bilevel.positive(0.1)},
        solver,
    )


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: bilevel.hypergradient(problem(), "finite_difference"), 'did you mean "finite-difference"'),
        (lambda: bilevel.solve(problem(), "Unrolled"), 'did you mean "unroll"'),
        (lambda: bilevel.argmin(lambda w: (w**2).sum(), ZERO, method="implict"), 'did you mean "implicit"'),
        (lambda: bilevel.hypergradient(problem(), "pbgd"), r"write bilevel.PBGD\(gamma=...\)"),
        (lambda: Implicit("gmre"), r"such as bilevel.GMRES\(\)"),  # type: ignore[arg-type]
        (lambda: bilevel.FiniteDifference("cg"), r"such as bilevel.CG\(\)"),  # type: ignore[arg-type]
        (lambda: CG(preconditioner="nystorm"), 'did you mean "nystrom"'),  # type: ignore[arg-type]
        (lambda: bilevel.Penalty(form="centre"), 'did you mean "central"'),  # type: ignore[arg-type]
        (lambda: bilevel.solve(problem(), outer_optimizer="lbgfs"), 'did you mean "lbfgs"'),
        (lambda: bilevel.solve(problem(), on_untrusted="warning"), 'did you mean "warn"'),
        (lambda: bilevel.hypergradient(problem(), hparams={"l_2": ZERO[0] + 1.0}), 'did you mean "l2"'),
    ],
)
def test_misspelt_words(call: Callable[[], Any], hint: str) -> None:
    with pytest.raises(BilevelError, match=hint):
        call()


def test_no_hint_for_another_word() -> None:
    assert meant("adam", ["lbfgs"]) == ""


def fails(*_: Any) -> Any:
    return dict[str, Any]()["l1"]


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda: bilevel.hypergradient(problem(inner.Proximal(prox.L1(fails)))), "`prox.L1: strength`"),
        (lambda: bilevel.hypergradient(problem(inner.Proximal(prox.Box(low=fails)))), "`prox.Box: low`"),
        (lambda: bilevel.hypergradient(problem(inner.SGD(lr=fails, steps=2)), "unroll"), "`inner.SGD: lr`"),
        (lambda: bilevel.hypergradient(problem(fails)), "`inner_solver`, called with (params, hparams)"),
        (lambda: bilevel.argmin(fails, ZERO, ZERO), "`loss`, called with (params, *args)"),
        (lambda: bilevel.argmin(lambda w, a: (w**2).sum(), ZERO, ZERO, solver=fails), "`solver`, called with (params"),
        (lambda: bilevel.root(fails, ZERO), "`residual`, called with (x, *args)"),
        (lambda: bilevel.root(lambda x: x, ZERO, solver=fails), "`solver`, called with (start, *args)"),
    ],
)
def test_errors_of_the_users_functions_say_where(call: Callable[[], Any], where: str) -> None:
    with pytest.raises(KeyError) as caught:
        call()
    assert sum(f"bilevel: while evaluating {where}" in note for note in caught.value.__notes__) == 1


def test_a_loss_that_writes_into_its_arguments_is_told_the_other_form() -> None:
    wrong = bilevel.BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() + (h.mul_(2.0) * w**2).sum(),
        lambda w, h: (w**2).sum(),
        params=torch.zeros(2, dtype=torch.float64),
        hparams=bilevel.positive(0.1),
    )
    with pytest.raises(RuntimeError) as caught:
        bilevel.hypergradient(wrong)
    assert any("x * 2 for x.mul_(2)" in note for note in caught.value.__notes__)


def test_a_missing_key_of_hparams_is_shown_with_those_there_are() -> None:
    with pytest.raises(KeyError) as caught:
        bilevel.hypergradient(problem(key="l_2"))
    assert caught.value.__notes__[1] == "bilevel: the keys of `hparams` are 'l2'; did you mean \"l2\"?"


def test_data_of_another_dtype() -> None:
    """NumPy's float64 beside torch's float32: the commonest stumble of all."""
    x = torch.ones(3, 2, dtype=torch.float64)
    closed = BilevelProblem(
        lambda w, h: (x @ w).square().sum() + h, lambda w, h: w.sum(), torch.zeros(2), bilevel.positive(0.1)
    )
    with pytest.raises(RuntimeError) as caught:
        bilevel.hypergradient(closed)
    assert caught.value.__notes__[1].startswith("bilevel: `params` and `hparams` are torch.float32 here")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: bilevel.argmin(_square, ZERO, ZERO, solver=LINEAR),
            r"`solver` is CG\(.*trains nothing; write method=",
        ),
        (lambda: problem(LINEAR), r"`inner_solver` is CG\(.*trains nothing"),
        (lambda: bilevel.argmin(_square, ZERO, ZERO, solver=NAME), r"`solver` is a str.*\(params, \*args\)"),
        (lambda: bilevel.root(lambda x: x.sum(), ZERO), r"what `residual` returned: start has shape \(\)"),
        (lambda: bilevel.fixed_point(lambda x: x, "zero"), "`start` is a str"),
        (lambda: bilevel.compare(problem(), ["cg"], reference=0.5), "`reference` is 0.5, expected a method, a Hyper"),
    ],
)
def test_the_argument_at_fault_is_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises((InvalidTypeError, InvalidValueError), match=said):
        call()


def test_a_loss_that_is_nan_under_argmin() -> None:
    with pytest.raises(bilevel.NonFiniteError, match=r"^loss is nan"):
        bilevel.argmin(lambda w, a: (w - a).sum() * float("nan"), ZERO, ZERO)


def _square(w: Tensor, a: Tensor) -> Tensor:
    return ((w - a) ** 2).sum()
