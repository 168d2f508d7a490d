"""`bilevel.lightning`: hyperparameters that move while Lightning trains."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own imports warn
    pl: Any = pytest.importorskip("pytorch_lightning")

from bilevel.lightning import HyperCallback, _bases

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.filterwarnings("ignore:::pytorch_lightning")]
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

DICE = torch.Generator().manual_seed(0)
X = torch.randn(80, 12, generator=DICE)
Y = X[:, 0] + torch.randn(80, generator=DICE)


class Ridge(pl.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(12, 1)
        self.strength: Any = None

    def loss(self, batch: Any, strength: Tensor) -> Tensor:
        return self.validation(batch) + strength * (self.layer.weight**2).sum()

    def validation(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self.layer(x)[:, 0] - y) ** 2).mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Any, i: int) -> Tensor:
        return self.loss(batch, self.strength["l2"])

    def validation_step(self, batch: Any, i: int) -> None:
        self.log("validation", self.validation(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Logged(pl.loggers.logger.DummyLogger):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step or 0, metrics))


def hyper(**settings: Any) -> bilevel.HyperOptimizer:
    return bilevel.HyperOptimizer(
        {"l2": bilevel.positive(1e-3)},
        lambda net, h, batch: net.loss(batch, h["l2"]),
        lambda net, h, batch: net.validation(batch),
        on_untrusted="ignore",
        **settings,
    )


def loader(rows: slice, size: int = 10) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X[rows], Y[rows]), batch_size=size)


def trainer(folder: Path, *callbacks: Any, epochs: int = 4, **settings: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} | settings
    quiet = {"enable_checkpointing": False} | quiet
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks],
        log_every_n_steps=1,
        **quiet,
    )


def test_a_strength_moves_towards_what_validation_wants_and_is_logged(tmp_path: Path) -> None:
    net, tuned, log = Ridge(), hyper(), Logged()
    net.strength = tuned.hparams
    run = trainer(tmp_path, HyperCallback(tuned, every_n_steps=2, after_n_steps=4), logger=log, epochs=6)
    run.fit(net, loader(slice(0, 20)), loader(slice(20, 80), 60))
    assert tuned.steps == 5  # of 12 steps: 4, 6, 8, 10, 12
    assert tuned.hparams["l2"].item() > 1e-3  # 20 noisy rows for 12 weights: more is better
    ours = [(step, metrics) for step, metrics in log.seen if "hparams/l2" in metrics]
    assert [step for step, _ in ours] == [4, 6, 8, 10, 12]
    assert ours[0][1]["hparams/l2"] == pytest.approx(1e-3) and "loss/outer" in ours[0][1]


def test_the_training_that_it_watches_goes_as_without_it(tmp_path: Path) -> None:
    ends = []
    for watched in (True, False):
        torch.manual_seed(0)
        net, tuned = Ridge(), hyper(outer_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.0))
        net.strength = tuned.hparams
        shuffled = DataLoader(TensorDataset(X[:20], Y[:20]), batch_size=5, shuffle=True)
        trainer(tmp_path, *([HyperCallback(tuned, every_n_steps=1)] if watched else []), epochs=2).fit(
            net, shuffled, loader(slice(20, 80))
        )
        ends.append(net.layer.weight.detach().clone())
    assert torch.equal(*ends)


def test_it_is_resumed_with_the_trainer_s_checkpoint(tmp_path: Path) -> None:
    ends = []
    for cut in (False, True):
        torch.manual_seed(0)
        net, tuned = Ridge(), hyper(seed=0)
        net.strength = tuned.hparams
        data = loader(slice(0, 20)), loader(slice(20, 80))
        run = trainer(tmp_path, HyperCallback(tuned, every_n_steps=1), epochs=1 if cut else 2)
        run.fit(net, *data)
        if cut:
            run.save_checkpoint(tmp_path / "cut.ckpt")
            net, tuned = Ridge(), hyper(seed=1)
            net.strength = tuned.hparams
            run = trainer(tmp_path, HyperCallback(tuned, every_n_steps=1), epochs=2)
            run.fit(net, *data, ckpt_path=tmp_path / "cut.ckpt", weights_only=False)
            assert tuned.steps == 4
        ends.append(tuned.hparams["l2"].clone())
    assert torch.equal(*ends)


class Manual(Ridge):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Without(Ridge):
    def loss(self, batch: Any, strength: Tensor) -> Tensor:
        return self.validation(batch)


@pytest.mark.parametrize(
    ("net", "data", "message"),
    [
        (Ridge, (), r"no validation data: give the Trainer some, trainer\.fit\(module, train_loader, val_loader\)"),
        (Ridge, ([loader(slice(0, 5)), loader(slice(5, 9))],), r"2 validation loaders; say which one"),
        (Manual, (loader(slice(0, 5)),), r"Manual has automatic_optimization=False.*call hyper\.step\(self"),
        (Without, (loader(slice(0, 5)),), r"hparams\['l2'\] has no path to the outer loss"),
    ],
)
def test_misuse_is_named(net: Any, data: Any, message: str, tmp_path: Path) -> None:
    module, tuned = net(), hyper()
    module.strength = tuned.hparams
    run = trainer(tmp_path, HyperCallback(tuned, every_n_steps=1), epochs=1, num_sanity_val_steps=0)
    with pytest.raises(bilevel.BilevelError, match=message):
        run.fit(module, loader(slice(0, 20)), *data)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: HyperCallback({"l2": 1.0}), r"`hyper` is a dict, expected a bilevel\.HyperOptimizer"),  # type: ignore[arg-type]
        (lambda: HyperCallback(hyper(), every_n_steps=0), r"`every_n_steps` is 0"),
    ],
)
def test_bad_arguments_are_named(made: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        made()


def test_it_is_a_callback_of_both_packages_where_both_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        pass

    other = ModuleType("lightning.pytorch")
    other.Callback = Other  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", other)
    assert _bases() == (Other, pl.Callback)


def test_it_is_imported_on_demand_and_says_what_to_install() -> None:
    program = """
import sys, bilevel
assert not {"pytorch_lightning", "lightning", "transformers"} & set(sys.modules)
for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers", "accelerate"):
    sys.modules[name] = None
for door in ("lightning", "huggingface"):
    try:
        __import__(f"bilevel.{door}")
    except bilevel.BilevelError as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 'pip install "bilevel[lightning]"' in told and 'pip install "bilevel[huggingface]"' in told
