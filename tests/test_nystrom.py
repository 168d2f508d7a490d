"""The Nyström inverse and preconditioner, against dense formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from benchmarks.problems import Dice, draw
from bilevel import CG, Cholesky, Implicit, Nystrom
from bilevel.operators import LinearOperator
from bilevel.solvers.linear import LinearSolution
from bilevel.testing import relative_error

N = 60
_GENERATOR = torch.Generator().manual_seed(0)
Q = torch.linalg.qr(torch.randn(N, N, generator=_GENERATOR, dtype=torch.float64)).Q
RHS = torch.randn(N, generator=_GENERATOR, dtype=torch.float64)
V = torch.randn(N, 5, generator=_GENERATOR, dtype=torch.float64)
EYE = torch.eye(N, dtype=torch.float64)
# Exponential decay onto a floor: what a few strong directions and a penalty make of a Hessian.
DECAY = Q @ torch.diag(torch.logspace(4, -6, N, dtype=torch.float64) + 1.0) @ Q.T


class Counted:
    """An operator that counts its products."""

    def __init__(self, matrix: Tensor, kept: Any = None) -> None:
        self.products, self.matrix = 0, matrix
        like = {"w": torch.zeros(len(matrix), dtype=matrix.dtype)}
        self.operator = LinearOperator(
            lambda v: self._times(v["w"]), like, symmetric=True, matvecs=lambda v: self._times(v["w"]), kept=kept
        )

    def _times(self, v: Tensor) -> dict[str, Tensor]:
        self.products += len(v) if v.dim() == 2 else 1
        return {"w": v @ self.matrix}


def solved(solver: Any, matrix: Tensor, kept: Any = None, rhs: Tensor = RHS) -> tuple[LinearSolution, int]:
    counted = Counted(matrix, kept)
    return solver.solve(counted.operator, {"w": rhs}), counted.products


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def columns(seed: int, rank: int) -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:rank]


@pytest.mark.parametrize("damping", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_inverse_is_the_papers_formula(rank: int, damping: float) -> None:
    """(C W^+ C^T + ρ I)^-1 b with C the columns of A and W their rows, formed densely."""
    solution, products = solved(Nystrom(rank=rank, damping=damping, sketch="columns", seed=3), DECAY)
    picked = columns(3, rank)
    C, W = DECAY[:, picked], DECAY[picked][:, picked]
    truth = torch.linalg.solve(C @ torch.linalg.pinv(W, hermitian=True) @ C.T + damping * EYE, RHS)
    assert relative(solution.value["w"], truth) <= 1e-10
    assert products == rank + 1
    assert solution.relative == pytest.approx(relative(DECAY @ truth, RHS), rel=1e-8)
    assert (
        solution.status == "low rank" and f"rank {rank} is that of the Hessian + {damping:.2g} I" in solution.notes[0]
    )


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
def test_full_rank_is_the_inverse(sketch: Any, scale: float) -> None:
    solution, products = solved(Nystrom(rank=1000, sketch=sketch), scale * DECAY)
    assert solution.status == "converged" and products == N + 1
    # Rounding times the condition of 1e4.
    assert relative(scale * solution.value["w"], torch.linalg.solve(DECAY, RHS)) <= 1e-11
    lowest = float(torch.linalg.eigvalsh(scale * DECAY)[0])
    assert solution.curvature == pytest.approx(lowest, rel=1e-8)
    damped, _ = solved(Nystrom(rank=1000, sketch=sketch, damping=1e-9 * scale), scale * DECAY)
    assert relative(scale * damped.value["w"], torch.linalg.solve(DECAY, RHS)) <= 1e-8  # 1e-9 of a curvature of 1


@pytest.mark.parametrize("rank", [1, 10])
def test_outside_of_the_sketch_the_curvature_is_measured(rank: int) -> None:
    """A multiple of the identity is solved at any rank, and so is one with as many strong directions added."""
    solution, products = solved(Nystrom(rank=rank), 3.0 * EYE)
    assert relative(solution.value["w"], RHS / 3.0) <= 1e-14
    assert (solution.status, products) == ("converged", rank + 2)
    assert solution.curvature == pytest.approx(3.0)
    strong = Q[:, :3] @ torch.diag(torch.tensor([1e9, 1e8, 1e7], dtype=torch.float64)) @ Q[:, :3].T + 0.5 * EYE
    solution, _ = solved(Nystrom(rank=10), strong)
    # Three eigenvectors are found up to 1 / 1e7, and the rest of the sketch sees a curvature of 0.5 where it is.
    assert relative(solution.value["w"], torch.linalg.solve(strong, RHS)) <= 1e-6
    assert "a curvature of 0.5 was measured" in solution.notes[0]


def test_a_larger_rank_leaves_a_smaller_error() -> None:
    truth = torch.linalg.solve(DECAY, RHS)
    energy = DECAY @ truth @ truth

    def error(rank: int) -> float:
        off = solved(Nystrom(rank=rank), DECAY)[0].value["w"] - truth
        return math.sqrt(float(off @ DECAY @ off / energy))

    errors = [error(rank) for rank in (5, 20, 40, 60)]
    assert errors == sorted(errors, reverse=True) and errors[0] < 1.0 and errors[2] < 0.2 and errors[3] < 1e-9


def test_negative_curvature_is_named() -> None:
    solution, _ = solved(Nystrom(), DECAY - 5.0 * EYE)
    assert solution.status == "nonpositive curvature"
    assert solution.curvature is not None and solution.curvature < 0.0
    inside = Q[:, :5] @ torch.diag(torch.tensor([9.0, 7.0, 5.0, 3.0, 2.0], dtype=torch.float64)) @ Q[:, :5].T
    assert solved(Nystrom(), inside)[0].status == "singular"
    assert solved(Nystrom(), inside, rhs=inside @ RHS)[0].status == "converged"


def test_the_random_state_is_left_and_not_read() -> None:
    before = torch.get_rng_state()
    first, _ = solved(Nystrom(rank=5), DECAY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again, _ = solved(Nystrom(rank=5), DECAY)
    other, _ = solved(Nystrom(rank=5, seed=1), DECAY)
    assert torch.equal(first.value["w"], again.value["w"])
    assert not torch.allclose(first.value["w"], other.value["w"])


# The preconditioner


def test_the_preconditioner_is_the_papers_formula() -> None:
    rank, damping = 10, 0.3
    made = Nystrom(rank=rank, damping=damping, sketch="columns", seed=2).precondition(Counted(DECAY).operator)
    picked = columns(2, rank)
    approximation = DECAY[:, picked] @ torch.linalg.inv(DECAY[picked][:, picked]) @ DECAY[picked]
    values, vectors = torch.linalg.eigh(approximation)
    values, U = values[-rank:], vectors[:, -rank:]
    inverse = (values[0] + damping) * U @ torch.diag(1.0 / (values + damping)) @ U.T + EYE - U @ U.T
    assert relative(made.inverse(RHS), inverse @ RHS) <= 1e-10
    assert made.smallest == 1.0
    assert float(torch.linalg.eigvalsh(inverse)[-1]) == pytest.approx(1.0 / made.smallest)


def test_a_decaying_spectrum_takes_far_fewer_products() -> None:
    plain, plain_products = solved(CG(preconditioner=None), DECAY)
    sketched, products = solved(CG(preconditioner="nystrom"), DECAY)
    truth = torch.linalg.solve(DECAY, RHS)
    for solution in (plain, sketched):
        assert solution.status == "converged"
        assert relative(solution.value["w"], truth) <= 1e-8 * float(RHS.norm() / truth.norm())  # |r| / λ, λ = 1
    assert products < 0.6 * plain_products  # 20 of them for the sketch
    assert sketched.steps < 0.3 * plain.steps
    kept, products = solved(CG(preconditioner="nystrom"), DECAY, sketched.kept)
    assert (kept.steps, products) == (sketched.steps, sketched.steps + 1)
    assert kept.notes == ("CG was preconditioned by a Nyström sketch of rank 20, kept",)
    lowest = float(torch.linalg.eigvalsh(DECAY)[0])
    assert sketched.curvature is not None and 0.5 * lowest <= sketched.curvature <= 1.01 * lowest


def test_a_kept_sketch_is_drawn_again_once_it_has_cost_more_than_a_new_one() -> None:
    solver, other = CG(preconditioner=Nystrom(rank=26)), DECAY + V @ V.T
    first, _ = solved(solver, DECAY)
    fresh, _ = solved(solver, other)
    kept, wasted, counts = first.kept, 0, []
    for _ in range(6):
        solution, products = solved(solver, other, kept)
        assert relative(other @ solution.value["w"], RHS) <= 1e-8
        counts.append(products)
        kept, wasted = solution.kept, wasted + solution.steps - first.steps
        if kept is None:
            break
    assert kept is None and 26 - 11 < wasted < 26 + 11  # in whole solves of 11 each
    last, products = solved(solver, other, kept)
    assert products == 26 + last.steps + 1 and last.steps == fresh.steps
    assert last.steps < counts[0] - 1  # it was worth it


def test_the_inverse_draws_a_kept_sketch_again_when_the_residual_grows() -> None:
    solver = Nystrom(rank=N - 2)
    first, products = solved(solver, DECAY)
    assert products == N
    near, products = solved(solver, 1.001 * DECAY, first.kept)
    assert products == 2 and near.kept["left"] == first.kept["left"]
    far, products = solved(solver, Q.T @ DECAY @ Q, first.kept)
    fresh, _ = solved(solver, Q.T @ DECAY @ Q)
    assert products == 2 + N
    assert torch.equal(far.value["w"], fresh.value["w"]) and far.kept["left"] == fresh.kept["left"]


# Through the estimator


def ridge(n: int = 40) -> bilevel.BilevelProblem:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(80, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    y, target = (torch.randn(m, generator=generator, dtype=torch.float64) for m in (80, n))
    return bilevel.BilevelProblem(
        lambda w, h: ((X @ w - y) ** 2).mean() + (h * w**2).sum(),
        lambda w, h: ((w - target) ** 2).sum(),
        torch.zeros(n, dtype=torch.float64),
        bilevel.positive(1e-2, shape=(n,)),
    )


def test_a_small_curvature_that_a_few_products_do_not_show_is_not_missed() -> None:
    """39 variables of condition 1e3: the residual is small at 10 products, the smallest curvature shows at 16."""
    known = draw(Dice(1018), sizes=(3, 40), condition=(1, 1e4)).known
    found = bilevel.hypergradient(known.problem(), "nystrom", params=known.truth.params, on_untrusted="ignore")
    assert found.certificate.error == pytest.approx(relative_error(found.gradient, known.truth.gradient), rel=0.1)
    assert not found.certificate.trusted


def test_the_certificate_says_what_was_done() -> None:
    found = bilevel.hypergradient(ridge(), Implicit(Nystrom(rank=5)), on_untrusted="ignore")
    truth = bilevel.hypergradient(ridge(), Implicit(Cholesky()))
    error = relative(found.gradient, truth.gradient)
    assert found.certificate.verdict != "exact" and error > 1e-3
    assert found.certificate.error == pytest.approx(error, rel=0.5)
    assert any("Nyström inverse is of rank 5" in note for note in found.certificate.notes)
    damped = bilevel.hypergradient(ridge(), Implicit(Nystrom(rank=40, damping=0.1)), on_untrusted="ignore")
    assert any("Hessian + 0.1 I" in note for note in damped.certificate.notes)
    assert damped.certificate.verdict != "exact" and relative(damped.gradient, truth.gradient) > 1e-3
    whole = bilevel.hypergradient(ridge(), Implicit(Nystrom(rank=40)))
    assert whole.certificate.verdict == "exact" and relative(whole.gradient, truth.gradient) <= 1e-8


@pytest.mark.parametrize("name", ["nystrom", "lbfgs"])
def test_what_is_kept_is_saved_in_checkpoints(name: Any, tmp_path: Any) -> None:
    method = Implicit(CG(preconditioner=name))
    whole = bilevel.solve(ridge(), method, steps=6)

    class Stop(Exception):
        pass

    def stop(record: bilevel.Record) -> None:
        if record.step == 3:
            raise Stop

    keeper = bilevel.Checkpoint(tmp_path / "run.pt", steps=1)
    with pytest.raises(Stop):
        bilevel.solve(ridge(), method, steps=6, checkpoint=keeper, callbacks=[stop])
    resumed = bilevel.solve(ridge(), method, steps=6, checkpoint=keeper)
    assert torch.equal(resumed.hparams, whole.hparams)
    assert [r.outer_loss for r in resumed.history] == [r.outer_loss for r in whole.history]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Nystrom(rank=0), "`rank` is 0"),
        (lambda: Nystrom(damping=0.0), "`damping` is 0.0"),
        (lambda: Nystrom(sketch="rows"), "`sketch` is 'rows'"),  # type: ignore[arg-type]
        (lambda: Nystrom(seed=0.5), "`seed` is 0.5"),  # type: ignore[arg-type]
        (lambda: CG(preconditioner=Nystrom), "`preconditioner` is <class"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense_are_refused(build: Any, named: str) -> None:
    with pytest.raises(bilevel.InvalidValueError, match=named):
        build()
