"""The hypergradient and the certificate that says how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["exact", "approximate", "untrusted"]

# The contract: "exact" means that the estimated relative error is below this.
EXACT_BELOW = 1e-3
# Off by 0.5, an approximation may point anywhere, so it does not work as designed; an estimate may be a fifth too low.
APPROXIMATE_BELOW = 0.4


@dataclass(frozen=True)
class Certificate:
    """How far a hypergradient can be trusted.

    Attributes:
        verdict: "exact" (exact in the limit, estimated relative error below 1e-3), "approximate"
            (approximates by design and works as designed) or "untrusted".
        inner_residual: norm of the inner gradient where the hypergradient was taken, relative to
            the inner gradient's own scale (see `bilevel.solvers.base.inner_scale`).
        adjoint_residual: true relative residual of the linear system; None if none was solved.
        curvature: smallest p·Hp / p·p met on the way; None if none was looked at.
        error: estimated relative error of the hypergradient; None where the method has no estimate.
        standard_error: of a mean over several draws of batches, relative; None for a single draw.
        reasons: sentences that say what is wrong and which knob to turn.
        notes: sentences that say what was done on the way and is worth knowing.
    """

    verdict: Verdict
    inner_residual: float | None = None
    adjoint_residual: float | None = None
    curvature: float | None = None
    error: float | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    standard_error: float | None = None

    @property
    def trusted(self) -> bool:
        """True unless the verdict is "untrusted"."""
        return self.verdict != "untrusted"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Certificate:
        """Return the certificate that `dataclasses.asdict` made a dict of, also where tuples became lists."""
        return cls(**{**fields, "reasons": tuple(fields["reasons"]), "notes": tuple(fields["notes"])})

    def __str__(self) -> str:
        figures = {
            "estimated relative error": self.error,
            "standard error over batches": self.standard_error,
            "inner residual": self.inner_residual,
            "adjoint residual": self.adjoint_residual,
            "smallest curvature": self.curvature,
        }
        lines: list[str] = [self.verdict]
        lines += [f"  {name}: {value:.2e}" for name, value in figures.items() if value is not None]
        lines += [f"  ! {reason}" for reason in self.reasons]
        lines += [f"  - {note}" for note in self.notes]
        return "\n".join(lines)


def judge(error: float | None, reasons: Sequence[str], *, by_design: bool, hint: str) -> tuple[Verdict, list[str]]:
    """Turn an error estimate and what went wrong into a verdict and its reasons.

    Args:
        error: estimated relative error; None if the method has no estimate.
        reasons: what is wrong for certain; any entry makes the verdict "untrusted".
        by_design: the method approximates by design, so an error above 1e-3 (but below 0.4) is no fault of its own.
        hint: what to do about a large error, as the end of a sentence.
    """
    if reasons:
        return "untrusted", list(reasons)
    if error is not None and error < EXACT_BELOW:
        return "exact", []
    if by_design and (error is None or error < APPROXIMATE_BELOW):
        return "approximate", []
    shown = "unknown" if error is None else f"{error:.1e}"
    return "untrusted", [f"the estimated relative error of the hypergradient is {shown} ({_demand(by_design)}): {hint}"]


def _demand(by_design: bool) -> str:
    if by_design:
        return f"a good approximation stays below {APPROXIMATE_BELOW}"
    return f"exact means below {EXACT_BELOW:.0e}"


@dataclass
class Cost:
    """What was spent: exact counts, so that tests can hold them.

    Attributes:
        gradients: gradients of the inner or the outer loss.
        products: Hessian-vector or Jacobian-vector products (a dense Hessian of n variables counts n).
    """

    gradients: int = 0
    products: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.gradients + other.gradients, self.products + other.products)


@dataclass(frozen=True)
class Hypergradient:
    """The gradient of the outer loss through the inner solution, with its certificate.

    Attributes:
        gradient: dF/dλ in natural units, structured like the user's `hparams` (a name-to-tensor
            dict where an estimator returns it).
        outer_loss: F(λ) at the inner solution.
        params: the inner solution, structured like the user's `params`.
        certificate: how far `gradient` can be trusted.
        cost: gradients and products spent, the inner solve included.
        correction: what to add to `outer_loss` for the value at the exact inner solution, to first order; 0 where the
            method knows none.
    """

    gradient: Any
    outer_loss: float
    params: Any
    certificate: Certificate
    cost: Cost
    correction: float = 0.0
