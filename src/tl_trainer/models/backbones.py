"""Every backbone by name: torchvision's, timm's as `timm/<name>`, and the one that comes with tl-trainer."""

from __future__ import annotations

from importlib import metadata

import torch
from torch import Tensor

from tl_trainer.errors import SettingError
from tl_trainer.ground.wording import unknown
from tl_trainer.models import embedded, timm_models, torchvision_models
from tl_trainer.models.chain import Backbone
from tl_trainer.models.weights import Weights

BACKBONES = torchvision_models.NAMES | {embedded.NAME}  # and every `timm/<name>`

LISTED = "tl-train --list backbones"


def resolve_weights(backbone: str, weights: str, size: int | None = None) -> Weights:
    """The weights called so of the backbone called so, for images of `size` px (None: of what they were trained with).

    Raises SettingError for names that there are not.
    """
    if backbone == embedded.NAME:
        return embedded.resolve(weights).at(size)
    if backbone.startswith(timm_models.PREFIX):
        return timm_models.resolve(backbone, weights).at(size)
    if backbone not in BACKBONES:
        raise SettingError(
            "model.backbone",
            unknown("backbone", backbone, BACKBONES, LISTED) + "; those of timm are called timm/<name>",
        )
    return torchvision_models.resolve(backbone, weights).at(size)


def build_backbone(name: str, weights: Weights, tap: str, seed: int) -> Backbone:
    """The backbone with its weights: downloaded or cached, from a file, or random from `seed`.

    Raises SettingError for a tap or weights that do not fit, InputError where weights cannot be fetched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == embedded.NAME:
            return embedded.build(weights, tap)
        if name.startswith(timm_models.PREFIX):
            return timm_models.build(name, weights, tap)
        return torchvision_models.build(name, weights, tap)


def empty_backbone(name: str, pretrained: bool, tap: str, size: int | None = None) -> Backbone:
    """The backbone without memory for its weights, to be filled by `load_state_dict(..., assign=True)`.

    size: the side of the images that it was built for, where that makes a difference.
    """
    if name == embedded.NAME or name.startswith(timm_models.PREFIX):
        return timm_models.empty(embedded.MODEL if name == embedded.NAME else name, tap, size)
    return torchvision_models.empty(name, pretrained, tap, size)


def feature_size(backbone: Backbone, name: str, weights: Weights, tap: str, image: Tensor) -> int:
    """The number of features at the tap for images such as this one (3, H, W), found without computing any."""
    if backbone.features is not None:
        return backbone.features
    empty, (height, width) = empty_backbone(name, weights.fetch is not None, tap, weights.preset.crop), image.shape[-2:]
    place = next(empty.parameters()).device
    with torch.no_grad():
        return int(empty(torch.empty(1, 3, height, width, device=place)).shape[1])


def library_versions(name: str) -> list[str]:
    """The versions, besides torchvision's, that the backbone's features depend on."""
    return [metadata.version("timm")] if name == embedded.NAME or name.startswith(timm_models.PREFIX) else []
