"""The demo dataset: pictures drawn by code, so that the first minute needs no network and no data."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from tl_trainer.files import cache_folder

VERSION = 1
SIZE = 64
PER_CLASS = {"train": 60, "val": 15, "test": 15}

Point = tuple[float, float]
Shape = Callable[[random.Random], list[Point]]


def demo_folder() -> Path:
    """The dataset in ImageFolder layout, drawn once into the cache folder."""
    folder = cache_folder() / f"demo-v{VERSION}"
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}-{os.getpid()}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        _draw_all(draft)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster, and drew the same pictures
            shutil.rmtree(draft)
    return folder


def _draw_all(folder: Path) -> None:
    for split, count in PER_CLASS.items():
        for name, shape in SHAPES.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                picture = _draw(shape, random.Random(f"{VERSION} {split} {name} {index}"))
                picture.save(folder / split / name / f"{index:03}.png")


def _draw(shape: Shape, rng: random.Random) -> Image.Image:
    """One object on a spotted background, with its size, angle, colours and place at random."""
    scale = 4  # drawn large and reduced, for smooth edges
    side = SIZE * scale
    hue = rng.random()
    picture = Image.new("RGB", (side, side), _colour(rng, hue))
    draw = ImageDraw.Draw(picture)
    for _ in range(15):
        x, y, radius = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.05, 0.15) * side
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng, hue))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 6)))
    draw = ImageDraw.Draw(picture)
    angle, size = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 0.42) * side
    centre = (side * rng.uniform(0.4, 0.6), side * rng.uniform(0.4, 0.6))
    outline = [_turned(point, angle, size, centre) for point in shape(rng)]
    draw.polygon(outline, fill=_colour(rng, hue + rng.uniform(0.3, 0.7)))
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _colour(rng: random.Random, hue: float) -> str:
    return f"hsv({(hue + rng.uniform(-0.06, 0.06)) % 1 * 360:.0f},{rng.randint(40, 100)}%,{rng.randint(40, 100)}%)"


def _turned(point: Point, angle: float, size: float, centre: Point) -> Point:
    x, y = point
    return (
        centre[0] + size * (x * math.cos(angle) - y * math.sin(angle)),
        centre[1] + size * (x * math.sin(angle) + y * math.cos(angle)),
    )


def _polar(radius: Callable[[float], float], points: int = 120) -> list[Point]:
    angles = [2 * math.pi * index / points for index in range(points)]
    return [(radius(angle) * math.cos(angle), radius(angle) * math.sin(angle)) for angle in angles]


def _regular(corners: int, inner: float = 0.0) -> list[Point]:
    """A regular polygon, or a star where the corners alternate with an inner radius."""
    return _polar(lambda angle: 1.0 if not inner or round(angle / math.pi * corners) % 2 == 0 else inner,
                  corners * (2 if inner else 1))  # fmt: skip


def _cross(rng: random.Random) -> list[Point]:
    w = rng.uniform(0.2, 0.35)
    arm = [(w, w), (w, 1.0), (-w, 1.0)]
    return [(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in arm]


def _crescent(rng: random.Random) -> list[Point]:
    angles = [math.pi * (index / 40 - 0.5) for index in range(41)]
    depth = rng.uniform(0.2, 0.5)
    outer = [(math.cos(angle), math.sin(angle)) for angle in angles]
    return outer + [(depth * math.cos(angle), math.sin(angle)) for angle in reversed(angles)]


SHAPES: dict[str, Shape] = {
    "crescent": _crescent,
    "cross": _cross,
    "disc": lambda rng: _polar(lambda angle: 1.0),
    "drop": lambda rng: _polar(lambda angle: 0.45 + 0.75 * abs(angle / math.pi - 1) ** 4),
    "flower": lambda rng: _polar(lambda angle: 0.7 + 0.3 * math.cos(5 * angle)),
    "square": lambda rng: _regular(4),
    "star": lambda rng: _regular(5, rng.uniform(0.35, 0.5)),
    "triangle": lambda rng: _regular(3),
}
