"""A torchvision classification model and its weights as a chain of named stages.

Everything else is an index into that chain: where features are tapped, where training starts, what can be computed
once. Stage names are torchvision's own dotted module names (`features.10`, `layer4.2`, `classifier.4`); a name that
covers several stages (`layer4`) means all of them.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.request import url2pathname

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models import WeightsEnum, get_model_weights, list_models

from tl_trainer.data.transforms import Preprocessing
from tl_trainer.errors import CheckpointError, InputError, SettingError
from tl_trainer.ground.downloads import stall_timeout
from tl_trainer.ground.files import content_hash
from tl_trainer.ground.locks import sole_use
from tl_trainer.ground.progress import bars_shown
from tl_trainer.ground.sealed import load_plain
from tl_trainer.ground.wording import unknown
from tl_trainer.models.embedded import tiny_resnet

log = logging.getLogger(__name__)

BACKBONES = frozenset(list_models(module=torchvision.models)) | {tiny_resnet.__name__}
Weights: TypeAlias = WeightsEnum | Path | None  # one of torchvision's, a state_dict file, or random
TAPS = ("penultimate", "pooled", "logits")

_POOLING = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d)


class Stage(NamedTuple):
    """One link of the chain: torchvision's dotted name and what it does."""

    name: str
    module: nn.Module


class Function(nn.Module):
    """A stage that torchvision's forward writes as a function or a method: flatten, mean, relu."""

    def __init__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.kwargs)


class Backbone(nn.Module):
    """The chain up to the tap. `model` is the torchvision model that owns the weights, without the stages after it.

    The state dict's keys are torchvision's own with the prefix `model.`.
    """

    def __init__(self, model: nn.Module, stages: list[Stage], features: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.features = features  # the size of the output, where it does not depend on that of the images
        self.stages = stages  # a plain list: the modules are registered once, in `model`

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, features): the tapped output, flattened."""
        for stage in self.stages:
            x = stage.module(x)
        return x.flatten(1)

    def index(self, name: str) -> int:
        """The index of the first stage that `name` covers; SettingError for `model.trainable` where there is none."""
        covered = _covered(self.stages, name)
        if not covered:
            raise SettingError("model.trainable", unknown("stage", name, ["head", "all", *_stage_names(self.stages)]))
        return covered[0]


def weights_names() -> list[str]:
    """Every name that `model.weights` takes, of any backbone."""
    return sorted({"none", *itertools.chain.from_iterable(get_model_weights(name).__members__ for name in BACKBONES)})


def resolve_weights(backbone: str, weights: str) -> Weights:
    """`weights` as torchvision's enum member, as a file's path, or None for random. Raises SettingError."""
    if backbone not in BACKBONES:
        raise SettingError("model.backbone", unknown("backbone", backbone, BACKBONES))
    if weights == "none":
        return None
    members = get_model_weights(backbone).__members__
    if weights in members:
        return members[weights]
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if "/" in weights or path.suffix:
        raise SettingError("model.weights", f"no such file: {weights}")
    raise SettingError("model.weights", unknown(f"weights of {backbone}", weights, [*members, "none", "a file's path"]))


def preprocessing(backbone: str, weights: Weights) -> Preprocessing:
    """The sizes, mean and std of the weights; for random ones or a file, those of the backbone's default weights."""
    member = weights if isinstance(weights, WeightsEnum) else get_model_weights(backbone).__members__["DEFAULT"]
    preset = member.transforms()
    return Preprocessing(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def build_backbone(name: str, weights: Weights, tap: str, seed: int) -> Backbone:
    """The backbone with its weights: downloaded or cached, from a file, or random from `seed`.

    Raises SettingError for a tap or weights that do not fit, InputError where weights cannot be fetched.
    """
    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _tapped(_construct(name, pretrained=False), name, tap)
    if isinstance(weights, WeightsEnum) and weights.meta["categories"] is None and tap != "pooled":
        raise SettingError(
            "model.tap", f"{name} {weights.name} has no usable classifier; set model.tap: pooled, not {tap!r}"
        )
    backbone = empty_backbone(name, True, tap)
    path = fetch(weights) if isinstance(weights, WeightsEnum) else weights
    _load(backbone.model, path, name)
    return backbone


def empty_backbone(name: str, pretrained: bool, tap: str) -> Backbone:
    """The backbone without memory for its weights, to be filled by `load_state_dict(..., assign=True)`."""
    try:
        with torch.device("meta"):
            model = _construct(name, pretrained)
    except NotImplementedError:  # the RegNets compute their widths with tensors, which meta tensors cannot
        model = _construct(name, pretrained)
    return _tapped(model, name, tap)


def feature_size(backbone: Backbone, name: str, pretrained: bool, tap: str, height: int, width: int) -> int:
    """The number of features at the tap for images of that size, found without computing any."""
    if backbone.features is not None:
        return backbone.features
    empty = empty_backbone(name, pretrained, tap)
    place = next(empty.parameters()).device
    with torch.no_grad():
        return int(empty(torch.empty(1, 3, height, width, device=place)).shape[1])


def fetch(weights: WeightsEnum) -> Path:
    """The file of the weights: in the package, or in torch's cache, downloaded with a progress bar if need be.

    Its SHA-256 must begin as its name says, whenever it is used. Of several processes one downloads.
    """
    url = weights.url
    if url.startswith("file:"):
        path = Path(url2pathname(url.removeprefix("file:")))
        if not _intact(path):
            raise InputError(f"{path}, which comes with tl-trainer, is missing or damaged; install tl-trainer again")
        return path
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(url).name
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
        raise InputError(
            f"{url} cannot be downloaded: {getattr(error, 'reason', None) or error}\n"
            f"Fetch that file on another machine and put it at {path}\n"
            "or set model.weights to a state_dict file that is here. The backbone model.backbone=tiny_resnet "
            "model.weights=DEFAULT comes with tl-trainer."
        ) from error
    return path


def _intact(path: Path) -> bool:
    return path.exists() and content_hash(path).startswith(_named_hash(path))


def _named_hash(path: Path) -> str:
    """The first digits of the SHA-256 that torchvision writes into its files' names, or "" where there are none."""
    match = re.search(r"-([a-f0-9]{8,})\.", path.name)
    return match.group(1) if match else ""


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: the identity of frozen weights."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _construct(name: str, pretrained: bool) -> nn.Module:
    # The two inceptions have auxiliary classifiers that only matter for training from scratch, and their weights
    # expect the input of another framework.
    quirks = {"aux_logits": False, "init_weights": not pretrained, "transform_input": pretrained}
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, **(quirks if name in ("googlenet", "inception_v3") else {})
    )
    return model.eval()


def _tapped(model: nn.Module, name: str, tap: str) -> Backbone:
    stages = _chain(model)
    end = _tap_index(stages, name, tap)
    if stages[0].module is model and end == len(stages):
        return Backbone(model, stages[:1])  # not a chain, so its last Linear is inside the body unless it is cut off
    for stage in stages[end:]:
        if not isinstance(stage.module, Function):
            parent, _, leaf = stage.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity())
    following = [stage.module for stage in stages[end:] if isinstance(stage.module, nn.Linear)]
    return Backbone(model, stages[:end], following[0].in_features if tap in TAPS and following else None)


def _chain(model: nn.Module) -> list[Stage]:
    """The model's forward as a chain, read off torch.fx's trace of its top level; else the body and its last Linear."""
    stages: list[Stage] = []
    try:
        nodes = list(_TopLevel().trace(model).nodes)
    except (fx.proxy.TraceError, TypeError, RuntimeError):  # a forward whose control flow depends on its input
        return _body_and_linear(model)
    for before, node in itertools.pairwise(nodes):
        if node.op == "output":
            break
        if node.all_input_nodes != [before] or node.args[0] is not before:
            return _body_and_linear(model)
        if node.op == "call_module":
            stages += _flattened(str(node.target), model.get_submodule(str(node.target)))
        elif node.op == "call_method":
            stages.append(
                Stage(str(node.target), Function(getattr(Tensor, str(node.target)), *node.args[1:], **node.kwargs))
            )
        else:
            function: Any = node.target
            stages.append(Stage(function.__name__, Function(function, *node.args[1:], **node.kwargs)))
    return stages


class _TopLevel(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _flattened(name: str, module: nn.Module) -> list[Stage]:
    if type(module).forward is nn.Sequential.forward:
        return [stage for child, inner in module.named_children() for stage in _flattened(f"{name}.{child}", inner)]
    return [Stage(name, module)]


def _body_and_linear(model: nn.Module) -> list[Stage]:
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [Stage("body", model), Stage(*linear[-1])]


def _tap_index(stages: list[Stage], backbone: str, tap: str) -> int:
    """How many stages are before the tap."""
    if tap == "logits":
        if isinstance(stages[-1].module, nn.Identity):
            raise SettingError("model.tap", f"{backbone} has no classifier, so no logits; set model.tap: penultimate")
        return len(stages)
    if tap == "penultimate":
        # An Identity is the empty place for a classifier, as in tiny_resnet.
        linear = [index for index, stage in enumerate(stages) if isinstance(stage.module, (nn.Linear, nn.Identity))]
        if not linear:
            raise SettingError("model.tap", f"{backbone} has no Linear layer; set model.tap to pooled or a stage name")
        return linear[-1]
    if tap == "pooled":
        pooling = [index for index, stage in enumerate(stages) if _pools(stage)]
        return pooling[-1] + 1 if pooling else _tap_index(stages, backbone, "penultimate")
    covered = _covered(stages, tap)
    if not covered:
        raise SettingError("model.tap", unknown("tap", tap, [*TAPS, *_stage_names(stages)]))
    return covered[-1] + 1


def _pools(stage: Stage) -> bool:
    return isinstance(stage.module, _POOLING) or stage.name in ("mean", "adaptive_avg_pool2d")


def _covered(stages: list[Stage], name: str) -> list[int]:
    return [i for i, stage in enumerate(stages) if stage.name == name or stage.name.startswith(f"{name}.")]


def _stage_names(stages: list[Stage]) -> list[str]:
    """Names to choose from: features, features.0, avgpool; the top levels alone where those would not fit on a line."""
    top, both = (
        sorted({".".join(stage.name.split(".")[:level]) for stage in stages for level in levels})
        for levels in ((1,), (1, 2))
    )
    return both if len(", ".join(both)) < 350 else top


def _load(model: nn.Module, path: Path, name: str) -> None:
    loaded = load_plain(path)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: not a state_dict (names and tensors) of {name}")
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
    model.load_state_dict(with_versions(known, model, getattr(loaded, "_metadata", None)), assign=True)


def with_versions(state: dict[str, Tensor], model: nn.Module, versions: Any = None) -> dict[str, Tensor]:
    """The state dict with the modules' versions that `load_state_dict` reads: those given, else those of `model`.

    A plain dict carries none, and MNASNet refuses a state dict without.
    """
    found: Any = OrderedDict(state)
    found._metadata = versions or model.state_dict()._metadata  # type: ignore[attr-defined]
    return found  # type: ignore[no-any-return]


def _modern(key: str) -> str:
    """DenseNet's files still name `norm.1` what has been `norm1` since module names lost their dots."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key)
