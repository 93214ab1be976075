"""torchvision's models: each is built with every entry of its weights, from tensors of the shapes in that file."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torchvision
from torch import Tensor, nn
from torch.nn.modules import activation
from torchvision.models import WeightsEnum, get_model_weights

from tl_trainer.models import torchvision_models
from tl_trainer.models.backbones import build_backbone, empty_backbone, resolve_weights


@pytest.fixture(autouse=True)
def _without_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number matters here, and memory that is not written to costs nothing."""
    for name in ("normal_", "trunc_normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_"):
        for module in (nn.init, activation):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda tensor, *_, **__: tensor)


def state_in_file(name: str, weights: WeightsEnum, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Tensors without memory as they are in the file of the weights: what torchvision's own builder wants to load."""
    found: dict[str, Tensor] = {}

    def note(model: nn.Module, state: Any, *_: Any, **__: Any) -> None:
        found.update({key: value.to("meta") for key, value in model.state_dict().items()})

    with monkeypatch.context() as patched:
        patched.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: {})
        patched.setattr(nn.Module, "load_state_dict", note)
        torchvision.models.get_model(name, weights=weights)
    assert found
    return found


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", sorted(torchvision_models.NAMES))
def test_every_entry_of_the_weights_has_its_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, and in the backbone of the same name and size that a checkpoint fills."""
    monkeypatch.setattr(torchvision_models, "empty", functools.cache(torchvision_models.empty))
    monkeypatch.setattr(torchvision_models, "fetch", lambda weights: weights)
    monkeypatch.setattr(torchvision_models, "load_plain", lambda weights: state_in_file(name, weights, monkeypatch))
    for entry in get_model_weights(name):
        weights = resolve_weights(name, entry.name)
        built = build_backbone(name, weights, "pooled", 0)
        kept = empty_backbone(name, True, "pooled", weights.preset.crop)
        assert shapes(kept.model) == shapes(built.model) != {}
