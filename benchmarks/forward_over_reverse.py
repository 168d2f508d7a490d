"""One product with an inner Hessian: reverse over reverse, as the library takes it, beside forward over reverse.

    python -m benchmarks.forward_over_reverse

The vector-Jacobian product of w -> ∂g/∂w is, by symmetry, its derivative along the vector, which forward mode finds
without a second graph (Kemaev and others, Scalable meta-learning via mixed-mode differentiation, ICML 2025). Each row
is one whole recomputed step: loss, gradient and product, float32. Time of the processor, the best of some; peak of what
tensors take, watched operation by operation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.report import duration, size, table
from bilevel.measure import peak_memory
from bilevel.twice import twice_differentiable

CLASSES = 64


class Block(nn.Module):
    """Attention with four heads, and a layer of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.first(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.project(mixed)
        found: Tensor = x + self.narrow(F.gelu(self.widen(self.second(x))))
        return found


def transformer(width: int, depth: int) -> nn.Module:
    """Return blocks between an embedding and a linear layer."""
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(nn.Embedding(CLASSES, width), *blocks, nn.Linear(width, CLASSES))


def cases() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Return networks, each with inputs and labels."""
    torch.manual_seed(0)
    words = [torch.randint(0, CLASSES, (rows, 64)) for rows in (16, 16, 4, 4)]
    return {
        "784-256-10, batch of 64": (
            nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10)),
            torch.randn(64, 784),
            torch.randint(0, 10, (64,)),
        ),
        "transformer, 4 x 128, 16 x 64 words": (transformer(128, 4), words[0], words[1]),
        "transformer, 12 x 128, 4 x 64 words": (transformer(128, 12), words[2], words[3]),
    }


def ways(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """Return both ways to a product, and the gradient alone."""
    start = {name: p.detach() for name, p in model.named_parameters()}
    along = {name: 0.01 * torch.randn_like(p) for name, p in start.items()}

    def gradient(w: dict[str, Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        found: Tensor = functional_call(model, w, (x,))
        loss = F.cross_entropy(found.flatten(0, -2), y.flatten())
        return torch.autograd.grad(loss, list(w.values()), create_graph=create_graph)

    def leaves() -> dict[str, Tensor]:
        return {name: p.clone().requires_grad_() for name, p in start.items()}

    def reverse() -> tuple[Tensor, ...]:
        w = leaves()
        return torch.autograd.grad(gradient(w, create_graph=True), list(w.values()), list(along.values()))

    def forward() -> tuple[Tensor, ...]:
        with forward_ad.dual_level():
            w = {name: forward_ad.make_dual(p.clone(), along[name]).requires_grad_() for name, p in start.items()}
            return tuple(forward_ad.unpack_dual(g).tangent for g in gradient(w))

    return {
        "gradient alone": lambda: gradient(leaves()),
        "reverse over reverse": reverse,
        "forward over reverse": forward,
    }


def measured(run: Callable[[], Any], seconds: float = 2.0) -> tuple[float, int]:
    """Return the shortest time of a call and the peak of one."""
    with peak_memory(torch.device("cpu")) as peak:
        run()
    best, spent = math.inf, 0.0
    while spent < seconds:
        begin = time.process_time()
        run()
        last = time.process_time() - begin
        best, spent = min(best, last), spent + last
    return best, peak.bytes


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with twice_differentiable(recurrent_on_gpu=False):
        for name, case in cases().items():
            runs = ways(*case)
            pairs = zip(runs["reverse over reverse"](), runs["forward over reverse"](), strict=True)
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
            for way, run in runs.items():
                seconds, taken = measured(run)
                rows.append([f"{name}: {way}", duration(seconds), size(taken)])
    print(table("One recomputed step", ["", "time", "peak"], rows))


if __name__ == "__main__":
    main()
