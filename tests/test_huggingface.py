"""`bilevel.huggingface`: hyperparameters that move while HuggingFace's Trainer trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import bilevel

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
transformers: Any = pytest.importorskip("transformers")
HyperCallback = pytest.importorskip("bilevel.huggingface").HyperCallback

pytestmark = pytest.mark.usefixtures("seeded")

DICE = torch.Generator().manual_seed(0)
X = torch.randn(80, 12, generator=DICE)
Y = X[:, 0] + torch.randn(80, generator=DICE)


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, rows: slice) -> None:
        self.x, self.y = X[rows], Y[rows]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


class Ridge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        predicted = self.layer(x)[:, 0]
        return {"loss": ((predicted - labels) ** 2).mean(), "logits": predicted}


def validation(net: Any, h: Any, batch: Any) -> Tensor:
    return net(**batch)["loss"]  # type: ignore[no-any-return]


def penalized(net: Any, h: Any, batch: Any) -> Tensor:
    return validation(net, h, batch) + h["l2"] * (net.layer.weight**2).sum()  # type: ignore[no-any-return]


class Penalized(transformers.Trainer):  # type: ignore[misc]
    loss: Any = staticmethod(penalized)
    hparams: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return self.loss(model, self.hparams, inputs)


def hyper(loss: Any = penalized, **settings: Any) -> bilevel.HyperOptimizer:
    return bilevel.HyperOptimizer({"l2": bilevel.positive(1e-3)}, loss, validation, on_untrusted="ignore", **settings)


def trainer(folder: Path, tuned: bilevel.HyperOptimizer, steps: int, rows: Any = slice(20, 80), **settings: Any) -> Any:
    torch.manual_seed(0)
    quiet = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    small = {"per_device_train_batch_size": 10, "learning_rate": 0.02}
    arguments = transformers.TrainingArguments(str(folder), max_steps=steps, **{**quiet, **small, **settings})
    held_out = None if rows is None else {"a": Rows(slice(20, 80))} if rows == "several" else Rows(rows)
    run = Penalized(Ridge(), arguments, train_dataset=Rows(slice(0, 20)), eval_dataset=held_out)
    run.hparams = tuned.hparams
    return run


def test_a_strength_moves_towards_what_validation_wants_and_is_logged(tmp_path: Path) -> None:
    tuned = hyper()
    whole = {"per_device_train_batch_size": 20, "per_device_eval_batch_size": 60, "learning_rate": 0.1}
    run = trainer(tmp_path, tuned, 60, **whole)
    run.add_callback(HyperCallback(run, tuned, every_n_steps=5, after_n_steps=40))
    run.train()
    assert tuned.steps == 5 and tuned.hparams["l2"].item() > 1e-3  # 20 noisy rows for 12 weights: more is better
    ours = [entry for entry in run.state.log_history if "hparams/l2" in entry]
    assert [entry["step"] for entry in ours] == [40, 45, 50, 55, 60]
    assert ours[0]["hparams/l2"] == pytest.approx(1e-3) and "loss/outer" in ours[0]


def test_the_training_that_it_watches_goes_as_without_it(tmp_path: Path) -> None:
    ends = []
    for watched in (True, False):
        tuned = hyper(outer_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.0))
        run = trainer(tmp_path, tuned, 4)
        if watched:
            run.add_callback(HyperCallback(run, tuned, every_n_steps=1))
        run.train()
        ends.append(run.model.layer.weight.detach().clone())
    assert torch.equal(*ends)


def test_it_is_resumed_with_the_trainer_s_checkpoint(tmp_path: Path) -> None:
    ends = []
    for folder, stops in (("whole", (4,)), ("cut", (2, 4))):
        for stop in stops:
            tuned = hyper(seed=0)
            run = trainer(
                tmp_path / folder, tuned, stop, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
            )
            run.add_callback(HyperCallback(run, tuned, every_n_steps=1))
            run.train(resume_from_checkpoint=stop == 4 and folder == "cut")
        assert tuned.steps == 4
        ends.append(tuned.hparams["l2"].clone())
    assert torch.equal(*ends)
    (tmp_path / "cut" / "checkpoint-4" / "bilevel.pt").unlink()
    tuned = hyper()
    run = trainer(tmp_path / "cut", tuned, 6)
    run.add_callback(HyperCallback(run, tuned))
    with pytest.raises(bilevel.BilevelError, match=r"goes on from step 4, and .*bilevel\.pt is not there"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("rows", "loss", "message"),
    [
        (None, penalized, r"no validation data: write Trainer\(\.\.\., eval_dataset=dataset\)"),
        ("several", penalized, r"several eval_datasets \(a\).*validation=dataset"),
        (slice(20, 80), validation, r"hparams\['l2'\] has no path to the outer loss"),
    ],
)
def test_misuse_is_named(rows: Any, loss: Any, message: str, tmp_path: Path) -> None:
    tuned = hyper(loss)
    run = trainer(tmp_path, tuned, 2, rows)
    run.loss = loss
    run.add_callback(HyperCallback(run, tuned, every_n_steps=1))
    with pytest.raises(bilevel.BilevelError, match=message):
        run.train()


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(bilevel.BilevelError, match=r"`trainer` is a HyperOptimizer.*trainer\.add_callback"):
        HyperCallback(hyper(), hyper())
    with pytest.raises(bilevel.BilevelError, match=r"`hyper` is a dict"):
        HyperCallback(trainer(tmp_path, hyper(), 1), {"l2": 1.0})
