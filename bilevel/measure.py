"""What a run takes: milliseconds, what graphs hold, the peak of memory; and what memory is free."""

from __future__ import annotations

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
from torch.utils._python_dispatch import TorchDispatchMode

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# By the name of the controller, which version 2 leaves out: the limit, what is used, and what of that is given back.
GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the shortest time of a few calls; no further one once they have taken half a second."""
    best, spent = math.inf, 0.0
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        last = time.perf_counter() - begin
        best, spent = min(best, last), spent + last
        if spent > 0.5:
            break
    return 1e3 * best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


@dataclass
class Peak:
    """The most bytes that tensors took at once, beyond what was there before."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of what is allocated inside; on a CPU every operation is watched, which takes time."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with _Watch(peak):
        yield peak


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the storages that operations make, for as long as they live."""

    def __init__(self, peak: Peak) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._peak, self._live = peak, 0
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._watch(tensor, counted=False)  # was there before, or it would be known
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self._watch(tensor, counted=True)
        return made

    def _watch(self, tensor: Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._watched:
            return
        size = storage.nbytes() if counted else 0

        def gone(_: Any) -> None:
            self._live -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, gone)
        self._live += size
        self._peak.bytes = max(self._peak.bytes, self._live)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in optree.tree_leaves(tree) if isinstance(x, Tensor) and x.layout == torch.strided]


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
    """Return what is left below the memory limits of this process's control groups and of those that they are in."""
    try:
        lines = OWN_GROUPS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for controller in set(controllers.split(",")) & set(GROUP_FILES):
            found += [_left(GROUPS.joinpath(controller, *parts[:k]), controller) for k in range(len(parts) + 1)]
    return min((left for left in found if left is not None), default=None)


def _left(group: Path, controller: str) -> int | None:
    most, used, cached = GROUP_FILES[controller]
    try:
        fields = (line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        reclaimable = sum(int(size) for name, size in fields if name == cached)
        return int((group / most).read_text()) - int((group / used).read_text()) + reclaimable
    except (OSError, ValueError):  # no such files, or no limit: "max"
        return None
