"""A classifier from its section of the configuration: with a new head, as a checkpoint has it, or empty."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.schema import ModelSection
from tl_trainer.errors import CheckpointError
from tl_trainer.models.backbones import build_backbone, empty_backbone, feature_size, output_size, resolve_weights
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.extra import extend, spatial_shape
from tl_trainer.models.heads import new_head
from tl_trainer.models.weights import Weights, state_hash

log = logging.getLogger(__name__)


def new_classifier(
    model: ModelSection, weights: Weights, classes: int, image: Tensor, seed: int, *, freeze_batchnorm: bool
) -> tuple[Classifier, int]:
    """With these weights and a new head, and how many features that takes from such an image (3, H, W)."""
    backbone = build_backbone(model.backbone, weights, model.tap, seed)
    torch.manual_seed(seed)
    if model.extra:
        empty = empty_backbone(model.backbone, weights.pretrained, model.tap, weights.preset.crop)
        shape = spatial_shape(empty, weights.preset.crop)
        extend(backbone, model.extra, shape)
        extend(empty, model.extra, shape)
        size = output_size(empty, image)
    else:
        size = feature_size(backbone, model.backbone, weights, model.tap, image)
    head = new_head(size, classes, model.head)
    classifier = Classifier(backbone, head, model.trainable, freeze_batchnorm=freeze_batchnorm)
    random = [stage.name for stage in classifier.frozen if any(map(stage.owns, backbone.random))]
    if random:
        log.warning("frozen stages are random; set model.trainable to the first of them: %s", random[0])
    return classifier, size


def empty_classifier(model: ModelSection, size: int, trainable: str, *, freeze_batchnorm: bool) -> Classifier:
    """Without weights and head, to ask about its stages. size: that of the images."""
    backbone = empty_backbone(model.backbone, model.weights != "none", model.tap, size)
    extend(backbone, model.extra, spatial_shape(backbone, size) if model.extra else ())
    return Classifier(backbone, nn.Identity(), trainable, freeze_batchnorm=freeze_batchnorm)


def saved_classifier(saved: Checkpoint, model: ModelSection, size: int | None, seed: int) -> Classifier:
    """With the weights of the checkpoint. size: that of the images, as configured."""
    weights = saved.backbone["weights"]
    with torch.device("meta"):
        head = new_head(saved.features, len(saved.classes), model.head)
    if saved.frozen is not None:
        backbone = empty_backbone(model.backbone, saved.backbone_pretrained, model.tap, saved.backbone.get("size"))
    else:
        name, source = weights.removesuffix(f" of {model.weights_from}"), model.weights_from
        backbone = build_backbone(model.backbone, resolve_weights(model.backbone, name, size, source), model.tap, seed)
    if model.extra:
        extend(backbone, model.extra, spatial_shape(backbone, saved.backbone.get("size", 224)))
    classifier = Classifier(backbone, head, model.trainable)
    if saved.frozen is None and state_hash(classifier.frozen_state()) != saved.backbone["sha256"]:
        raise CheckpointError(
            f"the weights of {model.backbone} are not those it was trained with; end its run with --resume, "
            "which writes them into best.pth"
        )
    classifier.restore(saved.trained, saved.frozen)
    return classifier
