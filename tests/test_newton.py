"""Newton's method as an inner solver: its end, and the derivative of its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import hypergradient, inner
from bilevel.evaluation import Evaluator
from bilevel.response import ProblemResponse
from bilevel.testing import KnownProblem, known_problems, relative_error

CURVED = [known for known in known_problems() if known.name != "softmax regression, free bias"]
every_problem = pytest.mark.parametrize("known", CURVED, ids=lambda known: known.name)
GENERATOR = torch.Generator().manual_seed(0)
X, XV = (torch.randn(12, 3, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
Y, YV = (torch.randn(12, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def tensors(structure: Any) -> Any:
    return dict(structure.named_parameters()) if isinstance(structure, nn.Module) else structure


@every_problem
def test_it_converges_to_the_last_digits_in_few_steps(known: KnownProblem) -> None:
    problem = known.problem(inner.Newton())
    evaluation = Evaluator(problem, bilevel.Implicit())(problem.hparams.layout.start)
    params = problem.params.shaped(evaluation.hypergradient.params)
    assert relative_error(params, tensors(known.truth.params)) <= 1e-12
    assert evaluation.inner_status == "converged" and evaluation.inner_steps <= 7  # measured: 1 to 6
    gradient = problem.hparams.layout.shaped(evaluation.hypergradient.gradient)
    assert relative_error(gradient, known.truth.gradient) <= 1e-10


@pytest.mark.parametrize("method", ["unroll", "forward", "fixed-point"])
@every_problem
def test_its_steps_can_be_differentiated(known: KnownProblem, method: str) -> None:
    """At the minimum a step's derivative is the implicit one, whatever came before."""
    found = hypergradient(known.problem(inner.Newton(steps=8)), method)
    assert relative_error(found.gradient, known.truth.gradient) <= 1e-10
    assert found.certificate.verdict == "exact"


def curved(w: Tensor, h: Tensor) -> Tensor:
    """Convex with a third derivative."""
    return torch.logaddexp(X @ w - Y, Y - X @ w).mean() + (h * w**2).sum() / 2 + (w**4).sum() / 20


def distance(w: Tensor, h: Tensor) -> Tensor:
    return ((XV @ w - YV) ** 2).mean()


H = torch.tensor([0.3, 0.1, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2])
def test_unrolled_away_from_the_minimum_it_is_autograd_through_the_written_loop(steps: int, damping: float) -> None:
    start = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)

    def loop(h: Tensor) -> Tensor:
        w = start
        for _ in range(steps):
            hessian = torch.func.jacrev(torch.func.grad(curved))(w, h) + damping * torch.eye(3, dtype=torch.float64)
            w = w - torch.linalg.inv(hessian) @ torch.func.grad(curved)(w, h)
        return w

    h = H.clone().requires_grad_()
    (expected,) = torch.autograd.grad(distance(loop(h), h), h)
    problem = bilevel.BilevelProblem(
        curved, distance, start, bilevel.positive(H), inner.Newton(steps=steps, damping=damping)
    )
    for method in ("unroll", "forward"):
        found = hypergradient(problem, method)
        assert relative_error(found.gradient, expected) <= 1e-12
        assert relative_error(found.params, loop(H)) <= 1e-12
        assert found.certificate.inner_residual is not None and found.certificate.inner_residual > 1e-4, "too close"


def test_a_step_can_be_differentiated_twice() -> None:
    start = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
    problem = bilevel.BilevelProblem(curved, distance, start, bilevel.positive(H), inner.Newton(steps=1))
    response = ProblemResponse(problem)
    (name,), (label,) = problem.params.start, problem.hparams.layout.start

    def step(w: Tensor, h: Tensor) -> Tensor:
        return response.step({name: w}, {}, {label: h}, 0)[0][name]

    inputs = (start.clone().requires_grad_(), H.clone().requires_grad_())
    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)


def test_one_step_on_a_quadratic_is_the_solution_for_n_products() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((X @ w - Y) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((XV @ w - YV) ** 2).mean(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(0.2),
        inner.Newton(steps=1),
    )
    matrix = X.T @ X / 12 + 0.2 * torch.eye(3, dtype=torch.float64)
    w = torch.linalg.solve(matrix, X.T @ Y / 12)
    slope = 2.0 * XV.T @ (XV @ w - YV) / 12
    found = hypergradient(problem, "unroll")
    assert relative_error(found.params, w) <= 1e-13
    assert relative_error(found.gradient, -w @ torch.linalg.solve(matrix, slope)) <= 1e-12
    assert (found.cost.gradients, found.cost.products) == (1 + 3, 3 + 1)


def test_a_solved_problem_takes_no_step() -> None:
    known = CURVED[0]
    problem = known.problem(inner.Newton())
    evaluate = Evaluator(problem, bilevel.Implicit())
    upper = problem.hparams.layout.start
    evaluate(upper)
    again = evaluate(upper)
    assert (again.inner_steps, again.inner_status) == (0, "converged")


def test_damping_leaves_the_solution_where_it_is() -> None:
    problem = CURVED[0].problem(inner.Newton(steps=200, damping=0.3))
    evaluation = Evaluator(problem, bilevel.Implicit())(problem.hparams.layout.start)
    assert relative_error(problem.params.shaped(evaluation.hypergradient.params), CURVED[0].truth.params) <= 1e-8
    short = CURVED[0].problem(inner.Newton(steps=3, damping=0.3))
    assert Evaluator(short, bilevel.Implicit())(short.hparams.layout.start).inner_status == "max_steps"


def test_a_whole_run_trains_by_newton_steps() -> None:
    known = CURVED[2]
    expected = bilevel.solve(known.problem(), steps=10)
    for method in ("implicit", "unroll"):
        assert bilevel.solve(known.problem(inner.Newton()), method, steps=10).outer_loss == pytest.approx(
            expected.outer_loss, rel=1e-8
        )


# Errors


def of(inner_loss: Any, solver: inner.Newton, start: Tensor | None = None, **more: Any) -> bilevel.BilevelProblem:
    start = torch.full((2,), 0.5, dtype=torch.float64) if start is None else start
    return bilevel.BilevelProblem(
        inner_loss, lambda w, h: (w**2).sum(), start, bilevel.positive(0.5), inner_solver=solver, **more
    )


@pytest.mark.parametrize("method", ["direct", "unroll"])
def test_a_direction_without_positive_curvature_is_told_with_the_damping_that_helps(method: str) -> None:
    def saddle(w: Tensor, h: Tensor) -> Tensor:
        return h * w[0] ** 2 - 0.3 * w[1] ** 2 + 0.1 * w[1] ** 4

    with pytest.raises(bilevel.BilevelError, match=r"negative curvature at step 0.*-3.0e-01.*Newton\(damping=0.6\)"):
        hypergradient(of(saddle, inner.Newton()), method)
    found = hypergradient(of(saddle, inner.Newton(steps=200, damping=0.6)), method, on_untrusted="ignore")
    # The minimum at w = (0, √1.5): λ moves nothing there, so that no relative error is known.
    assert relative_error(found.params, torch.tensor([0.0, 1.5**0.5], dtype=torch.float64)) <= 1e-8
    flat = of(lambda w, h: h * (w[0] - 1.0) ** 2, inner.Newton())
    with pytest.raises(bilevel.BilevelError, match=r"no curvature.*Newton\(damping=1e-06\)"):
        hypergradient(flat, method)
    report = bilevel.check(of(saddle, inner.Newton()), method)
    assert [f.subject for f in report.findings if f.level == "error"] == ["inner_solver"]


def test_a_loop_that_diverges_is_told() -> None:
    """√(1 + w²) from beyond 1: w' = -w³."""
    problem = of(lambda w, h: torch.sqrt(1.0 + w**2).sum() + 0.0 * h, inner.Newton(), torch.full((2,), 2.0).double())
    with pytest.raises(bilevel.BilevelError, match=r"inner.Newton.*inner.LBFGS"):
        hypergradient(problem, "direct")


def test_what_does_not_fit_is_refused() -> None:
    large = of(lambda w, h: h * (w**2).sum(), inner.Newton(), torch.ones(4001, dtype=torch.float64))
    for method in ("direct", "unroll"):
        with pytest.raises(bilevel.BilevelError, match=r"`params` hold 4,001 numbers: 0.1 GB.*inner.LBFGS"):
            hypergradient(large, method)
        loader = DataLoader(TensorDataset(X), batch_size=4)
        with pytest.raises(bilevel.BilevelError, match=r"one fixed inner loss.*inner.Adam"):
            hypergradient(of(lambda w, h, batch: h * (w**2).sum(), inner.Newton(), inner_data=loader), method)
    report = bilevel.check(of(lambda w, h, batch: h * (w**2).sum(), inner.Newton(), inner_data=loader))
    assert ("error", "inner_solver") in [(f.level, f.subject) for f in report.findings]


@pytest.mark.parametrize("settings", [{"steps": 0}, {"damping": -1.0}, {"damping": "much"}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(bilevel.BilevelError, match=f"`{next(iter(settings))}`"):
        inner.Newton(**settings)
