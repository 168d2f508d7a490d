"""Random healthy problems and random traps, and how often a study draws each."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import healthy_cases, trap_problems, trap_training
from benchmarks.cases import Case
from benchmarks.problems import Dice

# Draw, and how often: healthy problems are half of all.
CASES: dict[Callable[[Dice], Case], int] = {
    healthy_cases.plain: 7,
    healthy_cases.orthonormal: 2,
    healthy_cases.coupled: 2,
    healthy_cases.scalar: 1,
    healthy_cases.scaled: 2,
    healthy_cases.dropout: 1,
    healthy_cases.float32: 2,
    trap_problems.ill_float32: 1,
    trap_problems.ill_float64: 1,
    trap_problems.saddle: 1,
    trap_problems.indefinite: 1,
    trap_problems.singular: 1,
    trap_problems.inconsistent: 1,
    trap_training.not_converged: 3,
    trap_training.early: 1,
    trap_training.neumann_diverges: 1,
    trap_training.short_window: 1,
    trap_training.learning_rate: 1,
    trap_problems.once: 1,
    trap_training.adamw: 1,
    trap_problems.zero: 1,
    trap_training.minibatches: 1,
    trap_problems.separable: 1,
    trap_problems.noise_free: 1,
    trap_training.resting_step: 1,
}


def draw_case(seed: int) -> Case:
    """Return the case of a seed."""
    dice = Dice(seed)
    return dice.choice([build for build, times in CASES.items() for _ in range(times)])(dice)
