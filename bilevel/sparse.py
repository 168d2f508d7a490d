"""Sparse designs: a constant matrix with few entries, whose products with dense tensors have derivatives of any order.

    y = X w      dL/dw = X^T dL/dy

The derivative of one product is the other, so two products serve every order, forward mode and `vmap`. On a CPU they
are SciPy's: torch transposes its CSR again in every backward pass, which makes it 2 to 20 times as slow, and refuses
batches of matrices under `vmap` (docs/performance.md, "Products").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError

_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class Design:
    """A constant sparse matrix `(n, d)`; `X @ w` and `X.T @ r` can be differentiated to any order in w and r.

    `X @ w` takes `(d,)`, `(d, k)` and `(..., d, k)`, `W @ X.T` the transposed shapes, and `torch.nn.functional.linear`
    and so `torch.nn.Linear` take a Design for their input. `X[rows]` are rows (a slice, a mask or indices), `X.to(...)`
    moves or casts. Anything else wants a dense matrix (`X.to_dense()`) or SciPy (`X.matrix`).

    Args:
        matrix: a SciPy sparse matrix or array, a sparse tensor, or a Design. Numbers are shared, not copied, where the
            format is CSR or CSC and the dtype stays.
        dtype: torch.float32 or torch.float64; None: that of a float matrix, else torch's default.
        device: where products are taken; None: that of a tensor or a Design, else the CPU.

    Raises:
        BilevelError: for a matrix that is dense, complex or not finite.

    >>> X = Design(sparse.csr_array([[0.0, 2.0], [3.0, 0.0]]))
    >>> w = torch.tensor([1.0, 10.0], dtype=torch.float64, requires_grad=True)
    >>> torch.autograd.grad((X @ w).square().sum(), w)[0]  # 2 X^T X w
    tensor([18., 80.], dtype=torch.float64)
    """

    def __init__(self, matrix: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        held, found = _scipy_of(matrix)
        dtype = dtype or _dtype_of(held)
        if dtype not in (torch.float32, torch.float64):
            raise InvalidValueError(f"Design(): `dtype` is {dtype}, expected torch.float32 or torch.float64")
        self.matrix: Any = held.astype(_NUMPY[dtype], copy=False)
        self.dtype, self.device = dtype, torch.device(found if device is None else device)
        if not np.isfinite(self.matrix.data).all():
            raise NonFiniteError("Design(): the matrix holds NaN or infinity", "design")

    @property
    def shape(self) -> torch.Size:
        """`(n, d)`."""
        return torch.Size(self.matrix.shape)

    @property
    def T(self) -> Design:
        """The transposed design; no number is copied."""
        return self._transposed

    @cached_property
    def _transposed(self) -> Design:
        other = _made(self.matrix.T, self.dtype, self.device)
        other.__dict__["_transposed"] = self
        return other

    def dim(self) -> int:
        """Return 2."""
        return 2

    def numel(self) -> int:
        """Return n * d, zeros included, as for a tensor."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        place = "" if self.device.type == "cpu" else f", {self.device}"
        return f"Design({self.shape[0]} x {self.shape[1]}, {self.matrix.nnz} entries, {self.dtype}{place})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Design, (self.matrix, self.dtype, self.device)

    def to(self, *to: torch.dtype | torch.device | str, **named: Any) -> Design:
        """Return the design in another dtype or on another device; itself where both stay."""
        dtype = named.get("dtype") or next((x for x in to if isinstance(x, torch.dtype)), self.dtype)
        device = named.get("device") or next((x for x in to if not isinstance(x, torch.dtype)), self.device)
        if dtype == torch.float64 and self.dtype == torch.float32 and torch.device(device) == self.device:
            return self._wide
        return self if (dtype, torch.device(device)) == (self.dtype, self.device) else Design(self, dtype, device)

    @cached_property
    def _wide(self) -> Design:
        """The same numbers in float64; kept, since a float32 problem that is taken again in float64 asks often."""
        return Design(self, torch.float64)

    def to_dense(self) -> Tensor:
        """Return the dense tensor `(n, d)`."""
        return torch.from_numpy(self.matrix.toarray()).to(self.device)

    def __getitem__(self, rows: Any) -> Design:
        if isinstance(rows, (int, tuple)) or (isinstance(rows, Tensor) and rows.dim() != 1):
            raise InvalidTypeError(
                f"a Design takes rows by a slice, a mask or a 1-d tensor of indices, not {rows!r}; write X[i : i + 1] "
                "for one row, and cut columns from the SciPy matrix: bilevel.sparse.Design(X.matrix[:, columns])"
            )
        chosen = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        return _made(self.matrix[chosen], self.dtype, self.device)

    def __matmul__(self, factor: Any) -> Any:
        self._check(factor)
        if factor.dtype == torch.float64 and self.dtype == torch.float32:
            return self._wide @ factor
        return _product(factor, self)

    def __rmatmul__(self, factor: Any) -> Any:
        if not isinstance(factor, Tensor) or factor.dim() < 2:
            return self.T @ factor
        return (self.T @ factor.mT).mT

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take products; explain for everything else."""
        kwargs = kwargs or {}
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            left, right = args
            return left @ right if isinstance(left, Design) else right.__rmatmul__(left)
        name = getattr(func, "__name__", str(func))
        raise InvalidTypeError(
            f"torch's {name} does not take a sparse Design, which has products only: X @ w, W @ X.T, "
            "torch.nn.functional.linear(X, weight); write X.to_dense() for a dense tensor, X.matrix for SciPy's"
        )

    def _check(self, factor: Any) -> None:
        """Raise unless X @ factor is a product."""
        (n, d), shape = self.shape, tuple(getattr(factor, "shape", ()))
        if not isinstance(factor, Tensor):
            raise InvalidTypeError(f"a Design is multiplied by a Tensor, not by a {type(factor).__name__}")
        if not shape or shape[max(0, len(shape) - 2)] != d:
            raise InvalidValueError(
                f"X @ w with a design X of shape ({n}, {d}) needs w of shape ({d},) or ({d}, k), not {shape}; for W of "
                f"shape (k, {d}) write W @ X.T or torch.nn.functional.linear(X, W)"
            )
        if factor.dtype != self.dtype and not (factor.dtype == torch.float64 and self.dtype == torch.float32):
            raise InvalidTypeError(
                f"the design is {self.dtype} and the tensor it is multiplied by {factor.dtype}; write "
                f"bilevel.sparse.Design(matrix, torch.float32) or X.to(torch.float32) for float32, and w.double() for "
                "float64"
            )
        if factor.device != self.device:
            raise InvalidValueError(
                f"the design is on {self.device} and the tensor it is multiplied by on {factor.device}; write "
                f"X.to('{factor.device}')"
            )

    def _multiply(self, factor: Tensor) -> Tensor:
        """Return X @ factor without a graph."""
        if factor.dim() > 2:  # one wide product instead of many
            stacked = factor.movedim(-2, 0)
            product = self._multiply(stacked.reshape(len(stacked), -1))
            return product.reshape(-1, *stacked.shape[1:]).movedim(0, -2)
        if self.device.type == "cpu":
            return torch.from_numpy(np.ascontiguousarray(self.matrix @ factor.detach().numpy()))
        return self._on_device @ factor.detach()

    @cached_property
    def _on_device(self) -> Tensor:
        """The matrix as torch's CSR, for a GPU."""
        rows = self.matrix.tocsr()
        starts, columns, values = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR beta
            return torch.sparse_csr_tensor(starts, columns, values, size=rows.shape, device=self.device)


class _Product(torch.autograd.Function):
    """X @ factor; linear, so its derivatives are products with X^T and X.

    The design comes as a function: torch would ask an argument with `__torch_function__` what to do under `vmap`.
    """

    @staticmethod
    def forward(factor: Tensor, held: Callable[[], Design]) -> Tensor:
        # A loss may run under a mode that promotes what float32 it meets (`bilevel.widening`) and lets nothing out to
        # NumPy; here everything is promoted already.
        with torch._C.DisableTorchFunction():
            return held()._multiply(factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.design = inputs[1]()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _product(gradient, ctx.design.T), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, held: None) -> Any:
        return _product(tangent, ctx.design)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], factor: Tensor, held: Callable[[], Design]) -> Any:
        """Multiply the whole batch as the columns of one matrix."""
        if in_dims[0] is None:
            return _product(factor, held()), None
        if factor.dim() == 2:
            return _product(factor.movedim(in_dims[0], 1), held()), 1
        return _product(factor.movedim(in_dims[0], 0), held()), 0


def _product(factor: Tensor, design: Design) -> Tensor:
    product: Tensor = _Product.apply(factor, lambda: design)  # type: ignore[no-untyped-call]
    return product


def _linear(design: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    """Return X @ weight.T + bias."""
    if not isinstance(design, Design):
        raise InvalidTypeError("torch.nn.functional.linear takes a Design for its input only, not for weight or bias")
    product: Tensor = design @ weight.mT if weight.dim() > 1 else design @ weight
    return product if bias is None else product + bias


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_PRODUCTS: tuple[Callable[..., Any], ...] = (
    torch.matmul,
    torch.mm,
    torch.mv,
    torch.sparse.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.mv,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
)


def is_sparse(data: Any) -> bool:
    """Say whether it is a SciPy sparse matrix or array, which losses get as a Design."""
    return bool(sparse.issparse(data))


def _made(matrix: Any, dtype: torch.dtype, device: torch.device) -> Design:
    """Return a design of what has been checked already."""
    design = object.__new__(Design)
    design.matrix, design.dtype, design.device = matrix, dtype, device
    return design


def _scipy_of(matrix: Any) -> tuple[Any, torch.device]:
    """Return a CSR or CSC array with the numbers of `matrix`, and the device that it was on."""
    if isinstance(matrix, Design):
        return matrix.matrix, matrix.device
    if isinstance(matrix, Tensor) and matrix.layout in _LAYOUTS and matrix.dim() == 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR beta
            rows = matrix.detach().cpu().to_sparse_csr()
        parts = (part.numpy() for part in (rows.values(), rows.col_indices(), rows.crow_indices()))
        return sparse.csr_array(tuple(parts), shape=tuple(matrix.shape)), matrix.device
    if not is_sparse(matrix) or matrix.ndim != 2 or np.iscomplexobj(matrix):
        kind = f"{type(matrix).__name__} of shape {tuple(getattr(matrix, 'shape', ()))}"
        raise InvalidTypeError(
            f"Design(): `matrix` is a {kind}, expected a real SciPy sparse matrix or sparse tensor of 2 dimensions; a "
            "dense one needs no Design, and scipy.sparse.csr_array(array) makes it sparse"
        )
    return sparse.csc_array(matrix) if matrix.format == "csc" else sparse.csr_array(matrix), torch.device("cpu")


def _dtype_of(matrix: Any) -> torch.dtype:
    """Return the dtype of a float matrix, torch's default for others."""
    known = {np.dtype(number): dtype for dtype, number in _NUMPY.items()}
    return known.get(matrix.dtype, torch.get_default_dtype())
