"""`argmin`, `root` and `fixed_point`: what they warn of and what they refuse."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import argmin, fixed_point, root
from problems_differentiable import D, log, number, quadratic

pytestmark = pytest.mark.usefixtures("seeded")

# Trust


def untrusted(build: Any, match: str) -> None:
    """Assert that a derivative warns, raises or keeps silent as asked."""
    for on_untrusted in ("warn", "raise", "ignore"):
        a = torch.tensor([2.0, 1.0], requires_grad=True, **D)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if on_untrusted == "raise":
                with pytest.raises(bilevel.UntrustedHypergradientError, match=match):
                    build(a, on_untrusted).sum().backward()
            else:
                build(a, on_untrusted).sum().backward()
        if on_untrusted == "warn":
            assert [w.category for w in caught] == [bilevel.UntrustedHypergradientWarning]
            assert match in str(caught[0].message)
        else:
            assert not caught


def test_a_solution_that_is_not_stationary() -> None:
    solver = bilevel.inner.SGD(lr=0.1, steps=30)  # 0.9^30 = 4 % short
    untrusted(
        lambda a, on: argmin(quadratic, torch.zeros(2, **D), a, solver=solver, on_untrusted=on),
        "of its size away from where the gradient of `loss` is zero",
    )


def test_a_saddle() -> None:
    signs = torch.tensor([1.0, -1.0], **D)
    untrusted(
        lambda a, on: argmin(
            lambda w, a: 0.5 * (signs * (w - a) ** 2).sum(),
            torch.zeros(2, **D),
            a,
            solver=lambda w, a: a,
            on_untrusted=on,
        ),
        "zero or negative curvature",
    )


def test_a_singular_jacobian() -> None:
    untrusted(
        lambda a, on: root(
            lambda x, a: torch.stack([x[0] + x[1] - a[0], x[0] + x[1] - a[0]]),
            torch.ones(2, **D),
            a,
            solver=lambda x, a: a[:1].expand(2) / 2,
            on_untrusted=on,
        ),
        "the Jacobian of `residual` is singular",
    )


def test_a_linear_solver_that_stops_early() -> None:
    scales = torch.logspace(0, 3, 70, **D)

    def build(a: Tensor, on: str) -> Tensor:
        found: Tensor = argmin(
            lambda w, a: 0.5 * (scales * w**2).sum() - a.sum() * w.sum(),
            torch.zeros(70, **D),
            a,
            method=bilevel.Implicit(bilevel.CG(max_steps=3, preconditioner=None)),
            on_untrusted=on,
        )
        return found

    untrusted(build, "used all its steps")


@pytest.mark.parametrize(
    ("solve", "match"),
    [
        (lambda a, on: root(lambda x, a: x**2 + a**2, torch.ones(2, **D), a, on_untrusted=on), "found no point"),
        (lambda a, on: fixed_point(lambda x, a: 2 * x.exp() + a, torch.ones(2, **D), a, on_untrusted=on), "at best"),
    ],
)
def test_no_solution(solve: Any, match: str) -> None:
    a = torch.tensor([2.0, 1.0], requires_grad=True, **D)
    with pytest.raises(bilevel.UntrustedHypergradientError, match=match):
        solve(a, "raise")
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match=match):
        solve(a, "warn")


# Bad input


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_transforms_of_functions_are_refused_in_words(transform: Any) -> None:
    for solve in (log, lambda a: root(lambda x, a: x - a, torch.zeros((), **D), a)):
        with pytest.raises(RuntimeError, match=r"use torch.autograd.grad or torch.autograd.functional"):
            transform(solve)(torch.ones(1, **D) if transform is torch.func.vmap else torch.ones((), **D))


def anything(x: Any) -> Any:
    return x


def zero(*shape: int) -> Tensor:
    return torch.zeros(*shape, **D)


OUTSIDE = torch.ones(2, requires_grad=True, **D)

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "not scalar": (lambda a: argmin(lambda w, a: (w - a) ** 2, zero(2), a), ValueError, "`loss` returned a tensor of"),
    "no return": (lambda a: argmin(anything(lambda w, a: None), zero(2), a), TypeError, "`loss` returned a NoneType"),
    "detached": (lambda a: argmin(lambda w, a: (w.detach() - a).sum(), zero(2), a), TypeError, "`loss` .*depend"),
    "no params": (lambda a: argmin(lambda w, a: (a**2).sum(), zero(2), a), TypeError, "`loss` .*depend"),
    "outside": (
        lambda a: argmin(lambda w, a: ((w - a * OUTSIDE) ** 2).sum(), zero(2), a),
        ValueError,
        "hand it over as one more argument",
    ),
    "nan": (lambda a: argmin(lambda w, a: (w * float("nan")).sum(), zero(2), a), ArithmeticError, "finite|nan"),
    "loss": (lambda a: argmin(anything(3), zero(2), a), TypeError, "`loss` is a int"),
    "typed": (lambda a: argmin(quadratic, zero(2), bilevel.positive(1.0)), TypeError, r"`args\[0\]` is .*a Tensor"),
    "complex": (
        lambda a: argmin(quadratic, zero(2), torch.complex(a, a)),
        TypeError,
        r"`args\[0\]` is torch.complex128",
    ),
    "params": (lambda a: argmin(quadratic, 1.0, a), TypeError, "`params` is a float"),
    "class": (
        lambda a: argmin(quadratic, zero(2), a, solver=bilevel.inner.LBFGS),
        TypeError,
        r"write bilevel.inner.LBFGS\(...\)",
    ),
    "solver structure": (
        lambda a: argmin(quadratic, zero(2), a, solver=lambda w, a: w[:1]),
        ValueError,
        r"what `solver` returned: params has shape \(1,\), expected \(2,\)",
    ),
    "method": (
        lambda a: argmin(quadratic, zero(2), a, method="fixed-point"),
        ValueError,
        "gives hypergradients only",
    ),
    "solver": (lambda a: argmin(quadratic, zero(2), a, solver=anything(3)), TypeError, "`solver` is a int"),
    "no steps": (lambda a: argmin(quadratic, zero(2), a, method="unroll"), ValueError, "`solver` is LBFGS.* no steps"),
    "no graph": (
        lambda a: argmin(quadratic, zero(2), a, solver=lambda w, a: a.detach(), method="unroll"),
        TypeError,
        "nothing to unroll",
    ),
    "decay": (
        lambda a: argmin(quadratic, zero(2), a, solver=bilevel.inner.SGD(lr=0.1, weight_decay=0.1, steps=3)),
        ValueError,
        "weight_decay",
    ),
    "on_untrusted": (lambda a: argmin(quadratic, zero(2), a, on_untrusted="shout"), ValueError, "`on_untrusted`"),
    "residual shape": (lambda a: root(lambda x, a: x[:1] - a[:1], zero(2), a), ValueError, "what `residual` returned"),
    "residual kind": (lambda a: root(lambda x, a: None, zero(2), a), TypeError, "what `residual` returned"),
    "residual constant": (lambda a: root(lambda x, a: a, zero(2), a), TypeError, "depend on its first argument"),
    "residual nan": (lambda a: root(lambda x, a: x / 0, zero(2), a), ArithmeticError, "NaN"),
    "map shape": (lambda a: fixed_point(lambda x, a: a[:1], zero(2), a), ValueError, "what `map` returned"),
    "symmetric": (lambda a: root(lambda x, a: x - a, zero(2), a, method="cg"), ValueError, "symmetr"),
    "unrolled root": (
        lambda a: root(lambda x, a: x - a, zero(2), a, method="unroll"),
        ValueError,
        "gives hypergradients only",
    ),
    "root solver": (
        lambda a: root(lambda x, a: x - a, zero(2), a, solver=anything(3)),
        TypeError,
        r"bilevel.Newton\(\)",
    ),
    "module start": (
        lambda a: root(lambda x, a: x, nn.Linear(2, 2), a),
        TypeError,
        r"`start` is a Linear.*functional_call",
    ),
    "memory": (lambda a: bilevel.Anderson(memory=-1), ValueError, "`memory` is -1"),
    "rtol": (lambda a: bilevel.Newton(rtol=2.0), ValueError, "`rtol` is 2.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case: str) -> None:
    call, kind, match = BAD[case]
    with pytest.raises(kind, match=match) as caught:
        call(torch.ones(2, requires_grad=True, **D))
    assert isinstance(caught.value, bilevel.BilevelError)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    a = number(2.0)
    with pytest.raises(bilevel.NonFiniteError, match="not finite"):
        torch.autograd.grad(log(a) * float("nan"), a)


def test_a_linear_loss_has_no_minimum() -> None:
    with pytest.raises(bilevel.NonFiniteError, match="has no minimum"):
        bilevel.argmin(lambda w, a: (a * w).sum(), torch.zeros(3).double(), torch.ones(()).double())
