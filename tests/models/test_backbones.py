"""Backbones as chains: the outputs are torchvision's own forward, at every tap; names, sizes, seeds and settings.

The references are torchvision's models with the same tensors. BatchNorm statistics are taken from a batch of noise
first: with the initial ones, activations vanish (EfficientNet) or explode (ResNet152), and a comparison of zeros
shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tl_trainer.errors import SettingError
from tl_trainer.models.backbones import build_backbone, empty_backbone, feature_size, resolve_weights
from tl_trainer.models.chain import Backbone
from tl_trainer.models.weights import with_versions

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
    backbone = build_backbone(name, resolve_weights(name, "none"), "logits", SEED)
    # Built without memory, where that works, to be filled with the backbone's own tensors.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        reference = torchvision.models.get_model(name, weights=None, **QUIRKS.get(name, {}))
    # A plain dict, as the product passes tensors on; MNASNet takes it with versions only.
    reference.load_state_dict(with_versions(dict(backbone.model.state_dict()), reference), assign=True)
    torch.manual_seed(SEED)
    for parameter in reference.parameters():
        if not parameter.any():  # biases, and the last layer of a vision transformer
            nn.init.normal_(parameter, std=0.02)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        reference.train()(10 * torch.randn(4, 3, side, side))
    # Bright images, for what AlexNet's and VGG's initial weights make of others is nearly their biases alone.
    return Pair(name, backbone, reference.eval(), 10 * torch.randn(2, 3, side, side))


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """One of the four backbones of the bundled configurations at a time, for they are large."""
    yield make_pair(request.param, 64)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 (of the largest value, above 1), where the two images' outputs differ by far more than that."""
    assert (expected[0] - expected[1]).abs().max().item() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


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
        assert (
            feature_size(backbone, pair.name, resolve_weights(pair.name, "none"), tap, torch.empty(3, height, width))
            == expected
        )


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "squeezenet1_1"])
@pytest.mark.parametrize("tap", ["penultimate", "pooled", "logits"])
def test_feature_size_is_that_of_the_output(name: str, tap: str) -> None:
    backbone, side = empty_backbone(name, True, tap), OTHERS[name]
    place = next(backbone.parameters()).device
    assert place.type == ("cpu" if name.startswith("regnet") else "meta")
    with torch.no_grad():
        shape = backbone(torch.empty(1, 3, side, side, device=place)).shape
    assert shape == (1, feature_size(backbone, name, resolve_weights(name, "none"), tap, torch.empty(3, side, side)))


@pytest.mark.parametrize(("tap", "height", "width"), [("features.3", 64, 64), ("features", 64, 96), ("layer3", 32, 64)])
def test_feature_size_at_a_stage_depends_on_the_image(tap: str, height: int, width: int) -> None:
    name = "resnet18" if tap.startswith("layer") else "alexnet"
    backbone = build_backbone(name, resolve_weights(name, "none"), tap, SEED)
    size = feature_size(backbone, name, resolve_weights(name, "none"), tap, torch.empty(3, height, width))
    with torch.inference_mode():
        assert backbone(torch.rand(1, 3, height, width)).shape == (1, size)
    assert feature_size(backbone, name, resolve_weights(name, "none"), tap, torch.empty(3, height, 2 * width)) > size


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


def test_a_vision_transformer_is_a_chain_too() -> None:
    _, _, reference, images = make_pair("vit_b_32", 224)
    features: list[Tensor] = []
    handle = reference.heads.head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    with torch.inference_mode():
        reference(images)
        handle.remove()
        for tap in ("penultimate", "pooled", "getitem"):
            backbone = tapped("vit_b_32", tap, reference.state_dict())
            names = [stage.name for stage in backbone.stages]
            assert names == ["conv_proj", "permute", "class_token", "encoder", "getitem"]
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
    first = build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", "none"), "logits", 3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", "none"), "logits", 3).state_dict()
    other = build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", "none"), "logits", 4).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["model.layers.0.weight"], other["model.layers.0.weight"])


def test_random_weights_are_torchvisions_own_initialisation() -> None:
    torch.manual_seed(3)
    expected = torchvision.models.get_model("mnasnet0_5", weights=None).state_dict()
    actual = build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", "none"), "penultimate", 3).model.state_dict()
    assert expected.keys() - actual.keys() == {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.equal(actual[key], expected[key]) for key in actual)


@pytest.mark.parametrize("name", ["alexnet", "mnasnet0_5"])  # dropout; BatchNorm
def test_a_backbone_starts_in_eval_mode(name: str) -> None:
    backbone, images = build_backbone(name, resolve_weights(name, "none"), "logits", SEED), torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(backbone(images), backbone(images))
        torch.testing.assert_close(backbone(images)[:1], backbone(images[:1]))


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        ("layer44", ["'layer44'", "did you mean 'layer4'", "penultimate, pooled", "avgpool", "fc"]),
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


@pytest.mark.parametrize("tap", ["penultimate", "logits", "features.28", "classifier"])
def test_vgg16_features_have_no_classifier_to_tap(tap: str) -> None:
    with pytest.raises(
        SettingError, match=r"IMAGENET1K_FEATURES has no usable classifier.*model.tap: pooled"
    ) as caught:
        build_backbone("vgg16", resolve_weights("vgg16", "IMAGENET1K_FEATURES"), tap, 0)
    assert caught.value.key == "model.tap"


def test_squeezenet_has_no_linear_layer_and_so_no_penultimate() -> None:
    with pytest.raises(SettingError, match=r"squeezenet1_1 has no Linear layer; set model.tap to pooled") as caught:
        build_backbone("squeezenet1_1", resolve_weights("squeezenet1_1", "none"), "penultimate", 0)
    assert caught.value.key == "model.tap"
    backbone = build_backbone("squeezenet1_1", resolve_weights("squeezenet1_1", "none"), "pooled", 0)
    assert (
        feature_size(
            backbone, "squeezenet1_1", resolve_weights("squeezenet1_1", "none"), "pooled", torch.empty(3, 64, 64)
        )
        == 1000
    )
