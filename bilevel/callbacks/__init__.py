"""Callbacks for `solve(callbacks=[...])`: logs in files, and other people's trackers.

Each writes, step by step, the losses, the norm of the hypergradient, its error estimate and verdict, the
hyperparameters in natural units, and what the step cost.
"""

from bilevel.callbacks.logs import CSV, JSONLines
from bilevel.callbacks.trackers import MLflow, TensorBoard, WandB
from bilevel.listening import Callback

__all__ = ["CSV", "Callback", "JSONLines", "MLflow", "TensorBoard", "WandB"]
