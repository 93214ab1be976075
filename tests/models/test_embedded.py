"""The backbone that comes with the package: its weights, its chain, and that pretraining gave it something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import get_model, get_model_weights

from tl_trainer.data.demo import SHAPES, TAME
from tl_trainer.data.drawing import Dice, scenes
from tl_trainer.errors import InputError, SettingError
from tl_trainer.ground.files import content_hash
from tl_trainer.models.backbones import build_backbone, fetch, preprocessing, resolve_weights, weights_names
from tl_trainer.models.embedded import TinyResNet, TinyResNet_Weights

WEIGHTS = TinyResNet_Weights.DRAWINGS_V1


def test_it_is_one_of_torchvisions_models() -> None:
    assert isinstance(get_model("tiny_resnet"), TinyResNet)
    assert get_model_weights("tiny_resnet") is TinyResNet_Weights
    assert resolve_weights("tiny_resnet", "DEFAULT") is resolve_weights("tiny_resnet", "DRAWINGS_V1") is WEIGHTS
    assert sum(weight.numel() for weight in TinyResNet().parameters()) == WEIGHTS.meta["num_params"]
    assert "DRAWINGS_V1" in weights_names()


def test_its_weights_are_a_small_half_precision_file_named_after_its_hash() -> None:
    file = fetch(WEIGHTS)
    assert file.stat().st_size < 1.5e6
    assert file.name == f"tiny_resnet-{content_hash(file)[:8]}.pth"
    assert list(file.parent.glob("*.pth")) == [file]
    state = torch.load(file, weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    assert all(value.isfinite().all() for value in state.values())


def test_a_damaged_package_is_not_taken_for_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / fetch(WEIGHTS).name
    monkeypatch.setattr(WEIGHTS.value, "url", damaged.as_uri())
    with pytest.raises(InputError, match="missing or damaged; install tl-trainer again"):
        fetch(WEIGHTS)
    damaged.write_bytes(b"other weights")
    with pytest.raises(InputError, match="missing or damaged"):
        fetch(WEIGHTS)


@pytest.mark.parametrize(("tap", "features"), [("penultimate", 320), ("pooled", 320), ("layer3", 320 * 6 * 6)])
def test_the_chain_is_its_own_forward(tap: str, features: int) -> None:
    images = torch.rand(2, 3, 96, 96)
    backbone = build_backbone("tiny_resnet", WEIGHTS, tap, seed=0).eval()
    found = backbone(images)
    assert found.shape == (2, features)
    if tap != "layer3":
        model = TinyResNet().eval()
        model.load_state_dict(torch.load(fetch(WEIGHTS), weights_only=True))
        torch.testing.assert_close(found, model(images))


def test_it_has_no_logits() -> None:
    with pytest.raises(SettingError, match=r"tiny_resnet has no classifier, so no logits; set model\.tap"):
        build_backbone("tiny_resnet", WEIGHTS, "logits", seed=0)


def test_random_weights_have_the_same_preprocessing() -> None:
    assert preprocessing("tiny_resnet", None) == preprocessing("tiny_resnet", WEIGHTS)


def test_its_features_tell_things_apart_that_random_ones_do_not() -> None:
    """Nearest class mean on the demo's things, 16 of each to learn from and 16 to tell."""
    settings = preprocessing("tiny_resnet", WEIGHTS)
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.mean, settings.std))
    images = torch.cat([scenes(shape, 32, 96, Dice(7), Dice(8), TAME) for shape in SHAPES.values()])
    right = {}
    for weights in (WEIGHTS, None):
        backbone = build_backbone("tiny_resnet", weights, "penultimate", seed=0).eval()
        with torch.inference_mode():
            features = backbone((images / 255 - mean) / std)
        features = ((features - features.mean(0)) / features.std(0)).view(len(SHAPES), 32, -1)
        means = features[:, :16].mean(1)
        nearest = torch.cdist(features[:, 16:].flatten(0, 1), means).argmin(1).view(len(SHAPES), 16)
        right[weights] = (nearest == torch.arange(len(SHAPES))[:, None]).float().mean().item()
    assert right[WEIGHTS] > right[None] + 0.15
