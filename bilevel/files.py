"""Files of plain values and tensors.

They are read with `weights_only=True`, so nothing in them is ever executed, and written beside their name and moved
there, so that a kill in the middle leaves the last good one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from bilevel.errors import InvalidValueError

LOG = "bilevel log"  # what the first line of a JSON-lines log calls itself

# What torch's reader was seen to raise on empty, cut, foreign and malicious files.
_UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
)


def check_folder(path: str | os.PathLike[str], argument: str) -> None:
    """Raise unless a file can lie at `path`: its folder exists, and it is no folder itself."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise InvalidValueError(
            f"`{argument}` is {os.fspath(path)!r}, but there is no folder {folder}; make it first, for example by "
            f"os.makedirs({os.path.dirname(os.fspath(path))!r})"
        )
    if os.path.isdir(path):
        raise InvalidValueError(f"`{argument}` is {os.fspath(path)!r}, a folder; give the name of a file in it")


def write(data: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write plain values and tensors to a file, all of it or nothing."""
    _replace(lambda file: torch.save(data, file), path)


def replace_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write text to a file as UTF-8, all of it or nothing."""
    _replace(lambda file: file.write(text.encode()), path)


def _replace(put: Callable[[BinaryIO], Any], path: str | os.PathLike[str]) -> None:
    temporary = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that `write` wrote; nothing in it is executed."""
    if not os.path.isfile(path):
        raise InvalidValueError(f"there is no file {os.fspath(path)}")
    try:
        data = torch.load(path, weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        # Without torch's text, which advises `weights_only=False`: that would execute the file.
        raise InvalidValueError(
            f"{os.fspath(path)} is cut short, or no file of bilevel's; nothing in it was executed and it is left as it "
            "is: delete it, or give another path"
        ) from error
    if not isinstance(data, dict):
        raise InvalidValueError(f"{os.fspath(path)} is no file of bilevel's; it is left as it is")
    return data
