"""The one door for data: nothing, one batch, a dataset, or a stream of batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.sparse import Design, is_sparse


@dataclass(frozen=True)
class Blocks:
    """Data cut into blocks that can be read in any order.

    Attributes:
        weights: the share of the examples in each block; they sum to one.
        read: block number -> batch.
    """

    weights: list[float]
    read: Callable[[int], Any]


class Batches:
    """Where the batches of one loss come from.

    A tensor or a dict/list/tuple of tensors is *one batch*. A map-style `Dataset` is read whole into
    one batch; wrap it in a `DataLoader` for minibatches. Any other iterable is a stream of batches
    and starts again when it ends. Batches go to the device of `params`. SciPy's sparse matrices become a
    `bilevel.sparse.Design` in the dtype of `params`.

    Attributes:
        given: False when the loss takes no batch.
        deterministic: every draw is the same.
    """

    def __init__(self, data: Any, role: str, like: Tensor) -> None:
        self._role, self._device, self._dtype = role, like.device, like.dtype
        self._stream: Iterable[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._batch: Any = None
        self._drawn = 0
        self._random: dict[str, Any] | None = None
        self.given = data is not None
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            if len(data) == 0:  # type: ignore[arg-type]
                raise InvalidValueError(f"`{role}` is empty: the {type(data).__name__} has no sample")
            data = default_collate([data[i] for i in range(len(data))])  # type: ignore[arg-type]
        _refuse_list_of_batches(data, role)
        if isinstance(data, (Tensor, Design, dict, list, tuple)) or is_sparse(data):
            self._batch = self._to_device(data, strict=True)
        elif (
            isinstance(data, Iterable)
            and not isinstance(data, (str, bytes, type))
            and not (_is_array(data) or _is_frame(data))
        ):
            self._stream = data
        elif self.given:
            kind = f"the class {data.__name__}" if isinstance(data, type) else f"a {type(data).__name__}"
            instead = "; write torch.from_numpy(array)" if _is_array(data) else ""
            if _is_frame(data):
                instead = "; write torch.tensor(frame.to_numpy())"
            raise InvalidTypeError(
                f"`{role}` is {kind}, expected None, one batch (Tensors or SciPy sparse matrices, also in a "
                f"dict/list/tuple), a Dataset, a DataLoader or an iterable of batches{instead}"
            )
        self.deterministic = self._stream is None

    def twin(self) -> Batches:
        """Return a second reader of the same data, with a position of its own."""
        other = copy.copy(self)
        other._iterator, other._drawn, other._random = None, 0, None
        return other

    def collected(self, most: int) -> list[Any] | None:
        """Return the batches of one pass; None for more than `most`, and for an iterator, which it would use up."""
        if self._stream is None:
            return [self._batch]
        if isinstance(self._stream, Iterator):
            return None
        found = list(islice(self.twin()._begin(), most + 1))
        return None if len(found) > most else [self._to_device(batch, strict=False) for batch in found]

    def fixed(self, batch: Any) -> Batches:
        """Return a reader that gives this batch at every draw."""
        other = self.twin()
        other._stream, other._batch, other.deterministic = None, batch, True
        return other

    def rows(self) -> int | None:
        """Return the number of examples; None where they cannot be counted without reading the stream."""
        if self._stream is None:
            tensors = [leaf for leaf in optree.tree_leaves(self._batch) if getattr(leaf, "shape", ())]
            return int(tensors[0].shape[0]) if tensors else None
        try:
            return len(self._stream.dataset)  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return None

    def once(self) -> Iterator[Any]:
        """Read one pass on the side: neither the position nor a generator of the stream's own moves."""
        if self._stream is None:
            yield self._batch
            return
        self.check_repeats()
        own = self._own_random()
        try:
            for batch in iter(self._stream):
                yield self._to_device(batch, strict=False)
        finally:
            self._set_own_random(own)

    def restart(self) -> None:
        """Begin a new pass with the next draw; an iterator that cannot go back goes on."""
        if self._stream is not None and not isinstance(self._stream, Iterator):
            self._iterator, self._drawn, self._random = None, 0, None

    def draw(self) -> Any:
        """Return the one batch, or the next of the stream."""
        if self._stream is None:
            return self._batch
        if self._iterator is None:
            self._iterator = self._begin()
        batch = next(self._iterator, _END)
        if batch is _END:
            batch = next(self._begin(), _END)
        if batch is _END:
            raise InvalidValueError(
                f"`{self._role}` has no batch left; give an iterable that can start again, "
                "for example a DataLoader, not an exhausted iterator"
            )
        self._drawn += 1
        return self._to_device(batch, strict=False)

    def _begin(self, skipped: int = 0) -> Iterator[Any]:
        """Start a pass over the stream behind so many batches, and keep the random states that decide its order."""
        assert self._stream is not None
        self._random = {"global": torch.get_rng_state(), "own": self._own_random()}
        self._drawn, self._iterator = 0, _pass(self._stream, skipped)
        return self._iterator

    def _own_random(self) -> Tensor | None:
        """Return the state of the generator that the stream was given, if it was."""
        own = getattr(self._stream, "generator", None)
        return own.get_state() if isinstance(own, torch.Generator) else None

    def _set_own_random(self, state: Tensor | None) -> None:
        own = getattr(self._stream, "generator", None)
        if isinstance(own, torch.Generator) and state is not None:
            own.set_state(state)

    def position(self) -> dict[str, Any]:
        """Return where the stream is: the batches drawn in this pass, and the random states at its start.

        Before the first pass that is the state of the stream's own generator.
        """
        return {"drawn": self._drawn, "random": self._random, "own": self._own_random()}

    def go_to(self, position: dict[str, Any]) -> None:
        """Bring the stream to a position that `position` returned; the global random state stays as it is."""
        self._iterator, self._drawn, self._random = None, 0, position["random"]
        if self._stream is None or position["random"] is None:
            self._set_own_random(position.get("own"))
            return
        self.check_repeats()
        now = torch.get_rng_state()
        torch.set_rng_state(position["random"]["global"])
        self._set_own_random(position["random"]["own"])
        self._iterator = self._begin(position["drawn"])
        self._drawn = position["drawn"]
        torch.set_rng_state(now)

    def check_repeats(self) -> None:
        """Raise for a stream that cannot give a batch again."""
        if isinstance(self._stream, Iterator):
            raise InvalidValueError(
                f"`{self._role}` is an iterator that cannot go back; give a DataLoader or another iterable that starts "
                "again"
            )

    def blocks(self, size: int | None) -> Blocks:
        """Cut the data into blocks that keep their examples.

        Args:
            size: examples in a block, for one batch; None: all of it. A DataLoader has its own blocks.

        Raises:
            InvalidValueError: for data that cannot be read in any order, or are not rows of examples.
        """
        if self._stream is not None:
            return self._loader_blocks(size)
        rows = (
            {leaf.shape[0] if leaf.dim() else None for leaf in optree.tree_leaves(self._batch)} if self.given else {1}
        )
        if size is None or not self.given:
            return Blocks([1.0], lambda i: self._batch)
        if len(rows) != 1 or None in rows:
            raise InvalidValueError(
                f"`{self._role}` holds tensors of {sorted(map(str, rows))} rows, and blocks of examples are cut along "
                "the first dimension: give all tensors one row for each example, or leave `batch_size` out"
            )
        count = int(next(iter(rows)) or 0)
        ends = [min(begin + size, count) for begin in range(0, count, size)]

        def read(i: int) -> Any:
            return optree.tree_map(lambda t: t[i * size : ends[i]], self._batch)

        return Blocks([(end - i * size) / count for i, end in enumerate(ends)], read)

    def _loader_blocks(self, size: int | None) -> Blocks:
        """Return the batches of a DataLoader that does not shuffle."""
        loader, sampler = self._stream, getattr(self._stream, "batch_sampler", None)
        fixed = type(sampler) is BatchSampler and isinstance(sampler.sampler, SequentialSampler)
        if not isinstance(loader, DataLoader) or sampler is None or not fixed:
            raise InvalidValueError(
                f"`{self._role}` gives no blocks that keep their examples, which a memory of gradients needs: give "
                "a DataLoader over a map-style Dataset with shuffle=False (the blocks are drawn at random anyway), or "
                'one batch of tensors and `batch_size=`; method="soba" takes any stream'
            )
        if size is not None:
            raise InvalidValueError(
                f"`batch_size` is {size}, and `{self._role}` is a DataLoader with batches of its own: leave out "
                "`batch_size`"
            )
        members = list(sampler)
        total = sum(map(len, members))

        def read(i: int) -> Any:
            rows = [loader.dataset[k] for k in members[i]]
            return self._to_device(loader.collate_fn(rows), strict=False)

        return Blocks([len(rows) / total for rows in members], read)

    def epoch(self) -> int:
        """Return the number of batches in one pass; 1 without a stream."""
        if self._stream is None:
            return 1
        try:
            return len(self._stream)  # type: ignore[arg-type]
        except TypeError as error:
            raise InvalidTypeError(
                f"`{self._role}` has no length, so `epochs` cannot be counted; give `steps` instead"
            ) from error

    def _to_device(self, batch: Any, *, strict: bool) -> Any:
        batch = optree.tree_map(self._placed, batch, none_is_leaf=True)
        leaves = optree.tree_leaves(batch, none_is_leaf=True)
        wrong = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, Design))]
        if strict and (wrong or not leaves):
            kind = type(wrong[0]).__name__ if wrong else "empty structure"
            raise InvalidTypeError(
                f"`{self._role}` holds a {kind}, expected Tensors (for an array: torch.from_numpy(array)); a list "
                "of batches is read as one batch: give a DataLoader or another iterable instead"
            )
        if strict and not any(leaf.numel() for leaf in leaves):
            raise InvalidValueError(f"`{self._role}` is empty: its tensors hold no number")
        return batch

    def _placed(self, leaf: Any) -> Any:
        """Return a part of a batch on the device of `params`; a SciPy sparse matrix as a Design."""
        if is_sparse(leaf):
            return Design(leaf, self._dtype, self._device)
        return leaf.to(self._device) if isinstance(leaf, (Tensor, Design)) else leaf


_END = object()


class _Numbers(Dataset[int]):
    """A dataset whose samples are their own numbers."""

    def __getitem__(self, number: int) -> int:
        return number


def _pass(stream: Iterable[Any], skipped: int) -> Iterator[Any]:
    """Return a pass over a stream behind so many batches; a plain DataLoader does not read the samples of those."""
    own = type(stream) is DataLoader and stream.batch_sampler is not None and stream.num_workers == 0
    if own and isinstance(stream.dataset, IterableDataset):  # type: ignore[attr-defined]
        own = False
    if not skipped or not own:
        batches = iter(stream)
        for _ in range(skipped):
            next(batches)
        return batches
    loader: Any = stream
    # A loader over numbers in place of samples draws the random numbers that decide the order, and no others.
    numbers = iter(
        DataLoader(_Numbers(), batch_sampler=loader.batch_sampler, collate_fn=list, generator=loader.generator)
    )
    for _ in range(skipped):
        next(numbers)
    return (loader.collate_fn(_samples(loader.dataset, members)) for members in numbers)


def _samples(dataset: Any, members: list[int]) -> Any:
    return dataset.__getitems__(members) if hasattr(dataset, "__getitems__") else [dataset[i] for i in members]


def _refuse_list_of_batches(data: Any, role: str) -> None:
    """Raise for a list whose entries look like batches: of one structure, and of one shape but for the rows."""
    if not isinstance(data, list) or len(data) < 2 or not all(isinstance(entry, (tuple, list, dict)) for entry in data):
        return
    leaves, specs = zip(*(optree.tree_flatten(entry, none_is_leaf=True) for entry in data), strict=True)
    if not all(isinstance(leaf, Tensor) and leaf.dim() for entry in leaves for leaf in entry):
        return
    shapes = {tuple(leaf.shape[1:] for leaf in entry) for entry in leaves}
    if len(set(specs)) == len(shapes) == 1:
        raise InvalidTypeError(
            f"`{role}` is a list of {len(data)} batches, and a list is read as one batch; write a DataLoader (for one "
            "pass in this order: DataLoader(your_list, batch_size=None)), or a tuple around them if they are one batch"
        )


def _is_frame(data: Any) -> bool:
    """Say whether this is a table or a column, which would be iterated over column by column, number by number."""
    return type(data).__module__.split(".")[0] in ("pandas", "polars")


def _is_array(data: Any) -> bool:
    return type(data).__module__ == "numpy"
