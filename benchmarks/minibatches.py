"""SOBA and SABA on minibatches: time until the outer loss is within 1 % of the best known, beside hand-written ones.

    python -m benchmarks minibatches --limit 300

As `benchmarks.time_to_target`, on hyper-cleaning with minibatches of 100, with the best of four rates of the outer Adam
for all. The best known value comes from runs on all data. Nobody knows the outer loss of all data on the way, so the
moment at which it passes the target is found by bisection.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.minibatch_runs import MINIBATCH_RUNS
from benchmarks.report import Settings
from benchmarks.time_to_target import Race

WITHIN = 1e-2
RATES = (0.1, 0.03, 0.3, 0.01)  # the first one alone in quick runs


def run(settings: Settings) -> str:
    """Return the section as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        return Race("cleaning", settings, Path(folder), MINIBATCH_RUNS, WITHIN, RATES).run()
