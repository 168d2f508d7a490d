"""Forward mode through the inner loop: tangents for all hyperparameters, or for a few random directions.

    Z_0 = 0,   Z_t = A_t Z_{t-1} + B_t V,   dF V = ∂f/∂w Z_T + ∂f/∂λ V
    A_t = ∂Φ_t/∂(w, state),  B_t = ∂Φ_t/∂λ  of the inner step  (w_t, state_t) = Φ_t(w_{t-1}, state_{t-1}, λ)

With V = I it is the hypergradient: Franceschi, Donini, Frasconi and Pontil, Forward and reverse gradient-based
hyperparameter optimization, ICML 2017, section 3.2 and algorithm 2. With columns v_1 ... v_b of random signs

    dF ≈ mean of (dF v_i) v_i,     E[v v^T] = I,     E|error|^2 = (m - 1) / b |dF|^2   for m hyperparameters

is unbiased: Shen, Wang, Yang, Li, Wang, Zhang, Scarlett, Zhu and Kawaguchi, Memory-efficient gradient unrolling for
large-scale bi-level optimization, NeurIPS 2024, section 3. It is V V^T dF / b: never uphill, and zero where dF is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.solvers.about import About, Sizes, Sweep, Terms
from bilevel.solvers.base import OuterGradient, Response, State, add_terms, outer_gradient
from bilevel.solvers.linear.base import check_count
from bilevel.solvers.recorded import check_end, exact_for_the_loop, growth_of_tangents, halvings, record
from bilevel.vector import Vector, detach, largest, leaves, size, unflatten

BLOCK = 32  # tangents that go through a step together: their intermediate results are held at once
GRAPHS = 3  # a step's graph, its derivative's, and room


@dataclass(frozen=True)
class Forward:
    """Carry tangents along the inner loop: memory does not grow with the number of steps, the work does with λ.

    Exact without `directions`: one tangent for each of m hyperparameters, m products a step, for m small and a loop
    whose graph does not fit. With `directions` an unbiased estimate for any m, whose relative error is
    sqrt((m - 1) / directions): a single one is mostly noise, and its certificate says so. Descend with small steps of
    an optimizer that averages (Adam), under on_untrusted="ignore". Sees learning rates, like "unroll".

    Args:
        directions: random directions of one hypergradient; each costs a product a step and holds one tangent. None, or
            as many as there are hyperparameters: exact.
        seed: of the directions. They differ from one hypergradient to the next.
        most: hyperparameters that are taken without `directions`; more are refused with what they would cost.
    """

    directions: int | None = None
    seed: int = 0
    most: int = 1000

    def __post_init__(self) -> None:
        if self.directions is not None:
            check_count(self.directions, "directions")
        check_count(self.most, "most")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InvalidTypeError(f"`seed` is {self.seed!r}, expected a whole number")
        if not -(2**63) <= self.seed < 2**64:
            raise InvalidValueError(f"`seed` is {self.seed}, expected a whole number of at most 64 bits")

    @property
    def about(self) -> About:
        """Exact with all directions, an unbiased estimate with random ones."""
        error, source = "rounding; it is the loop's own gradient", "Franceschi et al. 2017"
        whole = About("start", "loop", 2, True, Terms("T (m + 1) products", "m tangents of n, one step", error, source))
        if self.directions is None:
            return whole
        b = self.directions
        terms = Terms(f"{b + 1} T products", f"{b} tangents of n, one step", f"√((m - 1) / {b})", "Shen et al. 2024")
        return replace(whole, exact=False, random=True, terms=terms)

    def sweep(self, steps: int, hyperparameters: int, sizes: Sizes | None = None) -> Sweep:
        """Return what a loop of so many steps takes."""
        count = self._count(hyperparameters)
        return Sweep(products=steps * (count + 1), graphs=GRAPHS + min(count, BLOCK), tangents=count)

    def refusal(self, steps: int, hyperparameters: int, variables: int) -> str | None:
        """Return why so many hyperparameters are not taken, with what they would cost; None where they are."""
        if self.directions is not None or hyperparameters <= self.most:
            return None
        return (
            f"`hparams` hold {hyperparameters} numbers, and forward mode carries a tangent for each: "
            f"{self.sweep(steps, hyperparameters).products:,} products for {steps} inner steps, and "
            f"{hyperparameters * variables:,} numbers in memory; choose "
            f'method="unroll" ({steps} products), bilevel.Forward(directions=16) for an unbiased estimate, or '
            f"bilevel.Forward(most={hyperparameters}) if it must be so"
        )

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Run the inner loop from `lower` with its tangents; `state` is that of the random numbers."""
        m = size(upper)
        if (refused := self.refusal(response.unroll_steps(), m, size(lower))) is not None:
            raise InvalidValueError(refused)
        exact = self._count(m) == m
        if exact:
            along = torch.eye(m, dtype=torch.float64)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            if state is not None:
                generator.set_state(state)
            along = _signs(self._count(m), m, generator)
            state = generator.get_state()
        w, outer, slopes, seen, sizes = _slopes(response, lower, upper, along)
        gradient = unflatten(slopes if exact else along.T @ slopes / len(along), _on_cpu(upper))
        found = {n: gradient[n].to(t.device) if n in seen else None for n, t in upper.items()}
        total = add_terms(response, dict.fromkeys(upper), found, upper, _UNSEEN)
        certificate = exact_for_the_loop(response, w, upper, growth_of_tangents(sizes))
        if not exact:
            certificate = _estimated(certificate, math.sqrt((m - 1) / len(along)))
        return Hypergradient(total, outer.loss, w, certificate, response.cost), state

    def _count(self, hyperparameters: int) -> int:
        """Return the number of tangents; as many random directions as unit ones would be a waste."""
        return hyperparameters if self.directions is None else min(self.directions, hyperparameters)


_UNSEEN = (
    "neither the outer loss nor an inner step uses it. Take it out of `hparams`, or use it in a loss or in a setting "
    "of the inner solver (lr=lambda h: h[...])"
)


def _signs(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return `(count, length)` random signs; of all v with E[v v^T] = I they have the least variance."""
    return torch.randint(0, 2, (count, length), generator=generator).double() * 2.0 - 1.0


def _slopes(
    response: Response, lower: Vector, upper: Vector, along: Tensor
) -> tuple[Vector, OuterGradient, Tensor, set[str], list[Tensor]]:
    """Run the loop with its tangents.

    Returns:
        The end; the outer gradient there; dF v for every row of `along`; what of λ was seen; sizes of the tangents.
    """
    h = leaves(upper)
    v = {n: t.to(upper[n].device) for n, t in unflatten(along, _on_cpu(upper)).items()}
    w, state = detach(lower), response.initial_state(lower)
    tangents: list[Tensor] | None = None
    seen: set[str] = set()
    sizes: list[Tensor] = []
    total = response.unroll_steps()
    looked_at = halvings(total)
    for t in range(total):
        step, w, state = record(response, w, state, h, t)
        if tangents is None:
            tangents = [x.new_zeros(len(along), *x.shape) for x in step.inputs]
        tangents, used = step.push(response, tangents, h, v, BLOCK)
        if t + 1 in looked_at:
            sizes.append(largest(tangents[: len(w)]))
        seen |= {name for name, uses in zip(h, used, strict=True) if uses}
    check_end(w)
    outer = outer_gradient(response, w, upper)
    seen |= {name for name, g in outer.upper.items() if g is not None}
    slopes = torch.zeros(len(along), dtype=torch.float64)
    terms = list(zip(tangents or [], outer.lower.values(), strict=False))  # the optimizer's tangents come after
    terms += [(v[name], g) for name, g in outer.upper.items() if g is not None]
    for tangent, g in terms:
        slopes += (tangent.double().reshape(len(along), -1) @ g.double().reshape(-1)).cpu()
    return w, outer, slopes, seen, sizes


def _on_cpu(v: Vector) -> Vector:
    return {name: t.cpu() for name, t in v.items()}


def _estimated(certificate: Certificate, error: float) -> Certificate:
    """Judge by the standard error too, which does not depend on the gradient: that of random signs."""
    hint = (
        "raise `directions`, or use it for its mean alone: it is unbiased and never points uphill, so that many small "
        'steps of Adam go the right way (on_untrusted="ignore")'
    )
    if not certificate.trusted:
        return replace(certificate, standard_error=error)
    verdict, reasons = judge(error, [], by_design=True, hint=hint)
    return replace(certificate, verdict=verdict, error=error, standard_error=error, reasons=tuple(reasons))
