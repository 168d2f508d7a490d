"""
Lightning trains, bilevel tunes
===============================

A LightningModule and its Trainer stay as they are. The strengths of an L2 penalty, one for each feature, come in as an
attribute that the loss reads; `bilevel` calls `Trainer.fit` as its inner solver and asks the certificate whether that
ended at a minimum.
"""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

# %%
# Thirty features, three of which matter, and few rows to tell them apart.

torch.manual_seed(0)
X = torch.randn(140, 30, dtype=torch.float64)
y = (X[:, :3].sum(1) + torch.randn(140, dtype=torch.float64) > 0).double()
training, validation, test = TensorDataset(X[:40], y[:40]), (X[40:90], y[40:90]), (X[90:], y[90:])


class Classifier(pl.LightningModule):
    """What a user of Lightning has; `strengths` is all that is new."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(30, 1, dtype=torch.float64)
        self.strengths: Any = None

    def cross_entropy(self, batch: Any) -> Tensor:
        x, target = batch
        return torch.nn.functional.binary_cross_entropy_with_logits(self.layer(x)[:, 0], target)

    def loss(self, batch: Any, strengths: Tensor) -> Tensor:
        return self.cross_entropy(batch) + (strengths * self.layer.weight**2).sum()

    def training_step(self, batch: Any, i: int) -> Tensor:
        return self.loss(batch, self.strengths)

    def configure_optimizers(self) -> torch.optim.Optimizer:  # any optimizer; this one ends closest to the minimum
        return torch.optim.LBFGS(self.parameters(), max_iter=50, line_search_fn="strong_wolfe", tolerance_change=0.0)


# %%
# The loop gets a working copy of the module, and hyperparameters in natural values. It may train the copy in place.


def fit(module: Classifier, hparams: Any, data: TensorDataset) -> None:
    module.strengths = hparams["l2"]
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=len(data)))


classifier = Classifier()
problem = bilevel.BilevelProblem(
    inner_loss=lambda module, h, batch: module.loss(batch, h["l2"]),
    outer_loss=lambda module, h, batch: module.cross_entropy(batch),
    params=classifier,
    hparams={"l2": bilevel.positive(0.01, shape=(30,))},
    inner_solver=bilevel.inner.fit(fit),
    inner_data=training,
    outer_data=validation,
)

# %%
# The module itself is not touched until `apply_`.

solution = bilevel.solve(problem, steps=5, progress=False)
print(solution.summary())
before = float(classifier.cross_entropy(test).detach())
solution.apply_()
strengths = solution.hparams["l2"]
print(
    f"strength of the three features that matter: {strengths[:3].mean():.2g}, of the others: {strengths[3:].mean():.2g}"
)
print(f"cross-entropy of the test rows, untrained and tuned: {before:.3f}, {classifier.cross_entropy(test):.3f}")

assert solution.certificate.verdict == "exact"
assert solution.outer_loss < 0.8 * solution.start.outer_loss
assert strengths[:3].mean() < strengths[3:].mean()
assert float(classifier.cross_entropy(test)) < before
