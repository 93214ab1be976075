"""timm's models: their names, weights, preprocessing, and the download from the Hugging Face hub.

timm takes two seconds to import, so it is imported when one of its models is used. Its models and their weights are
described in its own documentation (huggingface.co/docs/timm).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_trainer.data.transforms import Preprocessing
from tl_trainer.errors import CheckpointError, DownloadError, InputError, SettingError
from tl_trainer.ground.progress import bars_shown
from tl_trainer.ground.sealed import load_plain
from tl_trainer.ground.wording import unknown
from tl_trainer.models.chain import WHOLE, Backbone, chain, pools, tapped
from tl_trainer.models.weights import ANOTHER, OWN, Weights, given_file, in_file, tensors_of, unknown_weights

log = logging.getLogger(__name__)

PREFIX = "timm/"
FILE = "model.safetensors"  # what timm calls the weights in each repository of the hub


def check(name: str) -> None:
    """Raise SettingError for a model, or a tag of it, that timm does not have."""
    import timm

    model, _, tag = name.removeprefix(PREFIX).partition(".")
    if not timm.is_model(model):
        known = [PREFIX + other for other in timm.list_models()]
        raise SettingError("model.backbone", unknown("backbone", name, known, "tl-train --list backbones 'timm/*'"))
    if tag and tag not in _tags(model):
        raise SettingError("model.backbone", unknown(f"weights of {PREFIX}{model}", tag, _tags(model)))


def resolve(name: str, weights: str) -> Weights:
    """DEFAULT (the model's own or those of its tag), a tag with or without @revision, none, or a file."""
    check(name)
    model, _, tag = name.removeprefix(PREFIX).partition(".")
    if weights == "none":
        return Weights("none", _preset(_config(model, tag)))
    wanted, _, revision = weights.partition("@")
    if wanted == "DEFAULT" or wanted in _tags(model):
        config = _config(model, tag if wanted == "DEFAULT" else wanted)
        if not config.has_weights:
            raise SettingError(
                "model.weights", f"timm has no pretrained weights for {name}; set model.weights to a file, or to none"
            )
        fetch, here = partial(_fetch, config, revision or None), partial(cached, config)
        return Weights(config.tag or "DEFAULT", _preset(config), fetch, here=here)
    if path := given_file(weights):
        config = _config(model, tag)
        own = f"{PREFIX}{model}.{config.tag}" if config.tag else f"{PREFIX}{model}"
        return in_file(weights, path, _preset(config), f"preprocessed as {own}; {ANOTHER}")
    raise unknown_weights(name, weights, ["DEFAULT", *_tags(model), "none", "a file's path"])


def build(name: str, weights: Weights, tap: str) -> Backbone:
    """The backbone, filled from the weights' file, or random."""
    if weights.fetch is None:
        return up_to_tap(construct(name, weights.preset.crop), name, tap)
    path = weights.fetch()
    state = read_state(path)
    model = _loaded(name, state, path, weights.preset.crop)
    backbone = up_to_tap(model, name, tap)
    if path.name == FILE and path.parent.parent.name == "snapshots":  # the hub's cache: snapshots/<commit>/<file>
        backbone.revision = path.parent.name
    return backbone


def empty(name: str, tap: str, size: int | None) -> Backbone:
    """The backbone to be filled by `load_state_dict(..., assign=True)`; without memory for its weights where it can be.

    Some models keep tensors that no state dict has, such as the positions of rotary embeddings: these are made. Raises
    SettingError for what timm does not have: a checkpoint may name anything, and timm would look for it in the hub.
    """
    check(name)
    try:
        with torch.device("meta"):
            model = construct(name, size)
        kept = model.state_dict()
        if all(key in kept for key, _ in model.named_buffers()):
            return up_to_tap(model, name, tap)
    except (NotImplementedError, RuntimeError):  # it computes with tensors while it is built
        pass
    return up_to_tap(construct(name, size), name, tap)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, by name; never runs code from it. Raises CheckpointError."""
    if path.suffix != ".safetensors":
        return tensors_of(load_plain(path), path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from error


def pretrained(pattern: str) -> Iterator[tuple[str, Any]]:
    """The models with weights whose names match, and timm's PretrainedCfg of each of their weights."""
    import timm

    for full in timm.list_pretrained(pattern if "." in pattern else f"{pattern}.*"):
        model, _, tag = full.partition(".")
        yield PREFIX + model, _config(model, tag)


def cached(config: Any) -> bool:
    """Whether the weights' file is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    return bool(config.hf_hub_id) and isinstance(try_to_load_from_cache(config.hf_hub_id, FILE), str)


def _tags(model: str) -> list[str]:
    import timm

    return [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]


def _config(model: str, tag: str) -> Any:
    """timm's PretrainedCfg: where the weights are, and the preprocessing they want."""
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(f"{model}.{tag}" if tag else model)


def _preset(config: Any) -> Preprocessing:
    """As timm's own evaluation transform: the short side resized to size / crop_pct, the middle cut out.

    Raises SettingError for weights that want anything else.
    """
    if config.crop_mode == "border":
        raise SettingError(
            "model.weights",
            f"{config.architecture} was trained on images padded to a square (timm's crop_mode border), which "
            "tl-trainer does not do; take other weights",
        )
    size = config.input_size[-1]
    scaled = int(size / (config.crop_pct or 0.875))
    return Preprocessing(
        resize=[scaled, scaled] if config.crop_mode == "squash" else scaled,
        crop=size,
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation=config.interpolation,
    )


def construct(name: str, size: int | None, **pretrained: Any) -> nn.Module:
    """The model for images of that side; SettingError where it takes none but its own."""
    import timm

    model, _, tag = name.removeprefix(PREFIX).partition(".")
    config = _config(model, tag)
    if size is not None and config.fixed_input_size and size != config.input_size[-1]:
        pretrained["img_size"] = size  # position embeddings are resampled when weights are loaded
    try:
        network: nn.Module = timm.create_model(name.removeprefix(PREFIX), **pretrained)
    except (TypeError, AssertionError, ValueError) as error:
        if "img_size" not in pretrained:
            raise
        raise SettingError(
            "transforms.size", f"{name} takes images of {config.input_size[-1]} px only, not {size}: {error}"
        ) from error
    return network.eval()


def _loaded(name: str, state: dict[str, Tensor], path: Path, size: int) -> nn.Module:
    """The model with these tensors, every one of which must have its place."""
    try:
        return construct(name, size, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:  # whatever its own conversion trips over
        wanted = construct(name, size).state_dict()
        raise CheckpointError(
            f"{path}: not weights of {name}: it has {_described(state)}, the model {_described(wanted)}"
        ) from error


def _described(state: dict[str, Tensor]) -> str:
    strange = [f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:2]]
    return f"{len(state)} tensors ({', '.join(strange)}, ...)"


def up_to_tap(model: nn.Module, name: str, tap: str) -> Backbone:
    """The backbone up to the tap; `penultimate` is what timm calls pre-logits, the model without its classifier."""
    if tap != "logits":
        model.reset_classifier(0)  # type: ignore[operator]
    if tap == "pooled" and not any(map(pools, chain(model))):  # it pools in its head, which is left without classifier
        tap = "penultimate"
    return tapped(model, name, WHOLE if tap == "penultimate" else tap)


def _fetch(config: Any, revision: str | None) -> Path:
    """The weights' file in the hub's cache, downloaded if need be; the hub's own variables (HF_HUB_OFFLINE) count."""
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if not config.hf_hub_id:
        raise InputError(
            f"the weights of {config.architecture} are not on the hub; fetch {config.url or 'them'} and set "
            "model.weights to the file"
        )
    (enable_progress_bars if bars_shown() else disable_progress_bars)()
    try:
        return Path(huggingface_hub.hf_hub_download(config.hf_hub_id, FILE, revision=revision))
    except Exception as error:  # the hub's own, or those of its HTTP library, which is another one in each version
        address = huggingface_hub.hf_hub_url(config.hf_hub_id, FILE, revision=revision)
        reason = str(error).strip().splitlines()[0]
        raise DownloadError(
            f"{address} cannot be downloaded: {reason}\n"
            f"Fetch that file on another machine, and set model.weights to it. {OWN}"
        ) from error
