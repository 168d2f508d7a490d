"""What autograd cannot do twice: met with the fix, or with its name; and one hypergradient sees one function."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel.response import ProblemResponse
from bilevel.solvers.base import Linearization
from bilevel.vector import axpy, detach, leaves, norm, scale, subtract

torch.manual_seed(0)
X, XV = torch.randn(12, 4, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
Y, YV = torch.randn(12, 4, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)


def problem_of(forward: Any, params: Any) -> bilevel.BilevelProblem:
    """Ridge on whatever `forward` makes of the parameters: close to its start, so that it has a strict minimum."""

    def penalty(p: Any, h: Tensor) -> Tensor:
        tensors = p.parameters() if isinstance(p, nn.Module) else [p]
        return h * sum(((t - 0.1) ** 2).sum() for t in tensors)

    return bilevel.BilevelProblem(
        lambda p, h: ((forward(p, X) - Y) ** 2).mean() + penalty(p, h),
        lambda p, h: ((forward(p, XV) - YV) ** 2).mean(),
        params=params,
        hparams=bilevel.positive(1.0),
    )


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 4, dtype=torch.float64)


def hypergradient(problem: bilevel.BilevelProblem, method: str = "cg") -> Tensor:
    found = bilevel.hypergradient(problem, method, on_untrusted="raise").gradient
    assert isinstance(found, Tensor)
    return found


def attention(p: nn.Module, x: Tensor) -> Tensor:
    q: Tensor = p(x)[None, None]
    return F.scaled_dot_product_attention(q, q, q)[0, 0]


def test_fused_attention_gives_way_to_the_math_backend() -> None:
    def by_hand(p: nn.Module, x: Tensor) -> Tensor:
        q: Tensor = p(x)
        return torch.softmax(q @ q.T / 2.0, dim=-1) @ q  # sqrt(4) features

    fused, plain = hypergradient(problem_of(attention, linear())), hypergradient(problem_of(by_hand, linear()))
    torch.testing.assert_close(fused, plain, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers_work(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64, activation="gelu")
    problem = problem_of(lambda p, x: p(x[None])[0], layer.train(training))
    response, upper = ProblemResponse(problem), problem.hparams.layout.start
    start = problem.params.start
    generator = torch.Generator().manual_seed(0)
    v = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in start.items()}
    product = Linearization(response, start, upper).operator(v)
    ends = [response.residual(leaves(axpy(sign * 1e-5, v, start)), upper) for sign in (1.0, -1.0)]
    difference = detach(scale(0.5e5, subtract(*ends)))  # errs by 1e-10 from the step, 1e-11 from rounding
    assert float(norm(subtract(product, difference)) / norm(product)) < 1e-8


@pytest.mark.parametrize("method", ["cg", "direct", "unroll"])
def test_checkpoint_sees_the_tensors_of_the_forward_pass(method: str) -> None:
    """The module runs again in the backward pass, after the loss has returned."""

    def recomputed(p: nn.Module, x: Tensor) -> Any:
        return checkpoint(lambda z: torch.tanh(p(z)), x, use_reentrant=False)

    found = []
    for forward in (recomputed, lambda p, x: torch.tanh(p(x))):
        problem = problem_of(forward, linear())
        if method == "unroll":
            problem.inner_solver = bilevel.inner.SGD(lr=0.05, momentum=0.5, steps=7)
        found.append(hypergradient(problem, method))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0.0)


def test_reentrant_checkpoint_names_the_flag() -> None:
    def recomputed(p: Tensor, x: Tensor) -> Any:
        return checkpoint(lambda q: torch.tanh(x @ q), p, use_reentrant=True)

    problem = problem_of(recomputed, torch.eye(4, dtype=torch.float64))
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match="use_reentrant=False"):
        hypergradient(problem)


class Lengths(torch.nn.Module):
    def forward(self, x: Tensor) -> Any:
        sizes = torch.tensor([len(x)]), torch.tensor([2])
        return F.ctc_loss(x.log_softmax(-1)[:, None], torch.tensor([[1, 2]]), *sizes)


class Squared(torch.nn.Module):
    def forward(self, x: Tensor) -> Any:
        return square(x)


@pytest.mark.parametrize(("part", "name"), [(Lengths(), "2 (Lengths)"), (Squared(), "2 (Squared)")])
def test_the_module_without_a_second_derivative_is_named(part: torch.nn.Module, name: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True), part).double()
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = bilevel.BilevelProblem(
        lambda m, h: m(x).sum() + h * (m[0].weight ** 2).sum(),
        lambda m, h: (m[0].weight ** 2).sum(),
        net,
        bilevel.positive(0.1),
        bilevel.inner.SGD(lr=0.01, steps=2),
    )
    with pytest.raises(bilevel.NotTwiceDifferentiableError) as raised:
        hypergradient(problem)
    assert name in str(raised.value)


def test_the_line_of_an_operation_without_a_second_derivative_can_be_had() -> None:
    def loss(p: Tensor, x: Tensor) -> Any:
        lengths = torch.tensor([4]), torch.tensor([2])
        return F.ctc_loss((x[:4] @ p).log_softmax(-1)[:, None], torch.tensor([[1, 2]]), *lengths)  # this line

    problem = problem_of(loss, torch.eye(4, dtype=torch.float64))
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match=r"set_detect_anomaly.*penalty.*_ctc_loss_backward"):
        hypergradient(problem)
    with warnings.catch_warnings(record=True) as told, pytest.raises(bilevel.NotTwiceDifferentiableError):
        warnings.simplefilter("always")
        with torch.autograd.set_detect_anomaly(True):
            hypergradient(problem)
    assert any("# this line" in str(warning.message) for warning in told)


@pytest.mark.parametrize("where", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize("method", ["cg", "penalty"])
def test_a_reentrant_checkpoint_that_torch_goes_around_is_refused(where: str, method: str) -> None:
    """Its input needs no parameter, so torch.autograd.grad leaves out the weights inside of it and says nothing."""
    data = X.clone().requires_grad_()
    net = nn.Sequential(linear(), linear())

    def forward(p: Any, flag: bool) -> Any:
        return p[1](checkpoint(p[0], data, use_reentrant=flag))

    def penalty(p: Any, h: Any) -> Any:
        return h * sum(t.square().sum() for t in p.parameters())

    problem = bilevel.BilevelProblem(
        lambda p, h: forward(p, where == "inner_loss").square().mean() + penalty(p, h),
        lambda p, h: (forward(p, where == "outer_loss") - Y).square().mean(),
        params=net,
        hparams=bilevel.positive(1.0),
    )
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match=rf"`{where}`.*use_reentrant=False\)$"):
        hypergradient(problem, method)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = 2.0 * x * g
        return result


def square(x: Tensor) -> Tensor:
    y: Tensor = Square.apply(x)  # type: ignore[no-untyped-call]
    return y


def test_a_once_differentiable_function_is_refused_even_where_torch_is_silent() -> None:
    """Under a sum its gradient has no graph: torch raises nothing, and the Hessian would be the penalty's alone."""
    problem = bilevel.BilevelProblem(
        lambda w, h: square(X @ w).sum() + h * (w**2).sum(),
        lambda w, h: (XV @ w).sum(),
        params=torch.ones(4, dtype=torch.float64),
        hparams=bilevel.positive(1.0),
    )
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match=r"Square.*once_differentiable"):
        hypergradient(problem)


def in_place(p: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x @ p)
    s.mul_(2.0)
    return s


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (in_place, "out-of-place"),
        (lambda p, x: torch.cdist(x @ p, x, p=1.0)[:, :4], r"second derivative.*_cdist_backward"),
    ],
)
def test_operations_without_a_second_derivative_are_named(forward: Any, message: str) -> None:
    with pytest.raises(bilevel.NotTwiceDifferentiableError, match=message):
        hypergradient(problem_of(forward, torch.eye(4, dtype=torch.float64)))


def test_a_compiled_module_is_replaced_by_its_original() -> None:
    model = nn.Sequential(linear(), nn.Tanh())
    plain = hypergradient(problem_of(lambda p, x: p(x), model))
    compiled = torch.compile(model, backend="eager")
    problem = problem_of(lambda p, x: p(x), compiled)
    torch.testing.assert_close(hypergradient(problem), plain, rtol=1e-12, atol=0.0)
    compiled_part: Any = torch.compile(nn.Tanh(), backend="eager")
    inside = nn.Sequential(linear(), compiled_part)
    nested = problem_of(lambda p, x: p(x), inside)
    torch.testing.assert_close(hypergradient(nested), plain, rtol=1e-12, atol=0.0)
    with nested.params.bound(nested.params.start) as module:
        assert not any(hasattr(part, "_orig_mod") for part in module.modules())
    solution = bilevel.solve(problem, steps=2)
    solution.apply_()
    weight = dict(model.named_parameters())["0.weight"]
    torch.testing.assert_close(weight, dict(solution.params.named_parameters())["0.weight"])


def test_sparse_embeddings_equal_dense_ones() -> None:
    ids = torch.tensor([0, 2, 1, 0])

    def of(sparse: bool) -> Tensor:
        torch.manual_seed(0)
        table = nn.Embedding(3, 4, sparse=sparse, dtype=torch.float64)
        problem = bilevel.BilevelProblem(
            lambda p, h: ((torch.tanh(p(ids)) - Y[:4]) ** 2).sum() + h * ((p.weight - 0.1) ** 2).sum(),
            lambda p, h: ((p(ids) - YV[:4]) ** 2).sum(),
            params=table,
            hparams=bilevel.positive(2.0),
        )
        return hypergradient(problem)

    torch.testing.assert_close(of(True), of(False), rtol=1e-12, atol=0.0)


def test_dropout_is_one_mask_in_every_term() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5))
    problem = problem_of(lambda p, x: p(x), model.train())
    before = torch.get_rng_state()
    found = bilevel.hypergradient(problem, "direct", on_untrusted="raise")
    assert torch.equal(before, torch.get_rng_state())
    response = ProblemResponse(problem)
    start, upper = problem.params.start, problem.hparams.layout.start
    first, second = (Linearization(response, start, upper).operator.dense() for _ in range(2))
    assert torch.equal(first, second)
    # With the mask fixed the inner problem is a ridge regression, solved to the end.
    assert found.certificate.verdict == "exact"


def test_batch_norm_buffers_and_flags_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(linear(), nn.BatchNorm1d(4, dtype=torch.float64))
    problem = problem_of(lambda p, x: p.train()(x) if len(x) == 12 else p.eval()(x), model.eval())
    response = ProblemResponse(problem)
    inside = problem.params
    with inside.bound(inside.start) as module:
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    response.residual(leaves(inside.start), problem.hparams.layout.start)
    with inside.bound(inside.start) as module:
        assert not module.training
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, before[name]), name
    bilevel.hypergradient(problem, "cg", on_untrusted="ignore")
    assert not model.training and int(model[1].num_batches_tracked) == 0  # type: ignore[arg-type]
    assert torch.equal(model[1].running_mean, torch.zeros(4, dtype=torch.float64))  # type: ignore[arg-type]
