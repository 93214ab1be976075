"""Pillow's resize and torchvision's centre crop as two matrix products, so that a graph can hold them.

A row of weights for each pixel that is kept; where the crop is larger than the image, rows of zeros, which is black.
Pillow resizes along the width first and rounds to whole values after each axis; its weights have 22 binary digits, so
that the products are exact in float64, and so are the pixels. (Pillow 13 begins with the height where that shrinks much
more than the width; there a pixel may differ by its rounding.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
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

    def forward(self, images: Tensor) -> Tensor:
        height, width = (torch.arange(length, device=images.device).double() for length in images.shape[2:])
        short = torch.minimum(height[-1], width[-1]) + 1
        across = _rounded(images @ self._weights(width, short, 1).mT)
        return _rounded(self._weights(height, short, 0) @ across)

    def _weights(self, pixels: Tensor, short: Tensor, axis: int) -> Tensor:
        """The rows (kept, length) for an axis with these pixels; `short` is the length of the shorter axis."""
        length, resize = pixels[-1] + 1, self.sampling.resize
        if len(resize) == 1:
            scaled = torch.floor(resize[0] * length / short)
        else:
            scaled = torch.full_like(length, resize[axis]) if resize else length
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


def _rounded(values: Tensor) -> Tensor:
    return torch.floor(values + 0.5).clamp(0, 255)
