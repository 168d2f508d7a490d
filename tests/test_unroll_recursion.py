"""Unrolling against recursions written out: torch.optim's update rules, their adjoint, and what truncation costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import Truncated, Unroll, hypergradient, inner
from bilevel.testing import relative_error

# Unrolling, against a recursion written out: torch.optim's update rules with autograd through the loop


Step = Callable[[Tensor, Tensor, dict[str, Tensor], int], Tensor]
ZERO = torch.zeros((), dtype=torch.float64)
A = torch.tensor([[1.2, 0.3, 0.0], [0.3, 0.9, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
B = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
START = torch.tensor([0.4, 0.3, -0.6], dtype=torch.float64)
TARGET = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)


def quadratic(w: Tensor, h: dict[str, Tensor]) -> Tensor:
    return w @ (A @ w) / 2 - B @ w + h["strength"] * (w**4).sum() / 4


def gradient_of_quadratic(w: Tensor, h: dict[str, Tensor]) -> Tensor:
    return A @ w - B + h["strength"] * w**3


def distance(w: Tensor, h: dict[str, Tensor]) -> Tensor:
    return ((w - TARGET) ** 2).sum() / 2 + 0.01 * h["strength"] ** 2


def sgd(
    g: Tensor, w: Tensor, h: dict[str, Tensor], t: int, *, nesterov: bool = False, dampening: float = 0.0
) -> Tensor:
    g = g + h["decay"] * w
    h["v"] = g if t == 0 else h["momentum"] * h["v"] + (1.0 - dampening) * g
    return w - h["lr"][t] * (g + h["momentum"] * h["v"] if nesterov else h["v"])


def adam(g: Tensor, w: Tensor, h: dict[str, Tensor], t: int) -> Tensor:
    g = g + h["decay"] * w
    return w - h["lr"][t] * adam_direction(g, h, t)


def adamw(g: Tensor, w: Tensor, h: dict[str, Tensor], t: int) -> Tensor:
    return w - h["lr"][t] * h["decay"] * w - h["lr"][t] * adam_direction(g, h, t)


def adam_direction(g: Tensor, h: dict[str, Tensor], t: int) -> Tensor:
    h["m"] = 0.8 * h.get("m", ZERO) + 0.2 * g
    h["s"] = 0.95 * h.get("s", ZERO) + 0.05 * g**2
    return h["m"] / (1.0 - 0.8 ** (t + 1)) / (torch.sqrt(h["s"] / (1.0 - 0.95 ** (t + 1))) + 1e-8)


def rmsprop(g: Tensor, w: Tensor, h: dict[str, Tensor], t: int, *, centered: bool = False) -> Tensor:
    g = g + h["decay"] * w
    h["s"] = 0.9 * h.get("s", ZERO) + 0.1 * g**2
    h["m"] = 0.9 * h.get("m", ZERO) + 0.1 * g
    root = torch.sqrt(h["s"] - h["m"] ** 2 if centered else h["s"]) + 1e-8
    h["v"] = h["momentum"] * h.get("v", ZERO) + g / root
    return w - h["lr"][t] * h["v"]


T = 15
SCHEDULE: dict[str, Any] = {
    "lr": lambda h, step: h["lr"][step],
    "weight_decay": lambda h: h["decay"],
    "steps": T,
}
MOMENTUM: dict[str, Any] = {"momentum": lambda h: h["momentum"]}
NESTEROV: Step = lambda g, w, h, t: sgd(g, w, h, t, nesterov=True)  # noqa: E731
DAMPENED: Step = lambda g, w, h, t: sgd(g, w, h, t, dampening=0.4)  # noqa: E731
CENTERED: Step = lambda g, w, h, t: rmsprop(g, w, h, t, centered=True)  # noqa: E731
LOOPS: dict[str, tuple[Any, Step, Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (inner.SGD(**SCHEDULE, **MOMENTUM), sgd, torch.optim.SGD, {"momentum": 0.7}),
    "nesterov": (
        inner.SGD(**SCHEDULE, **MOMENTUM, nesterov=True),
        NESTEROV,
        torch.optim.SGD,
        {"momentum": 0.7, "nesterov": True},
    ),
    "dampened": (
        inner.SGD(**SCHEDULE, **MOMENTUM, dampening=0.4),
        DAMPENED,
        torch.optim.SGD,
        {"momentum": 0.7, "dampening": 0.4},
    ),
    "adam": (inner.Adam(**SCHEDULE, betas=(0.8, 0.95)), adam, torch.optim.Adam, {"betas": (0.8, 0.95)}),
    "adamw": (inner.AdamW(**SCHEDULE, betas=(0.8, 0.95)), adamw, torch.optim.AdamW, {"betas": (0.8, 0.95)}),
    "rmsprop": (
        inner.RMSProp(**SCHEDULE, **MOMENTUM, alpha=0.9),
        rmsprop,
        torch.optim.RMSprop,
        {"momentum": 0.7, "alpha": 0.9},
    ),
    "centered": (
        inner.RMSProp(**SCHEDULE, **MOMENTUM, alpha=0.9, centered=True),
        CENTERED,
        torch.optim.RMSprop,
        {"momentum": 0.7, "alpha": 0.9, "centered": True},
    ),
}


def settings(momentum: bool) -> dict[str, Tensor]:
    given = {
        "strength": torch.tensor(0.3, dtype=torch.float64),
        "lr": torch.linspace(0.2, 0.05, T, dtype=torch.float64),
        "decay": torch.tensor(0.1, dtype=torch.float64),
    }
    return given | ({"momentum": torch.tensor(0.7, dtype=torch.float64)} if momentum else {})


@pytest.mark.parametrize("method", ["unroll", "forward"])
@pytest.mark.parametrize("name", LOOPS)
def test_unroll_is_autograd_through_the_written_loop(name: str, method: str) -> None:
    solver, step, optimizer, options = LOOPS[name]
    given = settings("momentum" in options)
    found = hypergradient(bilevel.BilevelProblem(quadratic, distance, START, given, solver), method)

    h = {key: t.clone().requires_grad_() for key, t in given.items()}
    carried: dict[str, Tensor] = dict(h)
    w = START
    for t in range(T):
        w = step(gradient_of_quadratic(w, h), w, carried, t)
    loss = distance(w, h)
    expected = dict(zip(h, torch.autograd.grad(loss, list(h.values())), strict=True))

    assert relative_error(found.params, w) <= 1e-10
    assert found.outer_loss == pytest.approx(float(loss.detach()), rel=1e-10)
    for key, g in expected.items():  # each for itself: a small one must not hide behind a large one
        assert relative_error(found.gradient[key], g) <= 1e-10, key
        assert bool(g.abs().min() > 1e-6), "nothing to be compared"
    assert found.certificate.verdict == "exact"
    assert found.certificate.error is not None and found.certificate.error <= 1e-12  # rounding alone

    x = nn.Parameter(START.clone())  # the written loop is torch.optim's
    trained = optimizer([x], lr=1.0, weight_decay=0.1, **options)
    for t in range(T):
        trained.param_groups[0]["lr"] = float(given["lr"][t])
        x.grad = gradient_of_quadratic(x.detach(), given)
        trained.step()
    assert relative_error(w, x.detach()) <= 1e-10


def test_unroll_is_the_adjoint_recursion_by_hand() -> None:
    """Heavy ball on a quadratic, its adjoint derived on paper; no autograd.

    v' = β v + (A + h) w - b,  w' = w - η v'
    q = -η p' + β q',  p = p' + (A + h) q      (p, q: adjoints of w and v)
    """
    eta, beta, h, steps = 0.3, 0.8, 0.2, 40
    H = A + h * torch.eye(3, dtype=torch.float64)
    ws, vs = [START], [torch.zeros(3, dtype=torch.float64)]
    for _ in range(steps):
        vs.append(beta * vs[-1] + H @ ws[-1] - B)
        ws.append(ws[-1] - eta * vs[-1])
    p, q = ws[-1] - TARGET, torch.zeros(3, dtype=torch.float64)
    by_eta, by_beta, by_h = 0.0, 0.0, 0.0
    for t in reversed(range(steps)):
        q = -eta * p + beta * q
        by_eta -= float(p @ vs[t + 1])
        by_beta += float(q @ vs[t])
        by_h += float(q @ ws[t])
        p = p + H @ q

    problem = bilevel.BilevelProblem(
        lambda w, s: w @ (A @ w) / 2 - B @ w + s["h"] * (w**2).sum() / 2,
        lambda w, s: ((w - TARGET) ** 2).sum() / 2,
        START,
        {"h": bilevel.positive(h), "eta": bilevel.positive(eta), "beta": bilevel.interval(beta, 0.0, 1.0)},
        inner.SGD(lr=lambda s: s["eta"], momentum=lambda s: s["beta"], steps=steps),
    )
    for method in ("unroll", "forward"):
        found = hypergradient(problem, method)
        assert relative_error(found.params, ws[-1]) <= 1e-13
        for name, expected in {"eta": by_eta, "beta": by_beta, "h": by_h}.items():
            assert float(found.gradient[name]) == pytest.approx(expected, rel=1e-10), name


def test_one_number_for_all_steps_sums_the_schedule() -> None:
    given = settings(momentum=False)
    one = {"strength": given["strength"], "lr": torch.tensor(0.1, dtype=torch.float64)}
    many = {"strength": given["strength"], "lr": torch.full((T,), 0.1, dtype=torch.float64)}
    a = hypergradient(
        bilevel.BilevelProblem(quadratic, distance, START, one, inner.SGD(lr=lambda h: h["lr"], steps=T)), "unroll"
    )
    b = hypergradient(
        bilevel.BilevelProblem(quadratic, distance, START, many, inner.SGD(lr=lambda h, t: h["lr"][t], steps=T)),
        "unroll",
    )
    assert float(a.gradient["lr"]) == pytest.approx(float(b.gradient["lr"].sum()), rel=1e-12)
    assert float(a.gradient["strength"]) == pytest.approx(float(b.gradient["strength"]), rel=1e-12)


# What truncation costs, and what the certificate says of it


def scalar_quadratic(strength: float, eta: float, steps: int) -> tuple[bilevel.BilevelProblem, Tensor]:
    """Return a quadratic under gradient descent, and the contraction factors of a step."""
    problem = bilevel.BilevelProblem(
        lambda w, h: w @ (A @ w) / 2 - B @ w + h * (w**2).sum() / 2,
        lambda w, h: ((w - TARGET) ** 2).sum() / 2,
        START,
        bilevel.positive(strength),
        inner.SGD(lr=eta, steps=steps),
    )
    return problem, 1.0 - eta * (torch.linalg.eigvalsh(A) + strength)


@pytest.mark.parametrize("window", [1, 5, 10, 20, 40])
def test_the_error_of_truncation_is_bounded_by_the_contraction(window: int) -> None:
    strength, eta, steps = 0.1, 0.5, 100
    problem, factors = scalar_quadratic(strength, eta, steps)
    whole = hypergradient(problem, Unroll())
    cut = hypergradient(problem, Truncated(steps=window), on_untrusted="ignore")
    error = abs(float(cut.gradient - whole.gradient))
    w, sizes = START, []
    for _ in range(steps):
        sizes.append(float(w.norm()))
        w = w - eta * (A @ w - B + strength * w)
    # What is left out: sum over t >= window of (p_t)(-η w_t) with |p_t| <= ρ^t |p_0|.
    rho = float(factors.abs().max())
    bound = rho**window / (1.0 - rho) * float((w - TARGET).norm()) * eta * max(sizes)
    assert 0.0 < error <= bound
    assert error >= 1e-3 * bound, "the bound says nothing"
    assert cut.certificate.error is not None
    # The estimate takes one direction for all; on three eigenvalues it was within a factor of 2.
    assert error / 3.0 <= cut.certificate.error * abs(float(cut.gradient)) <= 3.0 * error


def test_a_window_over_steps_that_grow_is_untrusted() -> None:
    problem, factors = scalar_quadratic(0.1, 1.6, 30)
    assert float(factors.abs().max()) > 1.0
    found = hypergradient(problem, Truncated(steps=5), on_untrusted="ignore")
    assert found.certificate.verdict == "untrusted"
    assert "lower the inner learning rate" in found.certificate.reasons[0]
