"""`argmin`, `root` and `fixed_point`: solutions as differentiable functions of the arguments of their problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.differentiable.anderson import Anderson
from bilevel.differentiable.arguments import Arguments
from bilevel.differentiable.equation import ImplicitEquation, attach, paths, refuse_transforms
from bilevel.differentiable.newton import Found, Newton
from bilevel.differentiable.problems import LossResponse, ResidualResponse
from bilevel.differentiable.trust import Trust
from bilevel.differentiable.unrolled import unrolled
from bilevel.errors import InvalidTypeError, InvalidValueError, noting
from bilevel.evaluation import check_decay, check_on_untrusted
from bilevel.inner import InnerSolver
from bilevel.operators import LinearOperator
from bilevel.randomness import fork_random
from bilevel.selection import Selection
from bilevel.solvers import Estimator, Implicit, LinearSolver, Truncated, Unroll, estimator
from bilevel.vector import Vector, detach, leaves, norm, subtract


def argmin(
    loss: Callable[..., Tensor],
    params: Any,
    *args: Any,
    solver: InnerSolver | Callable[..., Any] | None = None,
    method: str | Estimator = "implicit",
    on_untrusted: str = "warn",
) -> Any:
    """Return the minimum of `loss(params, *args)` over `params`, differentiable with respect to `args`.

        w*(a) ∈ argmin_w g(w, a)      dw*/da = -(∂²g/∂w²)^-1 ∂²g/∂w∂a

    To any order, under torch.autograd, and inside of other losses: levels are nested by it.

    Args:
        loss: `(params, *args)` -> scalar. Tensors that require a gradient come in through `args`.
        params: where the search starts: a Tensor, a nested structure of Tensors, or an `nn.Module`. A start near the
            solution (the last one) saves time.
        args: anything: tensors that require a gradient, alone, in structures or in modules, are what the result can be
            differentiated by; the rest is constant.
        solver: None for L-BFGS to the last digits; one of `bilevel.inner`; or a function `(params, *args) -> params`.
        method: an implicit method: "implicit", "cg", "minres", "gmres", "direct", "neumann" or
            `bilevel.Implicit(linear_solver)`; or "unroll" or `bilevel.Truncated(steps)` for the derivative of the
            solver's own steps.
        on_untrusted: "warn", "raise" or "ignore" where a derivative cannot be trusted; the backward pass looks.

    Returns:
        The minimum in the structure of `params`; for a module, a new one that has it as parameters.

    >>> import torch, bilevel
    >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> w = bilevel.argmin(lambda w, a: w.exp() - a * w, torch.zeros((), dtype=torch.float64), a)  # w*(a) = log a
    >>> (slope,) = torch.autograd.grad(w, a, create_graph=True)
    >>> slope.item(), torch.autograd.grad(slope, a)[0].item()  # 1 / a and -1 / a^2
    (0.5, -0.25)
    """
    refuse_transforms()
    check_on_untrusted(on_untrusted)
    _check_callable(loss, "loss", "(params, *args) -> scalar Tensor")
    if isinstance(solver, type):
        raise InvalidTypeError(f"`solver` is the class {solver.__name__}; write bilevel.inner.{solver.__name__}(...)")
    how = estimator(method)
    arguments = Arguments(args)
    response = LossResponse(loss, params, arguments, solver)
    start = response.params.start
    with fork_random(_device(start)), response.session():
        if isinstance(how, (Unroll, Truncated)):
            return response.params.filled(unrolled(response, how, start, arguments))
        linear_solver = _linear_solver(how, "argmin")
        check_decay(response.solver, how)
        found = response.solve_inner(start, arguments.values).value
        trust = Trust("argmin", "the gradient of `loss`", on_untrusted)
        return response.params.filled(_attached(response, found, arguments, linear_solver, trust, symmetric=True))


def root(
    residual: Callable[..., Any],
    start: Any,
    *args: Any,
    solver: Newton | Anderson | Callable[..., Any] | None = None,
    method: str | Estimator = "implicit",
    on_untrusted: str = "warn",
) -> Any:
    """Return x with `residual(x, *args) = 0`, differentiable with respect to `args` to any order.

        R(x*(a), a) = 0      dx*/da = -(∂R/∂x)^-1 ∂R/∂a

    Args:
        residual: `(x, *args)` -> the structure and shapes of `start`. Its Jacobian need not be symmetric.
        start: where the search starts: a Tensor or a nested structure of Tensors.
        args: see `argmin`.
        solver: None for `bilevel.Newton()`; `bilevel.Anderson()`; or a function `(start, *args) -> x`.
        method: "implicit" (dense up to 64 unknowns, GMRES above), "gmres", "direct" or
            `bilevel.Implicit(linear_solver)` of a solver that needs no symmetry.
        on_untrusted: "warn", "raise" or "ignore" where no root is found or a derivative cannot be trusted.

    >>> import torch, bilevel
    >>> a = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    >>> x = bilevel.root(lambda x, a: x**2 - a, torch.ones((), dtype=torch.float64), a)
    >>> x.item(), torch.autograd.grad(x, a)[0].item()  # sqrt(a) and 1 / (2 sqrt(a))
    (3.0, 0.16666666666666666)
    """
    return _solved(residual, start, args, solver or Newton(), method, on_untrusted, caller="root", name="residual")


def fixed_point(
    map: Callable[..., Any],
    start: Any,
    *args: Any,
    solver: Newton | Anderson | Callable[..., Any] | None = None,
    method: str | Estimator = "implicit",
    on_untrusted: str = "warn",
) -> Any:
    """Return x = `map(x, *args)`, differentiable with respect to `args` to any order.

        x*(a) = Φ(x*(a), a)      dx*/da = (I - ∂Φ/∂x)^-1 ∂Φ/∂a

    The derivative does not depend on how x was found, and no iteration is kept. Bai, Kolter and Koltun, Deep
    equilibrium models, NeurIPS 2019.

    Args:
        map: `(x, *args)` -> the structure and shapes of `start`.
        start: where the iteration starts: a Tensor or a nested structure of Tensors.
        args: see `argmin`.
        solver: None for `bilevel.Anderson()`; `bilevel.Newton()`; or a function `(start, *args) -> x`.
        method: see `root`.
        on_untrusted: see `root`.

    >>> import torch, bilevel
    >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> x = bilevel.fixed_point(lambda x, a: a * x + 1.0, torch.zeros((), dtype=torch.float64), a)
    >>> x.item(), torch.autograd.grad(x, a)[0].item()  # 1 / (1 - a) and 1 / (1 - a)^2
    (2.0, 4.0)
    """
    return _solved(map, start, args, solver or Anderson(), method, on_untrusted, caller="fixed_point", name="map")


def _solved(
    function: Callable[..., Any],
    start: Any,
    args: tuple[Any, ...],
    solver: Any,
    method: str | Estimator,
    on_untrusted: str,
    caller: str,
    name: str,
) -> Any:
    """Find a root or a fixed point, and attach it to the arguments."""
    refuse_transforms()
    check_on_untrusted(on_untrusted)
    _check_callable(function, name, "(x, *args) -> the structure of `start`")
    linear_solver = _linear_solver(estimator(method), caller)
    _check_general(linear_solver, caller)
    if isinstance(start, (nn.Module, Selection)):
        raise InvalidTypeError(
            f"`start` is a {type(start).__name__}, expected a Tensor or a nested structure of Tensors; give "
            "dict(module.named_parameters()), and use torch.func.functional_call in the function"
        )
    arguments = Arguments(args)
    response = ResidualResponse(function, start, arguments, name)
    lower = response.params.start
    equation = "`residual`" if name == "residual" else "x - map(x)"
    trust = Trust(caller, equation, on_untrusted)
    with fork_random(_device(lower)), response.session():
        response.residual(leaves(lower), arguments.values)  # what is wrong with it should be said before the search
        found = _find(solver, response, lower, arguments)
        if found.failure:
            trust.doubt(f"`solver` found no point where {equation} is zero: {found.failure}; start nearer to one")
        return response.params.filled(
            _attached(response, found.value, arguments, linear_solver, trust, symmetric=False)
        )


def _find(solver: Any, response: ResidualResponse, lower: Vector, arguments: Arguments) -> Found:
    if isinstance(solver, type):
        raise InvalidTypeError(f"`solver` is the class {solver.__name__}; write bilevel.{solver.__name__}()")
    if hasattr(solver, "find"):
        result: Found = solver.find(response, lower, arguments.values)
        return result
    if not callable(solver):
        raise InvalidTypeError(
            f"`solver` is {solver!r}, expected bilevel.Newton(), bilevel.Anderson() or a function (start, *args) -> x"
        )
    params = response.params
    with arguments.bound({}) as given, noting("solver", "start, *args"):
        returned = solver(params.export(lower), *given)
    return Found(detach(params.read(returned, "what `solver` returned")), 1)


def _attached(
    response: LossResponse,
    found: Vector,
    arguments: Arguments,
    solver: LinearSolver | None,
    trust: Trust,
    symmetric: bool,
) -> Vector:
    """Return the solution with its graph to the arguments; without one where nothing is recorded."""
    if not torch.is_grad_enabled():
        return found
    used = paths(response, found, arguments.given, f"`{response.name}`")
    if not used:
        return found
    if response.piece is not None and response.piece.reasons:
        trust.doubt("; ".join(response.piece.reasons))
    size = max(float(norm(found)), float(norm(subtract(found, response.params.start))))
    equation = ImplicitEquation(response, symmetric, solver, trust, size)
    return attach(equation, found, {name: arguments.given[name] for name in used})


def _linear_solver(how: Estimator, caller: str) -> LinearSolver | None:
    if not isinstance(how, Implicit):
        unrolled_too = ', or "unroll"' if caller == "argmin" else ""
        raise InvalidValueError(
            f"`method` is {how!r}, which gives hypergradients only; bilevel.{caller} takes an implicit method "
            f'("implicit", "gmres", "direct", bilevel.Implicit(...)){unrolled_too}'
        )
    return how.linear_solver


def _check_general(solver: LinearSolver | None, caller: str) -> None:
    """Raise for a linear solver that refuses systems without symmetry: it is asked for the smallest one."""
    if solver is not None:
        one = {"x": torch.ones(1, dtype=torch.float64)}
        try:
            solver.solve(LinearOperator(lambda v: v, one, symmetric=False), one)
        except InvalidValueError as error:
            raise InvalidValueError(
                f"`method` is of no use for bilevel.{caller}, whose Jacobian has no symmetry ({error}); choose "
                '"implicit", "gmres" or "direct"'
            ) from error


def _check_callable(function: Any, name: str, wanted: str) -> None:
    if not callable(function) or isinstance(function, type):
        kind = f"the class {function.__name__}" if isinstance(function, type) else f"a {type(function).__name__}"
        raise InvalidTypeError(f"`{name}` is {kind}, expected a function {wanted}")


def _device(v: Vector) -> torch.device:
    return next(iter(v.values())).device
