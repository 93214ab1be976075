"""New stages after the tap of a pretrained backbone, which train with the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation

from tl_trainer.config.schema import ExtraSection
from tl_trainer.errors import SettingError
from tl_trainer.models.chain import Backbone


def extend(backbone: Backbone, extra: Sequence[ExtraSection], shape: Sequence[int]) -> None:
    """Put the stages behind those of the backbone. shape: that of its last output, (N, C, H, W)."""
    if extra:
        channels, stages = shape[1], list[nn.Module]()
        with next(backbone.parameters()).device:  # which may be one without memory
            for item in extra:
                stage, channels = _stage(item, channels)
                stages.append(stage)
        backbone.append(nn.Sequential(*stages).eval())


def spatial_shape(backbone: Backbone, size: int) -> torch.Size:
    """The shape of the backbone's last output for a square image; SettingError where it has no height and width."""
    x = torch.empty(1, 3, size, size, device=next(backbone.parameters()).device)
    with torch.no_grad():
        for stage in backbone.stages:
            x = stage.module(x)
    last = backbone.stages[-1]
    if last.module is backbone.model or x.dim() != 4 or x.shape[2] != x.shape[3]:  # or channels come last
        raise SettingError(
            "model.extra",
            f"its stages need features of shape (channels, height, width), and those after {last.name} are "
            f"{tuple(x.shape[1:])}; set model.tap to an earlier stage, such as layer3",
        )
    return x.shape


def _stage(item: ExtraSection, channels: int) -> tuple[nn.Module, int]:
    """What the item describes, for so many channels, and how many it gives."""
    if item.conv is not None:
        conv = item.conv
        return Conv2dNormActivation(channels, conv.channels, conv.kernel, conv.stride), conv.channels
    if item.residual is not None:
        width, stride = item.residual.channels, item.residual.stride
        shortcut = None  # the image itself, where that has the shape of what it is added to
        if stride != 1 or width != channels:
            shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        return BasicBlock(channels, width, stride, shortcut), width
    if item.norm is not None:
        return nn.BatchNorm2d(channels), channels
    return (nn.AdaptiveMaxPool2d if item.pool == "max" else nn.AdaptiveAvgPool2d)(1), channels
