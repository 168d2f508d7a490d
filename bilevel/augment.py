"""Augmentations whose magnitudes are hyperparameters: random, and smooth in the magnitude.

Each image draws u ~ U(-1, 1) anew at every call, and moves by magnitude · u. Within one hypergradient the numbers are
pinned, as all of torch's are. Images are `(n, channels, height, width)`; `noise` takes any shape.

The derivative with respect to a magnitude goes through the augmented images, so what comes before them (rotation by
interpolation) is differentiated once, and the model twice. All of it can be differentiated twice by torch too.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.errors import InvalidTypeError, InvalidValueError

__all__ = ["affine", "brightness", "contrast", "noise"]

Magnitude = float | Tensor


def noise(x: Tensor, std: Magnitude) -> Tensor:
    """Return x + std · N(0, 1), drawn for each entry.

    Args:
        x: any shape.
        std: a number, or a Tensor that broadcasts to x (one for each feature).
    """
    noisy = x + std * torch.randn_like(x)
    if noisy.shape != x.shape:
        raise InvalidValueError(
            f"augment.noise: `std` has shape {tuple(torch.as_tensor(std).shape)}, expected a number or a shape that "
            f"broadcasts to that of `x`, {tuple(x.shape)}"
        )
    return noisy


def brightness(x: Tensor, magnitude: Magnitude) -> Tensor:
    """Return x + magnitude · u: the same for all pixels of an image, in the unit of the pixels.

    Args:
        x: images.
        magnitude: the most that is added or taken away, >= 0.
    """
    _check(x, "brightness")
    return x + _drawn(x, magnitude)


def contrast(x: Tensor, magnitude: Magnitude) -> Tensor:
    """Return mean + (1 + magnitude · u)(x - mean), with the mean of each image.

    Args:
        x: images.
        magnitude: >= 0; 0.5 is half to one and a half times the contrast.
    """
    _check(x, "contrast")
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (1 + _drawn(x, magnitude)) * (x - mean)


def affine(
    x: Tensor,
    *,
    degrees: Magnitude = 0.0,
    translate: Magnitude = 0.0,
    scale: Magnitude = 0.0,
    mode: Literal["bilinear", "bicubic"] = "bilinear",
    padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
) -> Tensor:
    """Return images turned, shifted and scaled about their centres.

    Args:
        x: images.
        degrees: the most that they are turned by, either way.
        translate: the most that they are shifted by in each direction, as a part of the width and of the height.
        scale: the logarithm of the most that they are enlarged or made smaller by; 0.1 is about a tenth.
        mode: how pixels are interpolated. "bilinear" has kinks where a grid point crosses a pixel, which only finite
            differences of single images see; "bicubic" has none.
        padding_mode: what comes in from outside.
    """
    _check(x, "affine")
    if mode not in ("bilinear", "bicubic"):
        raise InvalidValueError(
            f'augment.affine: `mode` is {mode!r}, expected "bilinear" or "bicubic"; others have no derivative'
        )
    angle = degrees * _uniform(x) * (math.pi / 180.0)
    # From the output's coordinates to the input's, in units of half an image: an image that grows is read more closely.
    size = torch.exp(-scale * _uniform(x))
    ratio = x.shape[3] / x.shape[2]  # a turn is one of pixels, not of coordinates that are squeezed to a square
    shift_x, shift_y = (2 * translate * _uniform(x) for _ in range(2))
    cos, sin = size * torch.cos(angle), size * torch.sin(angle)
    rows = [cos, sin / ratio, shift_x, -sin * ratio, cos, shift_y]
    theta = torch.stack([r.expand(len(x)) for r in rows], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode=padding_mode, align_corners=False)


def _uniform(x: Tensor) -> Tensor:
    return 2 * torch.rand(len(x), dtype=x.dtype, device=x.device) - 1


def _drawn(x: Tensor, magnitude: Magnitude) -> Tensor:
    """Return magnitude · u of each image; a Tensor `(n)` holds a magnitude for each, as in `affine`."""
    u = _uniform(x)[:, None, None, None]
    if isinstance(magnitude, Tensor) and magnitude.dim() == 1:
        return magnitude[:, None, None, None] * u
    return magnitude * u


def _check(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"a {x.dtype} tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InvalidTypeError(f"augment.{name}: `x` is {kind}, expected floating-point images; write .float()")
    if x.dim() != 4:
        raise InvalidValueError(
            f"augment.{name}: `x` has shape {tuple(x.shape)}, expected (n, channels, height, width); write "
            "x.reshape(n, 1, height, width)"
        )
