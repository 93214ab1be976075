"""model.weights_from: what fits of a smaller backbone's weights goes into a deeper one of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from conftest import draw_split
from tl_trainer.assembly import set_up
from tl_trainer.config.load import load
from tl_trainer.errors import ConfigError, SettingError
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.weights import state_hash

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A file of resnet18's weights, and its tensors: each number of the first is 1, of the next 2 and so on."""
    with torch.device("meta"):
        shapes = torchvision.models.resnet18(weights=None).state_dict()
    state = {
        key: torch.full(value.shape, number, dtype=value.dtype) for number, (key, value) in enumerate(shapes.items(), 1)
    }
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(state, path)
    return path, state


def test_what_fits_is_taken_counted_and_listed_and_the_rest_is_random(
    small: tuple[Path, State], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="tl_trainer")
    path, given = small
    weights = resolve_weights("resnet34", str(path), source="resnet18")
    backbone = build_backbone("resnet34", weights, "penultimate", 7)
    found = backbone.model.state_dict()
    alone = build_backbone("resnet34", resolve_weights("resnet34", "none"), "penultimate", 7).model.state_dict()
    taken = {key for key, value in found.items() if key in given and given[key].shape == value.shape}
    assert all(torch.equal(value, given[key] if key in taken else alone[key]) for key, value in found.items())
    assert backbone.random == found.keys() - taken
    assert "layer3.0.conv1.weight" in taken and "layer3.2.conv1.weight" in backbone.random
    assert (
        f"resnet34: {len(taken)} of {len(found)} tensors are those of {path} of resnet18, the others random"
        in caplog.text
    )
    assert "taken: conv1.weight, bn1.weight, " in caplog.text and "random: layer1.2.conv1.weight, " in caplog.text
    other = build_backbone("resnet34", weights, "penultimate", 8)
    assert len({state_hash(of) for of in (found, other.model.state_dict(), alone)}) == 3
    assert weights.preset == resolve_weights("resnet18", str(path)).preset


def test_a_run_says_whose_weights_it_has_and_which_stage_stays_random(
    small: tuple[Path, State], caplog: pytest.LogCaptureFixture
) -> None:
    draw_split(Path("colours", "train"), 2)
    draw_split(Path("colours", "val"), 1, size=41)
    words: dict[str, Any] = {
        "model.backbone": "resnet34", "model.weights": str(small[0]), "model.weights_from": "resnet18",
        "model.tap": "layer1", "data.root": "colours", "transforms.size": 32, "transforms.train": "eval",
    }  # fmt: skip
    setup = set_up(load(None, words.items()))
    assert setup.parts.backbone["weights"] == f"{small[0]} of resnet18"
    assert "frozen stages are random; set model.trainable to the first of them: layer1.2" in caplog.text
    caplog.clear()
    set_up(load(None, {**words, "model.trainable": "layer1.2"}.items()))
    assert "random" not in "".join(record.message for record in caplog.records if record.levelname == "WARNING")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"weights_from": "alexnet"}, r"nothing of alexnet fits resnet34: the first tensor of one is features\.0\.wei"
         r"ght \(64, 3, 11, 11\), of the other conv1\.weight \(64, 3, 7, 7\); take one of its family"),
        ({"weights": "none", "weights_from": "resnet18"}, "weights_from: model.weights is none, so resnet18 has"),
        ({"weights_from": "resnet19"}, "model.weights_from: unknown backbone 'resnet19'; did you mean 'resnet18'"),
        ({"weights": "NOPE", "weights_from": "resnet18"}, "model.weights: unknown weights of resnet18 'NOPE'"),
    ],
)  # fmt: skip
def test_what_gives_nothing_is_refused_before_an_image_is_read(words: dict[str, str], said: str) -> None:
    draw_split(Path("colours", "train"), 2)
    Path("colours/train/red/00.jpg").write_bytes(b"never read")
    given = [("data.root", "colours"), ("model.backbone", "resnet34"), *((f"model.{k}", v) for k, v in words.items())]
    with pytest.raises((ConfigError, SettingError), match=said):
        set_up(load(None, given))
