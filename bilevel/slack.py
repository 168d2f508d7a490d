"""How much slack the default tolerances of a run get: its steps pay for no digits that they do not use.

Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016, algorithm 1, lets the tolerances of the
inner and the linear solves fall together by a schedule that is fixed beforehand. Here they follow the certificate: both
are as loose as the estimated error of the last hypergradient allows. That error is relative to the hypergradient, so
the tolerances fall with the outer progress. A hypergradient that becomes untrusted is taken again with less.
"""

from __future__ import annotations

import torch

from bilevel.certificate import Certificate
from bilevel.problem import BilevelProblem
from bilevel.solvers.about import about
from bilevel.solvers.base import Estimator

START = 1e3  # of the first hypergradient, of whose error nothing is known before
AIM = 3e-4  # of the estimated error: "exact" allows 1e-3
FASTER, SLOWER, MOST = 10.0, 0.1, 1e5  # factors of one step, and of all
POWER = 0.8  # errors grow about in proportion to tolerances; a little less is taken than that would give
LEAST, HOPELESS = 1e-3, 0.3  # below the default tolerances only down to this, and not for an error above that
UNKNOWN = 1e-3  # the factor for another try where no error is known


def may_loosen(estimator: Estimator, problem: BilevelProblem) -> bool:
    """Say whether a run has slack: float32 has no digits to spare, and one draw of minibatches is no other's truth."""
    dtypes = {t.dtype for t in problem.params.start.values()}
    return about(estimator).takes_slack and problem.deterministic and dtypes == {torch.float64}


def next_slack(slack: float, certificate: Certificate) -> float:
    """Return the slack for the next hypergradient of a run."""
    error = certificate.error
    if error is None or not certificate.trusted:
        return 1.0
    wanted = FASTER if error == 0.0 else (AIM / error) ** POWER
    return min(MOST, max(1.0, slack * min(FASTER, max(SLOWER, wanted))))


def tightened(slack: float, certificate: Certificate) -> float | None:
    """Return the slack for another try at the same point; None where that would not help.

    Where the inner problem is badly conditioned, the default tolerances themselves may be too loose.
    """
    error = certificate.error
    factor = UNKNOWN if error is None else min(SLOWER, AIM / error) / 3.0
    if slack > 1.0:
        return max(1.0, slack * factor)
    hopeless = error is None or error > HOPELESS or slack <= LEAST
    return None if hopeless else max(LEAST, slack * factor)
