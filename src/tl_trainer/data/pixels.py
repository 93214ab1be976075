"""What the pixels of an image say of it: its size, light and sharpness, and a perceptual hash."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 256  # pixels of the shorter side at which light and sharpness are measured; a smaller image is left as it is
BITS = 64
_GRID = 32  # pixels of the square that is hashed
_WAVES = int(BITS**0.5)  # along each side
# The waves of the cosine transform, (_WAVES, _GRID), without the constant one.
_COSINES = np.cos(np.pi / _GRID * np.outer(np.arange(1, _WAVES + 1), np.arange(_GRID) + 0.5))

_SHADE = 17  # of 256 greys, which count as one: of paper, with the noise of JPEG

NUMBERS = 6 + BITS  # of an image's Look


class Look(NamedTuple):
    """Of N images: sides in pixels, up to SIDE exact; brightness and contrast (mean and deviation of grey) of 1.

    sharpness: the variance of the Laplacian, for greys of 255 (Pech-Pacheco et al., 2000). uniform: the share of the
    pixels that have the most common shade of grey. hashes: (N, BITS) of 1, -1.
    """

    width: np.ndarray
    height: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    sharpness: np.ndarray
    uniform: np.ndarray
    hashes: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> Look:
        """From rows of `look`, (N, NUMBERS)."""
        width, height, brightness, contrast, sharpness, uniform = rows[:, :-BITS].T
        return cls(width, height, brightness, contrast, sharpness, uniform, rows[:, -BITS:])


def look(picture: Image.Image) -> np.ndarray:
    """The numbers of an RGB image, (NUMBERS,) float32."""
    grey = picture.convert("L")
    small = grey
    if min(grey.size) > SIDE:
        small = grey.copy()
        small.thumbnail((max(grey.size), SIDE) if grey.width > grey.height else (SIDE, max(grey.size)))
    greys = np.asarray(small)
    shades = np.convolve(np.bincount(greys.ravel(), minlength=256), np.ones(_SHADE))
    values = greys.astype(np.float32)
    padded = np.pad(values, 1, mode="edge")
    edges = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * values
    numbers = [*picture.size, values.mean() / 255, values.std() / 255, edges.var(), shades.max() / values.size]
    return np.array([*numbers, *_hash(grey)], dtype=np.float32)


def _hash(grey: Image.Image) -> np.ndarray:
    """The signs of the longest waves of the cosine transform, (BITS,).

    The pHash of Zauner (Implementation and Benchmarking of Perceptual Image Hash Functions, 2010), with 0 for the
    median, so that the hash of the mirror image follows from it.
    """
    square = np.asarray(grey.resize((_GRID, _GRID), Image.Resampling.BOX), dtype=np.float64)
    return np.where(_COSINES @ square @ _COSINES.T < 0, -1, 1).ravel()


def mirrored(hashes: np.ndarray) -> np.ndarray:
    """The hashes of the mirror images, (N, BITS): a wave with an odd number of half periods changes its sign."""
    signs = np.where(np.arange(1, _WAVES + 1) % 2, -1, 1)
    return np.asarray(hashes * np.tile(signs, _WAVES))
