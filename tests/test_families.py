"""`bilevel.over`: members of a family are those problems one by one, and folds are scikit-learn's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import bilevel
from bilevel import BilevelProblem, InvalidTypeError, InvalidValueError, inner, positive, prox
from bilevel.testing import relative_error

D = torch.float64
N = 3


def tables(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, rows, 2, generator=torch.Generator().manual_seed(seed), dtype=D)
    return x, x.sum(-1).sin() + 0.1


def squares(w: Any, h: Any, batch: Any) -> Tensor:
    return ((batch[0] @ w["w"] + w["b"] - batch[1]) ** 2).mean()  # type: ignore[no-any-return]


def one(train: Any, valid: Any, solver: Any = None) -> BilevelProblem:
    return BilevelProblem(
        lambda w, h, b: squares(w, h, b) + (h["l2"] * w["w"] ** 2).sum(),
        squares,
        {"w": torch.zeros(2, dtype=D), "b": torch.zeros((), dtype=D)},
        {"l2": positive(0.1, shape=2)},
        solver,
        train,
        valid,
    )


TRAIN, VALID = tables(8, 0), tables(6, 1)


@pytest.mark.parametrize(
    ("method", "solver", "tolerance"),
    [
        ("direct", None, 1e-7),  # the inner solutions are good to 1e-9 of the family's gradient
        ("cg", None, 1e-7),
        ("unroll", inner.SGD(lr=0.05, momentum=0.5, steps=5), 1e-12),
        ("forward", inner.Adam(lr=0.05, steps=5), 1e-12),
        ("implicit", inner.Proximal(prox.L1(lambda h: h["l2"], on="w")), 1e-7),
    ],
)
def test_a_family_is_its_members(method: str, solver: Any, tolerance: float) -> None:
    family = bilevel.hypergradient(bilevel.over(one(TRAIN, VALID, solver), N), method, on_untrusted="ignore")
    members = [
        bilevel.hypergradient(
            one(tuple(t[i] for t in TRAIN), tuple(t[i] for t in VALID), solver), method, on_untrusted="ignore"
        )
        for i in range(N)
    ]
    mean = sum(member.gradient["l2"] for member in members) / N
    assert relative_error(family.gradient["l2"], mean) < tolerance
    assert family.outer_loss == pytest.approx(sum(member.outer_loss for member in members) / N, rel=1e-8)
    for name in ("w", "b"):
        assert torch.allclose(family.params[name], torch.stack([m.params[name] for m in members]), atol=1e-8)


def test_one_vectorized_evaluation_serves_all_members() -> None:
    problem = one(TRAIN, VALID, inner.SGD(lr=0.05, steps=5))
    assert bilevel.hypergradient(bilevel.over(problem, N), "unroll").cost.products == 5


def test_modules_are_members_and_stay_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(2, 2, dtype=D), nn.Tanh(), nn.Linear(2, 1, dtype=D))
    before = [p.clone() for p in net.parameters()]

    def loss(m: Any, h: Any, b: Any) -> Any:
        return ((m(b[0])[..., 0] - b[1]) ** 2).mean() + h * sum((p**2).sum() for p in m.parameters())

    def problem(train: Any, valid: Any) -> BilevelProblem:
        return BilevelProblem(loss, loss, net, positive(0.1), inner.SGD(lr=0.1, steps=3), train, valid)

    family = bilevel.hypergradient(bilevel.over(problem(TRAIN, VALID), N), "unroll")
    members = [
        bilevel.hypergradient(problem(tuple(t[i] for t in TRAIN), tuple(t[i] for t in VALID)), "unroll")
        for i in range(N)
    ]
    assert relative_error(family.gradient, sum(m.gradient for m in members) / N) < 1e-12
    assert family.params["0.weight"].shape == (N, 2, 2)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_folds_are_those_of_scikit_learn() -> None:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, cross_val_score

    x, y = (t.reshape(-1, *t.shape[2:])[:20] for t in TRAIN)
    splits = list(KFold(4, shuffle=True, random_state=0).split(x))
    held = torch.zeros(4, 20, dtype=D)
    for i, (_, rows) in enumerate(splits):
        held[i, rows] = 1.0
    member = BilevelProblem(
        lambda w, h, out: ((1.0 - out) * (x @ w - y) ** 2).sum() + h * (w**2).sum(),
        lambda w, h, out: (out * (x @ w - y) ** 2).sum() / out.sum(),
        torch.zeros(2, dtype=D),
        positive(0.7),
        inner_data=held,
        outer_data=held,
    )
    found = bilevel.hypergradient(bilevel.over(member, 4))
    model = Ridge(alpha=0.7, fit_intercept=False)
    scores = cross_val_score(model, x.numpy(), y.numpy(), cv=splits, scoring="neg_mean_squared_error")
    assert found.outer_loss == pytest.approx(-scores.mean(), rel=1e-8)


def quadratics(scales: list[float], size: int = 90) -> BilevelProblem:
    """Members w·A_i w / 2 - h b·w with A_i = scale_i times a matrix of condition 100, but the identity for scale 1."""
    values = torch.linspace(1.0, 100.0, size, dtype=D)
    matrices = torch.stack([torch.ones(size, dtype=D) if s == 1.0 else s * values for s in scales])
    return BilevelProblem(
        lambda w, h, a: (a * w**2).sum() / 2 - h * w.sum(),
        lambda w, h, a: ((w - 1.0) ** 2).sum(),
        torch.zeros(size, dtype=D),
        positive(0.5),
        inner_data=matrices,
        outer_data=matrices,
    )


def test_conjugate_gradients_stop_for_each_member() -> None:
    problem = quadratics([1.0, 1e-3, 1e3, 30.0])
    params = torch.stack([0.5 / a for a in problem.inner_data])
    found = bilevel.hypergradient(bilevel.over(problem, 4), "cg", params=params)
    truth = sum(float((2 * (0.5 / a - 1.0) / a).sum()) for a in problem.inner_data) / 4
    assert found.gradient.item() == pytest.approx(truth, rel=1e-8)
    alone = []
    for a, w in zip(problem.inner_data, params, strict=True):
        one = BilevelProblem(
            problem.inner_loss, problem.outer_loss, torch.zeros(90, dtype=D), positive(0.5), inner_data=a, outer_data=a
        )
        alone.append(bilevel.hypergradient(one, "cg", params=w).cost.products)
    # A member alone may have its error from CG's coefficients; a family takes a loose solve for it.
    assert found.cost.products <= 1.1 * max(alone), "the hardest member decides, not the spectrum of all"
    assert found.certificate.curvature == pytest.approx(1e-3, rel=0.02)


def test_an_indefinite_member_is_found() -> None:
    problem = quadratics([2.0, 3.0])
    problem.inner_data[1, 0] = -1.0
    params = torch.stack([0.5 / a for a in problem.inner_data])
    found = bilevel.hypergradient(bilevel.over(problem, 2), "cg", params=params, on_untrusted="ignore")
    assert found.certificate.verdict == "untrusted"


def test_members_may_begin_elsewhere() -> None:
    problem = one(TRAIN, VALID, inner.SGD(lr=0.05, steps=3))
    starts = {name: torch.randn(N, *t.shape, dtype=D) for name, t in problem.params.start.items()}
    family = bilevel.hypergradient(bilevel.over(problem, N, starts), "unroll")
    member = one(tuple(t[1] for t in TRAIN), tuple(t[1] for t in VALID), inner.SGD(lr=0.05, steps=3))
    alone = bilevel.hypergradient(member, "unroll", params={name: t[1] for name, t in starts.items()})
    assert torch.allclose(family.params["w"][1], alone.params["w"], atol=1e-12)
    with pytest.raises(InvalidValueError, match="`starts` holds tensors of shapes"):
        bilevel.over(problem, N, {name: t[:2] for name, t in starts.items()})


def test_what_is_no_family_is_refused() -> None:
    problem = one(TRAIN, VALID)
    with pytest.raises(InvalidValueError, match="`n` is 0"):
        bilevel.over(problem, 0)
    with pytest.raises(InvalidTypeError, match="`problem` is a int"):
        bilevel.over(3, 2)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"`inner_data` of a family of 4 holds something of shape \(3, 8, 2\)"):
        bilevel.hypergradient(bilevel.over(problem, 4))
    with pytest.raises(InvalidValueError, match="whose groups would run over the members"):
        bilevel.over(one(TRAIN, VALID, inner.Proximal(prox.GroupL1(0.1, on="w"))), N)
    vector = BilevelProblem(lambda w, h: w - h, lambda w, h: w.sum(), torch.zeros(2, dtype=D), positive(0.1))
    with pytest.raises(InvalidValueError, match=r"`inner_loss` returned a tensor of shape \(2,\)"):
        bilevel.hypergradient(bilevel.over(vector, 2))


def test_batches_of_a_loader_hold_all_members() -> None:
    x, y = TRAIN
    halves: Any = [(x[:, i : i + 4], y[:, i : i + 4]) for i in (0, 4)]
    batches: Any = DataLoader(halves, batch_size=None)
    found = bilevel.hypergradient(bilevel.over(one(batches, VALID, inner.SGD(lr=0.05, steps=4)), N), "unroll")
    assert found.certificate.verdict == "exact" and found.params["w"].shape == (N, 2)
