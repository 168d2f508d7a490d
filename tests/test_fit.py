"""The user's own inner loop: what it gets, what it may return, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel

Fit = Callable[..., Any]


def minimizer(h: Tensor) -> Tensor:
    """Solve min |w - (1, 2)|^2 + h |w|^2."""
    return torch.tensor([1.0, 2.0], dtype=torch.float64) / (1 + h)


def pulled(w: Tensor, h: Tensor) -> Tensor:
    return ((w - torch.tensor([1.0, 2.0], dtype=torch.float64)) ** 2).sum() + h * (w**2).sum()


def tensor_problem(fit: Fit) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(
        pulled,
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(1.0),
        inner_solver=fit,
    )


EXACT = -10.0 / 8  # d/dh 5 (1 + h)^-2 = -10 (1 + h)^-3 at h = 1


@pytest.mark.parametrize("method", ["implicit", "cg", "direct", "unroll"])
def test_a_fit_that_returns_tensors(method: str) -> None:
    found = bilevel.hypergradient(tensor_problem(lambda w, h: minimizer(h)), method)
    assert found.gradient.item() == pytest.approx(EXACT, abs=1e-8)


def test_a_fit_gets_copies_to_start_from() -> None:
    seen: list[Tensor] = []

    def fit(w: Tensor, h: Tensor) -> Tensor:
        seen.append(w.clone())
        w.fill_(7.0)
        return minimizer(h).detach()

    start = torch.zeros(2, dtype=torch.float64)
    problem = bilevel.BilevelProblem(pulled, lambda w, h: (w**2).sum(), start, bilevel.positive(1.0), inner_solver=fit)
    for _ in range(2):
        bilevel.hypergradient(problem)
    assert torch.equal(start, torch.zeros(2, dtype=torch.float64))
    assert all(torch.equal(w, start) for w in seen)
    assert len(seen) == 2


def test_a_fit_may_train_with_autograd() -> None:
    def fit(w: Tensor, h: Tensor) -> Tensor:
        w.requires_grad_()
        optimizer = torch.optim.SGD([w], lr=0.2)
        for _ in range(100):
            optimizer.zero_grad()
            pulled(w, h).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return w

    found = bilevel.hypergradient(tensor_problem(fit))
    assert found.gradient.item() == pytest.approx(EXACT, abs=1e-8)
    assert not found.params.requires_grad


def nested(w: Any) -> Tensor:
    return torch.stack([w["a"], w["b"][0]])


def test_a_fit_with_a_nested_structure() -> None:
    def fit(w: Any, h: Tensor) -> Any:
        a, b = minimizer(h)
        return {"a": a, "b": [b]}

    zero = torch.zeros((), dtype=torch.float64)
    problem = bilevel.BilevelProblem(
        lambda w, h: pulled(nested(w), h),
        lambda w, h: nested(w).square().sum(),
        {"a": zero, "b": [zero]},
        bilevel.positive(1.0),
        inner_solver=fit,
    )
    for method in ("implicit", "unroll"):
        found = bilevel.hypergradient(problem, method)
        assert found.gradient.item() == pytest.approx(EXACT, abs=1e-8)
        assert found.params["b"][0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("returns", [True, False], ids=["module", "nothing"])
def test_a_fit_may_train_a_module_in_place(returns: bool) -> None:
    net = nn.Linear(1, 2, bias=False).double()
    before = net.weight.detach().clone()

    def fit(model: Any, h: Tensor) -> Any:
        assert model is not net
        with torch.no_grad():
            model.weight.copy_(minimizer(h)[:, None])
        return model if returns else None

    problem = bilevel.BilevelProblem(
        lambda m, h: pulled(m.weight[:, 0], h),
        lambda m, h: m.weight.square().sum(),
        net,
        bilevel.positive(1.0),
        inner_solver=fit,
    )
    found = bilevel.hypergradient(problem)
    assert found.gradient.item() == pytest.approx(EXACT, abs=1e-8)
    assert torch.equal(net.weight, before)
    assert isinstance(found.params, nn.Linear)
    with pytest.raises(bilevel.BilevelError, match=r"nothing to unroll.*in-place training of a module"):
        bilevel.hypergradient(problem, "unroll")


def test_a_fit_gets_the_data_where_there_are_some() -> None:
    data = {"target": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    seen: list[Any] = []

    def fit(w: Tensor, h: Tensor, given: Any) -> Tensor:
        seen.append(given)
        return given["target"] / (1 + h)  # type: ignore[no-any-return]

    problem = bilevel.BilevelProblem(
        lambda w, h, batch: ((w - batch["target"]) ** 2).sum() + h * (w**2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(1.0),
        inner_solver=fit,
        inner_data=data,
    )
    for method in ("implicit", "unroll"):
        assert bilevel.hypergradient(problem, method).gradient.item() == pytest.approx(EXACT, abs=1e-8)
    assert seen[0] is data


def test_a_fit_that_ends_early_is_untrusted() -> None:
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match="train the inner problem further"):
        found = bilevel.hypergradient(tensor_problem(lambda w, h: 0.9 * minimizer(h)))
    assert found.certificate.verdict == "untrusted"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda w: None, r"`inner_solver` returned None, expected the trained params.*add a return statement"),
        (lambda w: {"w": w}, r"what `inner_solver` returned.*missing.*structure that `params` has"),
        (lambda w: [w, w], r"what `inner_solver` returned has 2 tensors for the 1"),
        (lambda w: w[:1], r"what `inner_solver` returned: params has shape \(1,\), expected \(2,\)"),
        (lambda w: w.float(), r"what `inner_solver` returned: params is torch.float32, expected torch.float64"),
        (lambda w: w.to("meta"), r"what `inner_solver` returned: params is on meta, expected cpu"),
        (lambda w: w.numpy(), r"what `inner_solver` returned is a ndarray.*torch.from_numpy"),
        (lambda w: 1.0, r"what `inner_solver` returned is a float"),
        (lambda w: nn.Linear(1, 1), r"what `inner_solver` returned is a Linear"),
        (lambda w: w / 0.0, r"what `inner_solver` returned: params holds NaN or infinity"),
        (lambda w: w.to_sparse(), r"what `inner_solver` returned: params is a torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("method", ["implicit", "unroll"])
def test_wrong_returns_are_named(returned: Callable[[Tensor], Any], message: str, method: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        bilevel.hypergradient(tensor_problem(lambda w, h: returned(minimizer(h).detach())), method)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda m: m.weight, r"what `inner_solver` returned is a Parameter, expected the Linear that came in"),
        (lambda m: nn.Linear(1, 3).double(), r"params\['weight'\] has shape \(3, 1\), expected \(2, 1\)"),
        (lambda m: nn.ReLU(), r"missing: \['weight'\]"),
        (lambda m: m.float(), r"params\['weight'\] is torch.float32, expected torch.float64"),
    ],
)
def test_wrong_modules_are_named(returned: Callable[[nn.Module], Any], message: str) -> None:
    problem = bilevel.BilevelProblem(
        lambda m, h: pulled(m.weight[:, 0], h),
        lambda m, h: m.weight.square().sum(),
        nn.Linear(1, 2, bias=False).double(),
        bilevel.positive(1.0),
        inner_solver=lambda m, h: returned(m),
    )
    with pytest.raises(bilevel.BilevelError, match=message):
        bilevel.hypergradient(problem)


def test_a_detached_fit_cannot_be_unrolled() -> None:
    problem = tensor_problem(lambda w, h: minimizer(h).detach())
    with pytest.raises(bilevel.BilevelError, match=r'nothing to unroll.*method="implicit"'):
        bilevel.hypergradient(problem, "unroll")


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda w: w, r"`inner_solver` takes \(w\), but is called with \(params, hparams\)"),
        (lambda w, h, data: w, r"`inner_solver` takes \(w, h, data\).*`inner_data` is not given"),
        (3, r"`inner_solver` is a int"),
        (bilevel.inner.SGD, r"`inner_solver` is the class SGD.*inner.SGD\(\.\.\.\)"),
        (torch.optim.SGD, r"`inner_solver` is the class SGD.*bilevel.inner"),
        ("lbfgs", r"`inner_solver` is a str"),
    ],
)
def test_wrong_solvers_are_named_at_construction(fit: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        tensor_problem(fit)


def test_a_loop_that_wants_data_is_refused_without() -> None:
    with pytest.raises(bilevel.InvalidTypeError, match=r"`inner_solver` takes \(w, h, data\), but is called with"):
        bilevel.BilevelProblem(pulled, pulled, torch.zeros(2), torch.ones(()), bilevel.inner.fit(lambda w, h, data: w))
