"""Names in YAML -> torchvision v2 pipelines.

A pipeline is kept as plain data with everything spelled out (`[{Resize: {size: 232}}, ..., {Normalize: {mean: ...}}]`),
so that a checkpoint can carry it and prediction cannot preprocess differently from training.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from tl_trainer.data.images import Size
from tl_trainer.errors import InputError, SettingError
from tl_trainer.ground.wording import unknown

Step = tuple[str, Any]
PlainSteps = list[dict[str, Any]]

# They need boxes, clips or labels, return several images, or take code; ToTensor is deprecated and built here.
_UNUSABLE = {
    "Transform", "Lambda", "CutMix", "MixUp", "FiveCrop", "TenCrop", "UniformTemporalSubsample", "ToPILImage",
    "ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat", "RandomIoUCrop", "SanitizeBoundingBoxes",
    "SanitizeKeyPoints", "SetClampingMode", "ToTensor",
}  # fmt: skip
TRANSFORMS: dict[str, type[v2.Transform]] = {
    name: value
    for name, value in vars(v2).items()
    if inspect.isclass(value) and issubclass(value, v2.Transform) and name not in _UNUSABLE
}
_DETERMINISTIC = {
    "CenterCrop", "ConvertImageDtype", "Grayscale", "Identity", "LinearTransformation", "Normalize", "Pad",
    "PILToTensor", "RGB", "Resize", "ToDtype", "ToImage", "ToPureTensor", "CropOfFive", "Mirror",
}  # fmt: skip
_CONTAINERS = {"Compose", "RandomApply", "RandomChoice", "RandomOrder"}
_TO_TENSOR = {"ToImage", "PILToTensor"}
_TO_FLOAT = {"ToDtype", "ConvertImageDtype"}
_NEED_FLOAT = {"Normalize", "GaussianNoise", "LinearTransformation"}
_NEED_TENSOR = _NEED_FLOAT | _TO_FLOAT | {"RandomErasing", "ToPureTensor"}
_FLOAT: Step = ("ToDtype", {"dtype": "float32", "scale": True})
# What ToTensor, the familiar name of torchvision's first transforms, stands for.
_TENSOR: list[Step] = [("ToImage", None), _FLOAT]


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone's weights were trained with; sizes in pixels, mean and std of channels in [0, 1]."""

    resize: int | list[int]
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    steps: PlainSteps | None = None  # of evaluation, where they are others than the default with these values


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block torch draws from `seed` on the processor; after it from where it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Pipeline:
    """A transforms pipeline in two halves: `image` per picture, `batch` for what is cheaper on a whole batch.

    image: PIL RGB -> tensor (3, H, W), uint8 wherever only the float conversion and Normalize are left for `batch`.
    batch: (N, 3, H, W) -> float32 (N, 3, H, W), on whatever device the batch is on.
    """

    def __init__(self, steps: PlainSteps, key: str) -> None:
        self.steps = steps
        named = [_named(item) for item in steps]
        built = [_build(name, arguments, f"{key}[{index}]") for index, (name, arguments) in enumerate(named)]
        # Only the tail that treats every pixel alike can wait for the batch.
        split = len(named) - 2 if [name for name, _ in named[-2:]] == ["ToDtype", "Normalize"] else len(named)
        self.image: Callable[[Image.Image], Tensor] = v2.Compose(built[:split])
        self.batch: Callable[[Tensor], Tensor] = v2.Compose(built[split:]) if split < len(named) else v2.Identity()
        self.mean, self.std = _normalisation(named)
        self.deterministic = all(name in _DETERMINISTIC for name, _ in named)
        self.transforms = [leaf for transform in built for leaf in _leaves(transform)]

    def sizes(self, size: Size) -> Iterator[Size]:
        """The size after each resize before the first crop, of an image of `size` and at most.

        Resizing the short side to 256 makes 1,536,000 x 256 pixels of 6000 x 1.
        """
        for transform in self.transforms:
            if len(getattr(transform, "size", None) or ()) == 2:  # from here on every image is of this size
                return
            size = _resized(transform, *size)
            yield size

    def draw(self, picture: Image.Image, seed: int) -> Tensor:
        """`image` with the randomness of `seed`; torch's generator is left as it was, on every device."""
        if self.deterministic:
            return self.image(picture)
        with seeded(seed):
            return self.image(picture)

    def denormalise(self, batch: Tensor) -> Tensor:
        """The batch as it was before Normalize, clipped to [0, 1], for pictures. (N, 3, H, W) float."""
        mean, std = (torch.tensor(values, device=batch.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (batch * std + mean).clamp(0, 1)


def _leaves(transform: v2.Transform) -> Iterator[v2.Transform]:
    """The transform, or all those in a container: chance decides which are applied."""
    if not hasattr(transform, "transforms"):
        yield transform
        return
    for inner in transform.transforms:
        yield from _leaves(inner)


def _resized(transform: v2.Transform, width: float, height: float) -> Size:
    """The largest size that the transform may give an image of that size."""
    short, long = min(width, height), max(width, height)
    if isinstance(transform, v2.RandomRotation) and transform.expand:
        turn = math.radians(min(45, max(map(abs, transform.degrees))))  # by 45 degrees it becomes largest
        sine, cosine = math.sin(turn), math.cos(turn)
        return width * cosine + height * sine, width * sine + height * cosine
    if isinstance(transform, v2.RandomZoomOut):
        factor = max(transform.side_range)
        return width * factor, height * factor
    if isinstance(transform, v2.RandomShortestSize):
        side, limit = max(transform.min_size), transform.max_size
    elif isinstance(transform, v2.RandomResize):
        side, limit = transform.max_size, None
    elif isinstance(transform, v2.Resize) and len(transform.size or [0]) == 1:
        side, limit = (transform.size or [math.inf])[0], transform.max_size
    else:
        return width, height
    scale = min(side / short, limit / long) if limit else side / short
    return width * scale, height * scale


def spell_out(items: str | Sequence[Any], preprocessing: Preprocessing, *, train: bool) -> PlainSteps:
    """The configured list (or `default`) with sizes, tensor conversion, dtype and Normalize added where not given."""
    steps = _default(preprocessing, train) if isinstance(items, str) else _flat(items)
    _insert_if_missing(steps, ("ToImage", None), _TO_TENSOR, before=_NEED_TENSOR)
    _insert_if_missing(steps, _FLOAT, _TO_FLOAT, before=_NEED_FLOAT)
    normalise = ("Normalize", {"mean": list(preprocessing.mean), "std": list(preprocessing.std)})
    _insert_if_missing(steps, normalise, {"Normalize"}, before=set())
    return [{name: arguments} for name, arguments in steps]


def preprocessing_of(steps: PlainSteps, crop: int) -> Preprocessing:
    """The reverse of `spell_out`: the preprocessing whose default for evaluation has these steps.

    crop: the side that the network was built for.
    """
    named = dict(map(_named, steps))
    resize, centre, normalise = (named.get(name) for name in ("Resize", "CenterCrop", "Normalize"))
    if all(isinstance(arguments, dict) for arguments in (resize, centre, normalise)):
        assert resize is not None and centre is not None and normalise is not None
        found = Preprocessing(
            resize.get("size"), centre.get("size"), tuple(normalise["mean"]), tuple(normalise["std"]),
            resize.get("interpolation", "bilinear"),
        )  # fmt: skip
        if spell_out("default", found, train=False) == steps:
            return found
    mean, std = _normalisation([*map(_named, steps)])
    return Preprocessing(crop, crop, tuple(mean), tuple(std), "bilinear", steps)


def tta_pipelines(steps: PlainSteps, tta: str | None) -> list[Pipeline]:
    """The pipelines over whose probabilities test-time augmentation takes the mean, each of them deterministic.

    flip: the image and its mirror image. fivecrop: the corners and the centre of what CenterCrop cuts from. tencrop:
    those and their mirror images. None: the pipeline alone. Raises InputError where there is no CenterCrop.
    """
    assert tta in (None, "flip", "fivecrop", "tencrop"), tta
    variants = [steps]
    if tta in ("fivecrop", "tencrop"):
        names = [name for name, _ in map(_named, steps)]
        if "CenterCrop" not in names:
            raise InputError(
                f"--tta {tta} needs a CenterCrop in the preprocessing, which is {', '.join(names)}; use --tta flip"
            )
        place = names.index("CenterCrop")
        size = steps[place]["CenterCrop"]
        size = size["size"] if isinstance(size, dict) else size
        crops = [{"CropOfFive": {"size": size, "index": index}} for index in range(5)]
        variants = [[*steps[:place], crop, *steps[place + 1 :]] for crop in crops]
    if tta in ("flip", "tencrop"):
        variants += [_mirrored(variant) for variant in variants]
    return [Pipeline(variant, _VIEW) for variant in variants]


class CropOfFive(v2.FiveCrop):  # type: ignore[misc]
    """One of FiveCrop's: top left, top right, bottom left, bottom right, centre. Pads like CenterCrop where it must."""

    def __init__(self, size: Any, index: int) -> None:
        super().__init__(size)
        self.index = index

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = v2.functional.get_size(inpt)
        room = [max(height, self.size[0]), max(width, self.size[1])]
        return super().transform(v2.functional.center_crop(inpt, room), params)[self.index]


class Mirror(v2.Transform):  # type: ignore[misc]
    """The mirror image, always."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.horizontal_flip(inpt)


# What only test-time augmentation uses, in pipelines under this key.
_VIEW = "view"
_VIEWS: dict[str, type[v2.Transform]] = {"CropOfFive": CropOfFive, "Mirror": Mirror}


def _mirrored(steps: PlainSteps) -> PlainSteps:
    """The steps with a flip before the image becomes a tensor."""
    place = next(index for index, (name, _) in enumerate(map(_named, steps)) if name in _TO_TENSOR)
    return [*steps[:place], {"Mirror": None}, *steps[place:]]


def check(items: str | Sequence[Any], key: str) -> None:
    """Raise SettingError for the first item of a configured list that cannot be built."""
    for index, item in enumerate([] if isinstance(items, str) else items):
        name, arguments = _named(item, f"{key}[{index}]")
        _build(name, arguments, f"{key}[{index}]")


def _flat(items: Sequence[Any]) -> list[Step]:
    """The steps with each Compose replaced by what is in it, so that what is given is seen and not added again."""
    steps: list[Step] = []
    for name, arguments in map(_named, items):
        if name == "ToTensor":
            steps += _TENSOR
        elif name == "Compose":
            steps += _flat(arguments["transforms"] if isinstance(arguments, dict) else arguments)
        else:
            steps.append((name, arguments))
    return steps


def _default(preprocessing: Preprocessing, train: bool) -> list[Step]:
    interpolation = preprocessing.interpolation
    if train:
        crop = {"size": _side(preprocessing), "interpolation": interpolation}
        return [("RandomResizedCrop", crop), ("RandomHorizontalFlip", None)]
    if preprocessing.steps is not None:
        return _flat(preprocessing.steps)
    resize = {"size": preprocessing.resize, "interpolation": interpolation}
    return [("Resize", resize), ("CenterCrop", {"size": preprocessing.crop})]


def _side(preprocessing: Preprocessing) -> int | list[int]:
    """The side of the network's input, or its height and width where the steps of evaluation give another one."""
    if preprocessing.steps is None:
        return preprocessing.crop
    return [*Pipeline(preprocessing.steps, "transforms.eval").image(Image.new("RGB", (640, 480))).shape[-2:]]


def _insert_if_missing(steps: list[Step], step: Step, present: set[str], before: set[str]) -> None:
    names = [name for name, _ in steps]
    if not present.intersection(names):
        steps.insert(next((i for i, name in enumerate(names) if name in before), len(steps)), step)


def _named(item: Any, key: str = "transforms") -> Step:
    if isinstance(item, str):
        return item, None
    if isinstance(item, dict) and len(item) == 1:
        return next(iter(item.items()))
    raise SettingError(key, f"write a name or {{name: arguments}}, not {item!r}")


def _build(name: str, arguments: Any, key: str) -> v2.Transform:
    if name == "ToTensor":
        if arguments is not None:
            raise SettingError(key, f"ToTensor takes no arguments, not {arguments!r}")
        return v2.Compose([_build(*step, key) for step in _TENSOR])
    transforms = {**TRANSFORMS, **_VIEWS} if key.startswith(_VIEW) else TRANSFORMS
    if name not in transforms:
        raise SettingError(key, unknown("transform", name, [*TRANSFORMS, "ToTensor"]))
    cls = transforms[name]
    try:
        positional, named = _arguments(cls, name, arguments, key)
        inspect.signature(cls).bind(*positional, **named)
        if name == "ToDtype" and not named.get("scale"):
            raise ValueError("add scale: true, or the pixels stay in 0-255 instead of 0-1")
        return cls(*positional, **named)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        parameters = ", ".join(inspect.signature(cls).parameters) or "none"
        raise SettingError(key, f"{name} does not take {arguments!r}: {error} (arguments: {parameters})") from None


def _arguments(cls: type[v2.Transform], name: str, arguments: Any, key: str) -> tuple[list[Any], dict[str, Any]]:
    """YAML's scalar, list or mapping as the call's positional and named arguments.

    A list of one or two numbers is the first argument where that takes a sequence (`CenterCrop: [224, 200]`,
    `RandomRotation: [-45, 45]`); any other list is the positional arguments (`ColorJitter: [0.2, 0.1, 0.1, 0.1]`).
    """
    if arguments is None:
        return [], {}
    if name in _CONTAINERS:
        options = dict(arguments) if isinstance(arguments, dict) else {"transforms": arguments}
        inner = options.get("transforms", [])
        if not isinstance(inner, list):
            raise TypeError("write the transforms as a list")
        return [], {**options, "transforms": [_build(*_named(item, key), key) for item in inner]}
    if isinstance(arguments, dict):
        return [], {parameter: _value(parameter, value) for parameter, value in arguments.items()}
    first = next(iter(inspect.signature(cls).parameters.values()), None)
    if first is None:
        raise TypeError("it takes none")
    if not isinstance(arguments, list):
        return [_value(first.name, arguments)], {}
    numbers = all(isinstance(value, (int, float)) for value in arguments)
    if numbers and len(arguments) <= 2 and "Sequence" in str(first.annotation):
        return [arguments], {}
    return arguments, {}


def _value(parameter: str, value: Any) -> Any:
    if parameter == "interpolation":
        return InterpolationMode(value)
    if parameter == "dtype":
        dtype = getattr(torch, str(value), None)
        if dtype is not torch.float32:
            raise ValueError(f"dtype is float32, not {value!r}")
        return dtype
    return value


def _normalisation(named: list[Step]) -> tuple[list[float], list[float]]:
    for name, arguments in reversed(named):
        if name == "Normalize":
            return (
                (arguments["mean"], arguments["std"]) if isinstance(arguments, dict) else (arguments[0], arguments[1])
            )
    return [0.0] * 3, [1.0] * 3
