"""model.extra: new stages after a pretrained one, trained with the head and treated like any stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from conftest import draw_split
from tl_trainer import api, checkpoint
from tl_trainer.assembly import restore, set_up
from tl_trainer.config.load import load
from tl_trainer.config.schema import ExtraSection
from tl_trainer.deployed import Deployed
from tl_trainer.errors import ConfigError
from tl_trainer.explain import GradCam
from tl_trainer.models.backbones import build_backbone, empty_backbone, resolve_weights
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.extra import extend, spatial_shape

pytestmark = pytest.mark.usefixtures("without_pictures", "own_logging")

EXTRA: list[dict[str, Any]] = [
    {"norm": "batch"}, {"conv": {"channels": 8, "kernel": 1}}, {"residual": {"channels": 8}},
    {"residual": {"channels": 12, "stride": 2}}, {"pool": "mean"},
]  # fmt: skip
WORDS: dict[str, Any] = {
    "model.backbone": "shufflenet_v2_x0_5", "model.weights": "none", "model.tap": "stage2", "model.extra": EXTRA,
    "transforms.size": 32, "transforms.train": "eval", "data.workers": 0, "data.root": "colours",
    "train.precision": "fp32", "output.tensorboard": False, "output.report": False,
}  # fmt: skip


@pytest.fixture
def data() -> None:
    draw_split(Path("colours", "train"), 3)
    draw_split(Path("colours", "val"), 2, size=41)


def test_they_take_no_memory_where_the_backbone_has_none() -> None:
    backbone = empty_backbone("shufflenet_v2_x0_5", False, "stage2", 32)
    extend(backbone, [ExtraSection.model_validate({"conv": {"channels": 10**9}})], spatial_shape(backbone, 32))
    assert all(parameter.is_meta for parameter in backbone.parameters())


def test_they_compute_what_they_say() -> None:
    backbone = build_backbone("shufflenet_v2_x0_5", resolve_weights("shufflenet_v2_x0_5", "none"), "stage2", 0)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        x = backbone(images).view(2, 48, 4, 4)
        extend(backbone, [ExtraSection.model_validate(item) for item in EXTRA], spatial_shape(backbone, 32))
        stages = {stage.name: stage.module for stage in backbone.stages[-5:]}
        assert [*stages] == [f"extra.{index}" for index in range(5)]
        norm, conv, same, down, _ = (dict(stages[name].named_modules()) for name in stages)
        x = nn.functional.relu(conv["1"](conv["0"](norm[""](x))))
        for block, stride in ((same, 1), (down, 2)):
            y = nn.functional.relu(block["bn1"](block["conv1"](x)))
            assert block["conv1"].stride == (stride, stride)
            y = block["bn2"](block["conv2"](y))
            x = nn.functional.relu(y + (x if stride == 1 else block["downsample"](x)))
        assert x.shape == (2, 12, 2, 2)
        torch.testing.assert_close(backbone(images), x.mean(dim=(2, 3)))
    assert "downsample" not in same


def test_they_train_with_the_head_and_come_back_from_the_checkpoint(data: None) -> None:
    result = api.train(None, **{key.replace(".", "__"): value for key, value in WORDS.items()}, train__epochs=2)
    saved, fresh = checkpoint.load(Path(result["checkpoint"])), set_up(load(None, WORDS.items())).parts
    before = fresh.network.classifier.state_dict()
    assert saved.features == 12 and saved.frozen is not None
    for key, value in saved.frozen.items():
        assert ".extra." not in key and torch.equal(value, before[key])
    moved = {key for key, value in saved.trained.items() if not torch.equal(value, before[key])}
    assert {key.partition(".extra.")[2][0] for key in moved if ".extra." in key} == {"0", "1", "2", "3"}
    parts, images = restore(Path(result["checkpoint"])), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        logits = parts.network.logits(parts.network.features(images))
        deployed = Deployed(None, parts.network.classifier, parts.task.activations(None))
        torch.testing.assert_close(deployed(images), logits.softmax(dim=1))
    cam = GradCam(parts.network.classifier)
    cam.heat(images, torch.tensor([0, 1]))
    assert cam.stages[(cam._cut or 0) - 1] is parts.network.classifier.backbone.stages[-2].module
    model = api.load(result["checkpoint"])
    assert len(model.predict([Image.new("RGB", (40, 40))])[0].predictions) == 3


def test_their_batch_norm_learns_where_that_of_pretrained_stages_is_kept() -> None:
    backbone = build_backbone("shufflenet_v2_x0_5", resolve_weights("shufflenet_v2_x0_5", "none"), "stage2", 0)
    extend(backbone, [ExtraSection(norm="batch")], (1, 48, 4, 4))
    classifier = Classifier(backbone, nn.Linear(48 * 16, 3), "stage2", freeze_batchnorm=True).train()
    norms = {
        name: norm.training and norm.weight.requires_grad
        for name, norm in classifier.named_modules()
        if isinstance(norm, nn.BatchNorm2d)
    }
    assert [name for name, trains in norms.items() if trains] == ["backbone.model.extra.0"]
    assert len(norms) > 10 and classifier.trains_batch_norm


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"model.tap": "penultimate"}, r"model\.extra: its stages need features of shape \(channels, height, wid"
         r"th\), and those after mean are \(1024,\); set model\.tap to an earlier stage, such as layer3"),
        ({"model.backbone": "swin_t", "model.tap": "features.1"}, r"those after features\.1\.1 are \(8, 8, 96\)"),
        ({"model.extra": [{"pool": "mean", "norm": "batch"}]}, r"model\.extra\[0\]: is one of conv, residual, pool"),
        ({"model.extra": [{"conv": {"channels": 3, "kernel": 2}}]}, r"model\.extra\[0\]\.conv\.kernel: should be odd"),
        ({"model.extra": [{"residual": {}}]}, r"model\.extra\[0\]\.residual\.channels: has no value; give one"),
        ({"model.trainable": "extra.1"}, r"model\.trainable: unknown stage 'extra\.1' \(valid: all, conv1, conv1\.0"),
        ({"train.search": "auto"}, "^train.search finds a head alone, and model.extra trains with it; set train.se"),
        ({"train.phases": [{"trainable": "head", "search": "auto"}, {"trainable": "stage2"}]}, "finds a head alone"),
        ({"train.batch_size": 1}, r"train\.batch_size: 1 is too few: BatchNorm trains here"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_an_image_is_read(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        set_up(load(None, {**WORDS, "data.root": "never-read", **words}.items()))
