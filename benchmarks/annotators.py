"""`solve` with every method on one real problem: digits, labelled by annotators of whom half guess.

    python -m benchmarks.annotators [--steps 30] [--seed 0] [--methods cg unroll ...]

The labels of 20 annotators, 20 images each, are given to softmax regression with a weight for each annotator. Ten of
them guess. The weights (0 to 1) are tuned from 0.5 on 200 clean validation labels by every method of the table. One
that differentiates the inner loop gets heavy-ball SGD, the others L-BFGS; the single-loop ones need neither.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import bilevel
from bilevel import METHODS, BilevelProblem, inner
from bilevel.solvers import Estimator, about, estimator

ANNOTATORS, IMAGES, VALIDATION = 20, 20, 200
OBJECTS: dict[str, Estimator] = {"PBGD()": bilevel.PBGD(), "BOME()": bilevel.BOME()}  # these have no name
LOOP = 200
STRENGTH = 1e-3  # of the L2 penalty, small: data and weights shall decide


@dataclass(frozen=True)
class Digits:
    """Images and labels, and who labelled what.

    Attributes:
        train: images `(400, 64)`, labels as given, the number of the annotator of each.
        valid: images and clean labels; so is test.
        guesses: `(20,)`, True for an annotator who guesses.
    """

    train: tuple[Tensor, Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    guesses: Tensor


def read_digits(seed: int = 0) -> Digits:
    """Return scikit-learn's digits, with the labels of half of the annotators replaced by guesses."""
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    dice = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=dice)
    x, y = images[order] / 16.0, labels[order]
    n = ANNOTATORS * IMAGES
    who = torch.arange(n) % ANNOTATORS
    guesses = torch.arange(ANNOTATORS) < ANNOTATORS // 2
    given = torch.where(guesses[who], torch.randint(10, (n,), generator=dice), y[:n])
    middle = n + VALIDATION
    return Digits((x[:n], given, who), (x[n:middle], y[n:middle]), (x[middle:], y[middle:]), guesses)


def outer_loss(w: Any, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss on clean labels."""
    return torch.nn.functional.cross_entropy(batch[0] @ w["weight"] + w["bias"], batch[1])


def inner_loss(w: Any, h: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the loss on the annotators' labels, each image with the weight of its annotator."""
    x, y, who = batch
    losses = torch.nn.functional.cross_entropy(x @ w["weight"] + w["bias"], y, reduction="none")
    return (h[who] * losses).mean() + STRENGTH * (w["weight"] ** 2).sum()


def problem_for(method: str | Estimator, digits: Digits, loop: int = LOOP) -> BilevelProblem:
    """Return the problem with the inner solver that the method needs; one that is unrolled takes `loop` steps."""
    solver = inner.SGD(lr=0.5, momentum=0.9, steps=loop) if about(estimator(method)).unrolls else None
    start = {
        "weight": torch.zeros(digits.train[0].shape[1], 10, dtype=torch.float64),
        "bias": torch.zeros(10, dtype=torch.float64),
    }
    weights = bilevel.interval(0.5, 0.0, 1.0, shape=ANNOTATORS)
    return BilevelProblem(inner_loss, outer_loss, start, weights, solver, digits.train, digits.valid)


@dataclass(frozen=True)
class Outcome:
    """What became of one method: validation loss, test loss and accuracy, and how well guessers are told."""

    method: str
    valid: float
    test: float
    accuracy: float
    told: float
    seconds: float
    verdicts: str


def run(method: str, digits: Digits, steps: int, settings: Estimator | None = None, loop: int = LOOP) -> Outcome:
    """Tune the annotators' weights by one method, with its default settings or others."""
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bilevel.UntrustedHypergradientWarning)  # they are in the table
        solution = bilevel.solve(
            problem_for(settings or method, digits, loop),
            settings or method,
            steps=steps,
            seed=0,
            progress=False,
            outer_optimizer=adam,
        )
    seconds = time.perf_counter() - begin
    return outcome(method, solution.params, solution.hparams, digits, seconds, [r.verdict for r in solution.history])


def adam(tensors: list[Tensor]) -> torch.optim.Optimizer:
    """One outer optimizer for all, so that the methods differ and not their line searches."""
    return torch.optim.Adam(tensors, lr=0.3)


def outcome(method: str, w: Any, h: Tensor, digits: Digits, seconds: float, verdicts: list[str]) -> Outcome:
    """Measure a model and its annotators' weights."""
    logits = digits.test[0] @ w["weight"] + w["bias"]
    accuracy = float((logits.argmax(1) == digits.test[1]).double().mean())
    # The chance that an honest annotator has a larger weight than a guesser (area under the curve).
    pairs = h[~digits.guesses][:, None] - h[digits.guesses][None, :]
    told = float((pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean())
    valid, test = (float(outer_loss(w, h, part)) for part in (digits.valid, digits.test))
    counts = {v: verdicts.count(v) for v in ("exact", "approximate", "untrusted") if v in verdicts}
    return Outcome(method, valid, test, accuracy, told, seconds, ", ".join(f"{n} {v}" for v, n in counts.items()))


def untuned(digits: Digits) -> Outcome:
    """Return what equal weights give."""
    problem = problem_for("direct", digits)
    found = bilevel.hypergradient(problem, "direct")
    return outcome("equal weights", found.params, torch.full((ANNOTATORS,), 0.5).double(), digits, 0.0, [])


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as Markdown."""
    lines = [
        "| method | validation loss | test loss | test accuracy | guessers told | seconds | verdicts |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| `{o.method}` | {o.valid:.3f} | {o.test:.3f} | {o.accuracy:.1%} | {o.told:.2f} | {o.seconds:.1f} | "
        f"{o.verdicts} |"
        for o in outcomes
    ]
    return "\n".join(lines)


def main() -> None:
    """Run every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="outer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    every = [*METHODS, *OBJECTS]
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = read_digits(options.seed)
    outcomes = [untuned(digits)]
    for method in options.methods:
        outcomes.append(run(method, digits, options.steps, OBJECTS.get(method)))
        print(table(outcomes[-1:]).splitlines()[-1], flush=True)
    print()
    print(table(outcomes))


if __name__ == "__main__":
    main()
