"""Where a backbone's weights come from, whatever library it is of."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.data import expand
from tl_trainer.data.transforms import Preprocessing
from tl_trainer.errors import CheckpointError, SettingError
from tl_trainer.ground.wording import unknown

log = logging.getLogger(__name__)

UNDER = ("state_dict", "model", "model_state_dict")  # where training scripts keep the weights among other things
# How to choose a preprocessing for a file that says nothing of its own.
ANOTHER = "set transforms.size, or transforms.eval and transforms.train, for another preprocessing"

# What to do without a network.
OWN = "The weights of efficientnet_lite0 come with tl-trainer."


@dataclass(frozen=True)
class Weights:
    """Resolved weights: what they are called, the preprocessing they want, and how to get their file.

    fetch: gives the file, downloaded if need be; None for random weights. classifier: whether they have a usable one.
    here: whether nothing has to be downloaded. saved: the checkpoint of a run whose weights they are. source: the
    backbone that they are of, where that is another than the one which takes them.
    """

    name: str
    preset: Preprocessing
    fetch: Callable[[], Path] | None = None
    classifier: bool = True
    here: Callable[[], bool] = lambda: True
    saved: Checkpoint | None = None
    source: str | None = None

    @property
    def label(self) -> str:
        """What a checkpoint calls them."""
        return self.name if self.source is None else f"{self.name} of {self.source}"

    @property
    def pretrained(self) -> bool:
        """Whether the model is built for pretrained weights."""
        return self.fetch is not None and (self.saved is None or self.saved.backbone_pretrained)

    def without_download(self, backbone: str) -> Weights:
        """The same weights where they are here, else random ones in their shape, which is said."""
        if self.here():
            return self
        log.info("the weights %s of %s are not here yet; the dry run uses random ones", self.name, backbone)
        return replace(self, fetch=None)

    def at(self, size: int | None) -> Weights:
        """The same weights for images of that side, the resize in proportion; None leaves both as they are."""
        if size is None:
            return self
        if self.preset.steps is not None:
            raise SettingError(
                "transforms.size", f"{self.name} has a preprocessing of its own, without a size that can be changed; "
                "leave size out, or set transforms.eval and transforms.train"
            )  # fmt: skip
        preset, factor = self.preset, size / self.preset.crop
        scaled = (
            [round(side * factor) for side in preset.resize]
            if isinstance(preset.resize, list)
            else round(preset.resize * factor)
        )
        return replace(self, preset=replace(preset, resize=scaled, crop=size))


def given_file(weights: str) -> Path | None:
    """The file that `model.weights` names; None where it is no path. SettingError for a path without a file."""
    path = expand(weights)
    if path.is_file():
        return path
    if path.is_dir() and "/" in weights:
        raise SettingError("model.weights", f"no best.pth in {weights}; give the directory of a run, or a file")
    if "/" in weights or path.suffix:
        raise SettingError("model.weights", f"no such file: {weights}")
    return None


def in_file(weights: str, path: Path, preset: Preprocessing, said: str, *, classifier: bool = True) -> Weights:
    """The weights in a file that the user gives. What is `said` of their preprocessing is logged when it is loaded."""

    def fetch() -> Path:
        log.info("%s: %s", path, said)
        return path

    return Weights(weights, preset, fetch, classifier)


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict that a file holds, or has under one of UNDER, which is said. Raises CheckpointError."""
    for key in UNDER:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            log.info("%s: the weights are taken from its %r", path, key)
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path}: not a state_dict (names and tensors); make one with torch.save(model.state_dict(), 'weights.pth')"
        )
    return content


def unknown_weights(backbone: str, weights: str, valid: Iterable[str]) -> SettingError:
    """The complaint about weights that a backbone does not have."""
    return SettingError("model.weights", unknown(f"weights of {backbone}", weights, valid))


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: the identity of frozen weights."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_versions(state: dict[str, Tensor], model: nn.Module, versions: Any = None) -> dict[str, Tensor]:
    """The state dict with the modules' versions that `load_state_dict` reads: those given, else those of `model`.

    A plain dict carries none, and MNASNet refuses a state dict without.
    """
    found: Any = OrderedDict(state)
    found._metadata = versions or model.state_dict()._metadata  # type: ignore[attr-defined]
    return found  # type: ignore[no-any-return]
