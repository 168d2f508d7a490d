"""Which steps of an inner loop are held, and which are taken again, on the way back through it.

The loop is cut into N blocks of k steps, whose graphs are held together. Beside the start of the loop, s starts of
blocks are held; the others are reached again from those, by the binomial schedule, which advances by the fewest blocks:

    t(N, s) = r N - C(s + 1 + r, s + 2)      with the smallest r for which C(s + 1 + r, s + 1) >= N

Griewank and Walther, Algorithm 799: revolve, an implementation of checkpointing for the reverse or adjoint mode of
computational differentiation, ACM TOMS 26 (2000), with s + 1 snapshots. N = sqrt(T) and s = N - 2 is the schedule of
Chen, Xu, Zhang and Guestrin, Training deep nets with sublinear memory cost, arXiv 1604.06174 (2016); k = 1 and
s = T - 2 holds every iterate and no graph but one; k = T every graph. Deliberately different from each: k and s are
whatever takes the fewest steps again, for a step's graph may be as small as its start or a hundred times as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, comb, isqrt
from typing import Literal

Action = tuple[Literal["advance", "hold", "reverse", "return"], int]


@dataclass(frozen=True)
class Schedule:
    """A way back through a loop.

    Attributes:
        total: steps of the loop, T.
        block: steps whose graphs are held together, k.
        slots: starts of blocks that are held at once, that of the loop not counted, s.
    """

    total: int
    block: int
    slots: int = 0

    @property
    def blocks(self) -> int:
        """The number of blocks, N."""
        return ceil(self.total / self.block)

    @property
    def again(self) -> int:
        """The number of steps that are taken beyond once each."""
        at = again = 0
        for action, step in self.actions():
            if action == "advance":
                again += step - at
            at = step
        return again

    def actions(self) -> Iterator[Action]:
        """Yield what to do, and the step before which the loop then is.

        "advance" without graphs; "hold" where the loop is; "return" to what is held, which is held no longer where it
        is the start of the block to come; "reverse" that block: record its steps, and pull the adjoint back.
        """
        held = [0]
        yield "hold", 0
        for end in range(self.blocks, 0, -1):
            at = held[-1]
            if end < self.blocks:
                yield "return", self._start(at)
            while end - at > 1:
                snapshots = self.slots + 2 - len(held)
                at += _hop(end - at, snapshots)
                yield "advance", self._start(at)
                if end - at > 1:
                    held.append(at)
                    yield "hold", self._start(at)
            if held[-1] == at:
                held.pop()
            yield "reverse", self._start(end)

    def _start(self, block: int) -> int:
        """Return the first step of a block; the first block, which is passed most often, may be short."""
        return max(0, self.total - (self.blocks - block) * self.block)


def fitting(total: int, room: int, graph: int, state: int) -> Schedule | None:
    """Return the schedule that takes the fewest steps again; None where not even one graph and one start fit.

    Args:
        total: steps of the loop.
        room: bytes for graphs and starts.
        graph: bytes of the graph of one step.
        state: bytes of the start of a step.
    """
    best: tuple[int, Schedule] | None = None
    for block in _blocks(total, room, graph, state):
        count = ceil(total / block)
        slots = min(max(0, count - 2), (room - block * graph) // state)
        if count > 2 and slots < 1:
            continue
        again = total - block if slots == count - 2 else block * advances(count, slots + 1)
        if best is None or again < best[0]:
            best = again, Schedule(total, block, slots)
    return None if best is None else best[1]


def _blocks(total: int, room: int, graph: int, state: int) -> list[int]:
    """Return lengths of blocks to be tried: all small ones, and the shortest and the longest for some counts."""
    root = isqrt(total)
    lengths = {*range(1, root + 1), *(ceil(total / count) for count in range(1, root + 2))}
    lengths |= {min(total, (room - slots * state) // graph) for slots in range(root + 1)}
    return sorted(length for length in lengths if 1 <= length <= room // graph)


def advances(blocks: int, snapshots: int) -> int:
    """Return t: by how many blocks the loop advances on a way back, each block's own recording not counted."""
    r = _repeats(blocks, snapshots)
    return r * blocks - comb(snapshots + r, snapshots + 1)


def _repeats(blocks: int, snapshots: int) -> int:
    r = 0
    while comb(snapshots + r, snapshots) < blocks:
        r += 1
    return r


def _hop(blocks: int, snapshots: int) -> int:
    """Return how far the next snapshot is, of so many blocks ahead and with the snapshot here among those left."""
    if snapshots == 1:
        return blocks - 1
    r = _repeats(blocks, snapshots)
    return min(comb(snapshots + r - 1, snapshots), blocks - comb(snapshots + r - 2, snapshots - 1))
