"""`argmin` of one level: every derivative against a closed form or finite differences of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

import bilevel
from bilevel import argmin, root
from problems_differentiable import D, close, leaf, log, number, same, spd

pytestmark = pytest.mark.usefixtures("seeded")

# argmin: one level


def test_five_derivatives_of_a_logarithm() -> None:
    a = number(2.0)
    y = log(a)
    close(y.detach(), a.detach().log(), 1e-12)
    for k, truth in enumerate([1 / 2, -1 / 4, 2 / 8, -6 / 16, 24 / 32]):
        (y,) = torch.autograd.grad(y, a, create_graph=True)
        # The inner solution is exact to about 1e-13; each order amplifies that by about its own number.
        close(y.detach(), torch.tensor(truth, **D), 1e-12 * 10 ** (k / 2))


@pytest.mark.parametrize("method", ["implicit", "cg", "minres", "gmres", "direct", bilevel.Implicit(bilevel.CG())])
def test_three_derivatives_with_each_linear_solver(method: Any) -> None:
    P, a = spd(4), leaf(4, scale=0.3)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return w.exp().sum() + 0.5 * w @ P @ w - a @ w

    def value(a: Tensor) -> Tensor:
        w: Tensor = argmin(loss, torch.zeros(4, **D), a, method=method)
        return (w**3).sum()

    def by_hand(a: Tensor) -> Tensor:
        w: Tensor = argmin(loss, torch.zeros(4, **D), a.detach())
        for _ in range(3):  # a differentiable Newton step more than doubles the orders that are right: 1, 3, 7
            w = w - torch.linalg.solve(torch.diag(w.exp()) + P, w.exp() + P @ w - a)
        return (w**3).sum()

    found, truth = value(a), by_hand(a)
    weight = torch.randn(4, **D)
    for _ in range(3):
        (found,), (truth,) = (torch.autograd.grad(y, a, create_graph=True) for y in (found, truth))
        close(found.detach(), truth.detach())
        found, truth = found @ weight, truth @ weight


X, Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), **D), torch.arange(20.0, **D) % 2 * 2 - 1


def logistic(w: Tensor, strength: Tensor, x: Tensor) -> Tensor:
    return F.softplus(-Y * (x @ w)).mean() + (strength.exp() * w**2).sum() / 2


def test_logistic_regression_passes_gradcheck_twice() -> None:
    def solve(strength: Tensor, x: Tensor) -> Tensor:
        found: Tensor = argmin(logistic, torch.zeros(3, **D), strength, x)
        return found

    strength, x = torch.full((3,), -1.0, requires_grad=True, **D), X.clone().requires_grad_()
    assert gradcheck(solve, (strength, x[:, :])) and gradgradcheck(lambda s: solve(s, X), (strength,))


def test_jacobian_and_hessian_of_torch() -> None:
    P, a = spd(3), torch.randn(3, **D)

    def solve(a: Tensor) -> Tensor:
        found: Tensor = argmin(lambda w, a: 0.5 * w @ P @ w - a.exp() @ w, torch.zeros(3, **D), a)
        return found

    inverse, weight = torch.linalg.inv(P), torch.randn(3, **D)
    close(jacobian(solve, a), inverse * a.exp())  # type: ignore[no-untyped-call]
    curvature = hessian(lambda a: solve(a) @ weight, a)  # type: ignore[no-untyped-call]
    close(curvature, torch.diag(inverse @ weight * a.exp()))


def test_many_variables_by_conjugate_gradients() -> None:
    n = 90  # above the size up to which matrices are dense
    P, a = spd(n), leaf(n)
    w = argmin(lambda w, a: 0.5 * w @ P @ w - (a**2) @ w, torch.zeros(n, **D), a)
    truth = torch.linalg.solve(P, a**2)
    for power in (1, 2):
        (found,), (wanted,) = (torch.autograd.grad((y**power).sum(), a, create_graph=True) for y in (w, truth))
        close(found.detach(), wanted.detach(), 1e-7)  # CG stops at 1e-8, the condition is about 5
        weight = torch.randn(n, **D)
        same((torch.autograd.grad(g @ weight, a, retain_graph=True)[0] for g in (found, wanted)), 1e-6)


def test_structures_in_and_out_and_constants_beside() -> None:
    a: dict[str, Any] = {"x": leaf(2), "n": 3}
    unused = leaf(1)

    def loss(w: Any, a: Any, scale: float, unused: Tensor, nothing: None) -> Tensor:
        u, (v,) = w["u"], w["v"]
        value: Tensor = scale * ((u - a["n"] * a["x"]) ** 2).sum() + ((v - u.sum()) ** 2).sum() + unused.sum()
        return value

    start = {"u": torch.zeros(2, **D), "v": (torch.zeros(3, **D),)}
    w = argmin(loss, start, a, 2.0, unused, None)
    close(w["u"].detach(), 3 * a["x"].detach())
    found = torch.autograd.grad(w["v"][0].sum(), [a["x"], unused], allow_unused=True)
    close(found[0], torch.full((2,), 9.0, **D))
    assert found[1] is None  # the minimum does not depend on it, and no zero is invented
    assert not start["u"].requires_grad and bool((start["u"] == 0).all())


def test_modules_in_and_out() -> None:
    x, y = torch.randn(9, 2, **D), torch.randn(9, 1, **D)
    student, teacher = nn.Linear(2, 1, bias=False, **D), nn.Linear(2, 1, bias=False, **D)
    before = student.weight.detach().clone()

    def loss(w: Any, h: Any) -> Tensor:
        value: Tensor = ((w(x) - y) ** 2).sum() + ((w.weight - h.weight) ** 2).sum()
        return value

    trained = argmin(loss, student, teacher)
    assert isinstance(trained, nn.Linear) and bool((student.weight == before).all())
    truth = torch.linalg.solve(x.T @ x + torch.eye(2, **D), x.T @ y + teacher.weight.T)
    close(trained.weight.detach(), truth.detach().T)
    weight = torch.randn(9, 1, **D)
    trained(x).mul(weight).sum().backward()
    close(teacher.weight.grad, torch.linalg.solve(x.T @ x + torch.eye(2, **D), x.T @ weight).T)


def test_nothing_is_recorded_where_nothing_needs_it() -> None:
    assert not log(torch.tensor(2.0, **D)).requires_grad
    with torch.no_grad():
        assert not log(number(2.0)).requires_grad


def test_float32_stays_float32() -> None:
    a = torch.tensor(2.0, requires_grad=True)
    w = argmin(lambda w, a: w.exp() - a * w, torch.zeros(()), a)
    (slope,) = torch.autograd.grad(w, a)
    assert slope.dtype == torch.float32
    close(slope, torch.tensor(0.5), 1e-5)


def test_random_numbers_are_pinned_and_left_alone() -> None:
    a = leaf(5)
    state = torch.get_rng_state()
    mask = F.dropout(torch.ones(5, **D))  # zeros and twos
    torch.set_rng_state(state)
    w = argmin(lambda w, a: ((F.dropout(w) - a) ** 2).sum() + (w**2).sum(), torch.zeros(5, **D), a)
    weight = torch.arange(5.0, **D)
    (found,) = torch.autograd.grad(w @ weight, a)
    close(found, weight * mask / (mask**2 + 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_fused_attention_gives_way_to_the_math_backend() -> None:
    a = leaf(1, 1, 4, 2)

    def fused(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    def plain(q: Tensor) -> Tensor:
        return torch.softmax(q @ q.mT / 2.0**0.5, dim=-1) @ q

    def solve(attention: Any) -> Tensor:
        start = torch.zeros(1, 1, 4, 2, **D)
        w: Tensor = argmin(lambda w, a: ((attention(w) - a) ** 2).sum() + (w**2).sum(), start, a)
        return w.pow(2).sum()

    found, truth = (torch.autograd.grad(solve(attention), a)[0] for attention in (fused, plain))
    close(found, truth)


def test_a_penalty_with_kinks() -> None:
    """Elastic net with an orthonormal design: w = (a - l1) / (1 + l2) where a > l1, else 0."""
    a, l1, l2 = torch.tensor([3.0, 0.5], requires_grad=True, **D), number(1.0), number(0.25)
    penalty = bilevel.prox.ElasticNet(lambda args: args[1], lambda args: args[2])
    w = argmin(
        lambda w, *args: 0.5 * ((w - args[0]) ** 2).sum(),
        torch.zeros(2, **D),
        a,
        l1,
        l2,
        solver=bilevel.inner.Proximal(penalty),
        on_untrusted="raise",
    )
    close(w.detach(), torch.tensor([1.6, 0.0], **D))
    slopes = torch.autograd.grad(w.sum(), [a, l1, l2], create_graph=True)
    for slope, truth in zip(slopes, ([0.8, 0.0], -0.8, -1.28), strict=True):
        close(slope.detach(), torch.tensor(truth, **D))
    close(torch.autograd.grad(slopes[2], l2)[0], torch.tensor(2 * 2 / 1.25**3, **D))


# Unrolled


def test_unrolled_steps_of_gradient_descent() -> None:
    """w_T = a (1 - (1 - lr)^T) for the loss (w - a)^2 / 2; exact, so it holds to rounding, twice."""
    a, lr, T = number(2.0), number(0.1), 7
    solver = bilevel.inner.SGD(lr=lambda args: args[1], steps=T)
    w = argmin(lambda w, a, lr: 0.5 * (w - a) ** 2, torch.zeros((), **D), a, lr, solver=solver, method="unroll")
    truth = a * (1 - (1 - lr) ** T)
    for _ in range(2):
        close(w.detach(), truth.detach(), 1e-13)
        (w,), (truth,) = (torch.autograd.grad(y, lr, create_graph=True) for y in (w, truth))


def test_truncated_unrolling_sees_the_last_steps() -> None:
    a, solver = number(2.0), bilevel.inner.SGD(lr=0.1, steps=9)
    w = argmin(
        lambda w, a: 0.5 * (w - a) ** 2, torch.zeros((), **D), a, solver=solver, method=bilevel.Truncated(steps=4)
    )
    (found,) = torch.autograd.grad(w, a)
    assert found.item() == pytest.approx(1 - 0.9**4, rel=1e-14)


# The user's own solvers


def test_functions_as_solvers() -> None:
    a = number(2.0)
    close(torch.autograd.grad(log(a, solver=lambda w, a: a.log()), a)[0], torch.tensor(0.5, **D))
    x = root(lambda x, a: x**2 - a, torch.ones((), **D), a, solver=lambda x, a: a.sqrt())
    close(torch.autograd.grad(x, a)[0], 0.5 * a.detach() ** -0.5)
    y = log(a, solver=lambda w, a: a.sqrt() * 1.5, method="unroll")
    close(torch.autograd.grad(y, a)[0], 0.75 * a.detach() ** -0.5)
