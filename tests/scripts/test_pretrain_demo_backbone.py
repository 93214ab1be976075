"""scripts/pretrain_demo_backbone.py in miniature: it learns, it repeats itself, and its parts do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import load_script
from tl_trainer.data.drawing import Dice
from tl_trainer.ground.files import content_hash
from tl_trainer.models.backbones import build_backbone

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_demo_backbone.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for run, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(run)
        words = ["--seed", str(seed), "--steps", "3", "--batch", "8", "--threads", "1", "--output", str(folder)]
        if run == 0:
            said = subprocess.run([sys.executable, SCRIPT, *words], check=True, capture_output=True, text=True).stdout
        else:  # in this process, which saves the seconds that importing torch takes
            monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
            assert script.main() == 0
            said = capsys.readouterr().out
        (file,) = folder.iterdir()
        assert f"SHA-256 {content_hash(file)}" in said
        assert re.fullmatch(rf"tiny_resnet-{content_hash(file)[:8]}\.pth", file.name)
        build_backbone("tiny_resnet", file, "penultimate", seed=0)
        files.append(file.name)
    assert files[0] == files[1] != files[2]


def test_it_learns(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The colours, that is: telling pairs apart takes hundreds of batches to begin with."""
    script.pretrain(seed=0, steps=41, batch=16, reuse=4)
    losses = [float(value) for value in re.findall(r"colours ([\d.]+)", capsys.readouterr().err)]
    assert losses[-1] < losses[0] / 5


def test_a_pair_is_one_object_drawn_twice(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = script.pairs(20, Dice(0))
    assert drawn.shape == (20, 2, 3, script.SCENE, script.SCENE)
    assert torch.equal(script.pairs(20, Dice(0)), drawn)
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    seeds: list[tuple[float, float]] = []

    def scenes(shape: object, count: int, size: int, look: Dice, view: Dice) -> torch.Tensor:
        seeds.append((look.between(0, 1).item(), view.between(0, 1).item()))
        return torch.zeros(count, 3, size, size, dtype=torch.uint8)

    monkeypatch.setattr(script, "scenes", scenes)
    script.pairs(20, Dice(0))
    (first_look, first_view), (second_look, second_view) = seeds
    assert first_look == second_look
    assert first_view != second_view


@pytest.mark.parametrize("name", ["polygon", "parts", "stroke", "branches", "fractal"])
def test_a_shape_fills_part_of_its_square_and_varies(script: ModuleType, name: str) -> None:
    shape = getattr(script, name)
    assert shape in script.SHAPES
    axis = torch.linspace(-1.5, 1.5, 48)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).expand(64, -1, -1, -1)
    inside = (shape(points, Dice(3)) < 0).float()
    share = inside.mean((1, 2)) * 3**2  # of a square of side 1
    assert 0.05 < share.median() < 3
    assert (inside[0] != inside[1:]).any()


def test_every_shape_can_be_left_out(script: ModuleType) -> None:
    assert script.pairs(1, Dice(0)).shape == (1, 2, 3, script.SCENE, script.SCENE)


def test_views_keep_their_range_and_their_colours_without_the_dice(script: ModuleType) -> None:
    class Unloaded(Dice):
        def between(self, low: float, high: float, *shape: int) -> torch.Tensor:
            return torch.full(shape, (low + high) / 2)  # the middle: nothing changed

    pictures = torch.randint(0, 256, (4, 3, 80, 80), dtype=torch.uint8)
    views = script.cropped(pictures, 64, Dice(0))
    assert views.shape == (4, 3, 64, 64)
    torch.testing.assert_close(script.recoloured(views, Unloaded(0)), views)
    changed = script.recoloured(views, Dice(0))
    assert (changed.amin() >= 0) & (changed.amax() <= 1)
    assert not torch.equal(changed, views)


def test_the_loss_is_that_of_telling_the_partner_among_all_others(script: ModuleType) -> None:
    """Against the definition, term by term."""
    projected = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    terms = []
    for row in range(6):
        others = [torch.exp(projected[row] @ projected[other] / 0.2) for other in range(6) if other != row]
        partner = torch.exp(projected[row] @ projected[(row + 3) % 6] / 0.2)
        terms.append(-torch.log(partner / sum(others)))
    torch.testing.assert_close(script.info_nce(projected), torch.stack(terms).mean())
