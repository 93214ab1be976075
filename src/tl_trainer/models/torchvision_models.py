"""torchvision's classification models: their names, weights, preprocessing, and the download of a weights file."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import warnings
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights, list_models

from tl_trainer.data.transforms import Preprocessing
from tl_trainer.errors import CheckpointError, DownloadError, InputError, SettingError
from tl_trainer.ground.downloads import stall_timeout
from tl_trainer.ground.files import content_hash
from tl_trainer.ground.locks import sole_use
from tl_trainer.ground.progress import bars_shown
from tl_trainer.ground.sealed import load_plain
from tl_trainer.ground.wording import unknown
from tl_trainer.models.chain import Backbone, tapped
from tl_trainer.models.weights import (
    ANOTHER,
    OWN,
    Weights,
    given_file,
    in_file,
    tensors_of,
    unknown_weights,
    with_versions,
)

log = logging.getLogger(__name__)

NAMES = frozenset(list_models(module=torchvision.models))


def weights_names() -> list[str]:
    """Every name of weights, of any model."""
    return sorted({"none", *itertools.chain.from_iterable(get_model_weights(name).__members__ for name in NAMES)})


def resolve(name: str, weights: str) -> Weights:
    """The weights called so; SettingError where the model has none of that name."""
    members = get_model_weights(name).__members__
    default = _preset(members["DEFAULT"])
    if weights == "none":
        return Weights("none", default)
    if weights in members:
        member = members[weights]
        usable = bool(member.meta["categories"])
        return Weights(member.name, _preset(member), lambda: fetch(member), usable, lambda: _place(member).exists())
    if path := given_file(weights):
        if known := _recognised(path, name):
            preset, said = _preset(known), f"the weights {known.name} of {name}, with their preprocessing"
            return in_file(weights, path, preset, said, classifier=bool(known.meta["categories"]))
        like = f"{name} {members['DEFAULT'].name}"
        said = f"these are not torchvision's own weights, so images are preprocessed as for {like}; {ANOTHER}"
        return in_file(weights, path, default, said)
    raise unknown_weights(name, weights, [*members, "none", "a file's path"])


def _recognised(path: Path, name: str) -> WeightsEnum | None:
    """The weights of the model whose file this is, by its SHA-256, whatever it is called."""
    found, digest = path.stat(), ""
    for member in get_model_weights(name):
        if start := _named_hash(Path(member.url)):
            digest = digest or _hash(path.absolute(), found.st_size, found.st_mtime_ns)
            if digest.startswith(start):
                return member
    return None


@functools.lru_cache(maxsize=8)
def _hash(path: Path, size: int, modified: int) -> str:
    """Of a file that is still the same: weights are resolved several times before they are loaded."""
    return content_hash(path)


def build(name: str, weights: Weights, tap: str) -> Backbone:
    """The backbone, filled from the weights' file, or random."""
    if weights.fetch is None:
        return tapped(_construct(name, False, weights.preset.crop), name, tap)
    if not weights.classifier and tap != "pooled":
        raise SettingError(
            "model.tap", f"{name} {weights.name} has no usable classifier; set model.tap: pooled, not {tap!r}"
        )
    backbone = empty(name, True, tap, weights.preset.crop)
    _load(backbone.model, weights.fetch(), name)
    return backbone


def empty(name: str, pretrained: bool, tap: str, size: int | None) -> Backbone:
    """The backbone without memory for its weights. SettingError for what is no model of NAMES."""
    if name not in NAMES:
        raise SettingError("model.backbone", unknown("backbone", name, NAMES, "tl-train --list backbones"))
    try:
        with torch.device("meta"):
            model = _construct(name, pretrained, size)
    except NotImplementedError:  # the RegNets compute their widths with tensors, which meta tensors cannot
        model = _construct(name, pretrained, size)
    return tapped(model, name, tap)


def _preset(member: WeightsEnum) -> Preprocessing:
    preset = member.transforms()
    return Preprocessing(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def fetch(weights: WeightsEnum) -> Path:
    """The file of the weights: in torch's cache, downloaded with a progress bar if need be.

    Its SHA-256 must begin as its name says, whenever it is used. Of several processes one downloads.
    """
    url, path = weights.url, _place(weights)
    folder = path.parent
    if _intact(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with sole_use(folder, wait=True), stall_timeout():
            if _intact(path):  # by now
                return path
            if path.exists():
                log.warning("%s does not have the hash in its name; downloading it again", path)
            log.info("downloading %s", url)
            torch.hub.download_url_to_file(url, str(path), _named_hash(path), progress=bars_shown())
    except RuntimeError as error:  # torch.hub's word for a wrong hash
        raise InputError(f"{url}: the download is damaged ({error}); try again") from error
    except (OSError, HTTPException) as error:
        raise DownloadError(
            f"{url} cannot be downloaded: {getattr(error, 'reason', None) or error}\n"
            f"Fetch that file on another machine and put it at {path}, or set model.weights to a state_dict file. {OWN}"
        ) from error
    return path


def _place(weights: WeightsEnum) -> Path:
    """Where torch keeps the file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name


def _intact(path: Path) -> bool:
    return path.exists() and content_hash(path).startswith(_named_hash(path))


def _named_hash(path: Path) -> str:
    """The first digits of the SHA-256 that torchvision writes into its files' names, or "" where there are none."""
    match = re.search(r"-([a-f0-9]{8,})\.", path.name)
    return match.group(1) if match else ""


def _construct(name: str, pretrained: bool, size: int | None) -> nn.Module:
    quirks: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers only matter for training from scratch, and their weights expect the input of
        # another framework.
        quirks = {"aux_logits": False, "init_weights": not pretrained, "transform_input": pretrained}
    elif name.startswith("vit_") and size is not None:
        quirks = {"image_size": size}  # as many position embeddings; some weights are for 384 or 518 px
    model: nn.Module = torchvision.models.get_model(name, weights=None, **quirks)
    return model.eval()


def _load(model: nn.Module, path: Path, name: str) -> None:
    loaded = tensors_of(load_plain(path), path)
    state = {_modern(key.removeprefix("module.")): value for key, value in loaded.items()}
    wanted = model.state_dict()
    if missing := [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]:
        raise CheckpointError(
            f"{path}: not weights of {name}: {len(missing)} tensors are missing, the first {missing[0]}"
        )
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            raise CheckpointError(f"{path}: {key} is {tuple(state[key].shape)}, {name} has {tuple(value.shape)}")
    for key in wanted.keys() - state.keys():  # files older than torch 0.4.1 do not count batches
        state[key] = torch.tensor(0)
    known = {key: state[key].to(value.dtype) for key, value in wanted.items()}
    versions = _versions(loaded, path)  # in a file of DataParallel's, behind those of the wrapper
    versions = {re.sub(r"^module(\.|$)", "", module): version for module, version in versions.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, that such a file works as before
            model.load_state_dict(with_versions(known, model, versions), assign=True)
    except RuntimeError as error:  # MNASNet's, which builds its first layout for a file that says it has it
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{path}: the tensors of {name} are not in the layout of the version that the file says: {reason}"
        ) from error


def _versions(loaded: dict[str, Tensor], path: Path) -> dict[str, dict[str, Any]]:
    """What torch keeps of each module beside its tensors; {} where the file is a plain dict."""
    versions: Any = getattr(loaded, "_metadata", {})
    if not isinstance(versions, dict) or not all(
        isinstance(module, str) and isinstance(kept, dict) and isinstance(kept.get("version", 0), (int, type(None)))
        for module, kept in versions.items()
    ):
        raise CheckpointError(f"{path}: damaged: _metadata does not hold the versions of its modules")
    return versions


def _modern(key: str) -> str:
    """DenseNet's files still name `norm.1` what has been `norm1` since module names lost their dots."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key)
