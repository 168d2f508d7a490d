"""Inner solvers: torch.optim's update rules, minibatches, and decay outside of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import inner
from bilevel.solvers.about import about

STEPS = 50
Params = dict[str, Tensor]

OPTIMIZERS: list[tuple[str, type[Any], type[Any], dict[str, Any]]] = [
    ("sgd", inner.SGD, torch.optim.SGD, {"lr": 0.05}),
    ("sgd decay", inner.SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.3}),
    ("momentum", inner.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    ("dampening", inner.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.8, "dampening": 0.4}),
    ("dampening alone", inner.SGD, torch.optim.SGD, {"lr": 0.02, "dampening": 0.4}),
    ("nesterov", inner.SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("adam", inner.Adam, torch.optim.Adam, {"lr": 0.05}),
    ("adam all", inner.Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.2}),
    ("adamw", inner.AdamW, torch.optim.AdamW, {"lr": 0.05}),
    ("adamw all", inner.AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3}),
    ("adamw no decay", inner.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}),
    ("rmsprop", inner.RMSProp, torch.optim.RMSprop, {"lr": 0.01}),
    ("rmsprop all", inner.RMSProp, torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.2}),
    ("rmsprop momentum", inner.RMSProp, torch.optim.RMSprop, {"lr": 0.005, "momentum": 0.8}),
    ("rmsprop centered", inner.RMSProp, torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
]


def start() -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"weight": (3, 4), "bias": (3,), "scale": ()}
    return {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}


def loss(w: Params, h: Any = None) -> Tensor:
    """Couple a matrix, a vector and a 0-d tensor; smooth and not quadratic."""
    x = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)
    out = w["scale"] * torch.tanh(w["weight"] @ x + w["bias"])
    return (out - torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)).square().sum() + 0.05 * w["weight"].pow(4).sum()


def reference(
    kind: type[Any], settings: dict[str, Any], schedule: Callable[[int], dict[str, Any]] | None = None
) -> Params:
    """Run torch.optim itself; `schedule` sets options before each step."""
    w: Params = {name: nn.Parameter(t) for name, t in start().items()}
    optimizer = kind(list(w.values()), **settings)
    for t in range(STEPS):
        if schedule is not None:
            optimizer.param_groups[0].update(schedule(t))
        optimizer.zero_grad()
        loss(w).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: p.detach() for name, p in w.items()}


def trained(solver: Any, hparams: Any = None) -> bilevel.Hypergradient:
    """Return the hypergradient of the end of the inner loop; the outer loss also takes every hyperparameter itself."""
    h = bilevel.real(torch.tensor(0.5, dtype=torch.float64)) if hparams is None else hparams
    problem = bilevel.BilevelProblem(loss, lambda w, h: outer(w) + 0.0 * total(h), start(), h, inner_solver=solver)
    return bilevel.hypergradient(problem, "unroll")


def outer(w: Params) -> Tensor:
    return w["weight"].sum() + w["bias"].square().sum() + w["scale"].sin()


def total(h: Any) -> Tensor:
    return sum((t.sum() for t in h.values()), torch.zeros(())) if isinstance(h, dict) else h.sum()


def close(found: Params, expected: Params, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"), [row[1:] for row in OPTIMIZERS], ids=[r[0] for r in OPTIMIZERS]
)
class TestUpdateRules:
    def test_numbers(self, ours: type[Any], theirs: type[Any], settings: dict[str, Any]) -> None:
        close(trained(ours(**settings, steps=STEPS)).params, reference(theirs, settings))

    def test_functions_of_hyperparameters(self, ours: type[Any], theirs: type[Any], settings: dict[str, Any]) -> None:
        tuned = {name: value for name, value in settings.items() if name in ours.tunable()}
        hparams = {name: torch.tensor(value, dtype=torch.float64) for name, value in tuned.items()}
        given = settings | {name: lambda h, name=name: h[name] for name in tuned}
        found = trained(ours(**given, steps=STEPS), hparams)
        close(found.params, reference(theirs, settings))
        # Truth: central differences of torch.optim itself. Rounding 1e-16 / 1e-6 and curvature 1e-12 leave about 1e-8
        # of values of order 1 to 100.
        for name, value in tuned.items():
            if value == 0.0:
                continue  # torch.optim refuses a negative weight decay
            above, below = (
                float(outer(reference(theirs, settings | {name: value + shift}))) for shift in (1e-6, -1e-6)
            )
            assert found.gradient[name].item() == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-6)

    def test_schedules(self, ours: type[Any], theirs: type[Any], settings: dict[str, Any]) -> None:
        rates = settings["lr"] * torch.linspace(1.0, 0.1, STEPS, dtype=torch.float64)
        found = trained(ours(**settings | {"lr": lambda h, step: h["lr"][step]}, steps=STEPS), {"lr": rates})
        close(found.params, reference(theirs, settings, lambda t: {"lr": rates[t].item()}))
        assert found.gradient["lr"].count_nonzero() == STEPS

    def test_one_rate_per_tensor(self, ours: type[Any], theirs: type[Any], settings: dict[str, Any]) -> None:
        w: Params = {name: nn.Parameter(t) for name, t in start().items()}
        factors = {"weight": 1.0, "bias": 0.5, "scale": 0.1}
        groups = [{"params": [w[name]], "lr": settings["lr"] * f} for name, f in factors.items()]
        optimizer = theirs(groups, **settings)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(w).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        rates = {name: settings["lr"] * torch.tensor(f, dtype=torch.float64) for name, f in factors.items()}
        found = trained(ours(**settings | {"lr": lambda h: h}, steps=STEPS), rates)
        close(found.params, {name: p.detach() for name, p in w.items()})


@pytest.mark.parametrize("solver", [inner.Adam, inner.AdamW, inner.RMSProp])
def test_gradients_are_finite_where_the_inner_gradient_is_zero(solver: type[Any]) -> None:
    # The square root of the second moment has no derivative at 0: entry 1 never gets a gradient.
    problem = bilevel.BilevelProblem(
        lambda w, h: (w[0] - h) ** 2,
        lambda w, h: w.sum(),
        params=torch.tensor([0.0, 1.0], dtype=torch.float64),
        hparams=torch.tensor(1.0, dtype=torch.float64),
        inner_solver=solver(lr=0.1, weight_decay=0.0, steps=5),
    )
    found = bilevel.hypergradient(problem, "unroll")
    assert torch.isfinite(found.gradient)
    assert found.params[1] == 1.0


@pytest.mark.parametrize("solver", [inner.Adam, inner.RMSProp])
def test_an_inner_gradient_of_zero_everywhere_leaves_the_start(solver: type[Any]) -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() * h,
        lambda w, h: w.sum() + h,
        params=torch.ones(3, dtype=torch.float64),
        hparams=torch.tensor(1.0, dtype=torch.float64),
        inner_solver=solver(lr=0.1, steps=5),
    )
    # Rounding would decide the sign of a step here, which the certificate says.
    found = bilevel.hypergradient(problem, "unroll", on_untrusted="ignore")
    assert torch.equal(found.params, torch.ones(3, dtype=torch.float64))
    assert found.gradient.item() == pytest.approx(1.0, abs=1e-12)  # the direct term alone


def test_a_setting_per_tensor_must_name_all_tensors() -> None:
    with pytest.raises(bilevel.BilevelError, match=r"\['weight'\].*expected \['bias', 'scale', 'weight'\]"):
        trained(inner.SGD(lr=lambda h: {"weight": h}, steps=2))


def test_a_schedule_that_is_not_indexed_is_refused() -> None:
    with pytest.raises(bilevel.BilevelError, match=r"`lr` returned a Tensor of shape \(5,\).*h\['lr'\]\[step\]"):
        trained(inner.SGD(lr=lambda h: h, steps=2), torch.full((5,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("solver", [inner.SGD, inner.Adam, inner.AdamW, inner.RMSProp])
@pytest.mark.parametrize("wrong", [{}, {"steps": 0}, {"steps": 3, "epochs": 1}, {"steps": 2.5}, {"steps": True}])
def test_lengths_are_checked(solver: type[Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(bilevel.BilevelError, match=r"`steps` or `epochs`"):
        solver(lr=0.1, **wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inner.SGD(lr=-0.1, steps=1), "`lr` is -0.1"),
        (lambda: inner.SGD(lr=float("nan"), steps=1), "`lr` is nan"),
        (lambda: inner.SGD(lr="0.1", steps=1), "`lr` is '0.1'"),  # type: ignore[arg-type]
        (lambda: inner.SGD(lr=None, steps=1), "`lr` is None"),  # type: ignore[arg-type]
        (lambda: inner.SGD(lr=0.1, nesterov=True, steps=1), "`nesterov`.*`momentum`"),
        (lambda: inner.SGD(lr=0.1, momentum=0.9, dampening=0.1, nesterov=True, steps=1), "`nesterov`.*`dampening`"),
        (lambda: inner.Adam(betas=lambda h: (0.9, 0.99), steps=1), "`betas` is a function.*lr, weight_decay"),  # type: ignore[arg-type]
        (lambda: inner.Adam(betas=(0.9, 1.0), steps=1), r"`betas` is \(0.9, 1.0\)"),
        (lambda: inner.Adam(betas=0.9, steps=1), "`betas` is 0.9"),  # type: ignore[arg-type]
        (lambda: inner.RMSProp(alpha=1.5, steps=1), "`alpha` is 1.5"),
        (lambda: inner.LBFGS(rtol=2.0), "`rtol` is 2.0"),
        (lambda: inner.LBFGS(max_steps=0), "`max_steps` is 0"),
    ],
)
def test_settings_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        make()


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.1


def squares(w: Tensor, h: Tensor, batch: tuple[Tensor, Tensor] | list[Tensor]) -> Tensor:
    return ((batch[0] @ w - batch[1]) ** 2).mean() + h * (w**2).sum()


@pytest.mark.parametrize(("length", "passes"), [({"epochs": 2}, 2), ({"steps": 6}, 2), ({"steps": 3}, 1)])
def test_minibatches_are_taken_in_order(length: dict[str, Any], passes: int) -> None:
    loader = DataLoader(TensorDataset(*rows()), batch_size=4)
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.5)
    batches = [batch for _ in range(passes) for batch in loader]
    for batch in batches:
        optimizer.zero_grad()
        squares(w, torch.tensor(0.1, dtype=torch.float64), batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    problem = bilevel.BilevelProblem(
        squares,
        lambda w, h: w.square().sum(),
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(0.1),
        inner_solver=inner.SGD(lr=0.1, momentum=0.5, **length),
        inner_data=loader,
    )
    close({"w": bilevel.hypergradient(problem, "unroll").params}, {"w": w.detach()})


def test_epochs_of_one_batch_are_steps() -> None:
    problem = [
        bilevel.BilevelProblem(
            squares,
            lambda w, h: w.sum(),
            torch.zeros(2, dtype=torch.float64),
            bilevel.positive(0.1),
            inner_solver=solver,
            inner_data=rows(),
        )
        for solver in (inner.SGD(lr=0.1, epochs=7), inner.SGD(lr=0.1, steps=7))
    ]
    first, second = (bilevel.hypergradient(p, "unroll") for p in problem)
    assert torch.equal(first.params, second.params)
    assert torch.equal(first.gradient, second.gradient)


def test_epochs_need_data_with_a_length() -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter([rows()])

    problem = bilevel.BilevelProblem(
        squares,
        lambda w, h: w.sum(),
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(0.1),
        inner_solver=inner.SGD(lr=0.1, epochs=1),
        inner_data=Stream(),
    )
    with pytest.raises(bilevel.BilevelError, match=r"`inner_data` has no length.*`steps`"):
        bilevel.hypergradient(problem, "unroll")


def test_lbfgs_refuses_minibatches() -> None:
    problem = bilevel.BilevelProblem(
        squares,
        lambda w, h: w.sum(),
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(0.1),
        inner_data=DataLoader(TensorDataset(*rows()), batch_size=4),
    )
    with pytest.raises(bilevel.BilevelError, match=r"L-BFGS.*`inner_data`.*inner_solver=bilevel.inner.Adam"):
        bilevel.hypergradient(problem)


# Decay outside of the loss

DECAYS: list[Any] = [0.1, lambda h: h]


@pytest.mark.parametrize("method", [m for m in bilevel.METHODS if about(bilevel.solvers.estimator(m)).sees != "loop"])
@pytest.mark.parametrize("decay", DECAYS, ids=["number", "function"])
def test_a_decay_outside_of_the_loss_needs_unrolling(method: str, decay: Any) -> None:
    """The end of AdamW is no stationary point of `inner_loss`."""
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum(),
        lambda w, h: h * (w**2).sum(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(0.5),
        inner_solver=inner.AdamW(lr=0.1, weight_decay=decay, steps=5),
    )
    for call in (bilevel.hypergradient, bilevel.solve):
        with pytest.raises(bilevel.BilevelError, match=r"AdamW.*weight_decay.*`inner_loss`.*unroll"):
            call(problem, method)
    bilevel.hypergradient(problem, "unroll")
    # Given an inner solution, the solver plays no part.
    bilevel.hypergradient(problem, "direct", params=torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("decay", DECAYS, ids=["number", "function"])
def test_a_decay_in_the_gradient_is_seen_by_the_fixed_point_of_the_step_alone(decay: Any) -> None:
    def problem(outer_weight: float) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: ((w - 1.0) ** 2).sum() / 2,
            lambda w, h: (w**2).sum() / 2 + outer_weight * h,
            torch.zeros(1, dtype=torch.float64),
            bilevel.positive(0.5),
            inner_solver=inner.SGD(lr=0.5, weight_decay=decay, steps=100),
        )

    with pytest.raises(bilevel.BilevelError, match=r"SGD.*weight_decay"):
        bilevel.hypergradient(problem(1.0), "cg")
    found = bilevel.hypergradient(problem(0.0 if callable(decay) else 1.0), "fixed-point").gradient
    # w = 1 / (1 + h): d/dh w^2 / 2 = -(1 + h)^-3
    assert found.item() == pytest.approx(-(1.5**-3) if callable(decay) else 1.0, abs=1e-7)
