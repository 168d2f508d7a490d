"""Augmentations: known pictures, derivatives by finite differences, twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bilevel
from bilevel import augment
from problems_variables import scalar

pytestmark = pytest.mark.usefixtures("seeded")

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "noise": augment.noise,
    "brightness": augment.brightness,
    "contrast": augment.contrast,
    "degrees": lambda x, m: augment.affine(x, degrees=30 * m),
    "translate": lambda x, m: augment.affine(x, translate=m, padding_mode="border"),
    "scale": lambda x, m: augment.affine(x, scale=m, mode="bicubic"),
}


def images(height: int = 5, width: int = 5) -> Tensor:
    return torch.randn(3, 2, height, width, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves_at_zero(kind: str) -> None:
    x = images()
    torch.testing.assert_close(KINDS[kind](x, scalar(0.0)), x, rtol=0.0, atol=1e-12)
    assert not torch.allclose(KINDS[kind](x, scalar(0.3)), x, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_to_the_second_order(kind: str) -> None:
    x = images(3, 4)[:, :1].requires_grad_()

    def pinned(x: Tensor, m: Tensor) -> Tensor:
        torch.manual_seed(4)
        return KINDS[kind](x, m)

    at = (x, scalar(0.21).requires_grad_())
    assert torch.autograd.gradcheck(pinned, at)
    assert torch.autograd.gradgradcheck(pinned, at)


def test_known_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_uniform", lambda x: torch.ones(len(x), dtype=x.dtype))
    x = images()
    turned = augment.affine(x, degrees=90.0)
    quarter = torch.rot90(x, 1, (2, 3))
    near = min(float((turned - t).abs().max()) for t in (quarter, quarter.flip(2, 3)))
    assert near < 1e-12
    wide = images(4, 6)
    torch.testing.assert_close(augment.affine(wide, degrees=180.0), wide.flip(2, 3), rtol=0.0, atol=1e-12)
    shifted = augment.affine(x, translate=0.2)  # one pixel of five, from right to left and up
    torch.testing.assert_close(shifted[:, :, :4, :4], x[:, :, 1:, 1:], rtol=0.0, atol=1e-12)
    assert not shifted[:, :, 4].any()
    ramp = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).expand(1, 1, 5, 5)
    grown = augment.affine(ramp, scale=0.4)
    torch.testing.assert_close(grown, ramp * scalar(-0.4).exp(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(augment.brightness(x, 0.3), x + 0.3, rtol=1e-12, atol=0.0)
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(augment.contrast(x, 0.5), mean + 1.5 * (x - mean), rtol=1e-12, atol=1e-14)


def test_a_turn_of_a_wide_image_is_a_turn_of_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_uniform", lambda x: torch.ones(len(x), dtype=x.dtype))
    wide = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    wide[0, 0, 2, 5] = 1.0  # one pixel beside the centre
    turned = augment.affine(wide, degrees=90.0)
    assert turned.sum().item() == pytest.approx(1.0, abs=1e-9)
    assert max(turned[0, 0, 1, 4].item(), turned[0, 0, 3, 4].item()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("kind", ["noise", "translate"])
def test_magnitudes_are_tuned(kind: str) -> None:
    x, xv = images(4, 4), images(4, 4)
    y, yv = x[:, 0].mean((1, 2)), xv[:, 0].mean((1, 2))

    def scores(w: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x, w).flatten(1).tanh().mean(1)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return (scores(w, KINDS[kind](x, h)) - y).square().mean() + 0.05 * w.square().sum()

    problem = bilevel.BilevelProblem(
        inner,
        lambda w, h: (scores(w, xv) - yv).square().mean(),
        torch.zeros(2, 2, 2, 2, dtype=torch.float64),
        bilevel.positive(0.13),
    )
    assert bilevel.check_gradient(problem, directions=1).passed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.contrast(torch.zeros(3, 4), 0.1), r"`x` has shape \(3, 4\), expected \(n, channels"),
        (lambda: augment.brightness(torch.zeros(1, 1, 2, 2).byte(), 0.1), r"`x` is a torch.uint8 tensor"),
        (lambda: augment.affine(images(), degrees=1.0, mode="nearest"), r"`mode` is 'nearest'"),  # type: ignore[arg-type]
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        call()


@pytest.mark.parametrize("kind", ["brightness", "contrast"])
def test_a_magnitude_for_each_image(kind: str) -> None:
    images = torch.randn(3, 2, 4, 3)  # as many columns as images
    moved = KINDS[kind](images, torch.tensor([0.0, 1.0, 0.0]))
    assert [torch.allclose(a, b) for a, b in zip(moved, images, strict=True)] == [True, False, True]


def test_noise_of_a_shape_that_is_not_that_of_the_data_is_refused() -> None:
    with pytest.raises(bilevel.BilevelError, match=r"std.*\(3,\).*\(3, 1\)"):
        augment.noise(torch.zeros(3, 1), torch.ones(3))
