"""Measurements at the starting point of a problem: products against differences, the user's own functions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.response import ProblemResponse
from bilevel.vector import Vector, axpy, detach, dot, leaves, norm, scale, subtract

# Steps of the central differences, relative to the size of the variables. The long ones cross the kinks of a ReLU
# network; at the short ones rounding takes over, which `_rounding` knows.
STEPS = {torch.float64: tuple(10.0**-k for k in range(2, 9)), torch.float32: tuple(10.0**-k for k in range(1, 5))}
AGREES = {torch.float64: 1e-4, torch.float32: 2e-2}  # mismatch at the best step; 1e-8 and 1e-3 are usual
SETTLED = 1e-3  # differences of two steps that are this close have come to their limit


@dataclass(frozen=True)
class Differences:
    """A Hessian-vector product against central differences of gradients.

    Attributes:
        mismatch: relative, at the best step.
        agrees: the product is the derivative of the gradient at some step.
        settled: the differences have a limit, so a mismatch is the product's fault.
        kinks: they agree at short steps and not at long ones, and not as those of a smooth function would.
    """

    mismatch: float
    agrees: bool
    settled: bool
    kinks: bool


def random_vector(like: Vector, seed: int) -> Vector:
    """Return a vector of norm 1 that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    v = {name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for name, t in like.items()}
    return scale(1.0 / float(norm(v)), v)


def asymmetry(u: Vector, product_u: Vector, v: Vector, product_v: Vector) -> float:
    """Return |u·Hv - v·Hu| / (|u| |Hv| + |v| |Hu|), zero for a Hessian."""
    size = float(norm(u) * norm(product_v) + norm(v) * norm(product_u))
    return abs(float(dot(u, product_v) - dot(v, product_u))) / size if size > 0.0 else 0.0


def against_differences(
    response: ProblemResponse, lower: Vector, upper: Vector, v: Vector, product: Vector
) -> Differences:
    """Compare H v with (R(w + h v) - R(w - h v)) / 2h for a range of h."""
    first = next(iter(lower.values()))
    precision = torch.float64 if first.dtype == torch.float64 else torch.float32
    unit = float(norm(lower)) or 1.0
    size = max(response.start_gradient_norm(upper), float(norm(product)) * unit)
    found, mismatches = [], []
    for step in STEPS[precision]:
        h = step * unit
        ends = (response.residual(leaves(axpy(sign * h, v, lower)), upper) for sign in (1.0, -1.0))
        difference = scale(0.5 / h, subtract(*map(detach, ends)))
        largest = max(float(norm(difference)), float(norm(product)))
        rounding = 100.0 * torch.finfo(first.dtype).eps * size / h
        if rounding < 0.1 * largest or largest == 0.0:
            apart = max(0.0, float(norm(subtract(difference, product))) - rounding)
            found.append(difference)
            mismatches.append(apart / largest if largest > 0.0 else 0.0)
    if not mismatches:  # a gradient that is constant up to rounding
        return Differences(0.0, True, True, False)
    agrees = min(mismatches) <= AGREES[precision]
    pairs = [(float(norm(subtract(a, b))), float(norm(b))) for a, b in itertools.pairwise(found)]
    settled = any(apart <= SETTLED * whole for apart, whole in pairs)
    return Differences(min(mismatches), agrees, settled, agrees and _jumps(mismatches, AGREES[precision]))


def _jumps(mismatches: list[float], noise: float) -> bool:
    """Say whether mismatches fall otherwise than by the 100 a decade of a smooth function.

    Slower: every step crosses kinks. Far faster: shorter steps cross none. The longest step may be beyond the reach
    of any expansion, so there only the second counts.
    """
    for i, (long, short) in enumerate(itertools.pairwise(mismatches)):
        slow = i > 0 and short > 0.2 * long
        fast = short < 1e-4 * long
        if long > 10.0 * noise and (slow or fast):
            return True
    return False


def custom_functions(value: Tensor) -> list[str]:
    """Return the names of the user's own autograd Functions behind a tensor."""
    found: dict[str, None] = {}
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        owner = getattr(type(node), "_forward_cls", None)
        if owner is not None and not owner.__module__.startswith(("torch.", "bilevel.")):
            found[owner.__qualname__] = None
        waiting.extend(parent for parent, _ in node.next_functions)
    return list(found)
