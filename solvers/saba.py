"""SABA: SOBA with the variance reduction of SAGA in all three directions.

    D = (new term of block i) - (its last value in the memory) + (mean of the memory)

for each of R, H v and (∂R/∂λ)^T v over blocks of the inner data, and ∂f/∂w, ∂f/∂λ over blocks of the outer data.
Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables stochastic and global variance
reduction algorithms, NeurIPS 2022, algorithm 2 (SAGA: Defazio, Bach and Lacoste-Julien, NeurIPS 2014). The noise
vanishes as w, v and λ settle, so constant steps converge linearly where the inner loss is strongly convex.

Deliberate differences: blocks may differ in size, and are drawn in proportion; the memory begins with one pass over the
data where the authors' code begins with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import Linearization, Response, add_terms, negative, outer_gradient, present, ratio
from bilevel.solvers.directions import UNSEEN, Directions, Joint, Minibatches, Source
from bilevel.solvers.linear.base import check_count, dtype_of
from bilevel.solvers.single_loop import DRAWS, Moving
from bilevel.solvers.soba import SOBA
from bilevel.vector import Vector, norm, size, subtract

SAME = {torch.float64: 1e-8}  # how far the mean over blocks may lie from the whole: rounding
SAME_ELSE = 1e-3


@dataclass(frozen=True)
class SABA(SOBA):
    """Move w and v by minibatches whose noise vanishes, at the price of a memory.

    The data are cut into blocks: one batch of tensors by `batch_size`, a DataLoader with shuffle=False into its own
    batches. The losses must be means over examples.

    Args:
        lr, decay, momentum, warmup, steps: see `SOBA`; lr None: 1 / (3 x the largest curvature of a block), decay
            None: 0.
        batch_size: examples in a block, of both losses; None: a loader's own, else all data in one.
        memory: most megabytes that the memory may take.
    """

    batch_size: int | None = None
    memory: float = 1000.0
    reach: ClassVar[float] = 1.0 / 3.0  # the step of SAGA's theorem
    falls: ClassVar[float] = 0.0
    averages: ClassVar[bool] = False
    about: ClassVar[About] = About(
        begins="last",
        sees="losses",
        derivatives=2,
        exact=False,
        terms=Terms(
            "2 gradients and 2 products of a block; one pass first",
            "3 (n + m) numbers a block",
            "lag of w and v; noise vanishes",
            "Dagréou et al. 2022",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None:
            check_count(self.batch_size, "batch_size")
        if not self.memory > 0.0:
            raise InvalidValueError(f"`memory` is {self.memory!r}, expected a positive number of megabytes")

    def _source(self, response: Response, moving: Moving, upper: Vector, memory: Any) -> Source:
        if self.batch_size is None and not response.stochastic:
            return Minibatches(response)  # one block, whose memory would change nothing
        return Memory(response, self, moving, upper, memory)


class Table:
    """One vector for each block and their weighted mean; the vectors are overwritten in place."""

    def __init__(self, weights: list[float], rows: Vector | None = None, mean: Vector | None = None) -> None:
        self._weights, self.rows, self.mean = weights, rows or {}, mean or {}

    def put(self, i: int, value: Vector) -> None:
        """Fill in block i for the first time."""
        for name, t in value.items():
            if name not in self.rows:
                self.rows[name] = t.new_zeros((len(self._weights), *t.shape))
                self.mean[name] = torch.zeros_like(t)
            self.rows[name][i] = t
            self.mean[name] = self.mean[name] + self._weights[i] * t

    def reduced(self, i: int, value: Vector) -> Vector:
        """Return the variance-reduced vector, and remember `value`."""
        change = {name: t - self.rows[name][i] for name, t in value.items()}
        found = {name: t + self.mean[name] for name, t in change.items()}
        for name, t in value.items():
            self.rows[name][i] = t
            self.mean[name].add_(change[name], alpha=self._weights[i])
        return found


INNER, OUTER = ("residual", "product", "through"), ("by_lower", "by_upper", "loss")


class Memory:
    """Variance-reduced directions on random blocks."""

    def __init__(self, response: Response, settings: SABA, moving: Moving, upper: Vector, memory: Any) -> None:
        self._response = response
        self._blocks = response.blocks(settings.batch_size)
        self._weights = [blocks.weights for blocks in self._blocks]
        self.exact = all(len(weights) == 1 for weights in self._weights)
        kept = memory or {}
        self._tables = {
            name: Table(weights, **kept.get(name, {}))
            for names, weights in zip((INNER, OUTER), self._weights, strict=True)
            for name in names
        }
        if memory is None:
            self._check_size(settings.memory, moving.w, upper)
            self._fill(moving.w, moving.v, upper)

    def _take(self, i: int, j: int) -> None:
        self._response.see(self._blocks[0].read(i), self._blocks[1].read(j))

    def _check_size(self, most: float, lower: Vector, upper: Vector) -> None:
        inner, outer = map(len, self._weights)
        numbers = (2 * inner + outer) * size(lower) + (inner + outer) * size(upper)
        megabytes = numbers * next(iter(lower.values())).element_size() / 1e6
        if megabytes > most:
            raise InvalidValueError(
                f"the memory of SABA takes {megabytes:.3g} MB ({inner} inner and {outer} outer blocks, {size(lower)} "
                f"inner variables, {size(upper)} hyperparameters), above memory={most:g}: give larger blocks, raise "
                '`memory`, or use method="soba", which has none'
            )

    def _fill(self, w: Vector, v: Vector, upper: Vector) -> None:
        """Begin the memory with one pass, and check that it adds up to the whole."""
        whole = None
        if not self._response.stochastic:  # one batch of all examples was cut
            whole = Linearization(self._response, w, upper).residual, outer_gradient(self._response, w, upper).lower
        for i in range(len(self._weights[0])):
            self._take(i, 0)
            system = Linearization(self._response, w, upper)
            self._put(i, INNER, (system.residual, system.operator(v), present(system.pull_back(v))))
        for j in range(len(self._weights[1])):
            self._take(0, j)
            outer = outer_gradient(self._response, w, upper)
            loss = {"": torch.tensor(outer.loss, dtype=torch.float64)}
            self._put(j, OUTER, (outer.lower, present(outer.upper), loss))
        if whole is not None:
            _check_means(whole, (self._tables["residual"], self._tables["by_lower"]))

    def _put(self, i: int, names: tuple[str, ...], values: tuple[Vector, ...]) -> None:
        for name, value in zip(names, values, strict=True):
            self._tables[name].put(i, value)

    def linearize(self, w: Vector, upper: Vector) -> Linearization:
        """See `Source.linearize`: random blocks, in proportion to their sizes."""
        self._at = [int(torch.multinomial(torch.tensor(weights), 1)) for weights in self._weights]
        self._take(*self._at)
        self.system = Joint(self._response, w, upper)
        return self.system

    def look(self, w: Vector, upper: Vector) -> None:
        """See `Source.look`."""
        self.linearize(w, upper)
        self.outer = outer_gradient(self._response, w, upper)

    def sample(self, k: int, w: Vector, upper: Vector) -> Linearization:
        """See `Source.sample`: blocks spread over the data."""
        self._take(k * len(self._weights[0]) // DRAWS, 0)
        return Linearization(self._response, w, upper)

    def directions(self, w: Vector, v: Vector, upper: Vector, outward: bool) -> Directions:
        """See `Source.directions`."""
        self.look(w, upper)
        i, j = self._at
        found, rhs = None, float(norm(self.outer.lower))
        if outward:
            product, pulled = self.system.pull_both(v)
            through = self._tables["through"].reduced(i, present(pulled))
            direct = self._tables["by_upper"].reduced(j, present(self.outer.upper))
            terms: list[dict[str, Tensor | None]] = [dict.fromkeys(upper) | part for part in (direct, through)]
            found = add_terms(self._response, terms[0], negative(terms[1]), upper, UNSEEN)
        else:
            product = self.system.operator(v)
        bent = self._tables["product"].reduced(i, product)
        pull = self._tables["by_lower"].reduced(j, self.outer.lower)
        residual = self._tables["residual"].reduced(i, self.system.residual)
        loss = self._tables["loss"]
        loss.reduced(j, {"": torch.tensor(self.outer.loss, dtype=torch.float64)})
        return Directions(residual, subtract(bent, pull), found, float(loss.mean[""]), product, rhs)

    def memory(self) -> Any:
        """See `Source.memory`."""
        return {name: {"rows": table.rows, "mean": table.mean} for name, table in self._tables.items()}


def _check_means(whole: tuple[Vector, Vector], tables: tuple[Table, Table]) -> None:
    """Raise where a loss over all data is not the mean over the blocks."""
    for name, one, table in zip(("inner_loss", "outer_loss"), whole, tables, strict=True):
        off = ratio(float(norm(subtract(one, table.mean))), float(norm(table.rows)))
        if off > SAME.get(dtype_of(one), SAME_ELSE):
            raise InvalidValueError(
                f"the gradient of `{name}` over all examples is not the mean of those over blocks of `batch_size` "
                f"examples (it is {off:.1e} away): it sums over examples or couples them (batch statistics), or closes "
                "over one value for each example; write a mean over the examples of its batch"
            )
