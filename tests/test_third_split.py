"""The third split: its loss in the history, early stopping on it, and a run that is otherwise the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import BilevelProblem, solve
from problems_solve import sgd

FEATURES = 6


def rows(seed: int, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return x, x[:, 0] + 2.0 * torch.randn(count, generator=generator, dtype=torch.float64)


def inner_loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
    value: Tensor = ((batch[0] @ w - batch[1]) ** 2).mean() + (h * w**2).sum()
    return value


def outer_loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
    value: Tensor = ((batch[0] @ w - batch[1]) ** 2).mean()
    return value


def ridge(**third: Any) -> BilevelProblem:
    """Per-feature ridge on twelve rows: three rows of validation data, which it overfits."""
    start, strengths = torch.zeros(FEATURES, dtype=torch.float64), bilevel.positive(1.0, shape=(FEATURES,))
    return BilevelProblem(inner_loss, outer_loss, start, strengths, None, rows(0), rows(1, 3), **third)


def shape(solution: bilevel.Solution) -> list[Any]:
    return [(r.outer_loss, r.hypergradient_norm, r.gradients, r.products, r.hparams) for r in solution.history]


def test_the_test_loss_is_that_of_the_inner_solution_and_changes_nothing() -> None:
    test = rows(2, 40)
    plain, watched = (solve(problem, steps=4) for problem in (ridge(), ridge(test_data=test)))
    assert shape(plain) == shape(watched) and plain.certificate == watched.certificate
    assert watched.test_loss == watched.history[-1].test_loss == watched.history[-1]["test_loss"]
    x, y = rows(0)
    for record in (watched.start, *watched.history):
        w = torch.linalg.solve(
            x.T @ x / 12 + torch.diag(torch.tensor(record.hparams["hparams"]).double()), x.T @ y / 12
        )
        # Records of a run with slack are of inner solutions good to about six digits.
        assert record.test_loss == pytest.approx(float(outer_loss(w, w, test)), rel=1e-5)
    assert plain.test_loss is None and plain.history[-1].test_loss is None
    assert "test loss" in watched.summary() and "test loss" not in plain.summary()
    labels = [line.get_label() for line in watched.plot().axes[0].lines]
    assert labels == ["outer loss", "inner loss", "test loss"]


def test_a_stream_is_read_whole_and_weighted_by_rows() -> None:
    x, y = rows(2, 10)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator)
    before, state = torch.get_rng_state(), generator.get_state()
    found = solve(ridge(test_data=loader), steps=1, tol=0.0)
    whole = solve(ridge(test_data=(x, y)), steps=1, tol=0.0)
    assert found.test_loss == pytest.approx(whole.test_loss, rel=1e-12)  # batches of 4, 4 and 2
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(generator.get_state(), state)


def test_losses_that_close_over_their_data_and_random_ones() -> None:
    x, y = rows(2)
    problem = BilevelProblem(
        lambda w, h: inner_loss(w, h, rows(0)),
        lambda w, h: outer_loss(w, h, rows(1)),
        torch.zeros(FEATURES, dtype=torch.float64),
        bilevel.positive(1.0),
        test_loss=lambda w, h: ((x @ w - y) ** 2 * torch.rand(12, dtype=torch.float64)).mean(),
    )
    first, second = solve(problem, steps=2, seed=0), solve(problem, steps=2, seed=1)
    assert first.test_loss == second.test_loss  # the same numbers at every call


def test_buffers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 1)).double()

    def loss(net: Any, h: Tensor, batch: Any) -> Tensor:
        penalty: Tensor = h * sum((p**2).sum() for p in net.parameters())
        value: Tensor = ((net(batch[0])[:, 0] - batch[1]) ** 2).mean() + penalty
        return value

    def problem(**third: Any) -> BilevelProblem:
        solver = bilevel.inner.SGD(lr=0.1, steps=5)
        return BilevelProblem(loss, loss, net, bilevel.positive(0.1), solver, rows(0), rows(1), **third)

    plain, watched = (
        solve(p, "unroll", steps=2, outer_optimizer=sgd, on_untrusted="ignore")
        for p in (problem(), problem(test_data=rows(2)))
    )
    assert shape(plain) == shape(watched)
    assert torch.equal(plain.params[0].running_mean, watched.params[0].running_mean)


def test_a_family_has_the_mean_of_its_members() -> None:
    x, y = torch.stack([rows(0)[0], rows(1)[0]]), torch.stack([rows(0)[1], rows(1)[1]])
    member = BilevelProblem(
        inner_loss, outer_loss, torch.zeros(FEATURES, dtype=torch.float64), bilevel.positive(1.0), None,
        (x, y), (x, y), test_data=(2.0 * x, 2.0 * y),
    )  # fmt: skip
    solution = solve(bilevel.over(member, 2), steps=1)
    assert solution.test_loss == pytest.approx(4.0 * solution.outer_loss, rel=1e-6)


@pytest.mark.parametrize("optimizer", [None, sgd], ids=["lbfgs", "sgd"])
def test_patience_returns_the_best_point(optimizer: Any) -> None:
    test = rows(2, 40)
    solution = solve(ridge(test_data=test), outer_optimizer=optimizer, patience=3)
    losses = [record.test_loss for record in (solution.start, *solution.history)]
    best = losses.index(min(losses))  # type: ignore[type-var]
    assert solution.status.startswith("patience: the test loss") and f"step {best}" in solution.status
    assert len(solution.history) == best + 3 and solution.step == best
    assert solution.test_loss == losses[best]
    assert float(outer_loss(solution.params, solution.params, test)) == pytest.approx(solution.test_loss, rel=1e-12)
    assert float(outer_loss(solution.params, solution.params, rows(1, 3))) == pytest.approx(
        solution.outer_loss, rel=1e-8
    )
    assert solution.history[best - 1].hparams["hparams"] == solution.hparams.tolist()


def test_a_run_that_ends_otherwise_returns_the_best_point_too() -> None:
    solution = solve(ridge(test_data=rows(2, 40)), steps=12, patience=100)
    losses = [record.test_loss for record in (solution.start, *solution.history)]
    assert solution.test_loss == min(losses) < losses[-1]  # type: ignore[type-var,operator]
    assert solution.status.startswith("steps: all 12") and "lowest" in solution.status
    assert f"-> {solution.test_loss:.6g}" in solution.summary()


def test_the_returned_point_is_saved(tmp_path: Path) -> None:
    solution = solve(ridge(test_data=rows(2, 40)), patience=2)
    solution.save(tmp_path / "solution.pt")
    loaded = bilevel.Solution.load(tmp_path / "solution.pt")
    assert (loaded.step, loaded.test_loss) == (solution.step, solution.test_loss)
    assert loaded.summary() == solution.summary()


@pytest.mark.parametrize(("optimizer", "broken"), [(None, 1), (None, 4), (sgd, 5)])
def test_a_run_with_patience_resumes_exactly(tmp_path: Path, optimizer: Any, broken: int) -> None:
    def stop(record: bilevel.Record) -> None:
        if record.step == broken:
            raise RuntimeError("power cut")

    arguments: dict[str, Any] = {"outer_optimizer": optimizer, "patience": 4, "steps": 8}
    whole = solve(ridge(test_data=rows(2, 40)), **arguments)
    place = bilevel.Checkpoint(tmp_path / "run.pt", steps=1)
    with pytest.raises(RuntimeError, match="power cut"):
        solve(ridge(test_data=rows(2, 40)), checkpoint=place, callbacks=[stop], **arguments)
    again = solve(ridge(test_data=rows(2, 40)), checkpoint=place, **arguments)
    assert torch.equal(whole.hparams, again.hparams) and torch.equal(whole.params, again.params)
    assert (whole.status, whole.step, whole.test_loss) == (again.status, again.step, again.test_loss)
    assert [r.test_loss for r in whole.history] == [r.test_loss for r in again.history]
    with pytest.raises(bilevel.InvalidValueError, match="another run"):
        solve(ridge(test_data=rows(2, 40)), outer_optimizer=optimizer, checkpoint=place)


def test_misuse_is_named() -> None:
    closing = (lambda w, h: (h * w**2).sum(), lambda w, h: (w**2).sum(), torch.zeros(2), bilevel.positive(1.0))
    with pytest.raises(bilevel.InvalidValueError, match="`test_data` is given, but `outer_loss` takes no batch"):
        BilevelProblem(*closing, test_data=torch.zeros(2))
    with pytest.raises(bilevel.InvalidTypeError, match=r"`test_loss` takes .*because `test_data` is not given"):
        ridge(test_loss=outer_loss)
    with pytest.raises(bilevel.InvalidTypeError, match=r"`test_loss` takes .*because `test_data` is given"):
        ridge(test_data=rows(2), test_loss=lambda w, h: w.sum())
    with pytest.raises(bilevel.InvalidValueError, match="`test_data` is an iterator that cannot go back"):
        ridge(test_data=iter([rows(2)]))
    with pytest.raises(bilevel.InvalidTypeError, match="`test_data` is a list of 2 batches"):
        ridge(test_data=[rows(2), rows(3)])
    with pytest.raises(bilevel.InvalidValueError, match="`test_data` has no batch"):
        solve(ridge(test_data=DataLoader(TensorDataset(*rows(2)), batch_size=40, drop_last=True)), steps=1)
    with pytest.raises(bilevel.InvalidValueError, match=r"`patience` is 3, and the problem has no third split"):
        solve(ridge(), patience=3)
    for patience in (0, 2.5, True):
        with pytest.raises(bilevel.InvalidValueError, match=r"`patience` is .*, expected a whole number"):
            solve(ridge(test_data=rows(2)), patience=patience)  # type: ignore[arg-type]
    with pytest.raises(bilevel.InvalidValueError, match="`test_loss` returned a tensor of shape"):
        solve(ridge(test_loss=lambda w, h: w), steps=1)


def test_a_dry_run_looks_at_it_too() -> None:
    def fails(w: Tensor, h: Tensor) -> Tensor:
        raise ValueError("no such column")

    found = {
        (finding.level, finding.subject): finding.message for finding in bilevel.check(ridge(test_loss=fails)).findings
    }
    assert "no such column" in found["error", "test_loss"]
    outer = rows(1, 3)
    leaking = BilevelProblem(
        inner_loss, outer_loss, torch.zeros(FEATURES).double(), bilevel.positive(1.0), None, rows(0), outer, outer
    )
    assert "the same data" in bilevel.check(leaking).findings[0].message
    assert not any(finding.subject.startswith("test") for finding in bilevel.check(ridge(test_data=rows(2))).findings)


def test_a_test_loss_that_is_not_finite_stops_the_run_with_the_last_good_step() -> None:
    calls = 0

    def bad(w: Tensor, h: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return w.sum() * (torch.nan if calls == 3 else 1.0)

    with pytest.raises(bilevel.NonFiniteError, match="outer step 2: the test loss is nan") as caught:
        solve(ridge(test_loss=bad), outer_optimizer=sgd)
    assert caught.value.quantity == "test loss" and len(caught.value.solution.history) == 1
