"""Drawn scenes: repeatable, and shapes that are where they say they are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tl_trainer.data import demo
from tl_trainer.data.drawing import TEXTURES, Dice, Nuisance, Pattern, any_of, blob, box, ellipse, hsv, scenes

SHAPES = [blob, *demo.SHAPES.values()]
CALM = Nuisance(turn=0, size=(1, 1), place=0, ground=(1, 1), object=(0, 0), texture=0, litter=0, hidden=0, grain=0)


def grid(count: int, size: int = 48, reach: float = 1.5) -> Tensor:
    """(count, size, size, 2): coordinates from -reach to reach."""
    axis = torch.linspace(-reach, reach, size)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).expand(count, -1, -1, -1)


def test_the_same_dice_give_the_same_bytes_again() -> None:
    def draw(dice: Dice) -> Tensor:
        return scenes(partial(any_of, SHAPES), 12, 32, dice, Nuisance())

    first = draw(Dice(1))
    assert (first.shape, first.dtype) == ((12, 3, 32, 32), torch.uint8)
    assert torch.equal(draw(Dice(1)), first)
    assert not torch.equal(draw(Dice(2)), first)


def test_without_nuisance_the_object_is_in_the_middle_and_upright() -> None:
    def right_half(points: Tensor, dice: Dice) -> Tensor:
        return -points[..., 0]

    pictures = scenes(right_half, 8, 32, Dice(0), CALM).float()
    assert pictures[..., 18:].amax() == 0  # black
    assert pictures[..., :10].mean() > 80


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_shape_fills_part_of_its_square_and_varies(shape: Pattern) -> None:
    inside = (shape(grid(64), Dice(3)) < 0).float()
    share = inside.mean((1, 2)) * 3**2  # of a square of side 1
    assert 0.05 < share.median() < 3
    assert (inside[0] != inside[1:]).any()


@pytest.mark.parametrize("texture", TEXTURES, ids=lambda texture: texture.__name__)
def test_a_texture_is_between_0_and_1_and_varies(texture: Pattern) -> None:
    values = texture(grid(16), Dice(4))
    assert values.shape == (16, 48, 48)
    assert (values.amin() >= 0) & (values.amax() <= 1)
    assert (values.std((1, 2)) > 0.01).all()


def test_any_of_gives_every_choice_its_share() -> None:
    choices: list[Pattern] = [lambda points, dice, k=k: torch.full(points.shape[:-1], k) for k in (1.0, 2.0, 3.0)]  # type: ignore[misc]
    drawn = any_of(choices, grid(10, 4), Dice(0))[:, 0, 0]
    assert sorted(drawn.tolist()) == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert drawn.tolist() != sorted(drawn.tolist())
    assert sorted(any_of(choices, grid(2, 4), Dice(0))[:, 0, 0].tolist()) == [1, 2]


def test_every_shape_and_texture_can_be_left_out() -> None:
    assert scenes(partial(any_of, SHAPES), 1, 16, Dice(0), Nuisance()).shape == (1, 3, 16, 16)


def test_distances_are_negative_inside_and_0_on_the_outline() -> None:
    x = torch.tensor([0.0, 0.5, 1.0])
    zero = torch.zeros(3)
    assert ellipse(x, zero, 0.5, 0.5).tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert box(x, zero, 0.5, 0.5).tolist() == pytest.approx([-0.5, 0.0, 0.5])


def test_hsv_is_that_of_the_colour_circle() -> None:
    hue = torch.tensor([0.0, 1 / 3, 2 / 3, 1 / 6])
    found = hsv(hue, torch.ones(4), torch.ones(4))
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
