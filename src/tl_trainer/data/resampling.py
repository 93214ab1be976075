"""Pillow's resize and torchvision's centre crop as two matrix products, so that a graph can hold them.

A row of weights for each pixel that is kept; where the crop is larger than the image, rows of zeros, which is black.
Pillow resizes one axis after the other and rounds to whole values after each; its weights have 22 binary digits, so
that the products are exact in float64, and so are the pixels. It begins with the width, Pillow 13 with the height where
that loses more than twice as many pixels as the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor, nn

_ONE = 1 << 22


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _lanczos(x: Tensor) -> Tensor:
    angle = math.pi * x.clamp(min=1e-12)
    window = 3 * torch.sin(angle) * torch.sin(angle / 3) / (angle * angle)
    return torch.where(x < 3, window, torch.zeros_like(x))


# How much a pixel counts at a distance, in pixels of the smaller image (Pillow, Resample.c).
FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic, "lanczos": _lanczos}


@dataclass(frozen=True)
class Sampling:
    """A resize and the centre crop after it, each optional. Sizes in pixels.

    resize: [height, width], or [side] for the shorter side. crop: height and width.
    """

    resize: tuple[int, ...] = ()
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of what comes out; None where they depend on the image's."""
        if self.crop is not None or len(self.resize) != 2:
            return self.crop
        return self.resize[0], self.resize[1]


class Resample(nn.Module):
    """(N, 3, H, W) of whole values from 0 to 255 as float64 -> the same of the sampling's fixed size."""

    def __init__(self, sampling: Sampling) -> None:
        super().__init__()
        assert sampling.size is not None, sampling
        self.sampling, self.size = sampling, sampling.size
        self.height_may_be_first = bool(sampling.resize) and _may_begin_with_height()

    def forward(self, images: Tensor) -> Tensor:
        height, width = (torch.arange(length, device=images.device).double() for length in images.shape[2:])
        short = torch.minimum(height[-1], width[-1]) + 1
        down, across = self._weights(height, short, 0), self._weights(width, short, 1)
        if not self.height_may_be_first:
            return _width_first(images, down, across)
        lost, lost_across = (
            pixels[-1] + 1 - self._scaled(pixels[-1] + 1, short, axis) for axis, pixels in enumerate((height, width))
        )
        height_first = lost > 2 * lost_across.clamp(min=0)
        if torch.compiler.is_exporting():  # elsewhere torch.cond would first compile
            chosen: Tensor = torch.cond(height_first, _height_first, _width_first, (images, down, across))
            return chosen
        return (_height_first if height_first else _width_first)(images, down, across)

    def _scaled(self, length: Tensor, short: Tensor, axis: int) -> Tensor:
        """What the resize makes of an axis of that length; `short` is the length of the shorter axis."""
        resize = self.sampling.resize
        if len(resize) == 1:
            return torch.floor(resize[0] * length / short)
        return torch.full_like(length, resize[axis]) if resize else length

    def _weights(self, pixels: Tensor, short: Tensor, axis: int) -> Tensor:
        """The rows (kept, length) for an axis with these pixels."""
        length = pixels[-1] + 1
        scaled = self._scaled(length, short, axis)
        room = scaled - self.size[axis]
        offset = torch.where(room < 0, torch.ceil(room / 2), torch.round(room / 2))  # Python's round too is half-even
        kept = offset + torch.arange(self.size[axis], device=pixels.device).double()
        scale = length / scaled
        distance = (pixels + 0.5 - (kept[:, None] + 0.5) * scale).abs() / scale.clamp(min=1)
        rows: Tensor = FILTERS[self.sampling.interpolation](distance)
        inside = ((kept >= 0) & (kept < scaled))[:, None].double()
        rows = rows * inside / (rows.sum(dim=1, keepdim=True) * inside + (1 - inside))
        whole: Tensor = rows.sign() * (rows.abs() * _ONE + 0.5).floor()
        return whole / _ONE


def _width_first(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _rounded(down @ _rounded(images @ across.mT))


def _height_first(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _rounded(_rounded(down @ images) @ across.mT)


@cache
def _may_begin_with_height() -> bool:
    """Whether this Pillow does with an image of which only the height shrinks much."""
    picture = Image.frombytes("L", (4, 16), bytes(7 * value * value % 256 for value in range(64)))
    bilinear = Image.Resampling.BILINEAR
    in_steps = picture.resize((3, 16), bilinear).resize((3, 2), bilinear)
    return picture.resize((3, 2), bilinear).tobytes() != in_steps.tobytes()


def _rounded(values: Tensor) -> Tensor:
    return torch.floor(values + 0.5).clamp(0, 255)
