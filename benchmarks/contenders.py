"""One hypergradient by each library, in one form: given an inner solution, tensors in and arrays out.

All get the same losses and the same inner solution. `rtol` is the relative residual of the adjoint; betty-ml's CG
knows no tolerance and gets as many steps as the hand-written loop took (it takes the residual of the step before for
its next direction, so it does not get there).
"""

from __future__ import annotations

import contextlib
import io
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import hand_written
from benchmarks.workloads import Workload

# Name -> the module that must be there, and the distributions whose versions are reported.
CONTENDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bilevel": ("bilevel", ("torch",)),
    "bilevel, CG": ("bilevel", ("torch",)),
    "hand-written": ("torch", ("torch",)),
    "torchopt": ("torchopt", ("torchopt",)),
    "betty-ml": ("betty", ("betty-ml",)),
    "boat-torch": ("boat_torch", ("boat-torch",)),
    "jaxopt": ("jaxopt", ("jaxopt", "jax")),
}
MAX_STEPS = 10_000  # of conjugate gradients, where a library wants a number

Hypergradient = Callable[[list[Tensor], Tensor], Tensor]


def prepare(name: str, workload: Workload, rtol: float, steps: int) -> Hypergradient:
    """Return the hypergradient of a PyTorch contender (not bilevel's): `(w, h) -> dF/dh`."""
    inner, outer = workload.torch_losses()
    return {"hand-written": _hand_written, "torchopt": _torchopt, "betty-ml": _betty, "boat-torch": _boat}[name](
        inner, outer, rtol, steps
    )


def _leaves(w: list[Tensor], h: Tensor) -> tuple[list[Tensor], Tensor]:
    return [t.detach().clone().requires_grad_() for t in w], h.detach().clone().requires_grad_()


def _hand_written(inner: Any, outer: Any, rtol: float, steps: int) -> Hypergradient:
    return lambda w, h: hand_written.hypergradient(inner, outer, w, h, rtol)[0]


def _torchopt(inner: Any, outer: Any, rtol: float, steps: int) -> Hypergradient:
    """`custom_root` on the gradient, with its CG."""
    import torchopt

    solve = torchopt.linear_solve.solve_cg(rtol=rtol, maxiter=MAX_STEPS)
    optimality = torch.func.grad(lambda w, h: inner(list(w), h))

    def hypergradient(w: list[Tensor], h: Tensor) -> Tensor:
        w, h = _leaves(w, h)
        root = torchopt.diff.implicit.custom_root(lambda w, h: tuple(optimality(w, h)), argnums=1, solve=solve)
        solution = root(lambda start, h: tuple(t.detach() for t in start))(tuple(w), h)
        return torch.autograd.grad(outer(list(solution), h), h)[0]

    return hypergradient


def _betty(inner: Any, outer: Any, rtol: float, steps: int) -> Hypergradient:
    """Its hypergradient function on a stand-in for its Problem."""
    from betty.configs import Config
    from betty.hypergradient import jvp_fn_mapping

    def hypergradient(w: list[Tensor], h: Tensor) -> Tensor:
        w, h = _leaves(w, h)
        level = types.SimpleNamespace(
            paths=[],
            config=Config(type="cg", cg_iterations=steps),
            cur_batch=None,
            training_step_exec=lambda batch: inner(w, h),
            trainable_parameters=lambda: w,
            parameters=lambda: w,
        )
        above = types.SimpleNamespace(trainable_parameters=lambda: [h])
        grads = torch.autograd.grad(outer(w, h), [*w, h], materialize_grads=True)
        with contextlib.redirect_stdout(io.StringIO()):
            return jvp_fn_mapping["cg"](grads[:-1], level, above)[0] + grads[-1]

    return hypergradient


def _boat(inner: Any, outer: Any, rtol: float, steps: int) -> Hypergradient:
    """The function behind its operator "CG", on a gradient step of length 1, whose system is ours.

    Its tolerance is an absolute one, so it is scaled by the right-hand side. It flattens gradients by `view`, which
    wants them contiguous, and those through a sparse design are not.
    """
    from boat_torch.utils import op_utils

    def step(params: list[Tensor], loss: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return [p - g for p, g in zip(params, grads, strict=True)]

    def hypergradient(w: list[Tensor], h: Tensor) -> Tensor:
        w, h = _leaves(w, h)
        views = [t.view_as(t) for t in w]
        for t in views:
            t.register_hook(torch.Tensor.contiguous)
        loss = outer(views, h)
        size = hand_written.flatten(torch.autograd.grad(loss, w, retain_graph=True)).norm()
        return op_utils.conjugate_gradient(w, [h], loss, inner(views, h), MAX_STEPS, step, rtol * float(size))[0]

    return hypergradient


def prepare_jaxopt(workload: Workload, rtol: float) -> Callable[[list[np.ndarray], np.ndarray], Any]:
    """Return JAXopt's implicit differentiation with its CG, jitted: `(w, h) -> dF/dh`."""
    import jax

    jax.config.update("jax_enable_x64", workload.hparams.dtype == np.float64)
    from jaxopt import linear_solve
    from jaxopt.implicit_diff import root_vjp

    from benchmarks.jax_losses import jax_losses

    inner, outer = jax_losses(workload)

    def solve(matvec: Any, b: Any) -> Any:
        return linear_solve.solve_cg(matvec, b, tol=rtol, maxiter=MAX_STEPS)

    @jax.jit
    def hypergradient(w: Any, h: Any) -> Any:
        by_w, by_h = jax.grad(outer, argnums=(0, 1))(w, h)
        return by_h + root_vjp(jax.grad(inner), w, (h,), by_w, solve=solve)[0]

    return hypergradient
