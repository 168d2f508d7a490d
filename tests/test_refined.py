"""Float32 problems whose condition asks for float64: taken again there, by themselves, or not trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import CG, MINRES, BilevelProblem, Cholesky, Implicit, Neumann, positive
from bilevel.oracle import KnownProblem

N = 12
EXACT = 1e-3  # what the verdict promises


def ill_conditioned(condition: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float32 training and validation data whose Gram matrix has this condition."""
    dice = torch.Generator().manual_seed(seed)
    roots = torch.logspace(0, -0.5 * torch.log10(torch.tensor(condition)).item(), N, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(N, N, generator=dice, dtype=torch.float64)).Q
    X, X_val = ((torch.randn(4 * N, N, generator=dice, dtype=torch.float64) * roots) @ Q.T for _ in range(2))
    truth = torch.randn(N, generator=dice, dtype=torch.float64)
    y, y_val = (x @ truth + torch.randn(4 * N, generator=dice, dtype=torch.float64) for x in (X, X_val))
    return X.float(), y.float(), X_val.float(), y_val.float()


def ridge(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> tuple[Any, Any]:
    """Return losses that know nothing of float64: they use what they have captured."""
    return (
        lambda w, h: mse_loss(X @ w, y) / 2 + h * (w**2).sum() / 2,
        lambda w, h: mse_loss(X_val @ w, y_val) / 2,
    )


def logistic(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> tuple[Any, Any]:
    return (
        lambda w, h: softplus(-y.sign() * (X @ w)).mean() + h * (w**2).sum() / 2,
        lambda w, h: softplus(-y_val.sign() * (X_val @ w)).mean(),
    )


def truth_of(losses: Callable[..., Any], data: tuple[Tensor, ...], strength: float) -> Tensor:
    """Return the hypergradient by dense float64 solves, of the float32 numbers."""
    inner_loss, outer_loss = losses(*(t.double() for t in data))
    start = torch.zeros(N, dtype=torch.float64)
    given = float(torch.tensor(strength))  # as float32 holds it
    found: Tensor = KnownProblem("float32", inner_loss, outer_loss, start, positive(given)).truth.gradient
    return found


def distance(found: Any, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


METHODS = [Implicit(), Implicit(CG()), Implicit(MINRES()), Implicit(Cholesky())]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m.linear_solver).__name__)
@pytest.mark.parametrize("losses", [ridge, logistic])
@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7])
def test_float32_of_any_condition_is_exact(condition: float, losses: Callable[..., Any], method: Implicit) -> None:
    data, strength = ill_conditioned(condition), 0.5 / condition
    inner_loss, outer_loss = losses(*data)
    problem = BilevelProblem(inner_loss, outer_loss, torch.zeros(N), positive(strength))
    found = bilevel.hypergradient(problem, method)
    assert found.certificate.verdict == "exact"
    assert found.gradient.dtype == found.params.dtype == torch.float32
    assert distance(found.gradient, truth_of(losses, data, strength)) < EXACT
    if condition == 1e7:  # float32 alone cannot
        assert any("again in float64" in note for note in found.certificate.notes)


def test_without_float64_float32_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.solvers.implicit.short_of_digits", lambda certificate, lower: False)
    problem = BilevelProblem(*ridge(*ill_conditioned(1e7)), torch.zeros(N), positive(0.5e-7))
    assert not bilevel.hypergradient(problem, on_untrusted="ignore").certificate.trusted


def test_where_float32_will_do_nothing_is_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = BilevelProblem(*ridge(*ill_conditioned(10.0)), torch.zeros(N), positive(0.05))
    found = bilevel.hypergradient(problem)
    assert found.certificate.verdict == "exact" and not found.certificate.notes
    monkeypatch.setattr("bilevel.solvers.implicit.short_of_digits", lambda certificate, lower: False)
    assert bilevel.hypergradient(problem).cost == found.cost


@pytest.mark.parametrize("losses", [ridge, logistic])
def test_a_residual_of_rounding_size_is_solved_for(monkeypatch: pytest.MonkeyPatch, losses: Callable[..., Any]) -> None:
    """A bound of what it may change is a thousand times too large: all of it would lie along the smallest curvature."""
    monkeypatch.setattr("bilevel.solvers.implicit.short_of_digits", lambda certificate, lower: False)
    data, strength = ill_conditioned(1e4), 0.5e-4
    inner_loss, outer_loss = losses(*data)
    problem = BilevelProblem(inner_loss, outer_loss, torch.zeros(N), positive(strength))
    found = bilevel.hypergradient(problem, Implicit(CG()))
    error = found.certificate.error
    assert found.certificate.verdict == "exact" and error is not None
    assert distance(found.gradient, truth_of(losses, data, strength)) <= 1.5 * error


def test_solve_goes_on_through_ill_conditioned_float32() -> None:
    data = ill_conditioned(1e6)
    narrow = BilevelProblem(*ridge(*data), torch.zeros(N), positive(1e-6, high=1e3))
    wide = BilevelProblem(*ridge(*(t.double() for t in data)), torch.zeros(N).double(), positive(1e-6, high=1e3))
    found = bilevel.solve(narrow, on_untrusted="raise")
    # Float32 sees losses to 1e-7, so a minimum to the square root of that.
    assert found.outer_loss == pytest.approx(bilevel.solve(wide).outer_loss, rel=1e-5)


class Model(nn.Module):
    """Captures float32 tensors in every way: a buffer, a frozen parameter, an attribute, a constant."""

    scale: Tensor

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(N, 1, bias=False)
        self.frozen = nn.Parameter(torch.full((1,), 0.3), requires_grad=False)
        self.register_buffer("scale", torch.ones(N))
        self.shift, self.dtype = torch.full((1,), 0.1), torch.float32
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(N, affine=False) if norm else nn.Identity()
        nn.init.zeros_(self.linear.weight)

    def wide(self) -> Model:
        """Return the model that a user would write for float64, with the same numbers."""
        self.shift, self.dtype = self.shift.double(), torch.float64
        return self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * self.scale.to(self.dtype)
        out: Tensor = self.dropout(self.linear(x)).squeeze(-1) + self.shift.type(self.dtype) + self.frozen
        return out + torch.zeros(len(x)) + x.new_tensor(0.0, dtype=self.dtype)


def model_losses(data: tuple[Tensor, ...]) -> tuple[Any, Any]:
    X, y, X_val, y_val = data
    return (
        lambda m, h: mse_loss(m(X), y) / 2 + h * (m.linear.weight**2).sum() / 2,
        lambda m, h: mse_loss(m.eval()(X_val), y_val) / 2,
    )


def model_truth(model: Model, data: tuple[Tensor, ...], strength: float, losses: Any = model_losses) -> Tensor:
    """Return what the library says of the same module in float64."""
    wider = tuple(t.double() for t in data)
    inner_loss, outer_loss = losses(wider)
    problem = BilevelProblem(inner_loss, outer_loss, model.wide(), positive(float(torch.tensor(strength))))
    torch.manual_seed(0)
    found: Tensor = bilevel.hypergradient(problem).gradient
    return found


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}], ids=["plain", "dropout"])
def test_modules_are_promoted_with_all_that_they_hold(settings: dict[str, Any]) -> None:
    data, model = ill_conditioned(1e7), Model(**settings)
    problem = BilevelProblem(*model_losses(data), model, positive(1e-7))
    torch.manual_seed(0)
    found = bilevel.hypergradient(problem)
    assert any("again in float64" in note for note in found.certificate.notes)
    assert all(p.dtype == torch.float32 for p in found.params.state_dict().values())
    assert distance(found.gradient, model_truth(Model(**settings), data, 1e-7)) < EXACT


def test_batch_norm_keeps_its_float32_statistics() -> None:
    data, model = ill_conditioned(1e5), Model(norm=True)
    X = data[0]
    X[:, 1:] = X[:, :1] + 1e-3 * X[:, 1:]  # the columns are nearly one, which normalization leaves so

    def losses(data: tuple[Tensor, ...]) -> tuple[Any, Any]:
        inner_loss, _ = model_losses(data)
        return inner_loss, lambda m, h: mse_loss(m(data[2]), data[3]) / 2

    problem = BilevelProblem(*losses(data), model, positive(1e-5))
    found = bilevel.hypergradient(problem)
    assert any("again in float64" in note for note in found.certificate.notes)
    assert distance(found.gradient, model_truth(Model(norm=True), data, 1e-5, losses)) < EXACT
    assert {t.dtype for t in problem.params.buffers().values()} == {torch.float32, torch.int64}


def test_batches_of_a_loader_are_promoted() -> None:
    X, y, X_val, y_val = data = ill_conditioned(1e6)
    problem = BilevelProblem(
        lambda w, h, batch: mse_loss(batch[0] @ w, batch[1]) / 2 + h * (w**2).sum() / 2,
        lambda w, h, batch: mse_loss(batch[0] @ w, batch[1]) / 2,
        torch.zeros(N),
        positive(1e-6),
        inner_data=TensorDataset(X, y),
        outer_data=DataLoader(TensorDataset(X_val, y_val), batch_size=len(X_val)),
    )
    found = bilevel.hypergradient(problem)
    assert distance(found.gradient, truth_of(ridge, data, 1e-6)) < EXACT


def test_random_numbers_are_the_same_in_float64() -> None:
    X, y, X_val, y_val = ill_conditioned(1e6)

    def losses(noise: Callable[[], Tensor], *data: Tensor) -> tuple[Any, Any]:
        inner_loss, outer_loss = ridge(data[0], data[1], data[2], data[3])
        return lambda w, h: inner_loss(w, h) + 1e-3 * (noise() * w).sum(), outer_loss

    problem = BilevelProblem(
        *losses(lambda: torch.randn(N) + torch.rand_like(X[0]) + torch.empty(N).uniform_(), X, y, X_val, y_val),
        torch.zeros(N),
        positive(1e-6),
    )

    def exact(drawn: Tensor) -> Tensor:
        return truth_of(lambda *data: losses(lambda: drawn, *data), (X, y, X_val, y_val), 1e-6)

    torch.manual_seed(3)
    truth = exact((torch.randn(N) + torch.rand(N) + torch.rand(N)).double())
    torch.manual_seed(3)
    found = bilevel.hypergradient(problem, on_untrusted="ignore")
    assert any("again in float64" in note for note in found.certificate.notes)
    assert distance(found.gradient, truth) < EXACT


class _Float32Only(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("this kernel is float32 only")
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found: Tensor = 2.0 * x * grad
        return found


def float32_only(w: Tensor) -> Tensor:
    squares: Tensor = _Float32Only.apply(w)  # type: ignore[no-untyped-call]
    return squares.sum()


def with_term(term: Callable[[Tensor], Tensor]) -> BilevelProblem:
    inner_loss, outer_loss = ridge(*ill_conditioned(1e7))
    return BilevelProblem(lambda w, h: inner_loss(w, h) + 1e-7 * term(w), outer_loss, torch.zeros(N), positive(0.5e-7))


COUNTER = torch.zeros(1)

REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a kernel for float32": (float32_only, "float32 only"),
    "NumPy": (lambda w: (w * torch.from_numpy(w.detach().numpy())).sum(), "leaves torch"),
    "another precision": (lambda w: (w.half() ** 2).sum().float(), "fewer digits"),
    "a captured tensor in place": (lambda w: (w**2).sum() + 0.0 * COUNTER.add_(1.0).sum(), "in place"),
    "an output argument": (lambda w: (w**2).sum() + 0.0 * torch.ones(1, out=COUNTER).sum(), "in place"),
    "another function in float64": (
        lambda w: (w**2).sum() * (1e7 if w.dtype == torch.float64 else 1.0),
        "differs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_in_float64_stays_untrusted(name: str) -> None:
    term, said = REFUSED[name]
    certificate = bilevel.hypergradient(with_term(term), on_untrusted="ignore").certificate
    assert not certificate.trusted
    assert said in certificate.reasons[-1] and "params, hparams and data in float64" in certificate.reasons[-1]


def test_a_saddle_is_no_matter_of_digits() -> None:
    problem = BilevelProblem(
        lambda w, h: (w[0] ** 2 - w[1] ** 2) / 2 - h * w.sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2),
        positive(1.0),
    )
    found = bilevel.hypergradient(problem, params=torch.tensor([1.0, -1.0]), on_untrusted="ignore")
    assert not found.certificate.trusted
    assert "float64" not in found.certificate.reasons[-1]


@pytest.mark.parametrize("method", [Implicit(Neumann()), Implicit(CG(max_steps=3))], ids=["neumann", "cut short"])
def test_who_asked_for_less_gets_less(method: Implicit) -> None:
    problem = BilevelProblem(*ridge(*ill_conditioned(1e5)), torch.zeros(N), positive(1e-5))
    certificate = bilevel.hypergradient(problem, method, on_untrusted="ignore").certificate
    assert not certificate.notes


def test_what_was_trained_too_little_is_not_trained_on() -> None:
    problem = BilevelProblem(
        *ridge(*ill_conditioned(1e5)), torch.zeros(N), positive(1e-5), bilevel.inner.SGD(lr=0.1, steps=20)
    )
    certificate = bilevel.hypergradient(problem, on_untrusted="ignore").certificate
    assert not certificate.trusted and not certificate.notes
