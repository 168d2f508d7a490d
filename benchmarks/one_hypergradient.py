"""One hypergradient at an equal tolerance of the adjoint: time, and what it is worth.

    python -m benchmarks one-hypergradient

Every contender gets the same losses, inner solution, number of threads and relative residual. Each runs in a process of
its own and they take turns, so that what else the machine does falls on all alike; the ratio is the median over the
turns. The error is against CG in float64 at a residual of 1e-12. Compilation is not counted. Only bilevel's time
includes finding out how far the result can be trusted. "bilevel" is method="implicit", which chooses its linear solver
and has this tolerance by default.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import hand_written
from benchmarks.contenders import CONTENDERS, prepare, prepare_jaxopt
from benchmarks.report import Settings, duration, table
from benchmarks.worker import Stopwatch, Worker, WorkerError
from benchmarks.workloads import Workload, load

RTOL = {"f8": 1e-8, "f4": 1e-5}


def serve(task: dict[str, Any]) -> Any:
    """Load one contender; see `benchmarks.worker`."""
    workload = load(task["workload"], task["data"], task["small"])
    if task["contender"] == "reference":
        return lambda request: _reference(workload, request["path"])
    held = np.load(task["path"])
    params = [held[f"w{i}"].astype(workload.hparams.dtype) for i in range(len(workload.params))]
    run = _runner(task["contender"], workload, params, task["rtol"], task["steps"])
    run()  # warm up, compile

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        watch = Stopwatch()
        found, verdict = run()
        spent = watch.read()
        wrong = np.linalg.norm(np.asarray(found, "f8") - held["gradient"]) / np.linalg.norm(held["gradient"])
        return {**spent, "error": float(wrong), "verdict": verdict}

    return answer


def _runner(name: str, workload: Workload, params: list[np.ndarray], rtol: float, steps: int) -> Any:
    """Return a function of nothing that returns the hypergradient and, from bilevel, the verdict."""
    if name == "jaxopt":
        import jax.numpy as jnp

        jitted = prepare_jaxopt(workload, rtol)
        arrays = [jnp.asarray(p) for p in params], jnp.asarray(workload.hparams)
        return lambda: (np.asarray(jitted(*arrays)), "")
    w, h = [torch.from_numpy(p) for p in params], torch.from_numpy(workload.hparams)
    if not name.startswith("bilevel"):
        rival = prepare(name, workload, rtol, steps)
        return lambda: (rival(w, h).numpy(), "")
    import bilevel

    problem = bilevel.BilevelProblem(*workload.torch_losses(), w, h)
    method = bilevel.Implicit(bilevel.CG(rtol=rtol)) if name == "bilevel, CG" else "implicit"

    def ours() -> Any:
        found = bilevel.hypergradient(problem, method, params=w, on_untrusted="ignore")
        return found.gradient.numpy(), found.certificate.verdict

    return ours


def _reference(workload: Workload, path: str) -> dict[str, Any]:
    """Train to the end in float64 and write the inner solution and the hypergradient there."""
    import bilevel

    exact = workload.double()
    losses, h = exact.torch_losses(), torch.from_numpy(exact.hparams)
    problem = bilevel.BilevelProblem(*losses, exact.torch_params(), h)
    found = bilevel.hypergradient(problem, "cg", on_untrusted="ignore")
    params = [t.to(torch.from_numpy(workload.hparams).dtype) for t in found.params]  # as every contender gets them
    w = [t.double() for t in params]
    gradient, _, _, products = hand_written.hypergradient(*losses, w, h, 1e-12)
    np.savez(path, gradient=gradient.numpy(), **{f"w{i}": t.numpy() for i, t in enumerate(params)})
    return {"verdict": found.certificate.verdict, "products": products}


def run(settings: Settings) -> str:
    """Return the section as Markdown."""
    parts = []
    for name in settings.chosen(("a9a", "cleaning", "mlp"), quick=("a9a",)):
        with tempfile.TemporaryDirectory() as folder:
            parts.append(_compare(name, settings, Path(folder) / "reference.npz"))
    return "\n\n".join(parts)


def _compare(name: str, settings: Settings, path: Path) -> str:
    workload = load(name, settings.data, settings.small)
    rtol = RTOL[workload.hparams.dtype.str[1:]]
    task: dict[str, Any] = {
        "workload": name, "data": settings.data, "small": settings.small, "path": str(path), "rtol": rtol
    }  # fmt: skip
    reference = Worker(__name__, {**task, "contender": "reference"}, settings.python, settings.threads)
    reference.ask(path=str(path))
    reference.close()
    steps = _steps(workload, path, rtol)
    workers, failed = {}, {}
    for contender in CONTENDERS:
        try:
            started = {**task, "contender": contender, "steps": steps}
            workers[contender] = Worker(__name__, started, settings.python_of(contender), settings.threads)
        except WorkerError as error:
            failed[contender] = str(error)
    turns: dict[str, list[dict[str, Any]]] = {contender: [] for contender in workers}
    for _ in range(settings.repeats):
        for contender, worker in workers.items():
            turns[contender].append(worker.ask())
    for worker in workers.values():
        worker.close()
    rows = [_row(contender, found, turns["bilevel"], settings.clock) for contender, found in turns.items()]
    rows += [[contender, "-", "-", "-", f"failed: {why}"] for contender, why in failed.items()]
    title = f"{workload.words}; adjoint to {rtol:.0e} ({steps} products)"
    return table(title, ["contender", "time", "of bilevel's", "error", "verdict"], rows)


def _steps(workload: Workload, path: Path, rtol: float) -> int:
    """Return how many products the hand-written loop takes."""
    held = np.load(path)
    w = [torch.from_numpy(held[f"w{i}"]) for i in range(len(workload.params))]
    return hand_written.hypergradient(*workload.torch_losses(), w, torch.from_numpy(workload.hparams), rtol)[3]


def _row(contender: str, found: list[dict[str, Any]], ours: list[dict[str, Any]], clock: str) -> list[str]:
    ratios = [theirs[clock] / mine[clock] for theirs, mine in zip(found, ours, strict=True)]
    return [
        contender,
        duration(median(turn[clock] for turn in found)),
        f"{median(ratios):.2f}",
        f"{found[-1]['error']:.0e}",
        found[-1]["verdict"] or "none",
    ]
