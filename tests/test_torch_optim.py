"""`inner.TorchOptim`: torch's own optimizers and schedulers as inner solvers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel.inner import TorchOptim

D = torch.float64
TARGET = torch.tensor([1.0, 2.0], dtype=D)
EXACT = -10.0 / 8  # d/dh 5 (1 + h)^-2 at h = 1, where w* = TARGET / (1 + h)


def problem(solver: TorchOptim, lr: bool = False) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(
        lambda w, h: ((w - TARGET) ** 2).sum() + h["l2"] * (w**2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=D),
        {"l2": bilevel.positive(1.0), **({"lr": bilevel.positive(0.1)} if lr else {})},
        inner_solver=solver,
    )


SOLVERS = {
    "SGD": TorchOptim(optim.SGD, lr=0.1, momentum=0.5, steps=120),
    "AdamW": TorchOptim(
        optim.AdamW, lr=0.3, weight_decay=0.0, steps=300, scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=300)
    ),
    "Rprop": TorchOptim(optim.Rprop, lr=0.1, steps=120),
    "LBFGS": TorchOptim(optim.LBFGS, line_search_fn="strong_wolfe", steps=3),
    "factory": TorchOptim(lambda params: optim.SGD(params, lr=0.2), steps=100),
    "by step": TorchOptim(optim.SGD, lr=lambda h, step: 0.2 / (1 + 0.01 * step), steps=100),
    "by value": TorchOptim(optim.Adam, lr=lambda h: 0.05 * h["l2"], betas=lambda h: (0.9 * h["l2"], 0.999), steps=500),
    "plateau": TorchOptim(optim.SGD, lr=0.2, steps=100, scheduler=partial(lr_scheduler.ReduceLROnPlateau, patience=50)),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_hypergradient_at_its_end_is_exact(name: str) -> None:
    found = bilevel.hypergradient(problem(SOLVERS[name]))
    assert found.certificate.verdict == "exact"
    assert found.gradient["l2"].item() == pytest.approx(EXACT, rel=1e-5)  # digits that 100 to 400 steps leave


@pytest.mark.parametrize(
    ("solver", "made"),
    [
        (
            TorchOptim(optim.AdamW, lr=0.05, steps=7, scheduler=partial(lr_scheduler.StepLR, step_size=3)),
            lambda p: optim.AdamW(p, lr=0.05),
        ),
        (TorchOptim(optim.NAdam, steps=7, scheduler=partial(lr_scheduler.StepLR, step_size=3)), optim.NAdam),
    ],
)
def test_the_same_steps_as_by_hand(solver: TorchOptim, made: Callable[..., optim.Optimizer]) -> None:
    w = nn.Parameter(torch.zeros(2, dtype=D))
    optimizer = made([w])
    scheduler = lr_scheduler.StepLR(optimizer, step_size=3)
    for _ in range(7):
        optimizer.zero_grad()
        (((w - TARGET) ** 2).sum() + (w**2).sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    # A method that may have a decay outside of the loss; its params are those at the hyperparameters themselves.
    trained = bilevel.hypergradient(problem(solver), "zero-order", on_untrusted="ignore").params
    assert torch.equal(trained, w.detach())


def test_an_end_that_is_not_stationary_is_untrusted() -> None:
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match="train the inner problem further"):
        bilevel.hypergradient(problem(TorchOptim(optim.SGD, lr=0.01, steps=20)))


def test_epochs_groups_buffers_and_a_scheduler_per_epoch() -> None:
    seen: list[list[float]] = []

    class Watched(lr_scheduler.ExponentialLR):
        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            seen.append([group["lr"] for group in self.optimizer.param_groups])

    X = torch.arange(12.0, dtype=D).reshape(6, 2)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    solver = TorchOptim(
        optim.SGD,
        lr=0.1,
        groups={"*.bias": {"lr": 0.01}, "0.*": {"lr": lambda h: h}},
        epochs=2,
        scheduler=lambda optimizer: Watched(optimizer, gamma=0.5),
        scheduler_per_epoch=True,
    )
    with_batches = bilevel.BilevelProblem(
        lambda m, h, batch: (m(batch[0]) ** 2).mean() + h * (m[0].weight ** 2).sum(),
        lambda m, h, batch: (m(batch[0]) ** 2).mean(),
        net,
        bilevel.positive(0.05),
        inner_solver=solver,
        inner_data=DataLoader(TensorDataset(X), batch_size=2),
        outer_data=(X,),
    )
    found = bilevel.hypergradient(with_batches, on_untrusted="ignore")
    assert seen[-2:] == [[0.005, 0.025, 0.05], [0.0025, 0.0125, 0.025]]
    assert int(found.params[1].num_batches_tracked) == 6  # buffers move in training: two epochs of three batches
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_run_starts_each_training_at_the_last_solution() -> None:
    starts: list[Tensor] = []

    class Watched(optim.SGD):
        def __init__(self, params: Any, lr: float = 1e-3) -> None:
            params = list(params)
            starts.append(params[0].detach().clone())
            super().__init__(params, lr=lr)

    solution = bilevel.solve(problem(TorchOptim(Watched, lr=0.2, steps=80)), steps=2)
    assert solution.certificate.trusted
    after = [start for start in starts if start.shape == (2,)][1]
    torch.testing.assert_close(after, TARGET / 2, rtol=1e-8, atol=0.0)


def test_a_learning_rate_is_unseen_by_implicit_methods_and_seen_by_zero_order() -> None:
    short = problem(TorchOptim(optim.SGD, lr=lambda h: h["lr"], steps=3), lr=True)
    with pytest.raises(bilevel.UnseenHyperparameterError, match=r"hparams\['lr'\] has no path.*a learning rate"):
        bilevel.hypergradient(short)
    with pytest.raises(bilevel.BilevelError, match=r"TorchOptim has none that can be.*inner\.SGD\(lr"):
        bilevel.hypergradient(short, "unroll")
    report = bilevel.check(short)
    told = str(report)
    assert not report.ok and "no derivative goes through those" in told and "zero-order" in told
    found = bilevel.hypergradient(short, "auto")
    assert any("auto chose zero-order" in note for note in found.certificate.notes)
    # w_3 = TARGET / 2 (1 - r^3), r = 1 - 2 (1 + h) lr = 0.6, so dF/dlr = 2 w·dw/dlr with dw/dlr = TARGET / 2 * 12 r^2
    r = 0.6
    assert found.gradient["lr"].item() == pytest.approx(2 * 1.25 * (1 - r**3) * 12 * r**2, rel=1e-4)


@pytest.mark.parametrize("solver", [TorchOptim(optim.AdamW, steps=5), TorchOptim(optim.SGD, weight_decay=0.1, steps=5)])
def test_a_decay_outside_of_the_loss_is_refused(solver: TorchOptim) -> None:
    with pytest.raises(bilevel.BilevelError, match=r"TorchOptim with weight_decay=0\.\d+, which shrinks"):
        bilevel.hypergradient(problem(solver))
    in_a_group = TorchOptim(optim.SGD, lr=0.1, steps=5, groups={"*": {"weight_decay": lambda h: h["l2"]}})
    with pytest.raises(bilevel.BilevelError, match=r"with an optimizer of bilevel\.inner"):
        bilevel.hypergradient(problem(in_a_group))


Made = Callable[[], Any]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: TorchOptim(optim.AdamW, lr=0.1), r"needs either `steps` or `epochs`"),
        (lambda: TorchOptim(optim.AdamW, lr=0.1, steps=1, epochs=1), r"needs either `steps` or `epochs`"),
        (lambda: TorchOptim(optim.AdamW, lr=-1.0, steps=1), r"AdamW refuses its settings \(Invalid learning rate"),
        (lambda: TorchOptim(optim.AdamW, rho=1.0, steps=1), r"unexpected keyword.*it takes lr, betas"),
        (lambda: TorchOptim("adam", lr=0.1, steps=1), r"`optimizer` is a str object.*torch.optim.AdamW"),  # type: ignore[arg-type]
        (lambda: TorchOptim(dict, steps=1), r"`optimizer` made a dict|refuses its settings"),  # type: ignore[arg-type]
        (lambda: TorchOptim(optim.SGD, steps=1, scheduler=lr_scheduler.StepLR), r"missing.*step_size=30"),  # type: ignore[arg-type]
        (lambda: TorchOptim(optim.SGD, steps=1, scheduler=lambda o: 0.1), r"`scheduler` made a float"),
        (lambda: TorchOptim(optim.SGD, steps=1, scheduler=0.1), r"`scheduler` is a float object"),  # type: ignore[arg-type]
        (lambda: TorchOptim(optim.SGD, steps=1, groups=["0.*"]), r"`groups` is \['0\.\*'\], expected"),  # type: ignore[arg-type]
        (
            lambda: TorchOptim(
                optim.SGD, lr=lambda h, step: 0.1, steps=1, scheduler=lambda o: lr_scheduler.ConstantLR(o)
            ),
            r"both `lr`, a function of the step, and `scheduler`",
        ),
    ],
)
def test_bad_settings_are_named_at_once(made: Made, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        made()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": lambda h: "fast"}, r"AdamW refuses|SGD refuses"),
        ({"lr": lambda h: None}, r"`lr` returned a NoneType, expected a number"),
        ({"lr": lambda h: torch.ones(3)}, r"returned a Tensor of shape \(3,\).*lambda h, step"),
        ({"lr": lambda h: float("nan")}, r"`lr` returned nan"),
        ({"lr": lambda h, step: [0.1, 0.1][step]}, r"`lr` has no entry for step 2"),
        ({"lr": 1e3}, r"NaN or infinite within 200 steps of SGD"),
        ({"groups": {"head.*": {"lr": 0.1}}}, r"'head\.\*', which fits none of `params`; they are params"),
        ({"groups": {"*": {"lr": 0.1}, "p*": {"lr": 0.1}}}, r"'p\*', which fits none of `params` that no earlier"),
    ],
)
def test_bad_values_are_named_in_training(settings: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        bilevel.hypergradient(problem(TorchOptim(optim.SGD, steps=200, **settings)))


def test_it_can_be_pickled_and_printed() -> None:
    solver = TorchOptim(optim.AdamW, lr=0.1, steps=3)
    assert repr(pickle.loads(pickle.dumps(solver))) == repr(solver) == "TorchOptim(AdamW, lr=0.1, steps=3)"
