"""The demo dataset: pictures drawn by code, so that the first minute needs no network and no data."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from tl_trainer.data.drawing import Dice, Nuisance, Pattern, box, ellipse, length, scenes
from tl_trainer.ground.files import cache_folder

VERSION = 3
SIZE = 96
PER_CLASS = {"train": 40, "val": 10, "test": 30}

# Dark things on light ground, more or less upright: tame enough for 40 pictures of each.
TAME = Nuisance(
    turn=0.2, size=(0.7, 1.1), place=0.1, ground=(0.75, 1.0), object=(0.0, 0.35), texture=0.25,
    litter=0.3, hidden=0.15, grain=0.03,
)  # fmt: skip


def demo_folder() -> Path:
    """The dataset in ImageFolder layout, drawn once into the cache folder."""
    folder = cache_folder() / f"demo-v{VERSION}"
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        _draw_all(draft)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster, and drew the same pictures
            shutil.rmtree(draft)
    return folder


def _draw_all(folder: Path) -> None:
    for number, split in enumerate(PER_CLASS):
        for label, (name, shape) in enumerate(SHAPES.items()):
            (folder / split / name).mkdir(parents=True)
            pictures = scenes(shape, PER_CLASS[split], SIZE, Dice(1000 * number + label), TAME)
            for index, picture in enumerate(pictures):
                to_pil_image(picture).save(folder / split / name / f"{index:03}.png")


def _gable(across: Tensor, up: Tensor, half: Tensor | float, height: float) -> Tensor:
    """A triangle on the line up = 0, symmetric about across = 0."""
    return torch.maximum((across.abs() - half * (1 - up / height)) * 0.8, -up)


def _boat(points: Tensor, dice: Dice) -> Tensor:
    x, y = points.unbind(-1)
    hull = torch.maximum(ellipse(x, y - 0.3, 0.85, dice.between(0.35, 0.55, len(x), 1, 1)), 0.3 - y)
    mast = box(x, y + 0.3, 0.05, 0.65)
    sail = torch.maximum(_gable(x, 0.15 - y, dice.between(0.5, 0.8, len(x), 1, 1), 1.0), 0.08 - x)
    return torch.minimum(torch.minimum(hull, mast), sail)


def _butterfly(points: Tensor, dice: Dice) -> Tensor:
    x, y = points.unbind(-1)
    x = x.abs()
    body = ellipse(x, y, 0.1, 0.7)
    upper = ellipse(x - 0.45, y + 0.35, dice.between(0.3, 0.45, len(x), 1, 1), dice.between(0.3, 0.45, len(x), 1, 1))
    lower = ellipse(x - 0.35, y - 0.35, dice.between(0.2, 0.35, len(x), 1, 1), dice.between(0.25, 0.4, len(x), 1, 1))
    return torch.minimum(torch.minimum(upper, lower), body)


def _cup(points: Tensor, dice: Dice) -> Tensor:
    x, y = points.unbind(-1)
    half, height = dice.between(0.35, 0.5, len(x), 1, 1), dice.between(0.4, 0.7, len(x), 1, 1)
    bowl = box(x + 0.2, y, half + (y * -0.1), height)
    handle = ellipse(x - half + 0.2, y, 0.35, height * 0.65).abs() - 0.07
    return torch.minimum(bowl, torch.maximum(handle, half - 0.2 - x))


def _fish(points: Tensor, dice: Dice) -> Tensor:
    x, y = points.unbind(-1)
    body = ellipse(x + 0.2, y, 0.65, dice.between(0.3, 0.5, len(x), 1, 1))
    return torch.minimum(body, _gable(y, 0.9 - x, dice.between(0.35, 0.55, len(x), 1, 1), 0.75))


def _flower(points: Tensor, dice: Dice) -> Tensor:
    x, y = points.unbind(-1)
    petals = dice.whole(5, 8, len(x), 1, 1)
    radius = 0.6 + dice.between(0.15, 0.3, len(x), 1, 1) * torch.cos(petals * torch.atan2(y, x))
    ring = length(points)
    return torch.maximum(ring - radius, dice.between(0.1, 0.2, len(x), 1, 1) - ring)


def _house(points: Tensor, dice: Dice) -> Tensor:
    x, y = points.unbind(-1)
    half = dice.between(0.5, 0.7, len(x), 1, 1)
    walls = box(x, y - 0.35, half, 0.45)
    door = box(x - dice.between(-0.25, 0.25, len(x), 1, 1), y - 0.5, 0.14, 0.31)
    return torch.minimum(torch.maximum(walls, -door), _gable(x, -0.1 - y, half + 0.2, 0.7))


def _key(points: Tensor, dice: Dice) -> Tensor:
    x, y = points.unbind(-1)
    bow = ellipse(x + 0.55, y, 0.32, dice.between(0.25, 0.4, len(x), 1, 1)).abs() - 0.1
    shaft = box(x - 0.35, y, 0.55, 0.08)
    teeth = box((x - 0.65).abs() - 0.18, y - 0.15, 0.07, dice.between(0.15, 0.25, len(x), 1, 1))
    return torch.minimum(torch.minimum(bow, shaft), teeth)


def _mushroom(points: Tensor, dice: Dice) -> Tensor:
    x, y = points.unbind(-1)
    cap = torch.maximum(ellipse(x, y, 0.8, dice.between(0.6, 0.85, len(x), 1, 1)), y)
    return torch.minimum(cap, box(x, y - 0.35, dice.between(0.15, 0.28, len(x), 1, 1), 0.45))


SHAPES: dict[str, Pattern] = {
    "boat": _boat,
    "butterfly": _butterfly,
    "cup": _cup,
    "fish": _fish,
    "flower": _flower,
    "house": _house,
    "key": _key,
    "mushroom": _mushroom,
}
