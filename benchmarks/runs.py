"""Whole runs of every contender: the outer loop around its hypergradient.

`prepare_run(name, workload, tolerances)` returns `run(note, rate)`, which calls `note(h, loss)` after every outer step
and ends by itself or by what `note` raises. It returns why it ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from benchmarks import hand_written
from benchmarks.contenders import MAX_STEPS, prepare
from benchmarks.workloads import Workload

Note = Callable[[Any, float], None]
Run = Callable[[Note, Any], str]

# Name -> the contender of `benchmarks.contenders` whose library it needs.
RUNS = {
    "bilevel": "bilevel",
    "hand-written, L-BFGS": "hand-written",
    "hand-written, Adam": "hand-written",
    "torchopt, Adam": "torchopt",
    "betty-ml, Adam": "betty-ml",
    "boat-torch, Adam": "boat-torch",
    "jaxopt, Adam": "jaxopt",
    "optuna, 20 groups": "optuna",
}
BOUND = np.log(1e8)  # of logarithms, on both sides of the start; bilevel's own default


@dataclass(frozen=True)
class Tolerances:
    """Of rivals: relative to the first inner gradient, and to the right-hand side."""

    inner: float = 1e-5
    adjoint: float = 1e-3


def prepare_run(name: str, workload: Workload, tolerances: Tolerances) -> Run:
    """Load and warm up one contender."""
    if name == "bilevel":
        return partial(_bilevel, workload, tolerances != Tolerances())
    if name == "jaxopt, Adam":
        return _jaxopt(workload, tolerances)
    if name == "hand-written, L-BFGS":  # its line search wants digits
        tolerances = replace(tolerances, inner=1e-2 * tolerances.inner, adjoint=1e-2 * tolerances.adjoint)
        return partial(_lbfgs, _Inner(workload, tolerances), tolerances)
    level = _Inner(workload, tolerances)
    if name == "optuna, 20 groups":
        return partial(_optuna, level)
    if name == "hand-written, Adam":
        return partial(_adam, level, _WarmCG(level, tolerances))
    library = name.removesuffix(", Adam")
    w, h = level.start(), torch.from_numpy(workload.hparams)
    steps = hand_written.hypergradient(level.inner, level.outer, level.train(w, h), h, tolerances.adjoint)[3]
    hypergradient = prepare(library, workload, tolerances.adjoint, steps)
    return partial(_adam, level, lambda w, h: (hypergradient(w, h), level.outer_value(w, h)))


class _Inner:
    """The inner problem as the PyTorch rivals train it: L-BFGS from the last solution."""

    def __init__(self, workload: Workload, tolerances: Tolerances) -> None:
        self.workload = workload
        self.inner, self.outer = workload.torch_losses()
        w = [t.requires_grad_() for t in self.start()]
        first = torch.autograd.grad(self.inner(w, torch.from_numpy(workload.hparams)), w)
        self.gtol = tolerances.inner * float(hand_written.flatten(first).abs().max())

    def start(self) -> list[Tensor]:
        return self.workload.torch_params()

    def train(self, w: list[Tensor], h: Tensor) -> list[Tensor]:
        return hand_written.fit(self.inner, w, h, self.gtol)

    def outer_value(self, w: list[Tensor], h: Tensor) -> float:
        with torch.no_grad():
            return float(self.outer(w, h))


class _WarmCG:
    """The hand-written hypergradient, from the last adjoint."""

    def __init__(self, level: _Inner, tolerances: Tolerances) -> None:
        self._level, self._rtol = level, tolerances.adjoint
        self._adjoint: Tensor | None = None

    def __call__(self, w: list[Tensor], h: Tensor) -> tuple[Tensor, float]:
        gradient, self._adjoint, loss, _ = hand_written.hypergradient(
            self._level.inner, self._level.outer, w, h, self._rtol, self._adjoint
        )
        return gradient, loss


def _adam(level: _Inner, hypergradient: Any, note: Note, rate: float) -> str:
    """Adam on the logarithms, or on the values themselves where they may be negative."""
    positive, w = level.workload.positive, level.start()
    start = torch.from_numpy(level.workload.hparams)
    free = (start.log() if positive else start.clone()).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=rate)
    while True:
        h = free.detach().exp() if positive else free.detach().clone()
        w = level.train(w, h)
        gradient, loss = hypergradient(w, h)
        note(h.numpy(), loss)
        free.grad = gradient * h if positive else gradient
        optimizer.step()


def _lbfgs(level: _Inner, tolerances: Tolerances, note: Note, rate: None) -> str:
    """SciPy's L-BFGS-B, begun again from where its line search fails, until that gains nothing."""
    positive, w = level.workload.positive, level.start()
    hypergradient = _WarmCG(level, tolerances)
    h0 = level.workload.hparams
    dtype = torch.from_numpy(h0).dtype

    def function(free: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal w
        h = torch.from_numpy(np.exp(free) if positive else free.copy()).to(dtype)
        w = level.train(w, h)
        gradient, loss = hypergradient(w, h)
        note(h.numpy(), loss)
        return loss, (gradient * h if positive else gradient).double().numpy()

    start = (np.log(h0) if positive else h0).astype("f8")
    bounds = [(x - BOUND, x + BOUND) for x in start] if positive else None
    options = {"maxiter": 100_000, "maxfun": 100_000, "maxcor": 20, "gtol": 1e-12, "ftol": 1e-12}
    before, value = np.inf, 1e300
    while value < before * (1.0 - 1e-6):
        found = minimize(function, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        before, value, start = value, found.fun, found.x
    return str(found.message).lower().strip(": ")


def _bilevel(workload: Workload, tight: bool, note: Note, rate: None) -> str:
    """`bilevel.solve` as it comes."""
    import bilevel

    inner, outer = workload.torch_losses()
    last: list[Tensor] = []

    def watched(w: list[Tensor], h: Tensor) -> Tensor:
        last[:] = [h.detach()]  # L-BFGS accepts the point it evaluated last
        return outer(w, h)

    h = torch.from_numpy(workload.hparams)
    hparams = bilevel.positive(h) if workload.positive else h
    problem = bilevel.BilevelProblem(inner, watched, workload.torch_params(), hparams)
    solution = bilevel.solve(
        problem,
        steps=100_000,
        tol=1e-9 if tight else None,
        callbacks=[lambda record: note(last[0].numpy(), record.outer_loss)],
        on_untrusted="ignore",
        progress=False,
    )
    return solution.status


def _optuna(level: _Inner, note: Note, rate: None) -> str:
    """Optuna's default sampler on 20 values, each shared by a twentieth of the hyperparameters."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start, w = level.workload.hparams, level.start()
    group = np.arange(start.size) * 20 // start.size
    best: tuple[float, Any] = (np.inf, start)

    def objective(trial: Any) -> float:
        nonlocal w, best
        free = np.array([trial.suggest_float(f"group {i}", -5.0, 5.0) for i in range(20)])[group]
        h = (start * np.exp(free) if level.workload.positive else free).astype(start.dtype)
        w = level.train(w, torch.from_numpy(h))
        loss = level.outer_value(w, torch.from_numpy(h))
        best = min(best, (loss, h), key=lambda pair: pair[0])
        note(best[1], best[0])
        return loss

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=1_000_000)
    return "all trials"


def _jaxopt(workload: Workload, tolerances: Tolerances) -> Run:
    """JAXopt's L-BFGS with implicit differentiation by its CG, optax's Adam; a jitted step, compiled off the clock."""
    import jax

    jax.config.update("jax_enable_x64", workload.hparams.dtype == np.float64)
    import jax.numpy as jnp
    import jaxopt
    import optax

    from benchmarks.jax_losses import jax_losses

    inner, outer = jax_losses(workload)
    w0, h0 = [jnp.asarray(p) for p in workload.params], jnp.asarray(workload.hparams)
    size = float(optax.global_norm(jax.grad(inner)(w0, h0)))
    solver = jaxopt.LBFGS(
        inner, maxiter=2000, tol=tolerances.inner * size, history_size=20, implicit_diff=True,
        implicit_diff_solve=partial(jaxopt.linear_solve.solve_cg, tol=tolerances.adjoint, maxiter=MAX_STEPS),
    )  # fmt: skip
    natural = jnp.exp if workload.positive else lambda free: free

    def loss(free: Any, w: Any) -> Any:
        w = solver.run(w, natural(free)).params
        return outer(w, natural(free)), w

    @jax.jit
    def step(free: Any, w: Any, state: Any, rate: Any) -> Any:
        (value, w), gradient = jax.value_and_grad(loss, has_aux=True)(free, w)
        change, state = adam.update(gradient, state)
        return free - rate * change, w, state, value

    adam = optax.scale_by_adam()
    free0 = jnp.log(h0) if workload.positive else h0
    jax.block_until_ready(step(free0, w0, adam.init(free0), 0.1))

    def run(note: Note, rate: float) -> str:
        free, w, state = free0, w0, adam.init(free0)
        while True:
            before = free
            free, w, state, value = step(free, w, state, rate)
            note(np.asarray(natural(before)), float(value))

    return run
