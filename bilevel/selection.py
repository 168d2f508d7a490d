"""Which parameters of a module: chosen by patterns, and shared out among the keys of a dict.

A tensor that a module holds under several names (tied weights) answers to each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from bilevel.errors import InvalidTypeError, InvalidValueError

Names = tuple[tuple[str, ...], ...]
"""The names of each tensor, the first one being what the library calls it."""

SHOWN = 4  # names in a message


class Selection:
    """Some parameters of a module; made by `bilevel.parameters`, taken wherever `params` takes a module.

    Iterating gives the tensors, so that `torch.optim.SGD(bilevel.parameters(model, "head.*"))` works too.

    Attributes:
        module: the whole module, which losses get.
        names: the names of the parameters that are chosen.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.module, self.names = module, tuple(names)

    def __iter__(self) -> Iterator[nn.Parameter]:
        found = named_parameters(self.module)
        return iter([found[name] for name in self.names])

    def __repr__(self) -> str:
        return f"parameters({type(self.module).__name__}, {', '.join(map(repr, self.names))})"


def parameters(module: nn.Module, *patterns: str) -> Selection:
    """Choose which parameters of a module are the inner variables; the others are constants.

    Losses get the whole module, buffers move in training as they do without, and tied parameters stay tied: a pattern
    that fits any of a tensor's names chooses the tensor.

    Args:
        module: any `nn.Module`.
        patterns: of names as in `module.named_parameters()`, with the wildcards of `fnmatch`: `"head.*"`,
            `"*.bias"`. Of what they fit the parameters that require a gradient are taken. None: all of those.

    Raises:
        BilevelError: a pattern that fits nothing, or frozen parameters only.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> parameters(network, "2.*")
    parameters(Sequential, '2.weight', '2.bias')
    """
    if not isinstance(module, nn.Module):
        raise InvalidTypeError(
            f"parameters(): `module` is a {type(module).__name__}, expected an nn.Module; of tensors give those that "
            "are to be tuned, and let the losses close over the others"
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InvalidTypeError(
                f"parameters(): a pattern is a {type(pattern).__name__}, expected the name of a parameter or a pattern "
                'of names, such as "head.*"'
            )
    trainable = {id(p): p.requires_grad for p in module.parameters()}
    names = all_names(module)
    chosen: set[str] = set()
    for pattern in patterns or ("*",):
        fitting = {key: own for key, own in names.items() if any(fits(name, pattern) for name in own)}
        if not fitting:
            raise InvalidValueError(
                f"parameters(): no parameter of the {type(module).__name__} is called {pattern!r}"
                f"{near(pattern, [name for own in names.values() for name in own])}"
            )
        free = [own[0] for key, own in fitting.items() if trainable[key]]
        if not free:
            frozen = shown([own[0] for own in fitting.values()])
            raise InvalidValueError(
                f"parameters(): all parameters that {pattern!r} fits are frozen ({frozen}); unfreeze them with "
                f".requires_grad_(){near(pattern, [own[0] for key, own in names.items() if trainable[key]])}"
            )
        chosen.update(free)
    return Selection(module, [own[0] for own in names.values() if own[0] in chosen])


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that they have in the uncompiled module."""
    return {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters()}


def all_names(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return the names of each parameter by its id; more than one where weights are tied."""
    found: dict[int, tuple[str, ...]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        found[id(p)] = (*found.get(id(p), ()), name.replace("_orig_mod.", ""))
    return found


def fits(name: str, pattern: str) -> bool:
    """Say whether a name is the pattern or fits it."""
    return name == pattern or fnmatchcase(name, pattern)


def near(pattern: str, names: Sequence[str]) -> str:
    """Return the names that a pattern may have meant, or the first ones, for the end of a message."""
    bare = pattern.strip("*").strip(".")
    below = [name for name in names if bare and (name.startswith(f"{bare}.") or f".{bare}." in name)]
    if below:
        return f'; did you mean "{below[0][: below[0].index(bare) + len(bare)]}.*"? There are {shown(below)}'
    close = get_close_matches(pattern, names, n=SHOWN, cutoff=0.5)
    return f"; near names are {shown(close)}" if close else f"; the names are {shown(names)}"


def shown(names: Sequence[str]) -> str:
    """Return the first few names."""
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


Groups = Mapping[str, str | Sequence[str]]
"""Patterns by label: `{"head": "head.*", "rest": "*"}`."""


@lru_cache(maxsize=256)
def _by_key(names: Names, keys: tuple[str, ...]) -> tuple[str | None, ...]:
    """Return the key of each tensor: its name, else the longest module that it is in, else the first pattern."""
    own, found = set(keys), []
    for aliases in names:
        depth = max(alias.count(".") for alias in aliases)
        inside = [alias.rsplit(".", n)[0] for n in range(depth + 1) for alias in aliases]
        exact = next((name for name in inside if name in own), None)
        found.append(exact or next((key for key in keys for alias in aliases if fits(alias, key)), None))
    return tuple(found)


def shared_out(names: Names, keys: Sequence[str], groups: Groups | None, what: str) -> list[str | None]:
    """Return which key of a dict counts for each tensor; None where none does.

    Args:
        names: of the tensors.
        keys: of the dict: names of tensors, of modules that hold some, or patterns. The most specific one counts: a
            tensor's own name, then the longest name of a module, then the first pattern that fits.
        groups: patterns by key. The first key whose patterns fit counts. None: the keys say it themselves.
        what: what messages call the dict.

    Raises:
        InvalidValueError: a key without a tensor, and keys that are not those of `groups`.
    """
    flat = [alias for aliases in names for alias in aliases]
    if groups is None:
        found = list(_by_key(names, tuple(keys)))
        idle = [key for key in keys if key not in found]
        if idle:
            raise InvalidValueError(f"{what} has the key {idle[0]!r}, which no tensor falls to{near(idle[0], flat)}")
        return found
    if set(keys) != set(groups):
        raise InvalidValueError(
            f"{what} has the keys {list(keys)}, but `per` has {list(groups)}; give both the same dict of patterns"
        )
    listed = {key: (own,) if isinstance(own, str) else tuple(own) for key, own in groups.items()}
    patterns = tuple((key, pattern) for key, own in listed.items() for pattern in own)
    chosen = _by_pattern(names, patterns)
    for key, own in listed.items():
        if key not in chosen:
            raise InvalidValueError(
                f"`per` has the group {key!r} with {shown(own)}, which no tensor falls to"
                f"{near(own[0] if own else key, flat)}"
            )
    return list(chosen)


@lru_cache(maxsize=256)
def _by_pattern(names: Names, patterns: tuple[tuple[str, str], ...]) -> tuple[str | None, ...]:
    whole = {pattern: key for key, pattern in reversed(patterns)}
    found = []
    for aliases in names:
        exact = next((whole[alias] for alias in aliases if alias in whole), None)
        found.append(exact or next((k for k, p in patterns for alias in aliases if fits(alias, p)), None))
    return tuple(found)


def as_tensors(model: Any, what: str) -> tuple[list[Tensor], Names]:
    """Return the tensors of a module or a structure that are no constants, with their names.

    A frozen parameter (`requires_grad=False`), and what `bilevel.parameters` did not choose, is a constant.
    """
    if isinstance(model, nn.Module):
        tensors = {id(p): p for p in model.parameters() if p.requires_grad or not isinstance(p, nn.Parameter)}
        names = all_names(model)
        return list(tensors.values()), tuple(names[key] for key in tensors)
    found = dict(_leaves(model, ()))
    if not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise InvalidTypeError(
            f"{what}: the first argument is a {type(model).__name__}, expected an nn.Module, a Tensor or a nested "
            "dict/list/tuple of Tensors"
        )
    return list(found.values()), tuple((name,) for name in found)


def _leaves(structure: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(structure, Mapping):
        parts: Any = structure.items()
    elif isinstance(structure, (list, tuple)):
        parts = enumerate(structure)
    else:
        yield ".".join(path), structure
        return
    for key, part in parts:
        yield from _leaves(part, (*path, str(key)))
