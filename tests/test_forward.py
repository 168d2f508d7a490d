"""Forward mode: the same gradient as unrolling, in the memory of one step; and its random-direction estimate."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool2d, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import Forward, hypergradient, inner
from bilevel.evaluation import Evaluator
from bilevel.measure import peak_memory
from bilevel.solvers import forward
from bilevel.testing import relative_error

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X, XV, Y, YV = normal(30, 4), normal(20, 4), normal(30), normal(20)


def ridge(steps: int = 20, **more: Any) -> bilevel.BilevelProblem:
    """Six hyperparameters: a strength each, a learning rate and a momentum."""
    hparams = {"l2": bilevel.positive(0.1, shape=(4,)), "lr": bilevel.positive(0.05), "momentum": bilevel.real(0.5)}
    return bilevel.BilevelProblem(
        lambda w, h: ((X @ w - Y) ** 2).mean() + (h["l2"] * w**2).sum(),
        lambda w, h: ((XV @ w - YV) ** 2).mean() + 0.1 * (h["l2"] ** 2).sum(),
        torch.zeros(4, dtype=torch.float64),
        hparams,
        inner.SGD(lr=lambda h: h["lr"], momentum=lambda h: h["momentum"], steps=steps),
        **more,
    )


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in gradient.values()])


# All directions: the gradient of the loop


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(1, 6).double(), nn.Linear(6, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        q = self.embed(x.unsqueeze(-1))
        out: Tensor = self.out(scaled_dot_product_attention(q, q, q)).mean(1)
        return out


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1).double(), nn.BatchNorm2d(3).double()
        self.out = nn.Linear(3, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        maps = gelu(self.norm(self.conv(x.reshape(-1, 1, 2, 2))))
        out: Tensor = self.out(max_pool2d(maps, 2).flatten(1))
        return out


class Unbatched(torch.autograd.Function):
    """x^2, with a backward that cannot run on batches of gradients: it looks at numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.0 * x * g[0] if bool(torch.isfinite(g[0]).all()) else torch.full_like(x, math.nan)


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Unbatched.apply(self.layer(x))  # type: ignore[no-untyped-call]
        return out


@pytest.mark.parametrize("kind", [Checkpointed, Attention, Convolution, Looks])
@pytest.mark.parametrize("optimizer", [inner.SGD, inner.Adam, inner.RMSProp])
def test_it_is_unrolling_through_networks_and_minibatches(kind: type[nn.Module], optimizer: Any) -> None:
    """The step runs once for all directions: batches, dropout and running statistics are those of the loop."""
    torch.manual_seed(1)
    module = kind()
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
    problem = bilevel.BilevelProblem(
        lambda m, h, batch: (
            ((m(batch[0])[:, 0] - batch[1]) ** 2).mean() + h["l2"] * sum((p**2).sum() for p in m.parameters())
        ),
        lambda m, h: ((m(XV)[:, 0] - YV) ** 2).mean(),
        module,
        {"l2": bilevel.positive(0.1), "lr": bilevel.positive(0.01, shape=(6,))},
        optimizer(lr=lambda h, step: h["lr"][step], steps=6),
        loader,
    )
    found = {}
    for method in ("unroll", "forward"):
        problem.restart()
        assert loader.generator is not None
        loader.generator.manual_seed(3)
        torch.manual_seed(5)
        found[method] = hypergradient(problem, method, on_untrusted="ignore")
    for name, expected in found["unroll"].gradient.items():
        assert relative_error(found["forward"].gradient[name], expected) <= 1e-10, name
        assert bool((expected != 0.0).all()), "nothing to be compared"
    assert found["forward"].outer_loss == found["unroll"].outer_loss
    assert found["forward"].certificate.verdict == found["unroll"].certificate.verdict == "exact"


def test_a_loop_of_the_users_own_is_one_step() -> None:
    def fit(w: Tensor, h: Any) -> Tensor:
        w = w.clone().requires_grad_()
        for _ in range(5):
            loss = ((X @ w - Y) ** 2).mean() + h * (w**2).sum()
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - 0.1 * g
        return w

    def problem(loop: Any) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: ((X @ w - Y) ** 2).mean() + h * (w**2).sum(),
            lambda w, h: ((XV @ w - YV) ** 2).mean(),
            torch.zeros(4, dtype=torch.float64),
            bilevel.positive(0.2),
            loop,
        )

    expected = hypergradient(problem(fit), "unroll").gradient
    assert relative_error(hypergradient(problem(fit), "forward").gradient, expected) <= 1e-12
    with pytest.raises(bilevel.BilevelError, match=r'nothing to unroll.*method="implicit"'):
        hypergradient(problem(lambda w, h: fit(w, h).detach()), "forward")
    with pytest.raises(bilevel.BilevelError, match=r"LBFGS has none.*inner_solver=bilevel.inner.SGD"):
        hypergradient(problem(None), "forward")


def test_the_counts_are_exact() -> None:
    # A gradient a step, one of the outer loss and two for the certificate; a product a step for each of 6, and one.
    found = hypergradient(ridge(steps=20), "forward")
    assert (found.cost.gradients, found.cost.products) == (20 + 3, 20 * 7)
    assert Forward().sweep(20, 6).products == 20 * 7
    found = hypergradient(ridge(steps=20), Forward(directions=2), on_untrusted="ignore")
    assert (found.cost.gradients, found.cost.products) == (20 + 3, 20 * 3)
    assert Forward(directions=2).sweep(20, 6).products == 20 * 3
    report = bilevel.check(ridge(steps=20), "forward")
    assert report.costs.products == 20 * 7


def test_more_directions_than_go_through_a_step_together(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hypergradient(ridge(), "unroll").gradient
    monkeypatch.setattr(forward, "BLOCK", 4)
    assert relative_error(hypergradient(ridge(), "forward").gradient, expected) <= 1e-12


def test_memory_does_not_grow_with_the_steps() -> None:
    def peak(method: Any, steps: int) -> int:
        with peak_memory(torch.device("cpu")) as measured:
            hypergradient(ridge(steps=steps), method, on_untrusted="ignore")
        return measured.bytes

    for method in (Forward(), Forward(directions=2)):
        assert peak(method, 80) <= 1.05 * peak(method, 10)
    assert peak("unroll", 80) >= 4.0 * peak("unroll", 10), "the measure sees no graph"


# Random directions


@pytest.fixture
def every_sign(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Give out every vector of 6 signs in turn."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    turns = iter(signs)
    monkeypatch.setattr(forward, "_signs", lambda count, length, generator: next(turns)[None])
    return signs


def test_the_mean_over_all_signs_is_the_gradient(every_sign: Tensor) -> None:
    """Unbiased, and of the variance that the certificate states, both as equalities."""
    problem, method = ridge(), Forward(directions=1)
    expected = flat(hypergradient(problem, "unroll").gradient)
    size = float(expected.norm())
    found = [hypergradient(problem, method, on_untrusted="ignore") for _ in every_sign]
    draws = torch.stack([flat(f.gradient) for f in found])
    for draw, v in zip(draws, every_sign, strict=True):
        assert relative_error(draw, (expected @ v) * v) <= 1e-12
    assert relative_error(draws.mean(0), expected) <= 1e-12
    error = math.sqrt(float(((draws - expected) ** 2).sum(1).mean())) / size
    assert error == pytest.approx(math.sqrt(5.0), rel=1e-12)
    assert found[0].certificate.standard_error == pytest.approx(error, rel=1e-12)
    assert all(f.certificate.verdict == "untrusted" for f in found)


def test_it_never_points_uphill() -> None:
    problem = ridge()
    expected = flat(hypergradient(problem, "unroll").gradient)
    evaluate = Evaluator(problem, Forward(directions=2))
    for _ in range(20):
        assert float(flat(evaluate(problem.hparams.layout.start).hypergradient.gradient) @ expected) > 0.0


def test_directions_differ_from_call_to_call_and_repeat_with_the_state() -> None:
    problem = ridge()
    upper = problem.hparams.layout.start

    def calls(seed: int) -> list[Tensor]:
        evaluate = Evaluator(problem, Forward(directions=3, seed=seed))
        return [flat(evaluate(upper).hypergradient.gradient) for _ in range(3)]

    before = torch.get_rng_state()
    first, again, other = calls(0), calls(0), calls(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert not torch.equal(first[0], other[0])


def test_as_many_directions_as_hyperparameters_are_all_of_them() -> None:
    expected = hypergradient(ridge(), Forward())
    for directions in (6, 1000):
        found = hypergradient(ridge(), Forward(directions=directions))
        assert (found.certificate, found.cost) == (expected.certificate, expected.cost)
        assert torch.equal(flat(found.gradient), flat(expected.gradient))


def test_a_run_on_random_directions_gets_where_the_gradient_leads(tmp_path: Any) -> None:
    """Without a line search; and it goes on from a checkpoint with the directions that come next."""
    before = hypergradient(ridge(8), "unroll").outer_loss
    best = bilevel.solve(ridge(8), "unroll", steps=40).outer_loss
    method = Forward(directions=2)
    whole = bilevel.solve(ridge(8), method, steps=40, on_untrusted="ignore")
    assert before - whole.outer_loss >= 0.5 * (before - best) > 0.0  # 40 steps of Adam(lr=0.05)
    bilevel.solve(ridge(8), method, steps=15, on_untrusted="ignore", checkpoint=tmp_path / "run.pt")
    resumed = bilevel.solve(ridge(8), method, steps=40, on_untrusted="ignore", checkpoint=tmp_path / "run.pt")
    assert [r.outer_loss for r in resumed.history] == [r.outer_loss for r in whole.history]
    with pytest.raises(bilevel.BilevelError, match=r"line search.*torch.optim.Adam"):
        bilevel.solve(ridge(8), method, outer_optimizer="lbfgs")


# What is refused, in words


def many(count: int) -> bilevel.BilevelProblem:
    weights = normal(count, 3)
    return bilevel.BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() + ((weights @ w) ** 2 * h).mean(),
        lambda w, h: (w**2).sum(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(1.0, shape=(count,)),
        inner.SGD(lr=0.05, steps=3),
    )


def test_too_many_hyperparameters_are_refused_with_their_cost() -> None:
    problem = many(1001)
    with pytest.raises(bilevel.BilevelError, match=r'1001 numbers.*3,006 products.*3,003 numbers.*method="unroll"'):
        hypergradient(problem, "forward")
    report = bilevel.check(problem, "forward")
    assert [(f.level, f.subject) for f in report.findings] == [("error", "method")]
    assert "3,006 products" in report.findings[0].message and "directions=16" in report.findings[0].remedy
    expected = hypergradient(problem, "unroll").gradient
    assert relative_error(hypergradient(problem, Forward(most=1001)).gradient, expected) <= 1e-12
    assert bilevel.check(problem, Forward(directions=16)).ok
    hypergradient(problem, Forward(directions=16), on_untrusted="ignore")


def test_the_dry_run_notes_what_many_hyperparameters_cost() -> None:
    found = bilevel.check(many(31), "forward").findings
    assert [(f.level, f.subject) for f in found] == [("note", "method")]
    assert "96 products" in found[0].message and 'method="unroll" takes 3' in found[0].remedy
    assert not bilevel.check(many(20), "forward").findings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"directions": 0}, "`directions` is 0"),
        ({"directions": 2.0}, "`directions` is 2.0"),
        ({"seed": "x"}, "`seed` is 'x'"),
        ({"seed": 2**70}, "64 bits"),
        ({"most": 0}, "`most` is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=told):
        Forward(**settings)
