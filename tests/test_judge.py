"""The judge of the benchmark of whole runs trains to the end, whatever the strengths."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.time_to_target import Judge
from benchmarks.workloads import load


def test_it_trains_to_the_end_where_strengths_lie_sixteen_decades_apart() -> None:
    workload = load("a9a", None, small=True)
    judge, h = Judge(workload), np.logspace(-8, 8, 123)
    judge.loss(h)
    w = [t.requires_grad_() for t in judge._w]
    inner, _ = workload.torch_losses()
    (gradient,) = torch.autograd.grad(inner(w, torch.from_numpy(h)), w)
    start = [t.requires_grad_() for t in workload.torch_params()]
    (first,) = torch.autograd.grad(inner(start, torch.from_numpy(h)), start)
    assert float(gradient.abs().max()) <= 1e-7 * float(first.abs().max())
