"""The mode that runs float32 losses in float64: torch functions, second derivatives and layers."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from bilevel.widening import CannotWidenError, InFloat64


def test_the_mode_promotes_what_torch_functions_get_and_give() -> None:
    x, mask = torch.tensor([0.5, 2.0]), torch.tensor([True, False])
    with InFloat64():
        made = [
            x + 1,
            x[None].T,
            x.data,
            torch.zeros(2),
            torch.stack([x, x]),
            mask.float(),
            x.to(torch.float32),
            x.sum(0),
        ]
        made += [
            torch.full((2,), 0.5, dtype=torch.float32),
            x.max(dim=0).values,
            *torch.split(x, 1),
            torch.rand_like(x),
        ]
        binary_cross_entropy_with_logits(x, x, pos_weight=x)
        assert x.dtype == torch.float64 and x.shape == (2,) and mask.dtype == torch.bool
    assert all(t.dtype == torch.float64 for t in made)
    assert x.dtype == torch.float32
    with InFloat64(), pytest.raises(CannotWidenError, match="in place"):
        x[0] = 1.0


def test_second_derivatives_go_through_promoted_tensors() -> None:
    x = torch.tensor([0.1, 0.2])
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with InFloat64():
        loss = (torch.exp(x * w) * x.float()).sum()
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), w)
    wide = x.double()
    torch.testing.assert_close(second, wide**3 * torch.exp(wide), rtol=1e-14, atol=0.0)  # rounding of exp and a product


def causal(net: nn.Module, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])  # float32, made on the way
    out: Tensor = net(x, src_mask=mask)
    return out


FIRST = operator.itemgetter(0)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), causal),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda net, x: FIRST(net(x, x, x))),
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), lambda net, x: FIRST(net(x))),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(5, 3, 2), nn.GELU(), nn.MaxPool1d(2)), lambda net, x: net(x)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GroupNorm(1, 5)), lambda net, x: net(x)),
    "losses": (
        lambda: nn.Linear(4, 4),
        lambda net, x: nn.functional.cross_entropy(
            net(x)[0], torch.arange(4), torch.arange(1.0, 5.0), reduction="none"
        ),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_under_the_mode_is_the_layer_in_float64(name: str) -> None:
    build, run = LAYERS[name]
    torch.manual_seed(0)
    narrow = build()
    x = torch.randn(2, 4 if name == "losses" else 5, 4)
    wide = copy.deepcopy(narrow).double()
    parameters = {key: t.detach().double().requires_grad_() for key, t in narrow.named_parameters()}

    def second(value: Tensor, by: list[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad((value**2).sum(), by, create_graph=True)
        return [value, *grads, *torch.autograd.grad(sum((g**2).sum() for g in grads), by)]  # type: ignore[arg-type]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.manual_seed(1)
        with InFloat64():
            found = second(run(Swapped(narrow, parameters), x), list(parameters.values()))
        torch.manual_seed(1)
        with default_dtype(torch.float64):
            expected = second(run(wide, x.double()), list(wide.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # nothing that was computed in float32


class Swapped:
    """A module with other tensors as its parameters, as `bilevel.modules` lends it."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self._module, self._parameters = module, parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._module, self._parameters, args, kwargs)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
