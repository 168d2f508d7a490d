"""Which interpreter has which rival: each is asked once."""

from __future__ import annotations

import json
import subprocess
from functools import cache

from benchmarks.contenders import CONTENDERS

_ASK = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
modules, names = json.loads(sys.argv[1])
print(json.dumps([{m: importlib.util.find_spec(m) is not None for m in modules}, {n: version(n) for n in names}]))
"""


@cache
def _asked(python: str) -> tuple[dict[str, bool], dict[str, str]]:
    """Return which modules an interpreter has, and the versions of distributions."""
    modules = sorted({module for module, _ in CONTENDERS.values()} | {"optuna"})
    names = sorted({name for _, names in CONTENDERS.values() for name in names} | {"optuna"})
    run = subprocess.run([python, "-c", _ASK, json.dumps([modules, names])], capture_output=True, text=True, check=True)
    found, versions = json.loads(run.stdout)
    return found, versions


def python_of(contender: str, pythons: tuple[str, ...]) -> str:
    """Return the first interpreter that has a contender's library; the first of all where none has."""
    module = CONTENDERS[contender][0] if contender in CONTENDERS else contender
    if module in ("bilevel", "torch"):
        return pythons[0]
    return next((python for python in pythons if _asked(python)[0].get(module)), pythons[0])


def versions(pythons: tuple[str, ...]) -> str:
    """Return the versions of the rivals, and which are missing."""
    found: dict[str, str] = {}
    for python in reversed(pythons):
        found.update({name: held for name, held in _asked(python)[1].items() if held})
    every = sorted({name for _, names in CONTENDERS.values() for name in names} | {"optuna"})
    missing = [name for name in every if name not in found]
    words = ", ".join(f"{name} {found[name]}" for name in every if name in found and name != "torch")
    return words + (f"; not installed: {', '.join(missing)}" if missing else "")
