"""Penalties of the value gap whose inner variables move along: PBGD and BOME, against closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from benchmarks.trap_problems import Once
from bilevel import BOME, PBGD, BilevelProblem, Hypergradient, InvalidValueError, Penalty
from bilevel.evaluation import Evaluator
from bilevel.testing import KnownProblem, known_problems, relative_error
from problems import every_problem, kinked

METHODS: dict[str, Any] = {"pbgd": PBGD, "bome": BOME}

B, T = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.2], dtype=torch.float64)


def ridge(h: float = 0.3, f: float = 1.0, g: float = 1.0) -> BilevelProblem:
    """Ridge by one strength: w*(h) = B / (1 + h), and no h reaches T."""
    return BilevelProblem(
        lambda w, h: g * (((w - B) ** 2).sum() / 2 + h * (w**2).sum() / 2),
        lambda w, h: f * ((w - T) ** 2).sum() / 2,
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(h),
    )


def gradient_of_ridge(h: float) -> float:
    w = B / (1.0 + h)
    return float(-(w - T) @ w) / (1.0 + h)


def found(of: BilevelProblem, method: Any, **more: Any) -> Hypergradient:
    return bilevel.hypergradient(of, method, on_untrusted="ignore", **more)


# Closed forms


@every_problem
def test_settled_pbgd_is_the_forward_penalty(known: KnownProblem) -> None:
    """D_λ at argmin f + γ g and argmin g, which Penalty trains and PBGD moves to. Moves of 1e-10 that count as none,
    times a condition of up to 300 and γ, are below 1e-6."""
    given = {"params": known.truth.params}
    moved = found(known.problem(), PBGD(gamma=30.0, warmup=20_000), **given)
    trained = found(known.problem(), Penalty(1.0 / 30.0, "forward"), **given)
    assert relative_error(moved.gradient, trained.gradient) <= 1e-6


@pytest.mark.parametrize("gamma", [1.0, 30.0, 1000.0])
def test_pbgd_on_ridge_is_the_derivative_of_the_penalized_value(gamma: float) -> None:
    """min_y f + γ (g - min g) = |T - B/s|²/2 · γ s / (1 + γ s), s = 1 + h."""
    s = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    value = ((T - B / s) ** 2).sum() / 2 * gamma * s / (1.0 + gamma * s)
    (expected,) = torch.autograd.grad(value, s)
    # 1e-10, the move that counts as none, times γ
    assert relative_error(found(ridge(), PBGD(gamma=gamma)).gradient, expected) <= 1e-9 * max(1.0, gamma)


def test_twice_gamma_halves_the_bias() -> None:
    errors = [abs(float(found(ridge(), PBGD(gamma=g)).gradient) - gradient_of_ridge(0.3)) for g in (500.0, 1000.0)]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.01)  # the next term is 1/γ of the first


# One move, by hand

LR, GAMMA = 0.1, 7.0


def gradients(y: Tensor, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∂f/∂y, ∂g/∂y and ∂g/∂h of ridge."""
    return y - T, (y - B) + h * y, (y**2).sum() / 2


def first_move(joint: bool | None) -> tuple[Hypergradient, Any, Tensor, Tensor, float]:
    """Return the second call at h = 0.3, y before it and z in it; `joint` None: PBGD."""
    settings: dict[str, Any] = {"lr": LR, "warmup": 1, "moves": 1}
    method = PBGD(gamma=GAMMA, **settings) if joint is None else BOME(steps=3, eta=0.5, joint=joint, **settings)
    evaluate = Evaluator(ridge(), method)
    upper = evaluate.problem.hparams.layout.start
    z = evaluate(upper).hypergradient.params["params"]
    y, bend = evaluate.state["y"]["params"], evaluate.state["outer_steep"]
    z = z if joint is None else y
    for _ in range(1 if joint is None else 3):
        z = z - LR * gradients(z, 0.3)[1]
    return evaluate(upper).hypergradient, evaluate.state, y, z, bend


def test_a_call_of_pbgd_is_the_step_of_the_paper() -> None:
    at, state, y, z, bend = first_move(None)
    df, dg, dh = gradients(y, 0.3)
    torch.testing.assert_close(at.params["params"], z, rtol=1e-13, atol=0)
    torch.testing.assert_close(at.gradient["hparams"], GAMMA * (dh - gradients(z, 0.3)[2]), rtol=1e-12, atol=0)
    after = y - (df + GAMMA * dg) / (GAMMA / LR + bend)
    torch.testing.assert_close(state["y"]["params"], after, rtol=1e-13, atol=0)


@pytest.mark.parametrize("joint", [False, True])
def test_a_call_of_bome_is_the_step_of_the_paper(joint: bool) -> None:
    """κ = max(0, (η |∇q|² - <∇f, ∇q>) / |∇q|²); f does not use h, so ∇f has no part there."""
    at, state, y, z, bend = first_move(joint)
    df, dg, dh = gradients(y, 0.3)
    gap = dh - gradients(z, 0.3)[2]
    square = dg @ dg + (gap**2 if joint else 0.0)
    kappa = float((0.5 * square - df @ dg) / square)
    assert kappa > 0.0
    torch.testing.assert_close(at.params["params"], z, rtol=1e-13, atol=0)
    torch.testing.assert_close(at.gradient["hparams"], kappa * gap, rtol=1e-12, atol=0)
    after = y - (df + kappa * dg) / (max(kappa, 0.5) / LR + bend)
    torch.testing.assert_close(state["y"]["params"], after, rtol=1e-13, atol=0)


# Whole runs


def test_pbgd_ends_at_the_optimum_of_its_penalty() -> None:
    """Stationary where (|T|² + 2 γ T·B) s² - 2 γ |B|² s - |B|² = 0, which is O(1/γ) from the optimum s = |B|² / T·B."""
    b, t, tb = float(B @ B), float(T @ T), float(T @ B)
    for gamma in (10.0, 100.0):
        s = (gamma * b + math.sqrt((gamma * b) ** 2 + b * (t + 2.0 * gamma * tb))) / (t + 2.0 * gamma * tb)
        end = bilevel.solve(ridge(), PBGD(gamma=gamma), steps=400, on_untrusted="ignore")
        assert end.status.startswith("converged")  # to 1e-6 of the first hypergradient
        assert float(end.hparams) == pytest.approx(s - 1.0, rel=1e-5)
        assert abs(s - b / tb) <= 1.0 / gamma
        # At its own optimum the bias is all of the hypergradient.
        assert end.certificate.verdict == "untrusted" and "larger `gamma`" in end.certificate.reasons[0]


def test_bome_ends_at_the_optimum() -> None:
    """κ grows, so the bias fades; 120 steps of Adam by 0.05 come within 8e-4 (measured), 200 within 2e-4."""
    end = bilevel.solve(ridge(), BOME(), steps=120, on_untrusted="ignore")
    assert float(end.hparams) == pytest.approx(float(B @ B / (T @ B)) - 1.0, rel=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_bit_for_bit(name: str, tmp_path: Path) -> None:
    method = METHODS[name](warmup=20)
    short: dict[str, Any] = {"steps": 4, "on_untrusted": "ignore"}
    whole = bilevel.solve(ridge(), method, **short)
    path = bilevel.Checkpoint(tmp_path / "run.pt", steps=1)

    def crash(record: bilevel.Record) -> None:
        if record.step == 2:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        bilevel.solve(ridge(), method, checkpoint=path, callbacks=[crash], **short)
    again = bilevel.solve(ridge(), method, checkpoint=path, **short)
    assert torch.equal(again.hparams, whole.hparams) and torch.equal(again.params, whole.params)
    assert again.certificate == whole.certificate


# Trust


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("known", known_problems()[:3:2], ids=lambda known: known.name)
def test_the_estimate_is_the_error_and_never_exact(known: KnownProblem, name: str) -> None:
    at = found(known.problem(), METHODS[name]())
    error, estimate = relative_error(at.gradient, known.truth.gradient), at.certificate.error
    assert estimate is not None and error / 1.2 <= estimate <= 1.2 * error  # a loose solve: measured within 1 %
    assert at.certificate.verdict == "approximate" and at.cost.products == 0
    assert found(ridge(), PBGD(gamma=1e6)).certificate.verdict == "approximate"


def test_an_estimate_between_measurements_is_no_less_than_the_error() -> None:
    """The error is measured in calls 1, 20, 40 ..., and scaled by the residuals in between."""
    for method in (PBGD(), BOME()):
        evaluate = Evaluator(ridge(), method)
        (name,) = evaluate.problem.hparams.layout.start
        for call in range(25):
            h = 0.3 + 0.02 * call
            at = evaluate({name: torch.tensor(h, dtype=torch.float64)}).hypergradient
            error, estimate = abs(float(at.gradient[name]) / gradient_of_ridge(h) - 1.0), at.certificate.error
            assert estimate is not None and error <= 3.0 * estimate


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bend", [-0.5, 0.0])
def test_a_saddle_and_a_free_direction_are_untrusted(name: str, bend: float) -> None:
    """The inner loss curves downwards along the last axis, on which w stands still, or leaves free where f pulls."""
    bends = torch.tensor([1.0, 2.0, bend], dtype=torch.float64)
    of = BilevelProblem(
        lambda w, h: (bends * w**2).sum() / 2 + (h * w[:2]).sum(),
        lambda w, h: ((w - 1.0) ** 2).sum() if bend == 0.0 else ((w[:2] - 1.0) ** 2).sum() + w[2] ** 2,
        torch.zeros(3, dtype=torch.float64),
        bilevel.real(0.1, shape=(2,)),
    )
    certificate = found(of, METHODS[name]()).certificate
    assert certificate.verdict == "untrusted" and certificate.reasons


@pytest.mark.parametrize("name", METHODS)
def test_minibatches_are_untrusted(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = TensorDataset(torch.randn(40, 3, dtype=torch.float64, generator=generator))
    of = BilevelProblem(
        lambda w, h, b: ((w - b[0]) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((w - 1.0) ** 2).sum(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(0.5),
        inner_data=DataLoader(rows, batch_size=8, shuffle=True),
    )
    certificate = found(of, METHODS[name](warmup=20)).certificate
    assert certificate.verdict == "untrusted" and any("minibatches" in reason for reason in certificate.reasons)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("f", "g"), [(1e-12, 1.0), (1.0, 1e-12), (1e6, 1e-6)])
def test_the_units_of_the_losses_do_not_matter(name: str, f: float, g: float) -> None:
    plain, scaled = found(ridge(), METHODS[name]()), found(ridge(f=f, g=g), METHODS[name]())
    # Curvatures are measured by differences, to 1e-9; BOME's path depends on them.
    assert relative_error(scaled.gradient / f, plain.gradient) <= 1e-6
    assert scaled.certificate.verdict == plain.certificate.verdict == "approximate"


@pytest.mark.parametrize("name", METHODS)
def test_given_params_are_not_moved(name: str) -> None:
    w = B / 1.3
    at = found(ridge(), METHODS[name](), params=w)
    assert torch.equal(at.params, w)
    assert float(at.gradient) == pytest.approx(gradient_of_ridge(0.3), rel=0.05)  # a bias of 1 % and κ of 1 %


def test_first_derivatives_are_enough() -> None:
    X = torch.eye(3, 2, dtype=torch.float64)
    of = BilevelProblem(
        lambda w, h: Once.apply(X @ w - 1.0).sum() / 2 + h * (w**2).sum() / 2,  # type: ignore[no-untyped-call]
        lambda w, h: ((w - T) ** 2).sum() / 2,
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(0.5),
    )
    truth = bilevel.hypergradient(of, "penalty").gradient
    for method in (PBGD(), BOME()):
        at = found(of, method)
        assert relative_error(at.gradient, truth) <= 0.05 and at.certificate.verdict == "approximate"
    assert bilevel.check(of, PBGD()).ok


# What makes no sense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PBGD(gamma=0.0), "`gamma` is 0.0, expected a number above 0"),
        (lambda: PBGD(lr=-1.0), "`lr` is -1.0"),
        (lambda: PBGD(warmup=0), "`warmup`"),
        (lambda: BOME(moves=0), "`moves`"),
        (lambda: BOME(steps=0), "`steps`"),
        (lambda: BOME(eta=math.inf), "`eta` is inf"),
        (lambda: Penalty(form="bome"), r"moves the inner variables itself: write bilevel.BOME\(\)"),  # type: ignore[arg-type]
        (lambda: Penalty(form="pbgd"), r"write bilevel.PBGD\(\)"),  # type: ignore[arg-type]
        (lambda: bilevel.solve(ridge(), PBGD(), outer_optimizer="lbfgs"), "lbfgs"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        make()


def test_kinks_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="kinks"):
        found(kinked(), PBGD())
