"""Every backbone by name: torchvision's, timm's as `timm/<name>`, and the one that comes with tl-trainer."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from tl_trainer import checkpoint
from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.data import expand
from tl_trainer.data.transforms import Pipeline, preprocessing_of
from tl_trainer.errors import CheckpointError, SettingError
from tl_trainer.ground.sealed import check_seal
from tl_trainer.ground.wording import unknown
from tl_trainer.models import embedded, timm_models, torchvision_models
from tl_trainer.models.chain import TAPS, Backbone
from tl_trainer.models.weights import Weights, with_versions
from tl_trainer.runs import BEST

log = logging.getLogger(__name__)

BACKBONES = torchvision_models.NAMES | {embedded.NAME}  # and every `timm/<name>`

LISTED = "tl-train --list backbones"

State = dict[str, Tensor]


def resolve_weights(backbone: str, weights: str, size: int | None = None, source: str | None = None) -> Weights:
    """The weights called so of the backbone called so, for images of `size` px (None: of what they were trained with).

    source: another backbone of its family that they are of. Raises SettingError for names that there are not,
    CheckpointError for a damaged checkpoint.
    """
    if source is not None:
        resolve_weights(backbone, "none")
        return _of_another(source, weights, size)
    if path := _run_checkpoint(weights):
        return _of_run(path, backbone).at(size)
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
        if weights.source is not None:
            return _with_what_fits(name, weights, tap, seed)
        if weights.saved is not None:
            backbone = empty_backbone(name, weights.pretrained, tap, weights.preset.crop)
            # Copies, since the file may be replaced while they are used.
            state = {
                key: tensor.clone(memory_format=torch.contiguous_format)
                for key, tensor in _tensors_for(backbone, weights, weights.saved).items()
            }
            backbone.load_state_dict(with_versions(state, backbone), assign=True)
            return backbone
        if name == embedded.NAME:
            return embedded.build(weights, tap)
        if name.startswith(timm_models.PREFIX):
            return timm_models.build(name, weights, tap)
        return torchvision_models.build(name, weights, tap)


def check_tensors(name: str, weights: Weights, tap: str) -> None:
    """Raise SettingError where the weights of a run lack a tensor or have one of another shape, or where nothing of
    another backbone's fits."""
    if weights.source is not None:
        backbone = empty_backbone(name, weights.pretrained, tap, weights.preset.crop)
        given = _kept_tensors(weights.saved) if weights.saved else _empty_source(weights, tap).state_dict()
        _fitting(backbone, given, name, weights.source)
    elif weights.saved is not None:
        _tensors_for(empty_backbone(name, weights.pretrained, tap, weights.preset.crop), weights, weights.saved)


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
    return output_size(empty_backbone(name, weights.pretrained, tap, weights.preset.crop), image)


def output_size(empty: Backbone, image: Tensor) -> int:
    """The number of features that a backbone without memory gives of such an image (3, H, W)."""
    (height, width), place = image.shape[-2:], next(empty.parameters()).device
    with torch.no_grad():
        return int(empty(torch.empty(1, 3, height, width, device=place)).shape[1])


def library_versions(name: str) -> list[str]:
    """The versions, besides torchvision's, that the backbone's features depend on."""
    return [metadata.version("timm")] if name == embedded.NAME or name.startswith(timm_models.PREFIX) else []


def _run_checkpoint(weights: str) -> Path | None:
    """The checkpoint of a run that `model.weights` names by itself or by its directory."""
    path = expand(weights)
    path = path / BEST if path.is_dir() else path
    return path if path.is_file() and check_seal(path) else None


def _of_run(path: Path, backbone: str) -> Weights:
    """The weights in a checkpoint, with its preprocessing."""
    saved = checkpoint.load(path)
    name = saved.backbone["name"]
    if name != backbone:
        raise SettingError("model.weights", f"{path} is of {name}, not of {backbone}; set model.backbone: {name}")
    if saved.frozen is None:
        raise SettingError(
            "model.weights", f"the run of {path} has not ended, so its backbone is not in it; end it with --resume"
        )
    side = saved.backbone.get("size")
    if side is None:  # a checkpoint of version 2
        side = resolve_weights(backbone, "none").preset.crop
    try:
        Pipeline(saved.preprocessing, "preprocessing")
        preset = preprocessing_of(saved.preprocessing, side)
    except (SettingError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its preprocessing does not fit this version of torchvision") from error
    return Weights(str(path), preset, lambda: path, saved=saved)


def _tensors_for(backbone: Backbone, weights: Weights, saved: Checkpoint) -> State:
    """What the checkpoint has of the backbone's state dict, which must be all of it."""
    tensors, state = _kept_tensors(saved), State()
    for key, wanted in backbone.state_dict().items():
        tensor = tensors.get(key)
        if tensor is None:
            tap = saved.backbone["tap"]
            raise SettingError("model.tap", f"{weights.name} has no {key}: its tap is {tap}; set model.tap: {tap}")
        if tensor.shape != wanted.shape:
            raise SettingError(
                "model.weights", f"{key} of {weights.name} is {tuple(tensor.shape)}, and {tuple(wanted.shape)} is "
                "needed; leave transforms.size out"
            )  # fmt: skip
        state[key] = tensor
    return state


def _kept_tensors(saved: Checkpoint) -> State:
    """The backbone's tensors in a checkpoint, by their names in its state dict."""
    tensors = {**(saved.frozen or {}), **saved.trained}
    return {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}


def _of_another(source: str, weights: str, size: int | None) -> Weights:
    """The weights of another backbone, for the one that takes of them what fits."""
    try:
        found = resolve_weights(source, weights, size)
    except SettingError as error:
        key = "model.weights_from" if error.key == "model.backbone" else error.key
        raise SettingError(key, error.message.replace("model.backbone", "model.weights_from")) from None
    if found.fetch is None:
        raise SettingError("model.weights_from", f"model.weights is none, so {source} has nothing to give; set DEFAULT")
    return replace(found, source=source)


def _source_tap(weights: Weights, tap: str) -> str:
    """A tap that the source has too, and all the tensors before the one of the backbone that takes its weights."""
    assert weights.source is not None
    if tap in TAPS:
        return tap
    library = weights.source == embedded.NAME or weights.source.startswith(timm_models.PREFIX)
    return "penultimate" if library else "logits" if weights.classifier else "pooled"


def _empty_source(weights: Weights, tap: str) -> Backbone:
    assert weights.source is not None
    return empty_backbone(weights.source, weights.pretrained, _source_tap(weights, tap), weights.preset.crop)


def _fitting(backbone: Backbone, given: State, name: str, source: str) -> State:
    """Of the tensors of another backbone those whose name and shape fit; SettingError where no matrix does."""
    wanted = backbone.state_dict()
    fitting = {key: given[key] for key, value in wanted.items() if key in given and given[key].shape == value.shape}
    if not any(value.dim() > 1 for value in fitting.values()):
        first, own = (
            next(
                f"{key.removeprefix('model.')} {tuple(value.shape)}" for key, value in state.items() if value.dim() > 1
            )
            for state in (given, wanted)
        )
        raise SettingError(
            "model.weights_from",
            f"nothing of {source} fits {name}: the first tensor of one is {first}, of the other {own}; take one of its "
            "family",
        )
    return fitting


def _with_what_fits(name: str, weights: Weights, tap: str, seed: int) -> Backbone:
    """The backbone with the tensors of another that fit, the others random from `seed`."""
    assert weights.source is not None
    backbone = build_backbone(name, replace(weights, fetch=None, saved=None, source=None), tap, seed)
    if weights.saved is not None:
        given = _kept_tensors(weights.saved)
    else:
        other = build_backbone(weights.source, replace(weights, source=None), _source_tap(weights, tap), seed)
        given = other.state_dict()
    fitting, keys = _fitting(backbone, given, name, weights.source), [*backbone.state_dict()]
    backbone.load_state_dict(with_versions(fitting, backbone), strict=False)
    random = [key.removeprefix("model.") for key in keys if key not in fitting]
    backbone.random = frozenset(random)
    log.info("%s: %d of %d tensors are those of %s, the others random", name, len(fitting), len(keys), weights.label)
    log.debug("taken: %s", ", ".join(key.removeprefix("model.") for key in fitting))
    log.debug("random: %s", ", ".join(random) or "none")
    return backbone
