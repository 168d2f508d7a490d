"""How a run was made, as plain values: the call, the problem, the script, versions, the machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import scipy
import torch

from bilevel.problem import BilevelProblem

DEFAULTS: dict[str, Any] = {"callbacks": [(), []], "on_untrusted": ["warn"]}  # of `solve`, where that is not None

ROOMS = ("callbacks", "inner", "prox", "sklearn")  # packages whose names are public under their own
LONGEST = 200  # characters of what others print of themselves


def script_name() -> str:
    """Return the name of the program that runs, "" where it has none: `python -`, `python -c`, an interactive one."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return "" if name in ("-", "-c") else name


def context(problem: BilevelProblem, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a run before it begins.

    Args:
        problem: the problem.
        arguments: of `solve`, without the problem.

    Returns:
        `call` (the call of `solve`, defaults left out), `problem`, `hyperparameters` (kind by tensor), `samples` (rows
        of each split, None where they cannot be counted), `script`, `started` (UTC), `versions`, `device`, `dtype`,
        `threads`, `system`.
    """
    first = next(iter(problem.params.start.values()))
    kinds = problem.hparams.kinds
    readers = {
        "training": problem.inner_batches,
        "validation": problem.outer_batches,
        "test": problem.test_batches,
    }
    return {
        "call": _call(arguments),
        "problem": problem.described(_shown(problem.inner_solver)),
        "hyperparameters": {name: repr(kinds.get(name, "real")) for name in problem.hparams.layout.start},
        # A member of a family has rows of its own, and the first dimension counts members.
        "samples": {name: None if problem.members else reader.rows() for name, reader in readers.items()},
        "script": script_name(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "bilevel": str(getattr(sys.modules.get("bilevel"), "__version__", "unknown")),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "device": torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else str(first.device),
        "dtype": str(first.dtype),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} on {platform.machine()}, {os.cpu_count()} cores",
    }


def _call(arguments: Mapping[str, Any]) -> str:
    """Return the call of `solve` as code; functions by their names."""
    shown = [
        f"{name}={_shown(value)}"
        for name, value in arguments.items()
        if name == "method" or not (value is None or value in DEFAULTS.get(name, ()))
    ]
    return f"bilevel.solve({', '.join(['problem', *shown])})"


def _shown(value: Any) -> str:
    """Return a value as code, as far as it is short: settings that are not the default, shapes of tensors, names."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, torch.Tensor):
        return f"<tensor of shape {tuple(value.shape)}>"
    module = type(value).__module__
    if module.startswith("bilevel."):
        room = next((f"{room}." for room in ROOMS if module.startswith(f"bilevel.{room}")), "")
        return f"bilevel.{room}{_settings(value) if is_dataclass(value) else _cut(repr(value))}"
    if isinstance(value, str) or not callable(value):
        return _cut(repr(value))
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__qualname__)
    return name if module in ("__main__", "builtins") or "<" in name else f"{module}.{name}"


def _settings(value: Any) -> str:
    simple = (bool, int, float, str, type(None))
    found = [(field, getattr(value, field.name)) for field in fields(value) if field.repr]
    given = [
        f"{field.name}={_shown(x)}"
        for field, x in found
        if not (isinstance(x, simple) and isinstance(field.default, simple) and x == field.default)
    ]
    return f"{type(value).__name__}({', '.join(given)})"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
