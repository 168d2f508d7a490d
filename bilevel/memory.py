"""Amounts of memory, as people write them and as tensors take them."""

from __future__ import annotations

import re
from typing import Any

import optree
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError

UNITS = {"": 1, "B": 1}
for power, letter in enumerate("KMGT", start=1):
    UNITS |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power}


def parsed(amount: Any, name: str) -> int:
    """Return the bytes that "500MB", "1.5 GiB" or a whole number stands for.

    >>> parsed("1.5 kB", "memory"), parsed("2GiB", "memory"), parsed(700, "memory")
    (1500, 2147483648, 700)
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, str)):
        raise InvalidTypeError(
            f'`{name}` is {amount!r}, expected an amount such as "500MB" or "2GiB", or bytes as a whole number'
        )
    if isinstance(amount, int):
        found = amount
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", amount)
        if match is None or match[2].upper() not in UNITS:
            raise InvalidValueError(
                f'`{name}` is {amount!r}, expected a number and one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB: "500MB"'
            )
        found = int(float(match[1]) * UNITS[match[2].upper()])
    if found < 1:
        raise InvalidValueError(f'`{name}` is {amount!r}, expected more than nothing; write "500MB"')
    return found


def shown(count: float) -> str:
    """Return bytes as people read them.

    >>> shown(512), shown(3_210_000)
    ('512 B', '3.21 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def taken(tree: Any) -> int:
    """Return the bytes of all tensors in a structure."""
    return sum(t.numel() * t.element_size() for t in optree.tree_leaves(tree) if isinstance(t, Tensor))
