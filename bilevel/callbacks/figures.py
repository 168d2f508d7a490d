"""The figures of one record, by name."""

from __future__ import annotations

import math

from bilevel.solution import QUANTILES, SHOWN_ONE_BY_ONE, Record

LOSSES = ("outer_loss", "inner_loss", "test_loss")
TRUST = ("hypergradient_norm", "error", "inner_residual", "adjoint_residual")
COSTS = ("gradients", "products", "inner_steps", "inner_solves", "seconds")


def hyperparameters(record: Record) -> dict[str, float]:
    """Return natural values by name: "l2", "l2.0", "l2.1", or where they are many "l2.q0" to "l2.q1" (quantiles)."""
    found = {}
    for name, values in record.hparams.items():
        if record.sizes[name] == 1:
            found[name] = values[0]
        elif record.sizes[name] <= SHOWN_ONE_BY_ONE:
            found |= {f"{name}.{i}": value for i, value in enumerate(values)}
        else:
            found |= {f"{name}.q{q:g}": value for q, value in zip(QUANTILES, values, strict=True)}
    return found


def scalars(record: Record) -> dict[str, float]:
    """Return all that is a finite number, in the groups loss/, hypergradient/, cost/ and hparams/."""
    trust = {f"hypergradient/{name.removeprefix('hypergradient_')}": record[name] for name in TRUST}
    figures = {
        **{f"loss/{name.removesuffix('_loss')}": record[name] for name in LOSSES},
        **trust,
        "hypergradient/trusted": float(record.verdict != "untrusted"),
        **{f"cost/{name}": record[name] for name in COSTS},
        **{f"hparams/{name}": value for name, value in hyperparameters(record).items()},
    }
    return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}
