"""Kill a run with SIGKILL at random moments, start it again, and compare its end with an uninterrupted run.

    python -m benchmarks.killed_run --kills 50

The run is minibatch training with dropout and BatchNorm, unrolled, under Adam; or, with `--lbfgs`, an implicit run
under L-BFGS. Everything a record holds but its seconds must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel

ROOT = Path(__file__).resolve().parent.parent


def stochastic_problem() -> bilevel.BilevelProblem:
    """Return a small network with dropout, BatchNorm and shuffled minibatches, whose learning rate is tuned."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    y = x[:, :1] - x[:, 1:2] ** 2 + 0.1 * torch.randn(60, 1, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(p: nn.Module, h: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        error: Tensor = ((p(batch[0]) - batch[1]) ** 2).mean()
        return error + h["l2"] * sum((t**2).sum() for t in p.parameters())

    def validation(p: nn.Module, h: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        error: Tensor = ((p.eval()(batch[0]) - batch[1]) ** 2).mean()
        return error

    return bilevel.BilevelProblem(
        loss,
        validation,
        model,
        {"lr": bilevel.positive(0.05), "l2": bilevel.positive(1e-3)},
        inner_solver=bilevel.inner.SGD(lr=lambda h: h["lr"], momentum=0.5, steps=12),
        inner_data=DataLoader(TensorDataset(x[:40], y[:40]), batch_size=8, shuffle=True),
        outer_data=(x[40:], y[40:]),
    )


def smooth_problem() -> bilevel.BilevelProblem:
    """Return a ridge regression with one strength a feature."""
    generator = torch.Generator().manual_seed(0)
    x, xv = (torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (60, 40))
    truth = torch.randn(20, generator=generator, dtype=torch.float64) * (torch.arange(20) < 5)
    y, yv = (a @ truth + 3.0 * torch.randn(len(a), generator=generator, dtype=torch.float64) for a in (x, xv))
    return bilevel.BilevelProblem(
        lambda w, h: ((x @ w - y) ** 2).mean() + (h * w**2).sum(),
        lambda w, h: ((xv @ w - yv) ** 2).mean(),
        torch.zeros(20, dtype=torch.float64),
        bilevel.positive(1.0, shape=(20,)),
    )


def run(path: str | None, smooth: bool) -> bilevel.Solution:
    """Run to the end, from the checkpoint where there is one."""
    place = None if path is None else bilevel.Checkpoint(path, steps=1)
    if smooth:
        return bilevel.solve(smooth_problem(), "cg", steps=60, tol=0.0, checkpoint=place, on_untrusted="ignore")
    return bilevel.solve(
        stochastic_problem(),
        "unroll",
        steps=80,
        outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1),
        tol=0.0,
        seed=1,
        checkpoint=place,
        on_untrusted="ignore",
    )


def outcome(solution: bilevel.Solution) -> str:
    """Return every digit of an end, but for the seconds."""
    records = [{**vars(record), "seconds": 0.0} for record in [solution.start, *solution.history]]
    structure = solution.hparams
    tensors = structure.values() if isinstance(structure, dict) else [structure]
    return repr([records, [t.tolist() for t in tensors], solution.status])


def child(smooth: bool, path: Path) -> subprocess.Popen[str]:
    """Start the run in a process of its own; return when its imports are done."""
    command = [sys.executable, "-m", "benchmarks.killed_run", "--child", str(path)] + ["--lbfgs"] * smooth
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def kill_once(smooth: bool, path: Path, after: float) -> tuple[bool, str]:
    """Kill a run after so many seconds and start it again; return whether it was killed before its end, and the end."""
    process = child(smooth, path)
    try:
        out, _ = process.communicate(timeout=after)
        return False, out.strip()
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    out, _ = child(smooth, path).communicate()
    return True, out.strip()


def main() -> None:
    """Count kills and identical ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="stop after so many kills")
    parser.add_argument("--lbfgs", action="store_true", help="the implicit run under L-BFGS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print("ready", flush=True)
        print(outcome(run(options.child, options.lbfgs)))
        return
    expected, chance = outcome(run(None, options.lbfgs)), random.Random(options.seed)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        _, unharmed = kill_once(options.lbfgs, Path(folder) / "run.pt", after=3600.0)
    seconds = time.perf_counter() - begin
    assert unharmed == expected, "the run itself is not reproducible"
    kills = same = 0
    while kills < options.kills:
        with tempfile.TemporaryDirectory() as folder:
            killed, end = kill_once(options.lbfgs, Path(folder) / "run.pt", chance.uniform(0.0, seconds))
        kills, same = kills + killed, same + (killed and end == expected)
    print(f"{kills} random kills, {same} ends identical to the uninterrupted one")
    if same < kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
