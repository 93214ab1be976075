"""Backbones as chains: the outputs are torchvision's own forward, at every tap; names, sizes, seeds and settings.

The references are torchvision's models with the same tensors. BatchNorm statistics are taken from a batch of noise
first: with the initial ones, activations vanish (EfficientNet) or explode (ResNet152), and a comparison of zeros
shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, ResNet152_Weights, VGG16_Weights

from tl_trainer.errors import SettingError
from tl_trainer.models.backbones import (
    BACKBONES,
    Backbone,
    build_backbone,
    empty_backbone,
    feature_size,
    preprocessing,
    resolve_weights,
)

SEED = 7
SIZES = {  # name: (penultimate, pooled)
    "alexnet": (4096, 9216),
    "vgg16": (4096, 25088),
    "resnet152": (2048, 2048),
    "efficientnet_v2_s": (1280, 1280),
}
OTHERS = {  # name: the side of the images
    "convnext_tiny": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 80,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "vit_b_32": 224,
}
QUIRKS: dict[str, dict[str, Any]] = {
    name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")
}


class Pair(NamedTuple):
    """The whole chain, torchvision's model that shares its tensors, and images."""

    name: str
    backbone: Backbone
    reference: nn.Module
    images: Tensor


def make_pair(name: str, side: int) -> Pair:
    backbone = build_backbone(name, None, "logits", SEED)
    # Built without memory, where that works, to be filled with the backbone's own tensors.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        reference = torchvision.models.get_model(name, weights=None, **QUIRKS.get(name, {}))
    reference.load_state_dict(backbone.model.state_dict(), assign=True)
    torch.manual_seed(SEED)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        reference.train()(torch.randn(4, 3, side, side))
    return Pair(name, backbone, reference.eval(), torch.randn(2, 3, side, side))


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """One of the four backbones of the bundled configurations at a time, for they are large."""
    yield make_pair(request.param, 64)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest value, where both images give something else and not next to nothing."""
    largest = expected.abs().max().item()
    assert 1e-3 < largest < 1e3
    assert (expected[0] - expected[1]).abs().max().item() > 1e-3 * largest
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * min(1.0, largest))


def tapped(name: str, tap: str, state: dict[str, Tensor]) -> Backbone:
    """The chain up to the tap, sharing tensors with `state`; what it lacks would have no memory and fail in forward."""
    backbone = empty_backbone(name, False, tap)
    missing = backbone.model.load_state_dict(state, strict=False, assign=True).missing_keys
    assert not missing
    return backbone


def outputs_of(model: nn.Module, modules: list[str], images: Tensor) -> dict[str, Tensor]:
    """What torchvision's modules of those names give within the model's own forward."""
    found: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = output.clone()  # the ReLU that follows may work in place

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(remember(name)) for name in modules]
    with torch.inference_mode():
        model(images)
    for handle in hooks:
        handle.remove()
    return found


def test_logits_equal_torchvisions_forward(pair: Pair) -> None:
    with torch.inference_mode():
        expected = pair.reference(pair.images)
        actual = pair.backbone(pair.images)
    assert actual.shape == (2, 1000)
    assert_same(actual, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_logits_of_other_models_equal_torchvisions_forward(name: str) -> None:
    pair = make_pair(name, OTHERS[name])
    with torch.inference_mode():
        assert_same(pair.backbone(pair.images), pair.reference(pair.images).flatten(1))


@pytest.mark.parametrize(("tap", "index"), [("penultimate", 0), ("pooled", 1)])
def test_sizes_at_the_taps(pair: Pair, tap: str, index: int) -> None:
    expected = SIZES[pair.name][index]
    backbone = tapped(pair.name, tap, pair.reference.state_dict())
    with torch.inference_mode():
        assert backbone(pair.images).shape == (2, expected)
    for height, width in [(64, 64), (224, 224), (300, 256)]:
        assert feature_size(pair.name, tap, height, width) == expected


LAST_LINEAR = {
    "alexnet": "classifier.6",
    "vgg16": "classifier.6",
    "resnet152": "fc",
    "efficientnet_v2_s": "classifier.1",
}


def test_penultimate_is_the_input_of_the_last_linear(pair: Pair) -> None:
    seen: list[Tensor] = []
    last = pair.reference.get_submodule(LAST_LINEAR[pair.name])
    handle = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    with torch.inference_mode():
        pair.reference(pair.images)
        handle.remove()
        assert_same(tapped(pair.name, "penultimate", pair.reference.state_dict())(pair.images), seen[0])


STAGES = {
    "alexnet": ["features.0", "features.10", "features", "avgpool", "classifier.4", "classifier"],
    "vgg16": ["features.28", "features", "avgpool", "classifier.1"],
    "resnet152": ["conv1", "layer1", "layer3.35", "layer4", "avgpool", "fc"],
    "efficientnet_v2_s": ["features.0", "features.5.3", "features.5", "features", "avgpool", "classifier"],
}


def test_a_tap_at_a_stage_is_the_output_of_torchvisions_module(pair: Pair) -> None:
    expected = outputs_of(pair.reference, STAGES[pair.name], pair.images)
    for stage in STAGES[pair.name]:
        backbone = tapped(pair.name, stage, pair.reference.state_dict())
        with torch.inference_mode():
            assert_same(backbone(pair.images), expected[stage].flatten(1))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("densenet121", ["features.denseblock2", "features.transition1", "features"]),
        ("mobilenet_v3_small", ["features.3", "avgpool", "classifier.1"]),
        ("shufflenet_v2_x0_5", ["maxpool", "stage3", "conv5"]),
        ("regnet_y_400mf", ["stem", "trunk_output.block2", "trunk_output.block2.block2-0"]),
        ("swin_t", ["features.1", "norm", "avgpool"]),
    ],
)
def test_stages_of_other_models(name: str, stages: list[str]) -> None:
    _, _, reference, images = make_pair(name, 64)
    expected = outputs_of(reference, stages, images)
    for stage in stages:
        with torch.inference_mode():
            assert_same(tapped(name, stage, reference.state_dict())(images), expected[stage].flatten(1))


def test_pooled_is_after_the_last_pooling_also_where_it_is_a_function() -> None:
    _, _, reference, images = make_pair("shufflenet_v2_x0_5", 64)
    last = outputs_of(reference, ["conv5"], images)["conv5"]
    with torch.inference_mode():
        assert_same(tapped("shufflenet_v2_x0_5", "pooled", reference.state_dict())(images), last.mean([2, 3]))


def test_a_model_that_is_no_chain_is_a_body_and_its_last_linear() -> None:
    _, _, reference, images = make_pair("vit_b_32", 224)
    features: list[Tensor] = []
    handle = reference.heads.head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    with torch.inference_mode():
        reference(images)
        handle.remove()
        for tap in ("penultimate", "pooled", "body"):
            backbone = tapped("vit_b_32", tap, reference.state_dict())
            assert [stage.name for stage in backbone.stages] == ["body"]
            assert_same(backbone(images), features[0])


@pytest.mark.parametrize("name", ["alexnet", "resnet152", "densenet121", "mobilenet_v2", "swin_t", "googlenet"])
def test_stage_names_are_torchvisions_module_names(name: str) -> None:
    backbone = empty_backbone(name, False, "logits")
    with torch.device("meta"):
        modules = dict(torchvision.models.get_model(name, weights=None, **QUIRKS.get(name, {})).named_modules())
    named = [stage for stage in backbone.stages if stage.name in modules]
    assert {stage.name for stage in backbone.stages} - modules.keys() <= {
        "adaptive_avg_pool2d", "flatten", "permute", "relu",
    }  # fmt: skip
    assert all(type(stage.module) is type(modules[stage.name]) for stage in named)
    in_chain = {id(parameter) for stage in backbone.stages for parameter in stage.module.parameters()}
    assert in_chain == {id(parameter) for parameter in backbone.parameters()}


def test_a_name_that_covers_several_stages_starts_at_its_first() -> None:
    backbone = empty_backbone("resnet152", True, "penultimate")
    names = [stage.name for stage in backbone.stages]
    assert backbone.index("layer4") == backbone.index("layer4.0") == names.index("layer4.0")
    assert backbone.index("layer1.2") == names.index("layer1.2")
    assert names[-2:] == ["avgpool", "flatten"]


def test_the_stages_after_the_tap_hold_no_weights() -> None:
    keys = empty_backbone("alexnet", True, "features.3").state_dict().keys()
    assert sorted(keys) == [f"model.features.{n}.{what}" for n in (0, 3) for what in ("bias", "weight")]


@pytest.mark.parametrize("name", ["alexnet", "resnet152", "efficientnet_v2_s", "vit_b_32"])
def test_an_empty_backbone_has_no_memory(name: str) -> None:
    state = empty_backbone(name, True, "logits").state_dict()
    assert {value.device.type for value in state.values()} == {"meta"}


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_backbone("mnasnet0_5", None, "logits", 3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build_backbone("mnasnet0_5", None, "logits", 3).state_dict()
    other = build_backbone("mnasnet0_5", None, "logits", 4).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["model.layers.0.weight"], other["model.layers.0.weight"])


def test_random_weights_are_torchvisions_own_initialisation() -> None:
    torch.manual_seed(3)
    expected = torchvision.models.get_model("mnasnet0_5", weights=None).state_dict()
    actual = build_backbone("mnasnet0_5", None, "penultimate", 3).model.state_dict()
    assert expected.keys() - actual.keys() == {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.equal(actual[key], expected[key]) for key in actual)


@pytest.mark.parametrize("tap", ["penultimate", "pooled", "logits", "features.3"])
def test_a_backbone_starts_in_eval_mode(tap: str) -> None:
    assert not any(stage.module.training for stage in empty_backbone("alexnet", False, tap).stages)


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        ("layer44", ["layer44", "did you mean 'layer4", "penultimate, pooled", "avgpool"]),
        ("penultimat", ["did you mean 'penultimate'"]),
        ("", ["unknown tap ''", "layer4"]),
    ],
)
def test_an_unknown_tap_names_the_key_and_the_choices(tap: str, expected: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        empty_backbone("resnet152", True, tap)
    assert caught.value.key == "model.tap"
    for words in expected:
        assert words in caught.value.message


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "resnet152", "efficientnet_v2_s", "vit_b_32"])
def test_an_unknown_stage_names_the_key_and_choices_that_work(name: str) -> None:
    backbone = empty_backbone(name, True, "penultimate")
    with pytest.raises(SettingError) as caught:
        backbone.index("layr4")
    assert caught.value.key == "model.trainable"
    choices = caught.value.message.partition("(valid: ")[2].removesuffix(")").split(", ")
    assert {"head", "all"} < set(choices)
    for choice in choices:
        if choice not in ("head", "all"):
            backbone.index(choice)


def test_a_stage_after_the_tap_cannot_be_trained() -> None:
    with pytest.raises(SettingError, match="unknown stage 'fc'"):
        empty_backbone("resnet152", True, "penultimate").index("fc")


def test_an_unknown_backbone_names_the_key_and_the_nearest() -> None:
    with pytest.raises(SettingError, match="did you mean 'resnet152'") as caught:
        resolve_weights("resnet153", "DEFAULT")
    assert caught.value.key == "model.backbone"


def test_a_detection_model_is_no_backbone() -> None:
    assert "fasterrcnn_resnet50_fpn" not in BACKBONES
    with pytest.raises(SettingError, match="unknown backbone"):
        resolve_weights("fasterrcnn_resnet50_fpn", "none")


def test_weights_by_name_by_path_and_none(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"")
    assert resolve_weights("resnet152", "DEFAULT") is ResNet152_Weights.IMAGENET1K_V2
    assert resolve_weights("resnet152", "IMAGENET1K_V1") is ResNet152_Weights.IMAGENET1K_V1
    assert resolve_weights("resnet152", "none") is None
    assert resolve_weights("resnet152", "mine") == Path("mine")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("IMAGENET1K_V9", "did you mean 'IMAGENET1K_V1'.* DEFAULT, IMAGENET1K_V1, a file's path, none"),
        ("IMAGENET1K_FEATURES", "unknown weights of alexnet"),  # those are VGG16's
        ("missing.pth", "no such file: missing.pth"),
        ("~/no/such", "no such file: ~/no/such"),
    ],
)
def test_unknown_weights_name_the_key_and_the_choices(weights: str, expected: str) -> None:
    with pytest.raises(SettingError, match=expected) as caught:
        resolve_weights("alexnet", weights)
    assert caught.value.key == "model.weights"


@pytest.mark.parametrize("tap", ["penultimate", "logits", "features.28", "classifier"])
def test_vgg16_features_have_no_classifier_to_tap(tap: str) -> None:
    with pytest.raises(
        SettingError, match=r"IMAGENET1K_FEATURES has no usable classifier.*model.tap: pooled"
    ) as caught:
        build_backbone("vgg16", VGG16_Weights.IMAGENET1K_FEATURES, tap, 0)
    assert caught.value.key == "model.tap"


def test_squeezenet_has_no_linear_layer_and_so_no_penultimate() -> None:
    with pytest.raises(SettingError, match="squeezenet1_1 has no Linear layer; set model.tap to pooled") as caught:
        build_backbone("squeezenet1_1", None, "penultimate", 0)
    assert caught.value.key == "model.tap"
    assert feature_size("squeezenet1_1", "features", 64, 64) == 512 * 3 * 3


def test_preprocessing_is_the_weights_own() -> None:
    v1, v2 = (preprocessing("resnet152", weights) for weights in ResNet152_Weights)
    assert (v1.resize, v1.crop) == (256, 224)
    assert (v2.resize, v2.crop) == (232, 224)
    assert v2.mean == (0.485, 0.456, 0.406)
    assert v2.std == (0.229, 0.224, 0.225)
    assert v2.interpolation == "bilinear"


@pytest.mark.parametrize("weights", [None, Path("mine.pth")])
def test_preprocessing_of_unnamed_weights_is_the_defaults(weights: Path | None) -> None:
    assert preprocessing("alexnet", weights) == preprocessing("alexnet", AlexNet_Weights.DEFAULT)
    assert preprocessing("efficientnet_v2_s", weights).crop == 384
