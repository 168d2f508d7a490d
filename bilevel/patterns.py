"""Names of a module's parameters, patterns of them, and the values that a dict with such keys gives each tensor.

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
from bilevel.ranges import Hyperparameter

Names = tuple[tuple[str, ...], ...]
"""The names of each tensor, the first one being what the library calls it."""

Groups = Mapping[str, str | Sequence[str]]
"""Patterns by label: `{"head": "head.*", "rest": "*"}`."""

Values = float | Tensor | Mapping[str, Any]
"""One value for all tensors, or a dict of them by names of tensors or modules, patterns, or labels of groups."""

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


def shared_out(
    names: Names, keys: Sequence[str], groups: Groups | None, what: str, noun: str = "trained tensor"
) -> list[str | None]:
    """Return which key of a dict counts for each tensor; None where none does.

    Args:
        names: of the tensors.
        keys: of the dict: names of tensors, of modules that hold some, or patterns. The most specific one counts: a
            tensor's own name, then the longest name of a module, then the first pattern that fits.
        groups: patterns by key. One with the tensor's own name counts, else the first one whose patterns
            fit. None: the keys say it themselves.
        what: what messages call the dict.
        noun: what they call a thing that has a name.

    Raises:
        InvalidValueError: a key without a tensor, and keys that are not those of `groups`.
    """
    flat = [alias for aliases in names for alias in aliases]
    if groups is None:
        found = list(_by_key(names, tuple(keys)))
        idle = [key for key in keys if key not in found]
        if idle:
            raise InvalidValueError(f"{what} has the key {idle[0]!r}, which no {noun} falls to{near(idle[0], flat)}")
        return found
    if set(keys) != set(groups):
        raise InvalidValueError(
            f"{what} has the keys {list(keys)}, but `per` has {list(groups)}; give both the same dict of patterns"
        )
    listed = {key: as_patterns(own, f"`per`[{key!r}]") for key, own in groups.items()}
    patterns = tuple((key, pattern) for key, own in listed.items() for pattern in own)
    chosen = _by_pattern(names, patterns)
    for key, own in listed.items():
        if key not in chosen:
            raise InvalidValueError(
                f"`per` has the group {key!r} with {shown(own)}, which no {noun} falls to"
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
    if isinstance(model, Selection):
        tensors, names = {id(p): p for p in model}, all_names(model.module)
        return list(tensors.values()), tuple(names[key] for key in tensors)
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


def covered(tensors: list[Tensor], names: Names, on: str | Sequence[str] | None, what: str) -> list[bool]:
    """Say which tensors `on` chooses: None all, "matrices" those of two dimensions and more, else patterns.

    As in `bilevel.prox`, "weight" stands for every "....weight" too.
    """
    if on is None:
        return [True] * len(tensors)
    if on == "matrices":
        chosen = [t.dim() >= 2 for t in tensors]
        if not any(chosen):
            raise InvalidValueError(
                f'{what}: `on` is "matrices", but no tensor has two dimensions; say on=None for all, or name some'
            )
        return chosen
    patterns = as_patterns(on, f"{what}: `on`")
    chosen = [False] * len(tensors)
    for pattern in patterns:
        found = [any(fits(name, form) for name in own for form in (pattern, f"*.{pattern}")) for own in names]
        if not any(found):
            flat = [name for own in names for name in own]
            raise InvalidValueError(f"{what}: `on` names {pattern!r}, and no tensor is called so{near(pattern, flat)}")
        chosen = [a or b for a, b in zip(chosen, found, strict=True)]
    return chosen


def as_patterns(given: Any, what: str) -> tuple[str, ...]:
    """Return one pattern or several as a tuple."""
    several = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else ()
    if not several or not all(isinstance(pattern, str) for pattern in several):
        raise InvalidTypeError(f'{what} is {given!r}, expected a pattern of names such as "head.*", or a list of them')
    return several


def chosen(
    tensors: list[Tensor], names: Names, on: str | Sequence[str] | None, what: str
) -> tuple[list[Tensor], Names]:
    """Return the tensors that `on` chooses, with their names."""
    if not tensors:
        raise InvalidValueError(f"{what}: the module has no parameter that is trained")
    kept = [(t, own) for t, own, take in zip(tensors, names, covered(tensors, names, on, what), strict=True) if take]
    return [t for t, _ in kept], tuple(own for _, own in kept)


def values_of(names: Names, values: Values, per: Groups | None, what: str, noun: str = "trained tensor") -> list[Any]:
    """Return the value of each tensor, a number or a Tensor; None where a dict has none for it."""
    if per is not None and not isinstance(per, Mapping):
        raise InvalidTypeError(
            f"{what}: `per` is {per!r}, expected a dict of patterns such as {{'head': 'head.*', 'rest': '*'}}; for a "
            "value per layer, tensor or weight leave it out: the keys of the dict of values say it"
        )
    if not isinstance(values, Mapping):
        if per is not None:
            raise InvalidTypeError(f"{what} are a {type(values).__name__}, expected a dict with the keys of `per`")
        return [_checked(values, what)] * len(names)
    if not values:
        raise InvalidValueError(f"{what} are an empty dict, expected a value for at least one tensor")
    keys = shared_out(names, list(values), per, what, noun)
    return [None if key is None else _checked(values[key], f"{what}[{key!r}]") for key in keys]


def _checked(value: Any, what: str) -> Any:
    if isinstance(value, Hyperparameter):
        raise InvalidTypeError(
            f"{what}: {value!r} is a typed hyperparameter; give it to `hparams`, and take what the loss gets back"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise InvalidTypeError(f"{what}: got a {type(value).__name__}, expected a number or a Tensor")
    return value


def fitting(value: Any, shape: tuple[int, ...], what: str, name: str) -> Any:
    """Return a number or a Tensor that can be broadcast to a shape; raise for a Tensor that cannot."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1 and value.dim() > 0:
        return value.reshape(())
    ends = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > len(shape) or any(n not in (1, m) for n, m in ends):
        raise InvalidValueError(
            f"{what} has shape {tuple(value.shape)} for {name!r}, expected a number or a shape that broadcasts to "
            f"{tuple(shape)}"
        )
    return value
