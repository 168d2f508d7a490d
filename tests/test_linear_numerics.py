"""Linear solvers: precision, Ritz values and Lanczos, the series of Neumann, and the dense matrix."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bilevel.operators import BLOCK, LinearOperator
from bilevel.solvers.linear import LinearSolver, Neumann
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.testing import KnownSystem
from bilevel.vector import Vector, dot, flatten, norm, unflatten
from problems_linear import SOLVERS, SYSTEMS, every_solver, relative, run


@every_solver
def test_float32_is_solved_in_float32(solver: LinearSolver) -> None:
    system = SYSTEMS["well-conditioned"]
    low = KnownSystem("float32", system.matrix.float(), system.rhs.float())
    loose = dataclasses.replace(solver, rtol=None) if hasattr(solver, "rtol") else solver  # type: ignore[type-var]
    solution = loose.solve(low.operator, low.vector(low.rhs))
    assert solution.status == "converged"
    assert all(t.dtype == torch.float32 for t in solution.value.values())
    assert relative(system, {"x": flatten(solution.value).double()}) <= 2e-5  # asked for 1e-5; A itself is rounded


@pytest.mark.parametrize("key", ["cg", "minres", "gmres"])
def test_asking_for_more_than_the_precision_ends_and_says_so(key: str) -> None:
    system = SYSTEMS["ill-conditioned"]
    low = KnownSystem("float32", system.matrix.float(), system.rhs.float())
    solver = dataclasses.replace(SOLVERS[key], rtol=1e-14)  # type: ignore[type-var]
    solution = solver.solve(low.operator, low.vector(low.rhs))
    assert solution.status in ("max_steps", "stagnated", "nonpositive curvature")
    assert solution.relative <= 1.0


def test_dots_of_float32_are_summed_in_float64() -> None:
    # In float32, 1 + 1e-8 is 1, ten thousand times.
    a = {"big": torch.ones(1), "small": torch.full((10_000,), 1e-4)}
    expected = 1.0 + 10_000 * float(torch.tensor(1e-4)) ** 2
    assert float(dot(a, a)) == pytest.approx(expected, rel=1e-15)
    assert float(norm(a)) == pytest.approx(math.sqrt(expected), rel=1e-15)


@pytest.mark.parametrize("key", ["cg", "minres", "gmres"])
@pytest.mark.parametrize("name", ["well-conditioned", "ill-conditioned", "two eigenvalues"])
def test_the_smallest_ritz_value_is_the_smallest_eigenvalue_at_the_end(key: str, name: str) -> None:
    system, solution = run(SOLVERS[key], name)
    lowest = float(torch.linalg.eigvalsh(system.matrix)[0])
    # At the end of a Krylov space its Ritz values are eigenvalues; the ill-conditioned one is found to 1e-9.
    assert solution.curvature == pytest.approx(lowest, rel=1e-8)


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("key", ["cg", "minres", "gmres"])
def test_the_smallest_ritz_value_bounds_the_eigenvalue_from_above(key: str, steps: int) -> None:
    system, solution = run(dataclasses.replace(SOLVERS[key], max_steps=steps), "well-conditioned")  # type: ignore[type-var]
    # The Krylov space by Arnoldi with full orthogonality, and its Ritz values.
    basis = torch.linalg.qr(
        torch.stack([torch.linalg.matrix_power(system.matrix, k) @ system.rhs for k in range(steps)], dim=1)
    ).Q
    ritz = float(torch.linalg.eigvalsh(basis.T @ system.matrix @ basis)[0])
    lowest = float(torch.linalg.eigvalsh(system.matrix)[0])
    assert solution.curvature is not None and solution.curvature >= lowest
    assert solution.curvature == pytest.approx(ritz, rel=1e-8)


def test_neumann_with_enough_terms_follows_its_series() -> None:
    system = SYSTEMS["well-conditioned"]
    step, terms = 0.04, 25
    solution = Neumann(max_steps=terms, rtol=0.0, step_size=step).solve(system.operator, system.vector(system.rhs))
    shrink = torch.eye(12, dtype=torch.float64) - step * system.matrix
    expected = step * sum(torch.linalg.matrix_power(shrink, k) @ system.rhs for k in range(terms))
    assert float((flatten(solution.value) - expected).norm() / expected.norm()) <= 1e-14
    assert (solution.steps, solution.status) == (terms, "max_steps")


def test_a_neumann_step_that_is_too_long_is_found_out() -> None:
    system = SYSTEMS["well-conditioned"]  # largest eigenvalue 20: the series converges below 2 / 20
    solution = Neumann(max_steps=1000, step_size=0.11).solve(system.operator, system.vector(system.rhs))
    assert solution.status == "diverged"
    assert solution.relative <= 1.0
    ends = Neumann(max_steps=10_000, step_size=0.099).solve(system.operator, system.vector(system.rhs))
    assert ends.status == "converged"


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("name", ["well-conditioned", "ill-conditioned", "indefinite", "times 1e-12", "identity"])
def test_lanczos_finds_the_ends_of_a_small_spectrum(name: str, steps: int) -> None:
    system = SYSTEMS[name]
    low, high = extreme_eigenvalues(system.operator, steps)
    values = torch.linalg.eigvalsh(system.matrix)
    rounding = 1e-13 * float(values.abs().max())
    assert float(values[0]) - rounding <= low <= float(values[-1]) + rounding, "a Ritz value lies in the spectrum"
    if steps >= 5:  # after one or two steps the random start may still hide the largest eigenvalue
        assert float(values[-1]) - rounding <= high <= 1.2 * float(values[-1])
    if steps >= 12:
        assert low == pytest.approx(float(values[0]), rel=1e-6, abs=rounding)
        assert high == pytest.approx(float(values[-1]), rel=1e-10)


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.4, 0.9], ids=lambda gap: f"gap {gap}")
def test_twelve_lanczos_steps_find_the_largest_of_many_eigenvalues(gap: float) -> None:
    ramp = torch.linspace(0.0, 1.0 - gap, 10_000, dtype=torch.float64)
    ramp[-1] = 1.0
    operator = LinearOperator(lambda v: {"w": ramp * v["w"]}, {"w": torch.zeros_like(ramp)}, symmetric=True)
    _, high = extreme_eigenvalues(operator)
    # A Neumann series needs it to a factor of 2; it was within 2 % on every spectrum tried.
    assert high == pytest.approx(1.0, abs=0.05)


def test_lanczos_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    extreme_eigenvalues(SYSTEMS["identity"].operator)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["well-conditioned", "indefinite", "non-symmetric", "one unknown"])
def test_dense_is_the_matrix(name: str) -> None:
    system = SYSTEMS[name]
    assert torch.equal(system.operator.dense(), system.matrix)
    shifted = system.operator.shifted(0.5).dense()
    assert torch.allclose(shifted, system.matrix + 0.5 * torch.eye(len(system.rhs)), rtol=0.0, atol=1e-15)


def test_dense_is_formed_in_blocks_by_the_batched_product() -> None:
    n = BLOCK + 3
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    like = {"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros(n - 1, dtype=torch.float64)}
    counts: list[int] = []

    def many(v: Vector) -> Vector:
        counts.append(len(v["a"]))
        rows = torch.cat([v["a"][:, None], v["b"]], dim=1) @ matrix.T
        return {"a": rows[:, 0], "b": rows[:, 1:]}

    operator = LinearOperator(lambda v: unflatten(matrix @ flatten(v), like), like, symmetric=False, matvecs=many)
    assert torch.equal(operator.dense(), matrix)
    assert counts == [BLOCK, 3]
    assert torch.allclose(operator.shifted(2.0).dense(), matrix + 2.0 * torch.eye(n, dtype=torch.float64), rtol=1e-15)
