"""Frozen stages are bit for bit the same before and after training, wherever training starts, in every family.

The networks are torchvision's and timm's own classes with as few blocks and channels as these allow. Weight decay
changes what has no gradient too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models import VisionTransformer, create_model
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import AlexNet, ResNet
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import VGG, make_layers

from tl_trainer.config.training import OptimizerSection
from tl_trainer.models.chain import WHOLE, Backbone, tapped
from tl_trainer.models.classifier import Classifier
from tl_trainer.optim import build_optimizer, parameter_groups


def efficientnet_v2() -> nn.Module:
    blocks = [FusedMBConvConfig(1, 3, 1, 8, 8, 1), FusedMBConvConfig(4, 3, 2, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2)]
    return EfficientNet(blocks, dropout=0.2, last_channel=16)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, int]] = {  # with the tap and the side of the images
    "AlexNet": (AlexNet, "features", 63),
    "VGG16": (lambda: VGG(make_layers([8, 8, "M", 8, 8, "M"])), "features", 8),
    "ResNet": (lambda: ResNet(BasicBlock, [2, 1, 1, 1]), "avgpool", 32),
    "EfficientNetV2": (efficientnet_v2, "penultimate", 32),
    "timm's ViT": (lambda: VisionTransformer(32, 16, embed_dim=16, depth=2, num_heads=2, num_classes=0), WHOLE, 32),
    "timm's ConvNeXt": (lambda: create_model("test_convnext", num_classes=0), WHOLE, 32),
}


def backbone_of(family: str) -> Backbone:
    """Up to the tap, so that no memory goes to what is behind it; the numbers are noise."""
    make, tap, _ = FAMILIES[family]
    with torch.device("meta"):
        model = make()
    backbone = tapped(model, family, tap).to_empty(device="cpu")
    torch.manual_seed(1)
    for key, value in backbone.state_dict().items():
        if value.is_floating_point():
            value.fill_(1) if "running_var" in key else value.normal_(std=0.1)
    return backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_no_stage_that_is_frozen_changes(family: str) -> None:
    backbone, side = backbone_of(family), FAMILIES[family][2]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features = backbone(images).shape[1]
    starts = [stage.name for stage in backbone.stages if [*stage.module.parameters()]]
    assert len(starts) > 3
    section = OptimizerSection(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.5)
    for start in [*starts, "head"]:
        classifier = Classifier(backbone, nn.Linear(features, 2), start)
        frozen = {key: value.clone() for key, value in classifier.frozen_state().items()}
        trained = {key: value.clone() for key, value in classifier.trained_state().items()}
        optimizer = build_optimizer(parameter_groups(classifier.layers(), section), section)
        cross_entropy(classifier.train()(images), torch.tensor([0, 1])).backward()
        optimizer.step()
        after = classifier.state_dict()
        assert frozen.keys() | trained.keys() == after.keys()
        assert all(torch.equal(after[key], value) for key, value in frozen.items()), start
        first = backbone.stages[len(classifier.frozen)] if classifier.trained else None
        own = [key for key in trained if first is None or first.owns(key.removeprefix("backbone.model."))]
        assert own and not all(torch.equal(after[key], trained[key]) for key in own), start
