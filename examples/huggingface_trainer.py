"""
HuggingFace's Trainer trains, bilevel tunes
===========================================

A BERT (a tiny one, from its config) is fine-tuned by `Trainer.train`, with one L2 strength for each tensor of its head.
`bilevel` calls the Trainer as its inner solver. Then the same Trainer tunes them while it trains, by a callback.
"""

import os
import tempfile
from functools import partial
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

import bilevel
from bilevel.huggingface import HyperCallback

# %%
# Sentences of eight tokens; the label says whether token 7 is among them, and a fifth of the labels are wrong.

torch.manual_seed(0)
tokens = torch.randint(8, 20, (96, 8))
labels = torch.arange(96) % 2
tokens[labels == 1, 3] = 7
labels = torch.where(torch.rand(96) < 0.2, 1 - labels, labels)


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows as the Trainer wants them."""

    def __init__(self, rows: slice) -> None:
        self.rows = range(96)[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": tokens[self.rows[i]], "labels": labels[self.rows[i]]}


training, validation = Sentences(slice(0, 32)), Sentences(slice(32, 96))
config = BertConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    hidden_dropout_prob=0.0,  # dropout has no minimum to end at
    attention_probs_dropout_prob=0.0,
)
model = BertForSequenceClassification(config)
head = bilevel.parameters(model, "classifier.*")  # all of it would do as well, and take more steps to end


def validation_loss(net: Any, h: Any, batch: Any) -> Tensor:
    loss: Tensor = net(**batch).loss
    return loss


def training_loss(net: Any, h: Any, batch: Any) -> Tensor:
    penalty: Tensor = h["weight"] * (net.classifier.weight**2).sum() + h["bias"] * (net.classifier.bias**2).sum()
    return validation_loss(net, h, batch) + penalty


class Penalized(Trainer):
    """A Trainer whose loss has the penalty; `hparams` is all that is new."""

    hparams: Any = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Plain momentum, which comes closest to the minimum; AdamW would need weight_decay=0.0 and a scheduler."""
        assert self.model is not None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return training_loss(model, self.hparams, inputs)


def arguments(folder: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )


# %%
# The loop gets a working copy of the model, whose frozen part stays as it is, and trains it in place.


def fit(net: Any, h: Any, data: Sentences) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Penalized(net, arguments(folder, 140), train_dataset=data)
        trainer.hparams = h
        trainer.remove_callback(PrinterCallback)
        trainer.train()


start = {"weight": bilevel.positive(0.03), "bias": bilevel.positive(0.03)}
problem = bilevel.BilevelProblem(
    training_loss, validation_loss, head, start, bilevel.inner.fit(fit), inner_data=training, outer_data=validation
)
adam = partial(torch.optim.Adam, lr=0.5)  # a training each, where L-BFGS tries several points in a step
solution = bilevel.solve(problem, steps=3, outer_optimizer=adam, progress=False)
print(solution.summary())
assert solution.certificate.trusted
assert solution.outer_loss < solution.start.outer_loss

# %%
# Or in one training: every 10 steps one hypergradient, at the model as it is.

hyper = bilevel.HyperOptimizer(start, training_loss, validation_loss, on_untrusted="ignore", like=model)
model.bert.requires_grad_(False)
with tempfile.TemporaryDirectory() as folder:
    trainer = Penalized(model, arguments(folder, 140), train_dataset=training, eval_dataset=validation)
    trainer.hparams = hyper.hparams
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(HyperCallback(trainer, hyper, every_n_steps=10, after_n_steps=50))
    trainer.train()
print(hyper.hparams)
print(hyper.certificate)
assert hyper.steps == 10
assert hyper.hparams["weight"] < 0.03 > solution.hparams["weight"]  # both find that less of it is better
