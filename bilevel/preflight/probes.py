"""Measurements at the starting point of a problem: products against differences, steps with their graphs, times."""

from __future__ import annotations

import itertools
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.response import ProblemResponse
from bilevel.vector import Vector, axpy, detach, dot, is_finite, leaves, norm, scale, subtract

# Steps of the central differences, relative to the size of the variables. The long ones cross the kinks of a ReLU
# network; at the short ones rounding takes over, which `_rounding` knows.
STEPS = {torch.float64: tuple(10.0**-k for k in range(2, 9)), torch.float32: tuple(10.0**-k for k in range(1, 5))}
AGREES = {torch.float64: 1e-4, torch.float32: 2e-2}  # mismatch at the best step; 1e-8 and 1e-3 are usual
SETTLED = 1e-3  # differences of two steps that are this close have come to their limit
POWER_STEPS = 4


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
        if owner is not None and not owner.__module__.startswith("torch."):
            found[owner.__qualname__] = None
        waiting.extend(parent for parent, _ in node.next_functions)
    return list(found)


@dataclass
class Saved:
    """The memory that graphs hold on to: storages by address."""

    storages: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()

    def beyond(self, other: Saved) -> int:
        """Return the bytes that are not in `other` as well."""
        return sum(size for address, size in self.storages.items() if address not in other.storages)


class _Held:
    """A tensor that a graph saves, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saved_memory() -> Iterator[Saved]:
    """Count what the graphs built inside save for their derivatives, and still hold at the end."""
    saved = Saved()
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        one = _Held(tensor.detach())  # the tensor itself would make a cycle with its own node
        held.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        yield saved
    for one in held:
        if one.tensor.layout == torch.strided:
            saved.add(one.tensor)


@dataclass(frozen=True)
class Walk:
    """A few steps of the inner solver, each with its graph.

    Attributes:
        total: steps of the whole inner loop.
        bytes_per_step: what the graph of one step holds, without what all steps share.
        seen: the hyperparameters that a step uses.
        growth: the factor by which one step back lengthens an adjoint.
        broke_at: the step after which a variable was not finite; None if all were.
        end: the inner variables after them.
    """

    total: int
    bytes_per_step: int
    seen: frozenset[str]
    growth: float
    broke_at: int | None
    end: Vector


def walk(response: ProblemResponse, lower: Vector, upper: Vector, adjoint: Vector) -> Walk:
    """Take the first two steps, one as in the middle and one as at the end of the inner loop."""
    total = response.unroll_steps()
    h = leaves(upper)
    w, state = detach(lower), response.initial_state(lower)
    seen: set[str] = set()
    memory: list[Saved] = []
    graphs: list[Any] = []  # kept: freed memory would be given out again, and counted as shared
    growth, broke_at = 0.0, None
    for t in sorted({0, 1, total // 2, total - 1} & set(range(total))):
        w = leaves(w)
        state = optree.tree_map(lambda x: x.detach().requires_grad_() if _is_float(x) else x, state)
        with saved_memory() as saved:
            after, state = response.step(w, state, h, t)
        tensors = [x for x in (*after.values(), *optree.tree_leaves(state)) if _is_float(x)]
        for tensor in tensors:
            saved.add(tensor)
        attached = [x for x in tensors if x.requires_grad]
        with response.at(w, h):
            pulled = torch.autograd.grad(
                attached, list(h.values()), [torch.ones_like(x) for x in attached], retain_graph=True, allow_unused=True
            )
            if t == min(1, total - 1):
                growth = _growth(w, after, adjoint)
        seen |= {name for name, g in zip(h, pulled, strict=True) if g is not None}
        memory.append(saved)
        graphs.append((after, state))
        if broke_at is None and not is_finite(after):
            broke_at = t
        w = detach(after)
        state = optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)
    per_step = memory[1].beyond(memory[0]) if total > 1 else memory[0].beyond(Saved())
    return Walk(total, per_step, frozenset(seen), growth, broke_at, w)


def _growth(before: Vector, after: Vector, adjoint: Vector) -> float:
    """Return |J^T a| / |a| of the last of a few power steps, J the derivative of a step over the variables."""
    a, growth = adjoint, 0.0
    pairs = [(name, t) for name, t in after.items() if t.requires_grad]
    for _ in range(POWER_STEPS):
        size = float(norm(a))
        if not 0.0 < size < math.inf or not pairs:
            break
        a = scale(1.0 / size, a)
        outputs, cotangents = [t for _, t in pairs], [a[name] for name, _ in pairs]
        grads = torch.autograd.grad(outputs, list(before.values()), cotangents, retain_graph=True, allow_unused=True)
        a = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(before.items(), grads, strict=True)}
        growth = float(norm(a))
    return growth


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the shortest time of a few calls; of one where that takes a second."""
    best = math.inf
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - begin)
        if best > 1.0:
            break
    return 1e3 * best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be used on a device; None where the system does not say."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_available(), _group_limit()) if limit is not None]
    return min(limits, default=None)


def _available() -> int | None:
    """Return what Linux calls available; elsewhere the free pages, where the system counts them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        names = getattr(os, "sysconf_names", {})
        if not {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_limit() -> int | None:
    """Return what is left below the memory limit of a container (control groups, version 2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + sum(int(size) for name, size in cached if name == "inactive_file")
    except (OSError, ValueError):  # no such files, or no limit: "max"
        return None
