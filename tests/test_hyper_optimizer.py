"""`HyperOptimizer`: the same hypergradients as everywhere, inside of a loop that stays the user's."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import HyperOptimizer

D = torch.float64
TARGET = torch.tensor([1.0, 2.0], dtype=D)
WANTED = torch.tensor([0.8, 0.5], dtype=D)
BEST = TARGET / WANTED - 1.0  # w*(h) = TARGET / (1 + h) is WANTED there


def inner(w: Tensor, h: dict[str, Tensor]) -> Tensor:
    return ((w - TARGET) ** 2).sum() + (h["l2"] * w**2).sum()


def outer(w: Tensor, h: Any) -> Tensor:
    return ((w - WANTED) ** 2).sum()


def strengths() -> dict[str, Any]:
    return {"l2": bilevel.positive(1.0, shape=(2,))}


SGD = bilevel.inner.SGD(lr=0.2, steps=3)
METHODS = ["implicit", "cg", "neumann", "finite-difference", "sama", "one-step", "fixed-point", "penalty"]
METHODS += ["soba", "truncated", "unroll", "zero-order"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [[0.5, 1.0], [0.3, 0.9]], ids=["solution", "elsewhere"])
def test_step_takes_the_hypergradient_at_the_model(method: str, at: list[float]) -> None:
    w = torch.tensor(at, dtype=D, requires_grad=True)
    solver = None if method == "penalty" else SGD
    hyper = HyperOptimizer(
        strengths(), inner, outer, method, inner_solver=solver, on_untrusted="ignore", like=w, seed=0
    )
    record = hyper.step(w)
    problem = bilevel.BilevelProblem(inner, outer, w.detach(), strengths(), inner_solver=solver)
    torch.manual_seed(0)
    expected = bilevel.hypergradient(problem, method, params=w, on_untrusted="ignore")
    torch.testing.assert_close(hyper.gradient, expected.gradient, rtol=1e-12, atol=0.0)
    assert str(hyper.certificate) == str(expected.certificate)
    assert record.outer_loss == pytest.approx(expected.outer_loss) or method in ("implicit", "cg")  # there corrected
    exact = hyper.certificate is not None and hyper.certificate.verdict == "exact"
    # Those that unroll are exact for three steps from there, not for where they lead.
    if exact and at == [0.5, 1.0] and method not in ("unroll", "truncated", "zero-order"):
        closed = 2 * (TARGET / 2 - WANTED) * -TARGET / 4
        torch.testing.assert_close(hyper.gradient["l2"], closed, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("method", ["implicit", "neumann", "one-step", "soba", "truncated"])
def test_an_alternating_run_ends_at_the_optimum(method: str) -> None:
    w = torch.zeros(2, dtype=D, requires_grad=True)
    hyper = HyperOptimizer(
        strengths(),
        inner,
        outer,
        method,
        inner_solver=bilevel.inner.SGD(lr=0.1, steps=10) if method == "truncated" else None,
        on_untrusted="ignore",
        outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1),
        like=w,
    )
    train = torch.optim.SGD([w], lr=0.1)
    for step in range(200):
        train.zero_grad()
        inner(w, hyper.hparams).backward()  # type: ignore[no-untyped-call]
        train.step()
        if step % 2:
            hyper.step(w)
    # Adam's steps of 0.1 on a log scale have settled to about 2 % by then.
    torch.testing.assert_close(hyper.hparams["l2"], BEST, rtol=0.03, atol=0.0)
    assert hyper.certificate is not None and (hyper.certificate.trusted or method == "implicit")
    assert hyper.steps == 100


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)).double()


X, Y = torch.randn(24, 3, dtype=D, generator=torch.Generator().manual_seed(0)), torch.arange(24.0, dtype=D) / 24


def penalized(net: Any, h: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((net(x)[:, 0] - y) ** 2).mean() + sum((h[i] * p**2).sum() for i, p in enumerate(net.parameters()))  # type: ignore[no-any-return]


def validation(net: Any, h: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((net(x)[:, 0] - y) ** 2).mean()  # type: ignore[no-any-return]


def tuned(method: Any = "neumann", **settings: Any) -> HyperOptimizer:
    hparams = bilevel.positive(0.01, shape=(6,))
    return HyperOptimizer(hparams, penalized, validation, method, on_untrusted="ignore", **settings)


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    net, hyper = network(), tuned("truncated", inner_solver=SGD)
    net(X).sum().backward()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    identities, random = [id(p) for p in net.parameters()], torch.get_rng_state()
    hyper.step(net, (X[:8], Y[:8]), (X[8:], Y[8:]))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert [id(p) for p in net.parameters()] == identities
    assert all(g is None or torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training and all(p.requires_grad for p in net.parameters())


def test_losses_see_the_mode_the_buffers_and_the_trainable_part_of_the_model_now() -> None:
    seen: list[tuple[bool, float, int]] = []

    def outer_loss(net: Any, h: Any, batch: Any) -> Tensor:
        seen.append((net.training, float(net[1].running_mean[0]), sum(p.requires_grad for p in net.parameters())))
        return validation(net, h, batch)

    net = network()
    hyper = HyperOptimizer(
        bilevel.positive(0.01, shape=(6,)), penalized, outer_loss, "finite-difference", on_untrusted="ignore"
    )
    batch = (X, Y)
    hyper.step(net, batch, batch)
    with torch.no_grad():
        net[1].running_mean.fill_(3.0)  # type: ignore[operator]
    net.eval()
    before = len(seen)
    hyper.step(net, batch, batch)
    assert seen[0][0] and not seen[before][0] and seen[before][1] == 3.0
    net[0].requires_grad_(False)
    hyper.step(net, batch, batch)
    assert (seen[0][2], seen[-1][2]) == (6, 4)


def test_hparams_are_the_same_tensors_all_the_time() -> None:
    net, hyper = network(), tuned(like=torch.zeros((), dtype=D))
    held = hyper.hparams
    start = held.clone()
    hyper.step(net, (X, Y), (X, Y))
    assert hyper.hparams is held and not held.requires_grad
    assert not bool((held == start).any())


def test_hparams_may_be_a_module_and_take_the_dtype_of_the_model() -> None:
    weigh, w = nn.Linear(2, 1).double(), TARGET / 2
    before = weigh.weight.detach().clone()
    by_module = HyperOptimizer(
        weigh, lambda w, h: ((w - TARGET) ** 2).sum() + h(w**2).exp().sum(), outer, on_untrusted="ignore"
    )
    held = by_module.hparams.weight
    by_module.step(w)
    assert by_module.hparams.weight is held and not torch.equal(held, before) and torch.equal(weigh.weight, before)
    by_number = HyperOptimizer(strengths(), inner, outer, on_untrusted="ignore")
    assert by_number.hparams["l2"].dtype == torch.float32
    by_number.step(w)
    assert by_number.hparams["l2"].dtype == D


def loaders(batch: int) -> dict[str, Any]:
    def loader(rows: slice, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(TensorDataset(X[rows], Y[rows]), batch_size=batch, shuffle=True, generator=generator)

    return {"inner_data": loader(slice(0, 16), 1), "outer_data": loader(slice(16, 24), 2)}


def trained_on(net: nn.Module, hyper: HyperOptimizer, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        penalized(net, hyper.hparams, (X, Y)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        hyper.step(net)


@pytest.mark.parametrize("method", [bilevel.SOBA(warmup=5), "cg", bilevel.ZeroOrder(directions=2)], ids=str)
def test_a_resumed_loop_ends_as_an_uninterrupted_one(method: Any) -> None:
    solver = bilevel.inner.SGD(lr=0.1, steps=2)
    ends = []
    for cut in (False, True):
        net = network().eval()  # eval: dropout would draw from the global state
        hyper = tuned(method, seed=3, inner_solver=solver, like=net, **loaders(4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        trained_on(net, hyper, optimizer, 3)
        if cut:
            file = io.BytesIO()
            torch.save({"net": net.state_dict(), "hyper": hyper.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            net = network().eval()
            net.load_state_dict(saved["net"])
            hyper = tuned(method, seed=4, inner_solver=solver, like=net, **loaders(4))
            hyper.load_state_dict(saved["hyper"])
            assert hyper.steps == 3
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        trained_on(net, hyper, optimizer, 3)
        ends.append(hyper.hparams.clone())
    assert torch.equal(*ends)


def test_on_untrusted_raises_before_anything_moves_or_warns_once() -> None:
    w = torch.zeros(2, dtype=D)
    strict = HyperOptimizer(strengths(), inner, outer, on_untrusted="raise", like=w)
    with pytest.raises(bilevel.UntrustedHypergradientError, match="train the inner problem further"):
        strict.step(w)
    assert torch.equal(strict.hparams["l2"], torch.ones(2, dtype=D)) and strict.steps == 0
    warning = HyperOptimizer(strengths(), inner, outer, like=w)
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match="untrusted"):
        warning.step(w)
    warning.step(w)  # a second warning would be an error here


def test_a_nan_moves_nothing() -> None:
    hyper = HyperOptimizer(strengths(), inner, lambda w, h: outer(w, h) / 0.0, like=TARGET)
    with pytest.raises(bilevel.NonFiniteError):
        hyper.step(TARGET)
    assert torch.equal(hyper.hparams["l2"], torch.ones(2, dtype=D)) and hyper.steps == 0


def test_a_learning_rate_by_looking_ahead() -> None:
    w = torch.zeros(2, dtype=D)
    solver = bilevel.inner.SGD(lr=lambda h: h["lr"], steps=1)
    hyper = HyperOptimizer(
        {"lr": bilevel.positive(0.1)},
        lambda w, h: ((w - TARGET) ** 2).sum(),
        lambda w, h: ((w - TARGET) ** 2).sum(),
        "unroll",
        inner_solver=solver,
        like=w,
    )
    hyper.step(w)
    # |TARGET|^2 (1 - 2 lr)^2 after one step: its slope is -4 * 5 * (1 - 0.2)
    assert hyper.gradient["lr"].item() == pytest.approx(-16.0, rel=1e-10)
    assert hyper.hparams["lr"].item() > 0.1


BATCH = (X, Y)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: HyperOptimizer(strengths(), 3, outer), r"`inner_loss` is a int, expected a function"),
        (lambda: HyperOptimizer(strengths(), inner, outer, "implict"), r"implict.*did you mean"),
        (lambda: HyperOptimizer(strengths(), inner, outer, outer_optimizer="lbfgs"), r"`outer_optimizer` is \"lbfgs\""),
        (lambda: HyperOptimizer(strengths(), inner, outer, on_untrusted="never"), r"`on_untrusted` is 'never'"),
        (lambda: HyperOptimizer({"l2": 0.1}, inner, outer), r"`hparams` at 'l2' is a float.*bilevel.positive"),
        (lambda: HyperOptimizer(strengths(), inner, outer, like="cpu"), r"`like` is a str"),  # type: ignore[arg-type]
        (lambda: tuned().step(network()), r"`inner_loss` takes .* without `inner_batch`.*inner_data=loader"),
        (lambda: tuned().step(network(), None, BATCH), r"`outer_loss` takes .* without `outer_batch`"),
        (lambda: tuned(inner_data=BATCH).step(network(), BATCH, BATCH), r"got `inner_batch`.*`inner_data`; give one"),
        (lambda: HyperOptimizer(strengths(), inner, outer).step(TARGET, BATCH), r"`outer_loss` takes"),
        (
            lambda: HyperOptimizer({"l2": bilevel.positive(1.0), "x": bilevel.real(0.0)}, inner, outer).step(TARGET),
            r"hparams\['x'\] has no path to the outer loss",
        ),
        (lambda: tuned().step(TARGET / 0, BATCH, BATCH), r"holds NaN or infinity"),
        (
            lambda: tuned().load_state_dict(HyperOptimizer(strengths(), inner, outer).state_dict()),
            r"belongs to hyperparameters of the shapes .*'l2': \(2,\)",
        ),
    ],
)
def test_misuse_is_named(made: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        made()
