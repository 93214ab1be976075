"""Scenes drawn by code, many at once: a textured object on a textured ground, in some light, partly hidden.

A shape is a function (points, dice) -> distance to its outline, negative inside; a texture one to values in [0, 1].
`points` (N, S, S, 2) are coordinates, x to the right and y down; a shape fills about [-1, 1] x [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dice:
    """Random tensors of one sequence."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers in [low, high)."""
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def order(self, count: int) -> Tensor:
        """A random order of `count` things."""
        return torch.randperm(count, generator=self.generator)


Pattern = Callable[[Tensor, Dice], Tensor]


class Nuisance(NamedTuple):
    """What differs between pictures of one thing, and by how much."""

    turn: float = math.pi  # the largest angle to either side
    size: tuple[float, float] = (0.5, 1.1)
    place: float = 0.35  # the largest distance from the middle, of 1
    ground: tuple[float, float] = (0.1, 1.0)  # how dark and how light the colours are
    object: tuple[float, float] = (0.1, 1.0)
    texture: float = 1.0  # its contrast
    litter: float = 0.6  # the share of scenes with each of two small things lying about
    hidden: float = 0.3  # the share of scenes with a bar before the object
    grain: float = 0.05  # the largest standard deviation of the noise, of 1
    share: float = 1.0  # the share of scenes with the thing itself


LITTER = Nuisance(size=(0.08, 0.25), place=1.0)
BARS = Nuisance(size=(0.4, 0.8), place=1.0)


def scenes(shape: Pattern, count: int, size: int, dice: Dice, nuisance: Nuisance) -> Tensor:
    """(count, 3, size, size) uint8: pictures of what `shape` gives, each with its own ground and light."""
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).expand(count, -1, -1, -1)
    picture = surface(grid, dice, nuisance.ground, nuisance.texture)
    for _ in range(2):
        _paint(picture, grid, blob, dice, LITTER._replace(share=nuisance.litter))
    _paint(picture, grid, shape, dice, nuisance)
    _paint(picture, grid, bar, dice, BARS._replace(share=nuisance.hidden))
    return _photographed(picture, grid, dice, nuisance.grain)


def _paint(picture: Tensor, grid: Tensor, shape: Pattern, dice: Dice, nuisance: Nuisance) -> None:
    """Put an object into some of the scenes: turned, placed, shaded, and with a soft shadow around it."""
    rows = dice.order(len(picture))[: math.ceil(nuisance.share * len(picture))]
    count = len(rows)
    turn, place = nuisance.turn, nuisance.place
    scale = dice.between(*nuisance.size, count, 1, 1)
    points = turned(grid[rows] - dice.between(-place, place, count, 1, 1, 2), dice.between(-turn, turn, count))
    stretch = torch.exp(dice.between(-0.25, 0.25, count, 1, 1))
    points = points / (scale[..., None] * torch.stack([stretch, 1 / stretch], dim=-1))
    distance = shape(points, dice) * scale
    shadow = (0.7 - distance * dice.between(3, 10, count, 1, 1)).clamp(0, 1) * dice.between(0, 0.6, count, 1, 1)
    colours = surface(points, dice, nuisance.object, nuisance.texture) * _relief(distance, dice)[:, None]
    inside = (0.5 - distance * (picture.shape[-1] / 2)).clamp(0, 1)
    picture[rows] = torch.lerp(picture[rows] * (1 - shadow)[:, None], colours.clamp(0, 1), inside[:, None])


def _relief(distance: Tensor, dice: Dice) -> Tensor:
    """(N, S, S): how bright the surface of a bevelled object is under light from one side."""
    count, size = distance.shape[:2]
    depth = torch.sqrt((-distance / dice.between(0.1, 0.6, count, 1, 1)).clamp(0.001, 1))
    down, right = torch.gradient(depth, dim=(1, 2))
    angle, strength = dice.between(-math.pi, math.pi, count, 1, 1), dice.between(0, 0.12, count, 1, 1)
    return 1 + strength * size * (torch.cos(angle) * right + torch.sin(angle) * down).clamp(-0.15, 0.15)


def _photographed(picture: Tensor, grid: Tensor, dice: Dice, grain: float) -> Tensor:
    """The picture under uneven light, a little out of focus and noisy, as bytes."""
    count = len(picture)
    slope = dice.between(-0.3, 0.3, count, 1, 1, 2)
    picture = picture * (dice.between(0.7, 1.2, count, 1, 1) + (grid * slope).sum(-1))[:, None]
    soft = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    picture = torch.lerp(picture, soft, dice.between(-0.5, 1, count, 1, 1, 1).clamp(min=0))
    noisy = picture + torch.randn(picture.shape, generator=dice.generator) * dice.between(0, grain, count, 1, 1, 1)
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8)


def surface(points: Tensor, dice: Dice, value: tuple[float, float], contrast: float) -> Tensor:
    """(N, 3, S, S) in [0, 1]: three related colours, mixed by two textures."""
    count = len(points)
    hue = dice.between(0, 1, count, 1) + dice.between(-0.15, 0.15, count, 3)
    colours = hsv(hue, dice.between(0.0, 1, count, 3), dice.between(*value, count, 3))
    first, second, third = colours[..., None, None].unbind(1)
    fine = any_of(TEXTURES, turned(points, dice.between(-math.pi, math.pi, count)), dice) * contrast
    coarse = noise(points * 0.3, dice, octaves=1) * dice.between(0, 1, count, 1, 1) * contrast
    return torch.lerp(torch.lerp(first, second, fine[:, None]), third, coarse[:, None])


def hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Any shape, hue in turns -> the same shape with red, green and blue as a last dimension, in [0, 1]."""
    sector = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] * 6) % 6
    wedge = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * wedge)


def any_of(choices: Sequence[Pattern], points: Tensor, dice: Dice) -> Tensor:
    """Each of the choices for its share of the scenes, in random order."""
    drawn = points.new_empty(points.shape[:-1])
    for choice, rows in zip(choices, dice.order(len(points)).tensor_split(len(choices)), strict=True):
        drawn[rows] = choice(points[rows], dice)
    return drawn


def turned(points: Tensor, angle: Tensor) -> Tensor:
    """The points of each scene, turned by its angle (N,) about the middle."""
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    x, y = points.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)


def length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1)  # type: ignore[no-any-return]


# Shapes


def ellipse(x: Tensor, y: Tensor, half_x: Tensor | float, half_y: Tensor | float) -> Tensor:
    half_x, half_y = torch.as_tensor(half_x), torch.as_tensor(half_y)
    return (torch.sqrt((x / half_x) ** 2 + (y / half_y) ** 2) - 1) * torch.minimum(half_x, half_y)


def box(x: Tensor, y: Tensor, half_x: Tensor | float, half_y: Tensor | float) -> Tensor:
    return torch.maximum(x.abs() - half_x, y.abs() - half_y)


def blob(points: Tensor, dice: Dice) -> Tensor:
    """A closed contour as a short Fourier series of its angle."""
    count = len(points)
    angle = torch.atan2(points[..., 1], points[..., 0])
    radius = torch.full_like(angle, 0.7)
    for frequency in range(1, 7):
        height = dice.between(-0.25, 0.25, count, 1, 1) / math.sqrt(frequency)
        radius += height * torch.cos(frequency * angle + dice.between(-math.pi, math.pi, count, 1, 1))
    return length(points) - radius


def bar(points: Tensor, dice: Dice) -> Tensor:
    """A strip across the whole picture."""
    return points[..., 0].abs() - dice.between(0.1, 0.4, len(points), 1, 1)


# Textures


def noise(points: Tensor, dice: Dice, octaves: int = 3) -> Tensor:
    """Random values on a lattice, smoothed between, in octaves of half the size and half the weight."""
    count = len(points)
    total = torch.zeros(points.shape[:-1])
    for octave in range(octaves):
        lattice = dice.between(-0.5, 0.5, count, 1, 4 * 2**octave, 4 * 2**octave)
        sampled = F.grid_sample(lattice, points * 0.7, padding_mode="reflection", align_corners=False)
        total += sampled[:, 0] / 2**octave
    return (total * dice.between(0.7, 2.5, count, 1, 1) + 0.5).clamp(0, 1)


def grating(points: Tensor, dice: Dice) -> Tensor:
    """Parallel waves, more or less bent, soft or hard."""
    count = len(points)
    bend = dice.between(0, 0.3, count, 1, 1) * torch.sin(points[..., 1] * dice.between(1, 6, count, 1, 1))
    wave = torch.sin((points[..., 0] + bend) * torch.exp(dice.between(1.2, 3.4, count, 1, 1)))
    return (wave * dice.between(0.5, 4, count, 1, 1) * 0.5 + 0.5).clamp(0, 1)


def cells(points: Tensor, dice: Dice) -> Tensor:
    """Distances to scattered centres: pebbles where the two nearest are compared (Worley, 1996)."""
    count = len(points)
    centres = dice.between(-1.2, 1.2, count, 14, 2)
    squares = (points * points).sum(-1, keepdim=True) + (centres * centres).sum(-1)[:, None, None]
    apart = (squares - 2 * torch.einsum("nhwd,ncd->nhwc", points, centres)).clamp(min=0).sqrt()
    near, next_near = apart.topk(2, dim=-1, largest=False).values.unbind(-1)
    edges = ((next_near - near) * dice.between(3, 12, count, 1, 1)).clamp(0, 1)
    return torch.where(dice.between(0, 1, count, 1, 1) < 0.5, edges, (near * 1.5).clamp(0, 1))


def dots(points: Tensor, dice: Dice) -> Tensor:
    """Round spots on a square lattice."""
    count = len(points)
    within = (points * dice.between(2, 6, count, 1, 1, 1)) % 1 - 0.5
    radius = dice.between(0.15, 0.4, count, 1, 1)
    return ((radius - length(within)) * 8 + 0.5).clamp(0, 1)


def bricks(points: Tensor, dice: Dice) -> Tensor:
    """Rows of blocks with joints between them, every other row shifted."""
    count = len(points)
    x, y = (points * dice.between(1.5, 5, count, 1, 1, 1)).unbind(-1)
    x = x * dice.between(0.4, 1, count, 1, 1) + (y.floor() % 2) * dice.between(0, 0.5, count, 1, 1)
    edge = torch.minimum((x % 1 - 0.5).abs() * -1 + 0.5, (y % 1 - 0.5).abs() * -1 + 0.5)
    return ((edge - dice.between(0.03, 0.12, count, 1, 1)) * 15).clamp(0, 1)


TEXTURES: tuple[Pattern, ...] = (noise, grating, cells, dots, bricks)
