"""Transforms from YAML: the ways to write arguments, what is added, equality with torchvision's own presets, errors."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torchvision.models import get_weight
from torchvision.transforms import InterpolationMode, v2

from tl_trainer.data.transforms import TRANSFORMS, Pipeline, Preprocessing, check, spell_out, tta_pipelines
from tl_trainer.errors import InputError, SettingError
from tl_trainer.models.backbones import resolve_weights

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PRESET = Preprocessing(resize=48, crop=40, mean=MEAN, std=STD, interpolation="bilinear")
WEIGHTS = {
    "alexnet": "AlexNet_Weights.IMAGENET1K_V1",
    "vgg16": "VGG16_Weights.IMAGENET1K_FEATURES",
    "resnet152": "ResNet152_Weights.IMAGENET1K_V2",
    "efficientnet_v2_s": "EfficientNet_V2_S_Weights.IMAGENET1K_V1",
}


def _picture(width: int = 90, height: int = 70) -> Image.Image:
    """An RGB image in which every pixel differs from its neighbours."""
    generator = torch.Generator().manual_seed(width * height)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _names(items: str | list[Any], *, train: bool = False) -> list[str]:
    return [name for step in spell_out(items, PRESET, train=train) for name in step]


def _apply(items: str | list[Any], picture: Image.Image, preset: Preprocessing = PRESET, seed: int = 0) -> Tensor:
    """(3, H, W): what the network sees of a picture."""
    pipeline = Pipeline(spell_out(items, preset, train=False), "transforms.eval")
    torch.manual_seed(seed)
    batch = pipeline.batch(pipeline.image(picture).unsqueeze(0))
    assert batch.dtype == torch.float32
    return batch[0].as_subclass(Tensor)


def _reference(transform: v2.Transform, picture: Image.Image, seed: int = 0) -> Tensor:
    """The same by torchvision alone: the transform on the picture, then conversion and Normalize."""
    torch.manual_seed(seed)
    image = v2.functional.pil_to_tensor(transform(picture))
    return v2.functional.normalize(v2.functional.to_dtype(image, torch.float32, scale=True), list(MEAN), list(STD))


@pytest.mark.parametrize("size", [(500, 375), (300, 451), (224, 224), (60, 600)])
@pytest.mark.parametrize(("backbone", "weights"), WEIGHTS.items())
def test_default_eval_equals_the_preset_of_the_weights(backbone: str, weights: str, size: tuple[int, int]) -> None:
    picture, member = _picture(*size), get_weight(weights)
    preset = resolve_weights(backbone, member.name).preset
    rounding = 2 * torch.finfo(torch.float32).eps / min(preset.std)  # of a pixel in [0, 1], seen after Normalize
    torch.testing.assert_close(_apply("default", picture, preset), member.transforms()(picture), rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"CenterCrop": 24}, v2.CenterCrop(24)),
        ({"CenterCrop": [20, 30]}, v2.CenterCrop((20, 30))),
        ({"CenterCrop": {"size": [20, 30]}}, v2.CenterCrop((20, 30))),
        ({"Resize": 32}, v2.Resize(32)),
        ({"Resize": [32, 24]}, v2.Resize((32, 24))),
        ({"Resize": [32, "bicubic"]}, v2.Resize(32, InterpolationMode.BICUBIC)),
        ({"Resize": {"size": 32, "interpolation": "nearest"}}, v2.Resize(32, InterpolationMode.NEAREST)),
        ({"Pad": [1, 2]}, v2.Pad([1, 2])),
        ({"Pad": {"padding": [1, 2, 3, 4], "padding_mode": "edge"}}, v2.Pad([1, 2, 3, 4], padding_mode="edge")),
        ({"RandomCrop": 32}, v2.RandomCrop(32)),
        ({"RandomCrop": [32, 32]}, v2.RandomCrop((32, 32))),
        ({"RandomCrop": [32, 4]}, v2.RandomCrop((32, 4))),
        ({"RandomCrop": {"size": 32, "padding": 4}}, v2.RandomCrop(32, padding=4)),
        ({"RandomRotation": 45}, v2.RandomRotation(45)),
        ({"RandomRotation": [-45, 45]}, v2.RandomRotation((-45, 45))),
        ({"RandomRotation": [30, 45]}, v2.RandomRotation((30, 45))),
        ({"RandomHorizontalFlip": 1.0}, v2.RandomHorizontalFlip(1.0)),
        ("RandomVerticalFlip", v2.RandomVerticalFlip()),
        ({"ColorJitter": 0.4}, v2.ColorJitter(0.4)),
        ({"ColorJitter": [0.2, 0.1, 0.1, 0.1]}, v2.ColorJitter(0.2, 0.1, 0.1, 0.1)),
        ({"ColorJitter": {"hue": 0.1, "contrast": [0.5, 0.6]}}, v2.ColorJitter(hue=0.1, contrast=(0.5, 0.6))),
        ({"RandomResizedCrop": [24, [0.5, 1.0]]}, v2.RandomResizedCrop(24, (0.5, 1.0))),
        ({"GaussianBlur": [3, 5]}, v2.GaussianBlur((3, 5))),
        ({"GaussianBlur": [3, [1.0, 2.0]]}, v2.GaussianBlur(3, (1.0, 2.0))),
        ({"RandomApply": [{"CenterCrop": 24}]}, v2.RandomApply([v2.CenterCrop(24)])),
        ({"RandomApply": {"transforms": [{"CenterCrop": 24}], "p": 1.0}}, v2.RandomApply([v2.CenterCrop(24)], 1.0)),
        ({"RandomChoice": [{"CenterCrop": 24}, {"Resize": 8}]}, v2.RandomChoice([v2.CenterCrop(24), v2.Resize(8)])),
        ({"RandomOrder": ["RandomInvert", {"Pad": 3}]}, v2.RandomOrder([v2.RandomInvert(), v2.Pad(3)])),
        ({"Compose": [{"Resize": 32}, {"CenterCrop": 24}]}, v2.Compose([v2.Resize(32), v2.CenterCrop(24)])),
        ({"RandomChoice": [{"Compose": [{"Pad": 1}, {"Resize": [9, 8]}]}]},
         v2.RandomChoice([v2.Compose([v2.Pad(1), v2.Resize((9, 8))])])),
    ],
    ids=str,
)  # fmt: skip
def test_ways_to_write_arguments(item: Any, expected: v2.Transform) -> None:
    """Each item does what the torchvision transform does that a reader of the YAML would expect."""
    check([item], "transforms.train")
    picture = _picture()
    grey_level = 1.01 / 255 / min(STD)  # a convolution (GaussianBlur) may round a pixel to either side
    for seed in range(4):
        found, wanted = _apply([item], picture, seed=seed), _reference(expected, picture, seed)
        torch.testing.assert_close(found, wanted, rtol=0, atol=grey_level)


def test_a_list_of_two_is_a_size_and_not_size_and_padding() -> None:
    assert _apply([{"RandomCrop": [32, 32]}], _picture()).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="larger than"):  # with a padding of 32, this would fit
        _apply([{"RandomCrop": [80, 32]}], _picture())


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("default", "Resize CenterCrop ToImage ToDtype Normalize"),
        ([], "ToImage ToDtype Normalize"),
        ([{"CenterCrop": 8}], "CenterCrop ToImage ToDtype Normalize"),
        ([{"CenterCrop": 8}, "ToTensor"], "CenterCrop ToImage ToDtype Normalize"),
        (["ToTensor", {"CenterCrop": 8}], "ToImage ToDtype CenterCrop Normalize"),
        (["ToImage", {"CenterCrop": 8}], "ToImage CenterCrop ToDtype Normalize"),
        (["PILToTensor", "ConvertImageDtype"], "PILToTensor ConvertImageDtype Normalize"),
        (["RandomErasing"], "ToImage RandomErasing ToDtype Normalize"),
        (["GaussianNoise", {"CenterCrop": 8}], "ToImage ToDtype GaussianNoise CenterCrop Normalize"),
        ([{"Normalize": [[0.5] * 3, [0.5] * 3]}], "ToImage ToDtype Normalize"),
        ([{"Normalize": [[0.5] * 3, [0.5] * 3]}, "RandomErasing"], "ToImage ToDtype Normalize RandomErasing"),
        ([{"ToDtype": {"dtype": "float32", "scale": True}}, {"CenterCrop": 8}],
         "ToImage ToDtype CenterCrop Normalize"),
        ([{"Compose": [{"CenterCrop": 8}, "ToTensor"]}, "RandomErasing"],
         "CenterCrop ToImage ToDtype RandomErasing Normalize"),
        ([{"Compose": {"transforms": [{"Normalize": [[0.5] * 3, [0.5] * 3]}]}}], "ToImage ToDtype Normalize"),
    ],
    ids=str,
)  # fmt: skip
def test_conversion_and_normalize_are_added_where_not_given(items: str | list[Any], expected: str) -> None:
    assert _names(items) == expected.split()
    pixels = _apply(items, _picture())
    assert pixels.shape[0] == 3
    assert -3 < pixels.min() < pixels.max() < 4


def test_to_tensor_scales_to_one_and_normalize_is_the_weights_own() -> None:
    black, white = (Image.new("RGB", (2, 2), colour) for colour in ("black", "white"))
    for items in ([], ["ToTensor"], ["PILToTensor"]):
        torch.testing.assert_close(_apply(items, black)[:, 0, 0], -torch.tensor(MEAN) / torch.tensor(STD))
        torch.testing.assert_close(_apply(items, white)[:, 0, 0], (1 - torch.tensor(MEAN)) / torch.tensor(STD))


def test_a_normalize_that_is_given_is_kept() -> None:
    white = Image.new("RGB", (2, 2), "white")
    own = {"Normalize": {"mean": [0.0, 0.5, 1.0], "std": [1.0, 0.5, 0.25]}}
    assert _apply([own], white)[:, 0, 0].tolist() == [1.0, 1.0, 0.0]


def test_grey_levels_are_three_channels() -> None:
    grey = _apply(["Grayscale"], _picture())
    assert grey.shape == (3, 70, 90)
    torch.testing.assert_close(grey, _apply([{"Grayscale": 3}], _picture()))


def test_the_conversion_waits_for_the_batch_where_it_can() -> None:
    """uint8 is a quarter of the bytes to move from the workers to the device."""
    pipeline = Pipeline(spell_out("default", PRESET, train=False), "transforms.eval")
    assert pipeline.image(_picture()).dtype == torch.uint8
    noisy = Pipeline(spell_out(["GaussianNoise"], PRESET, train=False), "transforms.train")
    assert noisy.image(_picture()).dtype == torch.float32


def test_default_train_crops_and_flips_at_random() -> None:
    assert _names("default", train=True)[:2] == ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert _names("default", train=True)[2:] == ["ToImage", "ToDtype", "Normalize"]
    pipeline = Pipeline(spell_out("default", PRESET, train=True), "transforms.train")
    torch.manual_seed(0)
    views = [pipeline.image(_picture()) for _ in range(2)]
    assert [view.shape for view in views] == [(3, 40, 40)] * 2
    assert not torch.equal(*views)


def test_default_train_has_the_interpolation_of_the_weights() -> None:
    preset = Preprocessing(48, 40, MEAN, STD, "bicubic")
    [step, *_] = spell_out("default", preset, train=True)
    assert step == {"RandomResizedCrop": {"size": 40, "interpolation": "bicubic"}}


@pytest.mark.parametrize(
    ("items", "deterministic"),
    [
        ("default", True),
        ([{"Resize": 32}, {"CenterCrop": 24}, {"Pad": 2}, "Grayscale"], True),
        ([{"Compose": [{"Resize": 32}, "ToTensor"]}], True),
        (["RandomHorizontalFlip"], False),
        ([{"RandomHorizontalFlip": {"p": 0.5}}], False),
        ([{"RandomHorizontalFlip": {"p": 1.0}}], False),  # it draws a random number all the same
        ([{"Resize": 32}, {"ColorJitter": 0.1}], False),
        ([{"GaussianBlur": 3}], False),
        (["TrivialAugmentWide"], False),
        ([{"Compose": [{"Resize": 32}, "RandomHorizontalFlip"]}], False),
        ([{"RandomApply": [{"Resize": 32}]}], False),
    ],
    ids=str,
)
def test_the_determinism_flag(items: str | list[Any], deterministic: bool) -> None:
    assert Pipeline(spell_out(items, PRESET, train=False), "transforms.train").deterministic == deterministic


# Test-time augmentation

CROPS: list[Any] = [24, [20, 31], {"size": 25}, {"size": [31, 20]}]


def _views(items: str | list[Any], tta: str | None, picture: Image.Image) -> list[Tensor]:
    """What the network sees of a picture, in each view of the augmentation."""
    pipelines = tta_pipelines(spell_out(items, PRESET, train=False), tta)
    assert all(pipeline.deterministic for pipeline in pipelines)
    return [pipeline.batch(pipeline.image(picture).unsqueeze(0))[0].as_subclass(Tensor) for pipeline in pipelines]


def _expected_views(tta: str | None, picture: Image.Image, size: Any) -> list[Tensor]:
    """The same by torchvision's own functions, from the picture that is to be cropped."""
    views = {
        None: lambda: [v2.functional.center_crop(picture, size)],
        "flip": lambda: [view := v2.functional.center_crop(picture, size), v2.functional.hflip(view)],
        "fivecrop": lambda: v2.functional.five_crop(picture, size),
        "tencrop": lambda: v2.functional.ten_crop(picture, size),
    }
    return [_reference(v2.Identity(), view) for view in views[tta]()]


def _assert_same_views(found: list[Tensor], expected: list[Tensor]) -> None:
    """In whatever order: it is their mean that is taken."""
    assert [view.shape for view in found] == [view.shape for view in expected]
    assert sorted(view.numpy().tobytes() for view in found) == sorted(view.numpy().tobytes() for view in expected)


@pytest.mark.parametrize("crop", CROPS, ids=str)
@pytest.mark.parametrize(("tta", "number"), [(None, 1), ("flip", 2), ("fivecrop", 5), ("tencrop", 10)])
def test_views_are_torchvisions_own(tta: str | None, number: int, crop: Any) -> None:
    size = crop["size"] if isinstance(crop, dict) else crop
    height, width = (size, size) if isinstance(size, int) else size
    resized = (height + 16, width + 30)  # where the room is uneven, the mirrored centre is not the mirror's centre
    found = _views([{"Resize": list(resized)}, {"CenterCrop": crop}], tta, _picture())
    assert len(found) == number == len({view.numpy().tobytes() for view in found})
    _assert_same_views(found, _expected_views(tta, v2.functional.resize(_picture(), list(resized)), size))


@pytest.mark.parametrize("tta", [None, "flip", "fivecrop", "tencrop"])
def test_views_are_the_same_where_the_tensor_is_made_before_the_crop(tta: str | None) -> None:
    _assert_same_views(_views(["ToTensor", {"CenterCrop": 24}], tta, _picture()), _expected_views(tta, _picture(), 24))


@pytest.mark.parametrize(
    ("crop", "padding"), [([80, 60], [0, 5, 0, 5]), ([60, 100], [5, 0, 5, 0]), ([100, 100], [5, 15, 5, 15])], ids=str
)
@pytest.mark.parametrize("tta", ["fivecrop", "tencrop"])
def test_an_image_smaller_than_the_crop_is_padded_as_by_center_crop(
    tta: str, crop: list[int], padding: list[int]
) -> None:
    found = _views([{"CenterCrop": crop}], tta, _picture())
    _assert_same_views(found, _expected_views(tta, v2.functional.pad(_picture(), padding), crop))
    assert any(torch.equal(view, _apply([{"CenterCrop": crop}], _picture())) for view in found)


def test_only_crops_need_a_crop() -> None:
    steps = spell_out([{"Resize": [32, 32]}], PRESET, train=False)
    for tta in ("fivecrop", "tencrop"):
        with pytest.raises(InputError) as caught:
            tta_pipelines(steps, tta)
        assert str(caught.value) == (
            f"--tta {tta} needs a CenterCrop in the preprocessing, which is Resize, ToImage, ToDtype, Normalize; "
            "use --tta flip"
        )
    resized = v2.functional.resize(_picture(), [32, 32])
    _assert_same_views(_views([{"Resize": [32, 32]}], "flip", _picture()), _expected_views("flip", resized, [32, 32]))


def test_without_augmentation_the_pipeline_is_as_it_was() -> None:
    steps = spell_out("default", PRESET, train=False)
    (pipeline,) = tta_pipelines(steps, None)
    assert pipeline.steps == steps


ARGUMENTS: dict[str, Any] = {
    "CenterCrop": 24, "ElasticTransform": 50.0, "GaussianBlur": 3, "JPEG": 50, "Normalize": [[0.5] * 3, [0.5] * 3],
    "Pad": 3, "RandomAdjustSharpness": 2.0, "RandomAffine": 30, "RandomApply": ["RandomInvert"],
    "RandomChoice": ["RandomInvert", "Identity"], "RandomCrop": 24, "RandomOrder": ["RandomInvert"],
    "RandomPosterize": 2, "RandomResize": [20, 60], "RandomResizedCrop": 24, "RandomRotation": 30,
    "RandomShortestSize": [[20, 60]], "RandomSolarize": 100, "Resize": 24, "ScaleJitter": [[40, 40]],
    "ToDtype": {"dtype": "float32", "scale": True}, "Compose": ["RandomInvert"],
    "ColorJitter": 0.5, "Grayscale": None,
}  # fmt: skip


# LinearTransformation takes tensors, which YAML has not.
@pytest.mark.parametrize("name", sorted(TRANSFORMS.keys() - {"LinearTransformation"}))
def test_every_transform_works_and_what_is_called_deterministic_is(name: str) -> None:
    """No warning, pixels of the right kind, and no random number drawn where the flag says so."""
    pipeline = Pipeline(spell_out([{name: ARGUMENTS.get(name)}], PRESET, train=True), "transforms.train")
    picture, state = _picture(), torch.get_rng_state()
    assert all(min(size) > 0 for size in pipeline.sizes(picture.size))
    batch = pipeline.batch(pipeline.image(picture).unsqueeze(0))
    assert (batch.shape[1], batch.dtype) == (3, torch.float32)
    untouched = torch.equal(torch.get_rng_state(), state)
    assert untouched == pipeline.deterministic


@pytest.mark.parametrize("items", ["default", [], ["GaussianNoise"], [{"Normalize": [[0.1, 0.2, 0.3], [1.5, 1, 0.5]]}]])
def test_denormalise_inverts(items: str | list[Any]) -> None:
    pipeline = Pipeline(spell_out(items, PRESET, train=False), "transforms.eval")
    torch.manual_seed(0)
    pictures = torch.stack([pipeline.image(_picture()), pipeline.image(_picture())])
    *before, _ = spell_out(items, PRESET, train=False)
    torch.manual_seed(0)
    expected = Pipeline(before, "transforms.eval").image(_picture())
    shown = pipeline.denormalise(pipeline.batch(pictures))
    assert shown.shape == pictures.shape
    torch.testing.assert_close(shown[0], expected.as_subclass(Tensor), rtol=0, atol=1e-6)


def test_denormalise_clips() -> None:
    pipeline = Pipeline(spell_out("default", PRESET, train=False), "transforms.eval")
    shown = pipeline.denormalise(torch.tensor([-100.0, 100.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert shown[0, :, 0].tolist() == [[0.0, 1.0]] * 3


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "items",
    ["default", [{"Resize": [40, 50]}, {"Compose": ["ToTensor"]}, {"RandomApply": {"transforms": ["RandomErasing"]}}]],
    ids=["default", "list"],
)
def test_a_spelled_out_pipeline_is_plain_data(items: str | list[Any], train: bool) -> None:
    """It survives YAML and JSON, spelling it out again changes nothing, and the pixels stay the same."""
    steps = spell_out(items, PRESET, train=train)
    other = Preprocessing(resize=1, crop=1, mean=(9.0,) * 3, std=(9.0,) * 3, interpolation="nearest")
    assert spell_out(steps, other, train=not train) == steps
    expected = _apply(steps, _picture())
    for copy in (yaml.safe_load(yaml.safe_dump(steps)), json.loads(json.dumps(steps))):
        assert copy == steps
        assert torch.equal(_apply(copy, _picture(), other), expected)


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("CentreCrop", "unknown transform 'CentreCrop'; did you mean 'CenterCrop'"),
        ({"RandomFlip": 0.5}, "unknown transform 'RandomFlip'"),
        ("Lambda", "unknown transform 'Lambda'"),
        ("MixUp", "unknown transform 'MixUp'"),
        ("TenCrop", "unknown transform 'TenCrop'"),
        ({3: 4}, "unknown transform 3"),
        (5, "write a name or {name: arguments}, not 5"),
        ({"Resize": 1, "CenterCrop": 1}, "write a name or {name: arguments}, not {'Resize': 1, 'CenterCrop': 1}"),
        ("Resize", "missing a required argument: 'size' (arguments: size, interpolation, max_size, antialias)"),
        ({"Resize": {"sise": 3}}, "(arguments: size, interpolation, max_size, antialias)"),
        ({"Resize": {"size": 3, "sise": 3}}, "got an unexpected keyword argument 'sise'"),
        ({"Resize": "big"}, "Resize does not take 'big'"),
        ({"Resize": {"size": 3, "interpolation": "cubic"}}, "'cubic' is not a valid InterpolationMode"),
        ({"RandomHorizontalFlip": 3}, "RandomHorizontalFlip does not take 3"),
        ({"RandomHorizontalFlip": "yes"}, "RandomHorizontalFlip does not take 'yes'"),
        ({"Pad": [1, 2, 3, 4]}, "too many positional arguments (arguments: padding, fill, padding_mode)"),
        ({"Normalize": 0.5}, "missing a required argument: 'std'"),
        ({"ToImage": 5}, "it takes none"),
        ({"Identity": [5]}, "it takes none"),
        ({"ToTensor": 5}, "ToTensor takes no arguments, not 5"),
        ("ToDtype", "missing a required argument: 'dtype'"),
        ({"ToDtype": "float32"}, "add scale: true, or the pixels stay in 0-255 instead of 0-1"),
        ({"ToDtype": {"dtype": "float32"}}, "add scale: true"),
        ({"ToDtype": {"dtype": "float32", "scale": False}}, "add scale: true"),
        ({"ToDtype": {"dtype": "uint8", "scale": True}}, "dtype is float32, not 'uint8'"),
        ({"RandomApply": "Resize"}, "write the transforms as a list"),
        ({"RandomApply": 5}, "write the transforms as a list"),
        ({"RandomApply": {"p": 0.5}}, "Pass at least one transform"),
        ({"RandomApply": {"transforms": ["RandomInvert"], "q": 1}}, "got an unexpected keyword argument 'q'"),
        ({"RandomChoice": ["CentreCrop"]}, "unknown transform 'CentreCrop'; did you mean 'CenterCrop'"),
        ({"Compose": [{"Resize": "big"}]}, "Resize does not take 'big'"),
    ],
    ids=str,
)
def test_a_wrong_item_is_named_by_its_key(item: Any, complaint: str) -> None:
    with pytest.raises(SettingError) as caught:
        check(["RandomInvert", {"Resize": 32}, item], "transforms.train")
    assert caught.value.key == "transforms.train[2]"
    assert complaint in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("items", ["default", "eval", [], ["ToTensor"], [{"RandomApply": ["ToTensor"]}]])
def test_what_is_right_passes_the_check(items: str | list[Any]) -> None:
    check(items, "transforms.train")


# How large an image becomes


@pytest.mark.parametrize(
    "items",
    [
        "default",
        [{"Resize": 48}],
        [{"Resize": [48]}],
        [{"Resize": 48}, {"Resize": 20}],
        [{"Resize": {"size": 48, "max_size": 60}}],
        [{"Resize": {"size": None, "max_size": 60}}],
        [{"Compose": ["RandomInvert", {"Resize": 48}]}],
        [{"RandomShortestSize": [[20, 60]]}],
        [{"RandomShortestSize": {"min_size": [20, 60], "max_size": 100}}],
        [{"RandomResize": [59, 60]}],
        [{"RandomApply": [{"Resize": 48}]}],
        [{"RandomChoice": [{"Resize": 20}, {"Resize": 48}]}],
        [{"RandomRotation": {"degrees": [45, 45], "expand": True}}],
        [{"RandomRotation": {"degrees": [-20, 20], "expand": True}}],
        [{"RandomRotation": 45}],
        [{"RandomZoomOut": {"side_range": [3, 3], "p": 1.0}}],
        ["RandomInvert"],
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(90, 70), (10, 400), (300, 9)])
def test_how_large_an_image_becomes_on_the_way_to_its_crop(
    items: str | list[Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never larger than foretold, and in a number of draws about as large. Measured where torchvision does it."""
    made, call = [size], v2.Transform._call_kernel

    def measured(transform: v2.Transform, function: Any, *arguments: Any, **options: Any) -> Any:
        picture = call(transform, function, *arguments, **options)
        if function in (v2.functional.resize, v2.functional.rotate, v2.functional.pad):
            made.append(picture.size)
        return picture

    monkeypatch.setattr(v2.Transform, "_call_kernel", measured)
    pipeline = Pipeline(spell_out(items, PRESET, train=False), "transforms.train")
    for seed in range(20):
        pipeline.draw(_picture(*size), seed)
    foretold, largest = (max(sizes, key=math.prod) for sizes in ([size, *pipeline.sizes(size)], made))
    assert math.prod(largest) <= math.prod(foretold) * 1.1
    assert math.prod(foretold) <= math.prod(largest) * 1.1 + sum(largest) * 2


@pytest.mark.parametrize(
    "items",
    [
        [{"RandomResizedCrop": 24}],
        [{"Resize": [48, 30]}, {"Resize": 1000}],
        [{"CenterCrop": 24}, {"Resize": 48}],
        [{"RandomCrop": {"size": 24, "pad_if_needed": True}}, {"Resize": 48}],
    ],
    ids=str,
)
def test_what_is_resized_to_a_size_of_its_own_becomes_no_larger_for_its_shape(items: list[Any]) -> None:
    pipeline = Pipeline(spell_out(items, PRESET, train=True), "transforms.train")
    assert set(pipeline.sizes((6000, 1))) <= {(6000, 1)}
    assert max(pipeline.image(_picture(6000, 1)).shape[-2:]) <= 1600
