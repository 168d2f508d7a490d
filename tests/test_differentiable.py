"""`argmin`, `root` and `fixed_point`: every derivative against a closed form or finite differences of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

import bilevel
from bilevel import argmin, fixed_point, root

D: Any = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def spd(n: int) -> Tensor:
    M = torch.randn(n, n, **D)
    return M @ M.T / n + torch.eye(n, **D)


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, **D)).requires_grad_()


def number(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True, **D)


def close(found: Any, truth: Any, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(found, truth, rtol=rtol, atol=rtol * float(torch.as_tensor(truth).abs().max()))


def same(pair: Iterable[Tensor], rtol: float = 1e-8) -> None:
    found, truth = pair
    close(found.detach(), truth.detach(), rtol)


# argmin: one level


def log(a: Tensor, **settings: Any) -> Tensor:
    """Return log a, as the minimum of e^w - a w."""
    found: Tensor = argmin(lambda w, a: w.exp() - a * w, torch.zeros((), **D), a, **settings)
    return found


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


# Three levels


def test_three_level_quadratic() -> None:
    n = 4
    P, Q, S, A, B, C = spd(n), spd(n), spd(n), torch.randn(n, n, **D), torch.randn(n, n, **D), torch.randn(n, n, **D)
    target = torch.randn(n, **D)

    def lowest(w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return 0.5 * w @ P @ w - w @ (A @ v + B @ u)

    def middle(v: Tensor, u: Tensor) -> Tensor:
        w: Tensor = argmin(lowest, torch.zeros(n, **D), v, u)
        return 0.5 * v @ Q @ v + 0.5 * (w - u) @ S @ (w - u) + v @ C @ u

    def top(v: Tensor, u: Tensor) -> Tensor:
        return ((v - target) ** 2).sum() + (u**2).sum()

    u = leaf(n)
    G, K = torch.linalg.solve(P, A), torch.linalg.solve(P, B)  # w = G v + K u
    v = -torch.linalg.solve(Q + G.T @ S @ G, G.T @ S @ (K @ u - u) + C @ u)
    (truth,) = torch.autograd.grad(top(v, u), u)
    problem = bilevel.BilevelProblem(middle, top, torch.zeros(n, **D), u.detach())
    for method in ("implicit", "cg"):
        close(bilevel.hypergradient(problem, method, on_untrusted="raise").gradient, truth)


def ridge() -> tuple[Any, Any, Any]:
    """Return the three losses of ridge regression with a strength a feature, and the closed form of the first."""
    x1, x2, x3 = (torch.randn(20, 3, **D) for _ in range(3))
    y1, y2, y3 = (torch.randn(20, **D) for _ in range(3))

    def weights(v: Tensor, *rest: Any) -> Tensor:
        found: Tensor = torch.linalg.solve(x1.T @ x1 / 20 + torch.diag(v.exp()), x1.T @ y1 / 20)
        return found

    def by_argmin(v: Tensor, *rest: Any) -> Tensor:
        found: Tensor = argmin(
            lambda w, v: ((x1 @ w - y1) ** 2).mean() + (v.exp() * w**2).sum(), torch.zeros(3, **D), v
        )
        return found

    def losses(solve: Any) -> tuple[Any, Any]:
        return (
            lambda v, u: ((x2 @ solve(v) - y2) ** 2).mean() + u.exp() * (v**2).sum(),
            lambda v, u: ((x3 @ solve(v) - y3) ** 2).mean(),
        )

    return losses(by_argmin), losses(weights), (by_argmin, weights)


def test_three_level_ridge() -> None:
    """Both of the upper levels see the lowest one; the truth differentiates its closed form."""
    nested, dense, _ = ridge()
    exact = bilevel.inner.LBFGS(rtol=1e-13)
    for start in (-2.0, 0.0):
        found, truth = (
            bilevel.hypergradient(
                bilevel.BilevelProblem(losses[0], losses[1], torch.zeros(3, **D), torch.tensor(start, **D), exact),
                on_untrusted="ignore",  # 1e-13 may not be reached; the truth below says what was
            )
            for losses in (nested, dense)
        )
        close(found.gradient, truth.gradient)
        assert found.certificate.trusted


def test_a_float32_problem_is_taken_again_in_float64_with_its_lowest_level() -> None:
    P, A, u = torch.diag(torch.logspace(-4, 1, 6)), torch.randn(6, 6), torch.randn(6)

    def middle(v: Tensor, u: Tensor) -> Tensor:
        w: Tensor = argmin(lambda w, v: 0.5 * w @ P @ w - 1e-3 * w @ A @ v, torch.zeros(6), v)
        return ((w - u) ** 2).sum() + 1e-4 * (v**2).sum()

    problem = bilevel.BilevelProblem(middle, lambda v, u: ((v - 1) ** 2).sum(), torch.zeros(6), u)
    found = bilevel.hypergradient(problem, on_untrusted="raise").gradient
    wide = u.double().requires_grad_()
    G = 1e-3 * torch.linalg.solve(P.double(), A.double())
    v = torch.linalg.solve(G.T @ G + 1e-4 * torch.eye(6, **D), G.T @ wide)
    (truth,) = torch.autograd.grad(((v - 1) ** 2).sum(), wide)
    close(found, truth.float(), 1e-5)  # rounded to float32; in float32 throughout it is off by 10 % and more


def test_three_levels_of_argmin_alone() -> None:
    """min over v of a loss of log v: v*(u) = e^(u/2); and one more level around it."""

    def middle(v: Tensor, u: Tensor) -> Tensor:
        return (log(v) - u / 2) ** 2

    u = number(0.6)
    v = argmin(middle, torch.ones((), **D), u)
    truth = (u.detach() / 2).exp()
    for factor in (1.0, 0.5, 0.25):
        close(v.detach(), factor * truth, 1e-7)  # middle's curvature is in third derivatives of log by solved values
        (v,) = torch.autograd.grad(v, u, create_graph=True)


def test_a_nested_loss_stays_accurate_over_many_values() -> None:
    _, _, (solve, dense) = ridge()
    worst = 0.0
    for _ in range(40):
        v = (2.0 * torch.randn(3, **D)).requires_grad_()
        found, truth = (torch.autograd.grad(f(v).sum(), v)[0] for f in (solve, dense))
        worst = max(worst, float((found - truth).norm() / truth.norm()))
    assert worst < 1e-9  # the gradient of the lowest loss is small to 1e-12, and its condition is below 1e3


# root


def kepler(M: Tensor, e: Tensor, **settings: Any) -> Tensor:
    found: Tensor = root(lambda E, M, e: E - e * E.sin() - M, M.detach(), M, e, **settings)
    return found


def test_keplers_equation() -> None:
    M, e = number(1.2), number(0.6)
    E = kepler(M, e)
    value = scipy.optimize.brentq(lambda E: E - 0.6 * math.sin(E) - 1.2, 0.0, 3.0, xtol=1e-15)
    assert E.item() == pytest.approx(value, rel=1e-14)
    dM, de = torch.autograd.grad(E, [M, e], create_graph=True)
    (dMM,) = torch.autograd.grad(dM, M, create_graph=True)
    cos, sin = E.detach().cos(), E.detach().sin()
    close(E.detach() - 0.6 * sin, M.detach(), 1e-14)
    slope = 1 / (1 - 0.6 * cos)
    close(dM.detach(), slope)
    close(de.detach(), sin * slope)
    close(dMM.detach(), -0.6 * sin * slope**3)
    assert gradgradcheck(kepler, (M, e))


@pytest.mark.parametrize("method", ["implicit", "gmres", "direct"])
def test_a_system_without_symmetry(method: str) -> None:
    W, a = torch.randn(3, 3, **D), leaf(3)

    def residual(x: Tensor, a: Tensor) -> Tensor:
        return 2 * x + torch.tanh(W @ x) - a

    def solve(a: Tensor) -> Tensor:
        found: Tensor = root(residual, torch.zeros(3, **D), a, method=method)
        return found

    x = solve(a)
    start = torch.zeros(3, **D).numpy()
    by_scipy = scipy.optimize.root(lambda x: residual(torch.from_numpy(x), a.detach()).numpy(), start, tol=1e-12)
    close(x.detach(), torch.from_numpy(by_scipy.x), 1e-10)
    J = 2 * torch.eye(3, **D) + (1 - torch.tanh(W @ x.detach()) ** 2)[:, None] * W
    close(jacobian(solve, a), torch.linalg.inv(J))  # type: ignore[no-untyped-call]
    assert gradcheck(solve, (a,)) and gradgradcheck(solve, (a,))


def test_a_large_system_by_gmres() -> None:
    n = 80
    M, a = 4 * torch.eye(n, **D) + torch.randn(n, n, **D) / n**0.5, leaf(n)
    x, truth = root(lambda x, a: M @ x - a**2, torch.zeros(n, **D), a), torch.linalg.solve(M, a**2)
    (found,), (wanted,) = (torch.autograd.grad((y**2).sum(), a, create_graph=True) for y in (x, truth))
    close(found.detach(), wanted.detach(), 1e-7)  # GMRES stops at 1e-8
    weight = torch.randn(n, **D)
    same((torch.autograd.grad(g @ weight, a)[0] for g in (found, wanted)), 1e-6)


def test_kkt_system_of_an_equality_constrained_program() -> None:
    """min 1/2 x'Px - q'x with A x = b, by its optimality conditions; the truth solves them densely."""
    P, A, q, b = spd(4), torch.randn(2, 4, **D), leaf(4), leaf(2)

    def conditions(z: Any, q: Tensor, b: Tensor) -> Any:
        return {"x": P @ z["x"] - q + A.T @ z["λ"], "λ": A @ z["x"] - b}

    z = root(conditions, {"x": torch.zeros(4, **D), "λ": torch.zeros(2, **D)}, q.exp(), b)
    matrix = torch.cat([torch.cat([P, A.T], 1), torch.cat([A, torch.zeros(2, 2, **D)], 1)])
    truth = torch.linalg.solve(matrix, torch.cat([q.exp(), b]))
    weight = torch.randn(6, **D)
    found, wanted = torch.cat([z["x"], z["λ"]]), truth
    close(found.detach(), wanted.detach())
    grads = [torch.autograd.grad((y**2) @ weight, [q, b], create_graph=True) for y in (found, wanted)]
    for g, h in zip(*grads, strict=True):
        close(g.detach(), h.detach())
    same(torch.autograd.grad((g**2).sum(), q, retain_graph=True)[0] for g, _ in grads)


def test_newton_is_safeguarded() -> None:
    """Undamped Newton diverges on arctan from 3 (Nocedal and Wright, chapter 11)."""
    a = number(0.2)
    x = root(lambda x, a: x.atan() - a, torch.tensor(3.0, **D), a, on_untrusted="raise")
    close(x.detach(), a.detach().tan(), 1e-12)


# fixed_point


@pytest.mark.parametrize("solver", [None, bilevel.Anderson(memory=0), bilevel.Newton()])
def test_deep_equilibrium_layer(solver: Any) -> None:
    W, b = (0.25 * torch.randn(4, 4, **D)).requires_grad_(), leaf(4)

    def layer(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(W @ x + b)

    def solve(W: Tensor, b: Tensor) -> Tensor:
        found: Tensor = fixed_point(layer, torch.zeros(4, **D), W, b, solver=solver, on_untrusted="raise")
        return found

    x = torch.zeros(4, **D)
    for _ in range(300):  # contracts by 0.8: the derivatives too are at their limit
        x = layer(x, W, b)
    close(solve(W, b).detach(), x.detach(), 1e-11)
    found, truth = (torch.autograd.grad(y.sum(), [W, b], create_graph=True) for y in (solve(W, b), x))
    for g, h in zip(found, truth, strict=True):
        close(g.detach(), h.detach())
    same(torch.autograd.grad((g[0] ** 2).sum(), b, retain_graph=True)[0] for g in (found, truth))
    if solver is None:
        assert gradcheck(solve, (W, b)) and gradgradcheck(solve, (W, b))


def test_anderson_solves_linear_maps_in_as_many_steps_as_unknowns() -> None:
    """It is GMRES there (Walker and Ni, theorem 2.2), where the plain iteration needs 180 steps for the same."""
    calls = 0
    M = torch.diag(torch.tensor([0.9, 0.5, -0.7], **D))

    def linear(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return M @ x + 1.0

    x = fixed_point(linear, torch.zeros(3, **D), solver=bilevel.Anderson(rtol=1e-8))
    close(x, 1 / (1 - M.diagonal()), 1e-7)
    assert calls <= 7  # start, three directions, rounding; and a last look for the graph


def test_anderson_starts_again_where_it_overshoots() -> None:
    """Far from the solution the secant of arctan is flat and points to where the map is not defined."""

    def steps(x: Tensor, a: Tensor) -> Tensor:
        return torch.where(x > 0, x - 0.1 * torch.atan(10 * (x - a)), float("nan"))

    a = number(1.0)
    x = fixed_point(steps, torch.tensor(3.0, **D), a, on_untrusted="raise")
    close(x.detach(), a.detach(), 1e-11)
    close(torch.autograd.grad(x, a)[0], torch.tensor(1.0, **D))


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


def quadratic(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * ((w - a) ** 2).sum()


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
