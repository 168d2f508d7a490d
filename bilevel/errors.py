"""Everything this library raises or warns with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class BilevelError(Exception):
    """Base of every error that this library raises on purpose."""


NAN_ADVICE = (
    "look for NaN in the data, a logarithm or a root of 0, a division by 0 or an overflow of exp in the loss (inside "
    "torch.autograd.set_detect_anomaly(True) torch names the operation), or for a learning rate that is too large"
)


def meant(word: object, known: Iterable[str]) -> str:
    """Return a hint at the known word that a misspelt one is close to; empty where there is none.

    >>> meant("unrol", ["implicit", "unroll"])
    '; did you mean "unroll"?'
    """
    words = {w.lower().replace("_", "-"): w for w in known}
    close = get_close_matches(str(word).lower().replace("_", "-"), words, n=1)
    return f'; did you mean "{words[close[0]]}"?' if close else ""


@contextmanager
def noting(name: str, arguments: str, hparams: Any = None) -> Iterator[None]:
    """Add to any error inside that it came up in a function of the user's, and which keys `hparams` has."""
    begin = f"bilevel: while evaluating `{name}`"
    try:
        yield
    except Exception as error:
        if not any(note.startswith(begin) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{begin}, called with ({arguments})")
        if isinstance(error, KeyError) and isinstance(hparams, dict) and error.args[0] not in hparams:
            there = ", ".join(map(repr, hparams))
            error.add_note(f"bilevel: the keys of `hparams` are {there}{meant(error.args[0], map(str, hparams))}")
        raise


class InvalidValueError(BilevelError, ValueError):
    """An argument has the right type and a wrong value, shape, dtype, device or structure."""


class InvalidTypeError(BilevelError, TypeError):
    """An argument, or what a user's function returned, has the wrong type."""


class UnseenHyperparameterError(BilevelError, ValueError):
    """A hyperparameter has no path to the outer loss under the chosen method."""


class NotTwiceDifferentiableError(BilevelError, TypeError):
    """A loss holds an operation that autograd cannot differentiate twice; the message names it."""


class UntrustedHypergradientError(BilevelError, ArithmeticError):
    """A hypergradient's certificate says "untrusted" and `on_untrusted="raise"` was asked for.

    Attributes:
        certificate: the certificate in question, with its reasons.
        solution: the run up to the last good step when a run was stopped, else None.
    """

    def __init__(self, message: str, certificate: Any, solution: Any = None) -> None:
        super().__init__(message)
        self.certificate = certificate
        self.solution = solution


class NonFiniteError(BilevelError, ArithmeticError):
    """A NaN or an infinity came up; the run stopped at once.

    Attributes:
        quantity: what was not finite, for example "inner loss".
        step: the outer step (0 is the first), or None outside a run.
        solution: the run up to the last good step, or None if there was none.
    """

    def __init__(self, message: str, quantity: str, step: int | None = None, solution: Any = None) -> None:
        super().__init__(message)
        self.quantity = quantity
        self.step = step
        self.solution = solution


class UntrustedHypergradientWarning(UserWarning):
    """A hypergradient's certificate says "untrusted" (`on_untrusted="warn"`, the default)."""
