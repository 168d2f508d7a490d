"""`method="auto"`: each rule by itself, and what is measured of real problems."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import Averaged, BilevelProblem, Implicit, InvalidValueError, Unroll, inner, positive
from bilevel.choosing import measured
from bilevel.solvers.auto import Facts, choose
from bilevel.testing import known_problems, relative_error

D = torch.float64
SMALL, LARGE = Facts(inner=20, outer=5), Facts(inner=10_000, outer=5, condition=100.0, graph_bytes=2_000_000)
LOOP = replace(LARGE, steps=1000, step_bytes=1_000_000, free_bytes=8_000_000_000)  # graphs of 1 GB
TIGHT = replace(LOOP, free_bytes=1_000_000_000)  # 0.5 GB may be taken
HARD = replace(LARGE, inner=200, condition=1e6)  # 9,560 products for eight digits
RATES: Any = {"hidden": ("hparams['lr']",)}


@pytest.mark.parametrize(
    ("facts", "name", "word"),
    [
        (SMALL, "direct", "few enough for a dense Hessian"),
        (LARGE, "cg", "too many for a dense Hessian"),
        (replace(LARGE, fixed=False), "the mean of 4 draws of cg", "minibatches"),
        (LOOP, "unroll", "fit into the memory"),
        (TIGHT, "cg", "too many for a dense Hessian"),
        (replace(LOOP, own_loop=True), "cg", "too many for a dense Hessian"),
        (replace(LARGE, twice="fused attention"), "penalty", "fused attention"),
        (replace(LARGE, twice="fused attention", fixed=False), "finite-difference", "fused attention"),
        (replace(LOOP, **RATES), "unroll", "only the inner loop uses hparams['lr']"),
        (replace(TIGHT, **RATES), "unroll", "steps are taken again"),
        (replace(LOOP, own_loop=True, **RATES), "zero-order", "no derivative goes through it"),
        (replace(LARGE, **RATES), "cg", "too many"),  # L-BFGS has no such setting: the error names what to do
        (replace(LOOP, decays=True), "unroll", "decays weights outside"),
        (replace(LARGE, trains=False, fixed=False), "soba", "the method moves the inner variables itself"),
        (replace(LARGE, trains=False, fixed=False, twice="fused attention"), "finite-difference", "fused attention"),
        (HARD, "direct", "conjugate gradients would take more products"),
        (replace(HARD, condition=4.0), "implicit", "too many for a dense Hessian at once"),
        (replace(HARD, inner=5000), "cg", "too many for a dense Hessian"),
        (replace(HARD, free_bytes=500_000), "cg", "too many for a dense Hessian"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule(facts: Facts, name: str, word: str) -> None:
    choice = choose(facts)
    assert choice.name == name and word in choice.why
    assert str(choice).startswith(f"auto chose {name}: ") and str(choice).endswith(" MB)")


def test_predicted_costs() -> None:
    assert choose(SMALL).products == 20 and choose(SMALL).megabytes == 20 * 20 * 8 / 1e6
    # sqrt(100) / 2 * log(2e8) = 95.6 products for eight digits.
    assert choose(LARGE).products == 97 and choose(LARGE).megabytes == 2.0
    assert choose(LOOP).products == choose(LOOP).gradients == 1000 and choose(LOOP).megabytes == 1000.0
    tight = choose(replace(TIGHT, **RATES))
    assert (tight.gradients, tight.products, tight.megabytes) == (2000, 1000, 500.0)
    assert choose(replace(LARGE, fixed=False)).products == 4 * 97
    assert choose(HARD).products == 200 and choose(HARD).megabytes == pytest.approx(2.0 + 200 * 200 * 8 / 1e6)


def test_what_cannot_be_counted_is_said() -> None:
    unknown = replace(LARGE, condition=None)
    assert choose(unknown).products is None and "sqrt(condition), which cannot be told" in str(choose(unknown))
    assert "4 times as many products as" in str(choose(replace(unknown, fixed=False)))
    own = replace(LOOP, own_loop=True, **RATES)
    assert "(about 21 inner loops, " in str(choose(own))  # one, and four for each of 5 hyperparameters
    assert "(about 33 inner loops, " in str(choose(replace(own, outer=100)))
    assert "1,000 steps of 2 gradients and a product in the first call" in str(choose(replace(LARGE, trains=False)))
    assert "4 inner solves, warm" in str(choose(replace(LARGE, twice="fused attention")))


RIDGE = next(iter(known_problems()))


@pytest.mark.parametrize("known", known_problems(), ids=lambda known: known.name)
def test_auto_is_right_on_every_known_problem(known: Any) -> None:
    found = bilevel.hypergradient(known.problem(), "auto")
    assert relative_error(found.gradient, known.truth.gradient) < 1e-7
    assert found.certificate.verdict == "exact"
    assert any(note.startswith("auto chose direct: ") for note in found.certificate.notes)


def test_the_prediction_counts_what_is_then_spent() -> None:
    loop = RIDGE.problem(inner.SGD(lr=0.05, steps=30))
    found = bilevel.hypergradient(loop, "auto")
    assert (
        "auto chose unroll" in found.certificate.notes[0] and "30 Hessian-vector products" in found.certificate.notes[0]
    )
    assert found.cost.products == 30
    assert choose(measured(loop)).estimator == Unroll()


def scheduled(steps: int = 8) -> BilevelProblem:
    return BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() + h["l2"] * (w**2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(3, dtype=D),
        {"l2": positive(0.1), "lr": positive(0.1)},
        inner_solver=inner.SGD(lr=lambda h: h["lr"], steps=steps),
    )


def test_facts_of_a_learning_rate() -> None:
    facts = measured(scheduled())
    assert (facts.inner, facts.outer, facts.steps, facts.hidden) == (3, 2, 8, ("hparams['lr']",))
    assert facts.fixed and not facts.own_loop and facts.twice == "" and facts.step_bytes > 0
    assert facts.condition == pytest.approx(1.0)  # the Hessian is a multiple of the identity


def test_facts_of_a_users_own_loop() -> None:
    def fit(w: Tensor, h: Any) -> Any:
        return torch.ones_like(w) / (1.0 + h["l2"])

    problem = scheduled()
    own = BilevelProblem(
        problem.inner_loss, problem.outer_loss, torch.zeros(3, dtype=D), {"l2": positive(0.1)}, inner_solver=fit
    )
    facts = measured(own)
    assert facts.own_loop and facts.hidden == () and facts.steps is None
    found = bilevel.hypergradient(own, "auto")
    # F = 3 / (1 + l2)^2
    assert float(found.gradient["l2"]) == pytest.approx(-6.0 / 1.1**3, rel=1e-10)


def test_minibatches_are_averaged_where_the_loop_cannot_be_unrolled() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    data = DataLoader(TensorDataset(x), batch_size=16, shuffle=True)
    problem = BilevelProblem(
        lambda w, h, b: ((b[0] @ w - 1.0) ** 2).mean() + h * (w**2).sum(),
        lambda w, h, b: ((b[0] @ w - 1.0) ** 2).mean(),
        torch.zeros(3, dtype=D),
        positive(0.1),
        inner_solver=lambda w, h, loader: w + 0.1,
        inner_data=data,
        outer_data=(x,),
    )
    position, random = str(problem.position()), torch.get_rng_state()
    choice = choose(measured(problem))
    assert isinstance(choice.estimator, Averaged)
    assert str(problem.position()) == position and torch.equal(torch.get_rng_state(), random)


def test_minibatches_without_an_inner_solver_get_a_single_loop() -> None:
    """The default inner solver is L-BFGS, which refuses minibatches."""
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    problem = BilevelProblem(
        lambda w, h, b: ((b[0] @ w - 1.0) ** 2).mean() + h * (w**2).sum(),
        lambda w, h, b: ((b[0] @ w - 1.0) ** 2).mean(),
        torch.zeros(3, dtype=D),
        positive(0.1),
        inner_data=DataLoader(TensorDataset(x), batch_size=16, shuffle=True),
        outer_data=(x,),
    )
    assert choose(measured(problem)).estimator == bilevel.SOBA()
    report = bilevel.check(problem, "auto")
    assert report.ok and any("auto chose soba" in finding.message for finding in report.findings)


def test_a_loss_without_second_derivative_gets_a_first_order_method() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return w**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Any:
            (w,) = ctx.saved_tensors
            return 2.0 * w * g

    square: Any = Square.apply
    problem = BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() + h * square(w).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=D),
        positive(1.0),
    )
    found = bilevel.hypergradient(problem, "auto")
    # w = 1 / (1 + h), F = 2 / (1 + h)^2, dF/dh = -4 / (1 + h)^3
    assert float(found.gradient) == pytest.approx(-0.5, rel=1e-4)
    assert "auto chose penalty" in found.certificate.notes[0]


def test_every_door_takes_it() -> None:
    problem = scheduled()
    report = bilevel.check(problem, "auto")
    assert report.ok and any("auto chose unroll" in finding.message for finding in report.findings)
    assert bilevel.check_gradient(problem, "auto").passed
    solution = bilevel.solve(problem, "auto", steps=3, progress=False)
    assert solution.outer_loss < solution.start.outer_loss
    row, _ = bilevel.compare(problem, ["auto", "unroll"]).rows
    assert row.error == 0.0 and row.method == "auto"


def test_auto_is_no_part_of_another_method() -> None:
    with pytest.raises(InvalidValueError, match="may choose to"):
        Averaged(estimator=bilevel.Auto())


def test_modules_are_left_alone() -> None:
    x = torch.randn(32, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    problem = BilevelProblem(
        lambda m, h: (m(x) ** 2).mean() + h * sum((p**2).sum() for p in m.parameters()),
        lambda m, h: (m(x) ** 2).mean(),
        model,
        positive(0.1),
        inner_solver=inner.SGD(lr=0.01, steps=3),
    )
    buffers = {name: t.clone() for name, t in problem.params.buffers().items()}
    measured(problem)
    assert all(torch.equal(t, buffers[name]) for name, t in problem.params.buffers().items())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_dense_choice_is_the_implicit_one() -> None:
    assert choose(SMALL).estimator == Implicit(bilevel.Cholesky())


def test_curvatures_that_overflow_are_refused_in_words() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: 1e200 * (((w - 1.0) ** 2).sum() + h * (w**2).sum()),
        lambda w, h: (w**2).sum(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(0.5),
    )
    with pytest.raises(bilevel.NonFiniteError, match="overflow"):
        bilevel.hypergradient(problem, "auto")
