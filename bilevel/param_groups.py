"""Between tuned settings and the param groups of a torch optimizer, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.errors import InvalidTypeError, InvalidValueError, meant, noting
from bilevel.patterns import Groups, Selection, Values, all_names, as_tensors, chosen, shared_out, values_of

On = str | Sequence[str] | None
"""Which tensors: None for all, "matrices", or names and patterns of names."""

Where = str | Callable[[Any], Any]
"""Where in `hparams` a setting is: a key, a path of keys with dots, or a function of `hparams`."""


def groups(module: nn.Module, optimizer: Optimizer) -> dict[str, list[str]]:
    """Return the param groups of an optimizer as patterns by label, to be given as `per=`.

    A group is called by its "name", or "group 0" and so on. Parameters that the optimizer does not have are in none.
    """
    if not isinstance(optimizer, Optimizer):
        raise InvalidTypeError(f"groups(): `optimizer` is a {type(optimizer).__name__}, expected a torch.optim one")
    names = all_names(module)
    found: dict[str, list[str]] = {}
    for i, group in enumerate(optimizer.param_groups):
        if not all(id(p) in names for p in group["params"]):
            raise InvalidValueError(
                f"groups(): group {i} of the {type(optimizer).__name__} holds tensors that are no parameters of the "
                f"{type(module).__name__}; give the module that it was made for"
            )
        found[_label(group, i)] = [names[id(p)][0] for p in group["params"]]
    if len(found) < len(optimizer.param_groups):
        raise InvalidValueError(f"groups(): two groups have the same name, one of {list(found)}; rename one")
    return found


def _label(group: dict[str, Any], i: int) -> str:
    return str(group.get("name", f"group {i}"))


def param_groups(
    module: nn.Module | Selection,
    strengths: Values,
    *,
    per: Groups | None = None,
    on: On = None,
    setting: str = "weight_decay",
) -> list[dict[str, Any]]:
    """Return param groups for a torch optimizer, one for each value, with the module's own parameters.

    `torch.optim.SGD(param_groups(model, solution.hparams["decay"]), lr=0.1)` trains with the strengths that were tuned
    for `penalties.l2`. Parameters without one come last, in a group of their own with 0. AdamW's decay is not
    the gradient of a penalty: what was tuned for `l2` is another setting there.

    Args:
        module: whose trainable parameters they hold.
        strengths: a number for each tensor in the patterns of `penalties.l2`.
        per: see `penalties.l2`; give what it was given.
        on: see `penalties.l2`.
        setting: what the optimizer calls it.

    Raises:
        BilevelError: strengths for each weight, which no optimizer takes.
    """
    what = "param_groups(): `strengths`"
    everything, all_own = as_tensors(module, "param_groups()")
    tensors, names = chosen(everything, all_own, on, "param_groups()")
    values = values_of(names, strengths, per, what)
    keys = shared_out(names, list(strengths), per, what) if isinstance(strengths, Mapping) else ["all"] * len(names)
    found: dict[str, dict[str, Any]] = {}
    for tensor, key, value in zip(tensors, keys, values, strict=True):
        if key is not None:
            group = {"params": [], setting: _number(value, f"{what}[{key!r}]"), "name": key}
            found.setdefault(key, group)["params"].append(tensor)
    taken = {id(tensor) for group in found.values() for tensor in group["params"]}
    rest = [tensor for tensor in everything if id(tensor) not in taken]
    return [*found.values(), *([{"params": rest, setting: 0.0, "name": f"no {setting}"}] if rest else [])]


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InvalidValueError(
            f"{what} holds {value.numel()} values, and a param group takes one number; strengths for each weight can "
            "only be used in a loss (penalties.l2)"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise InvalidTypeError(f"{what} is a {type(value).__name__}, expected a number")
    return float(value)


def write_settings(
    optimizer: Optimizer,
    hparams: Any,
    settings: Mapping[str, Where],
    names: Mapping[int, tuple[str, ...]],
    per: Groups | None,
    on: On = None,
) -> None:
    """Write tuned values into the param groups of an optimizer; all of them, or none where one does not fit.

    Args:
        optimizer: whose groups get them.
        hparams: natural values.
        settings: where in `hparams` the value of each setting is.
        names: of the user's tensors, by their ids.
        per: patterns by label, for a setting whose keys are labels.
        on: which tensors the settings are for; groups of others stay as they are.
    """
    if not isinstance(optimizer, Optimizer):
        raise InvalidTypeError(
            f"apply_(): `optimizer` is a {type(optimizer).__name__}, expected a torch.optim.Optimizer"
        )
    planned = []
    for setting, where in settings.items():
        _check_setting(optimizer, setting)
        values = _for_groups(optimizer, _found(hparams, where, setting), names, per, on, f"apply_(): `{setting}`")
        planned += [(group, setting, v) for group, v in zip(optimizer.param_groups, values, strict=True)]
    for group, setting, value in planned:
        if value is None:
            continue
        if isinstance(group[setting], Tensor):
            group[setting].fill_(value)
        else:
            group[setting] = value


def _check_setting(optimizer: Optimizer, setting: str) -> None:
    known = [key for key in optimizer.param_groups[0] if key not in ("params", "name")]
    if setting not in known:
        raise InvalidValueError(
            f"apply_(): `{setting}` is no setting of {type(optimizer).__name__}; it has {', '.join(known)}"
            f"{meant(setting, known)}"
        )
    now = optimizer.param_groups[0][setting]
    if isinstance(now, bool) or not isinstance(now, (int, float, Tensor)):
        raise InvalidTypeError(
            f"apply_(): `{setting}` of {type(optimizer).__name__} is {now!r}, no number; set it by hand"
        )
    if setting == "lr" and any("initial_lr" in group for group in optimizer.param_groups):
        raise InvalidValueError(
            "apply_(): a learning rate scheduler is attached to `optimizer` and would overwrite `lr` at its next step; "
            "write the settings first, and make the scheduler then"
        )


def _for_groups(
    optimizer: Optimizer, value: Any, names: Mapping[int, tuple[str, ...]], per: Groups | None, on: On, what: str
) -> list[float | None]:
    """Return the number for each group; None where a dict has nothing for it."""
    groups = optimizer.param_groups
    labels = [_label(group, i) for i, group in enumerate(groups)]
    if isinstance(value, Mapping) and set(value) <= set(labels) and len(set(labels)) == len(labels):
        return [_number(value[k], f"{what}: {k!r}") if k in value else None for k in labels]
    if isinstance(value, Mapping) or (on is not None and isinstance(value, (int, float, Tensor))):
        return _by_names(optimizer, value, names, per, on, what)
    several = value.tolist() if isinstance(value, Tensor) and value.dim() == 1 else value
    if isinstance(several, (list, tuple)) and len(several) == len(groups):
        return [_number(v, what) for v in several]
    if isinstance(several, (list, tuple)) and len(several) != 1:
        raise InvalidValueError(
            f"{what} has {len(several)} values for {len(groups)} param group(s); give one, one for each group, or a "
            "dict by names (a schedule goes into torch.optim.lr_scheduler.LambdaLR)"
        )
    return [_number(several[0] if isinstance(several, (list, tuple)) else several, what)] * len(groups)


def _by_names(
    optimizer: Optimizer, values: Any, names: Mapping[int, tuple[str, ...]], per: Groups | None, on: On, what: str
) -> list[float | None]:
    """Return the number for each group by the names of its tensors, which must agree."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [tuple(p.shape) for p in held if id(p) not in names]
    if strange:
        raise InvalidValueError(
            f"{what} goes by names, but `optimizer` holds a tensor of shape {strange[0]} that is not in the `params` "
            "of this problem; make it for the model that you gave"
        )
    tensors, own = chosen(held, tuple(names[id(p)] for p in held), on, what)
    labels = per if isinstance(values, Mapping) else None  # one value for all has no labels
    by_tensor = dict(zip(map(id, tensors), values_of(own, values, labels, what), strict=True))
    found: list[float | None] = []
    for i, group in enumerate(optimizer.param_groups):
        told = {names[id(p)][0]: by_tensor.get(id(p)) for p in group["params"]}
        numbers = {name: None if v is None else _number(v, f"{what} for {name!r}") for name, v in told.items()}
        if len(set(numbers.values())) > 1:
            first, *_ = numbers
            other = next(name for name, v in numbers.items() if v != numbers[first])
            raise InvalidValueError(
                f"{what} differs within {_label(group, i)} of `optimizer`: {_told(numbers[first])} for {first!r}, "
                f"{_told(numbers[other])} for {other!r}; make the optimizer with a group for each "
                f"value: torch.optim.{type(optimizer).__name__}(bilevel.penalties.param_groups(model, "
                "solution.hparams[...], ...))"
            )
        found.append(next(iter(numbers.values()), None))
    return found


def _told(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _found(hparams: Any, where: Where, setting: str) -> Any:
    """Return the part of `hparams` that a key, a path of keys with dots or a function names."""
    if not isinstance(where, str) and callable(where):
        with noting(setting, "hparams", hparams):
            return where(hparams)
    if not isinstance(where, str):
        raise InvalidTypeError(
            f"apply_(): `{setting}` is a {type(where).__name__}, expected the key of `hparams` that holds its value "
            'such as "decay", or a function such as lambda h: h["decay"]'
        )
    found, path = hparams, where
    while path:
        parts = (
            found if isinstance(found, Mapping) else dict(enumerate(found)) if isinstance(found, (list, tuple)) else {}
        )
        keys = {str(key): key for key in parts}
        key = max((k for k in keys if path == k or path.startswith(f"{k}.")), key=len, default=None)
        if key is None:
            raise InvalidValueError(
                f"apply_(): `{setting}` is {where!r}, which is no key of `hparams`; there "
                f"{f'are {list(keys)}' if keys else 'are none, write a function: lambda h: h'}{meant(path, keys)}"
            )
        found, path = parts[keys[key]], path[len(key) + 1 :]
    return found
