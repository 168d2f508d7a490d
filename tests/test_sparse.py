"""Sparse designs: against dense equality, derivatives of every order, as data of a problem."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

import bilevel
from bilevel.sparse import Design

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def dense(n: int = 6, d: int = 5, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randn(n, d, dtype=torch.float64, generator=random)
    return numbers * (torch.rand(n, d, generator=random) > 0.5)


A = dense()

FORMATS: dict[str, Callable[[Any], Any]] = {
    "csr_matrix": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "csc_array": sparse.csc_array,
    "coo_array": sparse.coo_array,
    "torch coo": lambda a: torch.from_numpy(a).to_sparse(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_numbers(name: str) -> None:
    X = Design(FORMATS[name](A.numpy()))
    assert torch.equal(X.to_dense(), A)
    assert X.shape == A.shape and len(X) == 6 and X.numel() == 30 and X.T.shape == (5, 6)
    assert X.T.T is X


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch calls its CSR beta
def test_torch_csr_and_csc() -> None:
    for tensor in (A.to_sparse_csr(), A.to_sparse_csc()):
        assert torch.equal(Design(tensor).to_dense(), A)


def test_numbers_are_shared_where_they_can_be() -> None:
    matrix = sparse.csr_array(A.numpy())
    assert np.shares_memory(Design(matrix).matrix.data, matrix.data)
    assert np.shares_memory(Design(matrix).T.matrix.data, matrix.data)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp itself
@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 5, 3), (4, 2, 5, 3)], ids=str)
def test_products_and_their_derivatives_equal_the_dense_ones(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(3, *shape, dtype=torch.float64)

    def all_orders(X: Any) -> list[Tensor]:
        value = X @ w
        (gradient,) = torch.autograd.grad(value.exp().sum(), w, create_graph=True)

        def product(v: Tensor) -> Tensor:
            return torch.autograd.grad(gradient, w, v, retain_graph=True)[0]

        (third,) = torch.autograd.grad(
            torch.autograd.grad(gradient, w, vectors[0], create_graph=True)[0], w, vectors[1], retain_graph=True
        )
        tangent = torch.func.jvp(lambda u: X @ u, (w.detach(),), (vectors[0],))[1]
        return [value, gradient, product(vectors[0]), torch.func.vmap(product)(vectors), third, tangent]

    for ours, truth in zip(all_orders(Design(sparse.csr_array(A.numpy()))), all_orders(A), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_all_ways_to_write_a_product() -> None:
    X, W, R = Design(sparse.csr_array(A.numpy())), torch.randn(3, 5).double(), torch.randn(2, 3, 6).double()
    layer = torch.nn.Linear(5, 3, dtype=torch.float64)
    pairs = [
        (W @ X.T, W @ A.T),
        (R @ X, R @ A),
        (R[0, 0] @ X, R[0, 0] @ A),
        (torch.matmul(X, W.T), A @ W.T),  # type: ignore[arg-type]
        (torch.mm(W, X.T), W @ A.T),  # type: ignore[call-overload]
        (torch.mv(X, W[0]), A @ W[0]),  # type: ignore[arg-type]
        (functional.linear(X, W, W[:, 0]), functional.linear(A, W, W[:, 0])),  # type: ignore[arg-type]
        (layer(X), layer(A)),
    ]
    for ours, truth in pairs:
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_batched_products_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    X, seen = Design(sparse.csr_array(A.numpy())), []
    multiply = Design._multiply

    def watched(self: Design, factor: Tensor) -> Tensor:
        seen.append(tuple(factor.shape))
        return multiply(self, factor)

    monkeypatch.setattr(Design, "_multiply", watched)
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((X @ w).exp().sum(), w, create_graph=True)
    seen.clear()
    torch.func.vmap(lambda v: torch.autograd.grad(gradient, w, v, retain_graph=True)[0])(torch.eye(5).double())
    assert seen == [(5, 5), (6, 5)]  # X V and X^T of what came out: two products for five Hessian-vector products


def test_rows() -> None:
    X = Design(sparse.csr_array(A.numpy()))
    mask = torch.tensor([True, False, True, False, False, True])
    chosen: list[Any] = [slice(1, 4), torch.tensor([4, 0, 0]), mask, np.array([2, 3]), [1, 5]]
    for rows in chosen:
        assert torch.equal(X[rows].to_dense(), A[rows])


def test_dtypes() -> None:
    counts = sparse.csr_array((np.array([1, 2], np.uint16), np.array([0, 1]), np.array([0, 1, 2])), shape=(2, 2))
    assert Design(counts).dtype == torch.float32 and Design(counts, torch.float64).dtype == torch.float64
    X = Design(sparse.csr_array(A.numpy()), torch.float32)
    assert (X @ torch.ones(5)).dtype == torch.float32
    wide = X @ torch.ones(5, dtype=torch.float64)  # a float32 problem that is taken again in float64
    torch.testing.assert_close(wide, A.float().double().sum(1), rtol=1e-14, atol=1e-14)
    assert X.to(torch.float64) is X.to(torch.float64) and X.to(torch.float32) is X


def test_a_pickled_design_and_its_text() -> None:
    X = Design(sparse.csr_array(A.numpy()))
    _ = X.T
    again = pickle.loads(pickle.dumps(X))
    assert torch.equal(again.to_dense(), A)
    assert repr(again) == f"Design(6 x 5, {int((A != 0).sum())} entries, torch.float64)"


def test_the_products_of_a_gpu_run_on_torch() -> None:
    # The same code with the matrix in torch's CSR, here on the CPU.
    X, w = Design(sparse.csr_array(A.numpy())), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(X._on_device @ w, A @ w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(X.T._on_device @ (A @ w), A.T @ (A @ w), rtol=1e-12, atol=1e-12)


X_WRONG: list[tuple[Callable[[Design], Any], type[Exception], str]] = [
    (lambda X: X @ torch.zeros(6, dtype=torch.float64), ValueError, r"w of shape \(5,\) or \(5, k\), not \(6,\)"),
    (lambda X: X @ torch.zeros(3, 5, dtype=torch.float64), ValueError, r"write W @ X\.T"),
    (lambda X: X @ torch.zeros(5), TypeError, r"design is torch\.float64 .* torch\.float32; write"),
    (lambda X: X @ torch.zeros(5, dtype=torch.float64, device="meta"), ValueError, r"X\.to\('meta'\)"),
    (lambda X: X @ 3, TypeError, "by a Tensor, not by a int"),
    (lambda X: torch.exp(X), TypeError, r"torch's exp does not take a sparse Design"),  # type: ignore[arg-type]
    (lambda X: torch.mul(torch.ones(5), X), TypeError, "has products only"),  # type: ignore[arg-type]
    (lambda X: functional.linear(torch.ones(6).double(), X), TypeError, "for its input only"),  # type: ignore[arg-type]
    (lambda X: X[2], TypeError, r"X\[i : i \+ 1\]"),
    (lambda X: X[:, :2], TypeError, r"X\.matrix\[:, columns\]"),
    (lambda X: Design(A), TypeError, "a dense one needs no Design"),
    (lambda X: Design(A.numpy()), TypeError, r"ndarray of shape \(6, 5\)"),
    (lambda X: Design(X, torch.float16), ValueError, "expected torch.float32 or torch.float64"),
    (lambda X: Design(sparse.csr_array(A.numpy() * 1j)), TypeError, "expected a real SciPy sparse matrix"),
    (lambda X: Design(sparse.csr_array(np.array([[np.nan]]))), ArithmeticError, "NaN or infinity"),
]


@pytest.mark.parametrize("case", range(len(X_WRONG)))
def test_errors_say_what_to_write(case: int) -> None:
    wrong, error, text = X_WRONG[case]
    with pytest.raises(error, match=text) as caught:
        wrong(Design(sparse.csr_array(A.numpy())))
    assert isinstance(caught.value, bilevel.BilevelError)


def logistic(X: Any, Xv: Any, y: Tensor, yv: Tensor, **more: Any) -> bilevel.BilevelProblem:
    """One L2 strength per feature; the designs come as data."""

    def inner_loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        rows, labels = batch
        return functional.binary_cross_entropy_with_logits(rows @ w, labels) + 0.5 * (h * w**2).sum() / len(y)

    def outer_loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        rows, labels = batch
        return functional.binary_cross_entropy_with_logits(rows @ w, labels)

    return bilevel.BilevelProblem(
        inner_loss,
        outer_loss,
        torch.zeros(X.shape[1], dtype=y.dtype),
        bilevel.positive(1.0, shape=(X.shape[1],)),
        inner_data=(X, y),
        outer_data=(Xv, yv),
        **more,
    )


def generated(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    X, Xv = dense(80, 30, 1), dense(40, 30, 2)
    truth = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return X.to(dtype), Xv.to(dtype), (X @ truth > 0).to(dtype), (Xv @ truth > 0).to(dtype)


@pytest.mark.parametrize("method", ["implicit", "cg", "direct", "unroll", "soba"])
def test_a_problem_with_sparse_data_is_the_dense_problem(method: str) -> None:
    X, Xv, y, yv = generated()
    more = {"inner_solver": bilevel.inner.SGD(lr=0.1, steps=5)} if method == "unroll" else {}
    S, Sv = sparse.csr_matrix(X.numpy()), sparse.coo_array(Xv.numpy())
    found = bilevel.hypergradient(logistic(S, Sv, y, yv, **more), method)
    truth = bilevel.hypergradient(logistic(X, Xv, y, yv, **more), method)
    # Both inner solvers stop at 1e-9 of the first gradient, after other roundings.
    torch.testing.assert_close(found.gradient, truth.gradient, rtol=1e-5, atol=1e-8)
    assert (found.cost, found.certificate.verdict) == (truth.cost, truth.certificate.verdict)


def test_solve_and_check_take_sparse_data() -> None:
    X, Xv, y, yv = generated()
    problem = logistic(sparse.csr_array(X.numpy()), Design(sparse.csr_array(Xv.numpy())), y, yv)
    report = bilevel.check(problem)
    assert report.ok and not any("autograd Function" in str(finding) for finding in report.findings)
    found, truth = bilevel.solve(problem, steps=4), bilevel.solve(logistic(X, Xv, y, yv), steps=4)
    assert found.outer_loss == pytest.approx(truth.outer_loss, rel=1e-6)  # as far as four steps agree


def test_integer_counts_come_in_the_dtype_of_params() -> None:
    X, _, y, yv = generated(torch.float32)
    counts = sparse.csr_array((X != 0).numpy().astype(np.uint8))
    problem = logistic(counts, counts[:40], y, yv)
    assert problem.inner_batches.draw()[0].dtype == torch.float32
    certificate = bilevel.hypergradient(problem).certificate
    assert certificate.verdict == "exact", certificate


def test_float32_is_taken_again_in_float64() -> None:
    # Condition 1e6: float32 has too few digits. The losses close over the design, which is promoted where it is met.
    X, Xv, y, yv = generated(torch.float32)
    scales = torch.logspace(0, -3, 30)
    S, Sv = Design(sparse.csr_array((X * scales).numpy())), Design(sparse.csr_array((Xv * scales).numpy()))
    problem = bilevel.BilevelProblem(
        lambda w, h: ((S @ w - y) ** 2).mean() + 1e-6 * h * (w**2).sum(),
        lambda w, h: ((functional.linear(Sv, w[None]).squeeze(1) - yv) ** 2).mean(),  # type: ignore[arg-type]
        torch.zeros(30),
        bilevel.positive(1.0),
    )
    found = bilevel.hypergradient(problem, "cg")
    assert found.certificate.verdict == "exact", found.certificate
    Z, Zv = S.to_dense().double(), Sv.to_dense().double()
    exact = bilevel.BilevelProblem(
        lambda w, h: ((Z @ w - y.double()) ** 2).mean() + 1e-6 * h * (w**2).sum(),
        lambda w, h: ((Zv @ w - yv.double()) ** 2).mean(),
        torch.zeros(30, dtype=torch.float64),
        bilevel.positive(1.0),
    )
    truth = float(bilevel.hypergradient(exact, "direct").gradient)
    assert float(found.gradient) == pytest.approx(truth, rel=1e-3)  # what "exact" promises


def test_minibatches_of_rows() -> None:
    X, Xv, y, yv = generated()
    S = sparse.csr_array(X.numpy())

    def loader(rows: Any) -> DataLoader[Any]:
        return DataLoader(range(80), batch_size=16, collate_fn=lambda i: (rows[i], y[i]))  # type: ignore[arg-type]

    def run(rows: Any) -> Tensor:
        problem = logistic(X, Xv, y, yv, inner_solver=bilevel.inner.SGD(lr=0.1, steps=10))
        problem = bilevel.BilevelProblem(
            problem.inner_loss, problem.outer_loss, torch.zeros(30).double(), bilevel.positive(1.0, shape=(30,)),
            problem.inner_solver, loader(rows), (Xv, yv),
        )  # fmt: skip
        return bilevel.hypergradient(problem, "unroll").gradient  # type: ignore[no-any-return]

    torch.testing.assert_close(run(S), run(X), rtol=1e-10, atol=1e-12)
    blocks = bilevel.BilevelProblem(
        lambda w, h, b: ((b[0] @ w - b[1]) ** 2).mean() + h * (w**2).sum(),
        lambda w, h, b: ((b[0] @ w - b[1]) ** 2).mean(),
        torch.zeros(30).double(),
        bilevel.positive(1.0),
        inner_data=(S, y),
        outer_data=(Xv, yv),
    ).inner_batches.blocks(32)
    assert [len(blocks.read(i)[0]) for i in range(3)] == [32, 32, 16]
    assert torch.equal(blocks.read(1)[0].to_dense(), X[32:64])


def news20(documents: int) -> tuple[Any, Tensor, np.ndarray[Any, Any]]:
    """Return unit rows of word counts, whether the topic is one of the first ten, and the split."""
    if not (SHARED / "news20.npz").exists():
        pytest.skip(f"{SHARED}/news20.npz is not there")
    spec = importlib.util.spec_from_file_location("load", SHARED / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module
    spec.loader.exec_module(module)
    data = module.load("news20")
    counts = (data["data"].astype("f8"), data["indices"].astype("i4"), data["indptr"])
    X = sparse.csr_array(counts, shape=tuple(data["shape"]))[:documents]
    X = sparse.csr_array(sparse.diags_array(1.0 / sparse.linalg.norm(X, axis=1)) @ X)
    return X, torch.from_numpy((data["y"][:documents] < 10).astype("f8")), data["split"][:documents]


def test_news20_without_making_it_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, split = news20(1000)
    monkeypatch.setattr(Design, "to_dense", None)
    train, valid = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
    problem = logistic(X[train], X[valid], y[torch.from_numpy(train)], y[torch.from_numpy(valid)])
    solution = bilevel.solve(problem, "cg", steps=2)
    assert solution.hparams.shape == (62061,) and solution.certificate.verdict == "exact"
    assert solution.outer_loss < solution.start.outer_loss
    # One direction of finite differences: the truth of 62,061 entries at once. The step: the cube root of 1e-9 or so.
    check = bilevel.check_gradient(problem, "cg", directions=1)
    assert check.passed and check.conclusive, str(check)
