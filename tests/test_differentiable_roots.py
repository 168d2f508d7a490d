"""`root`, `fixed_point` and `argmin` within `argmin`: every derivative against a closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian

import bilevel
from bilevel import argmin, fixed_point, root
from problems_differentiable import D, close, leaf, log, number, same, spd

pytestmark = pytest.mark.usefixtures("seeded")

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
