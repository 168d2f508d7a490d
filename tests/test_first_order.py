"""Estimators that need first derivatives only: differences of gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import CG, Cholesky, FiniteDifference, Implicit, Neumann, Penalty, hypergradient, inner, prox, twice
from bilevel.response import ProblemResponse
from bilevel.solvers.base import Linearization
from bilevel.solvers.differences import Differences
from bilevel.testing import KnownProblem, check_estimator, known_problems, relative_error

PROBLEMS = {known.name: known for known in known_problems()}
every_problem = pytest.mark.parametrize("known", PROBLEMS.values(), ids=PROBLEMS)


def at_truth(known: KnownProblem, method: Any, solver: Any = None) -> bilevel.Hypergradient:
    return hypergradient(known.problem(solver), method, params=known.truth.params, on_untrusted="ignore")


# Differences of gradients, against the products of autograd


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
@every_problem
def test_products_by_differences_are_those_of_autograd(known: KnownProblem, size: float) -> None:
    problem = known.problem()
    response = ProblemResponse(problem)
    lower = problem.params.read(known.truth.params, "params")
    upper = problem.hparams.layout.start
    exact, differences = Linearization(response, lower, upper), Differences(response, lower, upper)
    generator = torch.Generator().manual_seed(0)
    v = {name: size * torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in lower.items()}
    # Rounding and truncation are eps^(2/3) = 4e-11 both, in units of the third derivative.
    assert relative_error(differences.operator(v), exact.operator(v)) <= 1e-8
    pulled, expected = differences.pull_back(v), exact.pull_back(v)
    assert relative_error(list(pulled.values()), list(expected.values())) <= 1e-8
    assert 0.0 < differences.noise <= 1e-8
    assert (
        relative_error(differences.residual, exact.residual) <= 1e-12
        or float(sum((t**2).sum() for t in exact.residual.values())) <= 1e-24
    )


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e6])
def test_the_step_finds_the_scale_of_the_variables(size: float) -> None:
    """g = sum cos(w / size): its third derivatives matter at moves of `size`, wherever w is; h is 1e-5 of |w| = 100."""
    w = torch.tensor([100.0, 3.0, 1.0], dtype=torch.float64) * size
    problem = bilevel.BilevelProblem(
        lambda w, h: h * torch.cos(w / size).sum(), lambda w, h: w.sum(), params=w, hparams=bilevel.positive(2.0)
    )
    response = ProblemResponse(problem)
    found = Differences(response, problem.params.start, problem.hparams.layout.start)
    v = torch.ones(3, dtype=torch.float64)
    (product,) = found.operator({next(iter(problem.params.start)): v}).values()
    # sin and cos near 100 carry 100 units of rounding: about (100 eps)^(2/3) = 1e-9.
    assert relative_error(product, -2.0 * torch.cos(w / size) / size**2) <= 1e-7


def test_noise_in_the_loss_shows_and_is_kept_small() -> None:
    """A loss that rounds to 1e-9, as one in mixed precision does: the longest step that the loss allows is best."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return torch.round(g * 1e9) / 1e9

    problem = bilevel.BilevelProblem(
        lambda w, h: h * (torch.cosh(Rounded.apply(w))).sum(),  # type: ignore[no-untyped-call]
        lambda w, h: w.sum(),
        params=torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64),
        hparams=bilevel.positive(2.0),
    )
    response = ProblemResponse(problem)
    found = Differences(response, problem.params.start, problem.hparams.layout.start)
    (name, w), *_ = problem.params.start.items()
    error = relative_error(found.operator({name: torch.ones_like(w)})[name], 2.0 * torch.cosh(w))
    assert 1e-10 < error <= 1e-5  # at the step of smooth losses, 4e-6, it would be 1e-4
    assert error / 30.0 <= found.noise <= 30.0 * error


# finite-difference


@every_problem
def test_finite_difference_is_the_formula_of_the_identity(known: KnownProblem) -> None:
    """-α (∂R/∂λ)^T ∂f/∂w by autograd, with α = 1 / L measured and with α given."""
    for size in (None, 0.07):
        expected = at_truth(known, Implicit(Neumann(max_steps=1, step_size=size)))
        found = at_truth(known, FiniteDifference(step_size=size))
        assert relative_error(found.gradient, expected.gradient) <= 1e-8
        assert found.cost.products == 0


def test_the_formula_of_the_identity_by_hand() -> None:
    """g = h·w^2/2 - b·w, f = |w - t|^2/2 + h·c: ∂f/∂h - α w (w - t)."""
    b, t, c, h, α = (
        torch.tensor(x, dtype=torch.float64) for x in ([1.0, -2.0], [0.3, 0.4], [0.1, 0.2], [2.0, 0.5], 0.3)
    )
    problem = bilevel.BilevelProblem(
        lambda w, h: (h * w**2).sum() / 2 - (b * w).sum(),
        lambda w, h: ((w - t) ** 2).sum() / 2 + (h * c).sum(),
        params=torch.zeros(2, dtype=torch.float64),
        hparams=bilevel.positive(h),
        inner_solver=inner.SGD(lr=0.3, steps=400),
    )
    w = b / h
    found = hypergradient(problem, "finite-difference", on_untrusted="ignore")
    assert relative_error(found.gradient, c - α * w * (w - t)) <= 1e-8  # α is the learning rate
    given = hypergradient(problem, FiniteDifference(step_size=0.1, step=1e-4), on_untrusted="ignore")
    assert relative_error(given.gradient, c - 0.1 * w * (w - t)) <= 1e-8


@pytest.mark.parametrize(
    ("solver", "bar"),
    [(CG(rtol=1e-10), 1e-8), (Cholesky(), 1e-8), (Neumann(max_steps=10_000, rtol=1e-9), 1e-6)],
    ids=lambda x: type(x).__name__,
)
def test_with_a_linear_solver_it_is_exact(solver: Any, bar: float) -> None:
    names = ("per-feature ridge", "logistic regression", "coupled quadratic", "linear module")
    known = [PROBLEMS[name] for name in names]  # CG has all of them in test_estimators
    check_estimator(FiniteDifference(solver), tolerance=bar, problems=known)


@every_problem
def test_the_estimate_of_the_identitys_error_is_its_error(known: KnownProblem) -> None:
    found = at_truth(known, "finite-difference")
    error, estimate = relative_error(found.gradient, known.truth.gradient), found.certificate.error
    assert estimate is not None and error / 1.5 <= estimate <= 1.5 * error
    assert found.certificate.verdict == ("approximate" if estimate < 0.4 else "untrusted")
    if estimate >= 0.4:
        assert "bilevel.FiniteDifference(bilevel.CG(" in found.certificate.reasons[0]


def test_an_inner_hessian_that_is_a_multiple_of_the_identity_is_exact() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        params=torch.zeros(3, dtype=torch.float64),
        hparams=torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
    )
    found = hypergradient(problem, "finite-difference")
    assert relative_error(found.gradient, 2.0 * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)) <= 1e-8
    assert found.certificate.verdict == "exact"


@pytest.mark.parametrize("method", ["finite-difference", "sama"])
@pytest.mark.parametrize("last", [0.3, 0.0])
def test_what_only_the_inverse_reaches_is_untrusted(method: str, last: float) -> None:
    """λ bends w0 and f sees w1: the identity's gradient is zero; so is sama's adjoint if the last learning rate is."""
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)

    def problem(*names: str) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: w @ (H @ w) / 2 - w.sum() + h["bends"] * w[0] ** 2 / 2,
            lambda w, h: (w[1] - 0.3) ** 2,
            params=torch.zeros(2, dtype=torch.float64),
            hparams={name: bilevel.positive(1.0) for name in names},
            inner_solver=inner.SGD(lr=lambda h, t: 0.3 if t < 199 else last, steps=200),
        )

    found = hypergradient(problem("bends"), method, on_untrusted="ignore")
    assert float(found.gradient["bends"]) == 0.0
    assert found.certificate.error == pytest.approx(1.0) and not found.certificate.trusted
    with pytest.raises(bilevel.UnseenHyperparameterError, match="unused"):
        hypergradient(problem("bends", "unused"), method)


def test_a_penalty_with_kinks_is_refused() -> None:
    lasso = bilevel.BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        params=torch.zeros(3, dtype=torch.float64),
        hparams=bilevel.positive(0.1),
        inner_solver=inner.ProximalGradient(bilevel.prox.L1(lambda h: h), lr=0.1, steps=100),
    )
    with pytest.raises(bilevel.BilevelError, match="kinks"):
        hypergradient(lasso, "finite-difference")


# What autograd cannot differentiate twice

torch.manual_seed(0)
X, XV = torch.randn(12, 4, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
Y, YV = torch.randn(12, 4, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)


class Once(torch.autograd.Function):
    """tanh, marked once_differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1.0 - y**2)  # type: ignore[no-any-return]


def once(p: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = Once.apply(p(x))  # type: ignore[no-untyped-call]
    return y


def normalized() -> nn.Module:
    torch.manual_seed(1)
    module: nn.Module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, dtype=torch.float64))
    return module


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 4, dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x[None], x[None], x[None], need_weights=self.need_weights)[0][0]
        return y


def problem_of(module: nn.Module, forward: Any = lambda p, x: p(x)) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(
        lambda p, h: ((forward(p, X) - Y) ** 2).mean() + h * sum(((t - 0.1) ** 2).sum() for t in p.parameters()),
        lambda p, h: ((forward(p, XV) - YV) ** 2).mean(),
        params=module,
        hparams=bilevel.positive(1.0),
    )


def by_hand(p: nn.Module, x: Tensor) -> Tensor:
    named = dict(p.named_parameters())
    g, v = (named[f"parametrizations.weight.original{i}"] for i in (0, 1))
    y: Tensor = x @ (g * v / v.norm(dim=1, keepdim=True)).T + named["bias"]
    return y


ONCE: dict[str, tuple[bilevel.BilevelProblem, bilevel.BilevelProblem]] = {
    "once_differentiable": (problem_of(linear(), once), problem_of(linear(), lambda p, x: torch.tanh(p(x)))),
    "weight_norm": (problem_of(normalized()), problem_of(normalized(), by_hand)),
    "fused attention": (problem_of(Attention(False)), problem_of(Attention(True))),
}


@pytest.mark.parametrize("name", ONCE)
def test_first_derivatives_are_enough(name: str) -> None:
    """From the inner solve to the certificate, against the same function written with twice differentiable ops."""
    problem, twin = ONCE[name]
    expected = hypergradient(twin, "cg", on_untrusted="raise")
    found = hypergradient(problem, FiniteDifference(CG(rtol=1e-9)), on_untrusted="raise")
    assert relative_error(found.gradient, expected.gradient) <= 1e-7
    found = hypergradient(problem, "penalty", on_untrusted="raise")
    assert relative_error(found.gradient, expected.gradient) <= 1e-6
    for method in ("finite-difference", "penalty"):
        assert not [f for f in bilevel.check(problem, method).findings if f.level == "error"]


@pytest.mark.parametrize("name", ["once_differentiable", "weight_norm"])
def test_the_refusal_of_second_derivatives_names_the_methods_that_work(name: str) -> None:
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match='method="finite-difference" or "penalty"'):
        hypergradient(ONCE[name][0], "cg")
    problem = bilevel.BilevelProblem(
        lambda w, h: torch.cdist(X @ w, X, p=1.0).mean() + h * (w**2).sum(),
        lambda w, h: (XV @ w).sum(),
        params=torch.eye(4, dtype=torch.float64),
        hparams=bilevel.positive(1.0),
    )
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match='method="finite-difference" or "penalty"'):
        hypergradient(problem, "cg")


def test_fused_kernels_stay_fused_for_first_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The math backend of attention is for second derivatives alone."""
    entered: list[bool] = []
    real: Any = twice.twice_differentiable

    def watched(gpu: bool) -> Any:
        entered.append(True)
        return real(gpu)

    monkeypatch.setattr("bilevel.response.twice_differentiable", watched)
    problem = ONCE["fused attention"][0]
    start = problem.params.export(problem.params.start)
    hypergradient(problem, "finite-difference", params=start, on_untrusted="ignore")
    assert not entered
    hypergradient(problem, "cg", params=start, on_untrusted="ignore")
    assert entered


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteDifference(CG), "`linear_solver`.*expected an object"),  # type: ignore[arg-type]
        (lambda: FiniteDifference(step_size=0.0), "`step_size` is 0.0, expected a number above 0"),
        (lambda: FiniteDifference(step=-1e-3), "`step` is -0.001"),
        (lambda: Penalty(0.0), "`sigma` is 0.0, expected a number above 0"),
        (lambda: Penalty(form="both"), "`form` is 'both', expected one of central"),  # type: ignore[arg-type]
        (lambda: FiniteDifference(CG(), step_size=0.1), "leave one out"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        make()


# penalty


def penalty_error(known: KnownProblem, method: Penalty) -> float:
    return relative_error(at_truth(known, method).gradient, known.truth.gradient)


@pytest.mark.parametrize(("form", "factor"), [("central", 4.0), ("forward", 2.0)])
@every_problem
def test_half_of_sigma_divides_the_error(known: KnownProblem, form: Any, factor: float) -> None:
    """O(σ²) and O(σ): the next term of the series is σ² and σ of the first, a few percent at 0.01."""
    errors = [penalty_error(known, Penalty(sigma, form)) for sigma in (1e-2, 5e-3)]
    assert errors[0] > 1e-5, "nothing to be compared"
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.05)


@every_problem
def test_the_estimate_of_a_given_sigma_is_its_error(known: KnownProblem) -> None:
    for method in (Penalty(1e-2), Penalty(1e-2, "forward")):
        found = at_truth(known, method)
        error, estimate = relative_error(found.gradient, known.truth.gradient), found.certificate.error
        assert estimate is not None and 0.9 * error <= estimate <= 1.5 * error  # it is measured by loose solves


@every_problem
def test_the_penalty_finds_its_sigma(known: KnownProblem) -> None:
    assert penalty_error(known, Penalty()) <= 1e-6
    assert penalty_error(known, Penalty(form="forward")) <= 1e-4  # 1e-3 of agreement, extrapolated
    found = hypergradient(known.problem(), "penalty")  # from the start, with an inner solve of its own
    assert relative_error(found.gradient, known.truth.gradient) <= 1e-6
    assert found.certificate.verdict == "exact"


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda known, steps: inner.SGD(lr=1.0 / known.truth.curvature[1], steps=steps),
    "adam": lambda known, steps: inner.Adam(lr=lambda h, t: 0.02 * (0.01 / steps) ** (t / steps), steps=steps),
}


@pytest.mark.parametrize(
    ("name", "optimizer", "steps"),
    [
        *itertools.product(["per-feature ridge", "coupled quadratic"], OPTIMIZERS, [3, 10]),
        ("per-feature ridge", "adam", 400),
        ("logistic regression", "sgd", 400),
    ],
)
def test_a_penalty_on_loops_that_stop_early_is_never_exact_by_mistake(name: str, optimizer: str, steps: int) -> None:
    known = PROBLEMS[name]
    found = at_truth(known, "penalty", OPTIMIZERS[optimizer](known, steps))
    error = relative_error(found.gradient, known.truth.gradient)
    if found.certificate.verdict == "exact":
        assert error < 1e-3
    if steps == 400:
        assert error <= 1e-3  # the loops end there, Adam's as far as its schedule goes


def test_a_penalty_on_minibatches_says_so() -> None:
    """Adam on batches of 5 does not end at a solution: what the pinned batch sees of it is noise."""
    torch.manual_seed(0)
    rows = TensorDataset(X, Y)
    problem = bilevel.BilevelProblem(
        lambda w, h, b: ((b[0] @ w - b[1]) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((XV @ w - YV) ** 2).mean(),
        params=torch.zeros(4, 4, dtype=torch.float64),
        hparams=bilevel.positive(0.5),
        inner_solver=inner.Adam(lr=0.03, steps=60),
        inner_data=DataLoader(rows, batch_size=5, shuffle=True),
    )
    assert hypergradient(problem, "penalty", on_untrusted="ignore").certificate.verdict != "exact"


def test_a_penalty_goes_through_kinks_with_a_proximal_solver() -> None:
    def lasso() -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: ((X @ w - Y[:, 0]) ** 2).mean(),
            lambda w, h: ((XV @ w - YV[:, 0]) ** 2).mean(),
            params=torch.zeros(4, dtype=torch.float64),
            hparams=bilevel.positive(0.2),
            inner_solver=inner.ProximalGradient(bilevel.prox.L1(lambda h: h), lr=0.2, steps=150),
        )

    found, expected = hypergradient(lasso(), "penalty"), hypergradient(lasso(), "implicit")
    assert relative_error(found.gradient, expected.gradient) <= 1e-6
    assert found.certificate.verdict == "approximate"  # how far training got is not measured across kinks


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("solver", ["to the end", "steps"])
def test_a_penalty_across_kinks_sees_that_training_stopped_early(solver: str, steps: int) -> None:
    lasso = prox.L1(lambda h: h)

    def found(stopped: Any, method: str) -> bilevel.Hypergradient:
        problem = bilevel.BilevelProblem(
            lambda w, h: ((X @ w - Y[:, 0]) ** 2).mean(),
            lambda w, h: ((XV @ w - YV[:, 0]) ** 2).mean(),
            params=torch.zeros(4, dtype=torch.float64),
            hparams=bilevel.positive(0.2),
            inner_solver=stopped,
        )
        return hypergradient(problem, method, on_untrusted="ignore")

    early = inner.ProximalGradient(lasso, lr=0.2, steps=steps)
    at = found(inner.Proximal(lasso, max_steps=steps) if solver == "to the end" else early, "penalty")
    error = relative_error(at.gradient, found(inner.Proximal(lasso), "implicit").gradient)
    assert at.certificate.error is not None and error <= 3.0 * at.certificate.error
    assert steps > 1 or not at.certificate.trusted


def test_a_penalty_measures_flat_directions() -> None:
    """50 steps of heavy ball leave the second direction where it began: no secant has seen its curvature."""
    bends, t = torch.tensor([1.0, 1e-5], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)

    def problem(solver: Any) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: (bends * (w - h) ** 2).sum() / 2,
            lambda w, h: ((w - t) ** 2).sum() / 2,
            params=torch.zeros(2, dtype=torch.float64),
            hparams=torch.tensor([0.3, -0.5], dtype=torch.float64),
            inner_solver=solver,
        )

    truth = torch.tensor([-0.7, -3.5], dtype=torch.float64)
    early = hypergradient(problem(inner.SGD(lr=0.9, steps=50)), "penalty", on_untrusted="ignore")
    error = relative_error(early.gradient, truth)
    assert error > 0.5 and early.certificate.error == pytest.approx(error, rel=0.1)
    # Trained to the end, with a σ below the smallest curvature: above it, inner - σ outer has no minimum.
    exact = hypergradient(problem(inner.LBFGS(rtol=1e-12)), "penalty", on_untrusted="ignore")
    assert relative_error(exact.gradient, truth) <= 1e-5


@pytest.mark.parametrize("sigma", [None, 1e-20])
def test_ends_that_are_the_same_are_no_missing_path(sigma: float | None) -> None:
    """At the outer optimum ∂f/∂w = 0 and both ends are the solution; so they are where σ is lost in rounding."""
    t = 1.0 if sigma is None else 5.0
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: ((w - t) ** 2).sum(),
        params=torch.ones(3, dtype=torch.float64),
        hparams=torch.ones(3, dtype=torch.float64),
    )
    found = hypergradient(problem, Penalty(sigma), on_untrusted="ignore")
    assert not found.gradient.any()
    assert found.certificate.verdict == ("exact" if sigma is None else "untrusted")
    assert found.certificate.error == pytest.approx(0.0 if sigma is None else 1.0)


def test_a_penalty_in_float32_has_half_of_the_digits() -> None:
    def problem(dtype: torch.dtype) -> bilevel.BilevelProblem:
        x, xv, y, yv = (t.to(dtype) for t in (X, XV, Y, YV))
        return bilevel.BilevelProblem(
            lambda w, h: ((x @ w - y) ** 2).mean() + (h * w**2).sum(),
            lambda w, h: ((xv @ w - yv) ** 2).mean(),
            params=torch.zeros(4, 4, dtype=dtype),
            hparams=bilevel.positive(torch.full((4, 1), 0.1, dtype=dtype)),
        )

    expected = hypergradient(problem(torch.float64), "direct").gradient
    for method in ("penalty", FiniteDifference(CG(rtol=1e-4))):
        found = hypergradient(problem(torch.float32), method)
        error = relative_error(found.gradient.double(), expected)
        assert error <= 1e-2
        assert found.certificate.verdict == "approximate" or error < 1e-3


def test_a_loop_of_ones_own_cannot_be_trained_on_another_loss() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        params=torch.zeros(3, dtype=torch.float64),
        hparams=bilevel.positive(0.5),
        inner_solver=lambda w, h: torch.full_like(w, float(h)),
    )
    with pytest.raises(bilevel.BilevelError, match="trains on inner_loss"):
        hypergradient(problem, "penalty")
