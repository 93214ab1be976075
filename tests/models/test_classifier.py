"""Classifier: what is frozen has no gradient and stays in eval mode, what trains moves, and both make up the whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tl_trainer.errors import SettingError
from tl_trainer.models.backbones import build_backbone, empty_backbone, resolve_weights
from tl_trainer.models.chain import Backbone, Stage
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.heads import build_head

CLASSES = 3


def small_backbone() -> Backbone:
    """Two blocks with what behaves differently in training, BatchNorm and dropout: (N, 3, H, W) -> (N, 6)."""

    def block(wide: int, narrow: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(wide, narrow, 3), nn.BatchNorm2d(narrow), nn.ReLU(inplace=True), nn.Dropout(0.5))

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("low", block(3, 4))
    model.add_module("high", block(4, 6))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    names = [f"{name}.{index}" for name in ("low", "high") for index in range(4)] + ["pool"]
    return Backbone(model, [Stage(name, model.get_submodule(name)) for name in names])


def small_classifier(trainable: str) -> Classifier:
    return Classifier(small_backbone(), build_head(6, [5], CLASSES, 0.5), trainable)


def images(seed: int = 1) -> Tensor:
    return 3 + 2 * torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def train_a_little(classifier: Classifier) -> None:
    classifier.train()
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.1)
    targets = torch.arange(8) % CLASSES
    for step in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(classifier(images(step)), targets).backward()
        optimizer.step()


FROZEN_BLOCKS = {  # model.trainable: the blocks that must not change
    "head": {"low", "high"},
    "high": {"low"},
    "high.0": {"low"},
    "low": set(),
    "all": set(),
}


@pytest.mark.parametrize("trainable", FROZEN_BLOCKS)
def test_training_changes_what_trains_and_nothing_else(trainable: str) -> None:
    classifier = small_classifier(trainable)
    before = copy.deepcopy(classifier.state_dict())
    train_a_little(classifier)
    assert {"backbone.model.low.1.running_mean", "head.1.weight"} < before.keys()
    for key, value in classifier.state_dict().items():
        block = key.removeprefix("backbone.model.").partition(".")[0]
        if key.endswith("0.bias") and block != "head":
            continue  # BatchNorm takes away whatever bias the convolution before it has
        assert torch.equal(value, before[key]) == (block in FROZEN_BLOCKS[trainable]), key


@pytest.mark.parametrize("trainable", FROZEN_BLOCKS)
def test_gradients_reach_what_trains_and_nothing_else(trainable: str) -> None:
    classifier = small_classifier(trainable).train()
    classifier(images()).sum().backward()
    for name, parameter in classifier.named_parameters():
        block = name.removeprefix("backbone.model.").partition(".")[0]
        assert parameter.requires_grad == (block not in FROZEN_BLOCKS[trainable]), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("trainable", FROZEN_BLOCKS)
def test_the_frozen_prefix_computes_the_same_in_training_as_in_evaluation(trainable: str) -> None:
    classifier = small_classifier(trainable)
    expected = classifier.eval().prefix(images())
    classifier.train()
    torch.manual_seed(2)
    assert torch.equal(classifier.prefix(images()), expected)
    assert not classifier.prefix(images()).requires_grad


def test_a_stage_within_a_block_freezes_what_is_before_it_in_the_block() -> None:
    classifier = small_classifier("high.1")
    trains = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert {name for name in trains if name.startswith("backbone")} == {
        "backbone.model.high.1.weight",
        "backbone.model.high.1.bias",
    }


@pytest.mark.parametrize("trainable", ["head", "high"])
def test_dropout_works_in_what_trains_only(trainable: str) -> None:
    classifier = small_classifier(trainable).train()
    torch.manual_seed(3)
    first, second = classifier(images()), classifier(images())
    assert not torch.equal(first, second)
    classifier.eval()
    assert torch.equal(classifier(images()), classifier(images()))


def test_train_and_eval_can_be_called_in_any_order() -> None:
    classifier = small_classifier("high")
    for _ in range(2):
        classifier.train()
        frozen, trained = classifier.backbone.model.low, classifier.backbone.model.high
        assert not any(module.training for module in frozen.children())
        assert all(module.training for module in trained.children())
        assert classifier.head.training
        classifier.eval()
        assert not any(module.training for module in trained.children())


@pytest.mark.parametrize("trainable", [*FROZEN_BLOCKS, "high.2", "pool"])
def test_prefix_and_suffix_make_the_whole(trainable: str) -> None:
    classifier = small_classifier(trainable).eval()
    expected = classifier.head(classifier.backbone(images()))
    assert torch.equal(classifier(images()), expected)
    assert torch.equal(classifier.suffix(classifier.prefix(images())), expected)
    assert expected.shape == (8, CLASSES)


def test_frozen_batch_norm_stays_as_it_is_in_stages_that_train() -> None:
    classifier = Classifier(small_backbone(), build_head(6, [5], CLASSES, 0.5), "all", freeze_batchnorm=True)
    assert small_classifier("all").trains_batch_norm and not classifier.trains_batch_norm
    before = copy.deepcopy(classifier.state_dict())
    train_a_little(classifier)
    same = {key for key, value in classifier.state_dict().items() if torch.equal(value, before[key])}
    assert same == {key for key in before if key.startswith(("backbone.model.low.1.", "backbone.model.high.1."))}


def test_what_trains_may_change_and_what_is_saved_does_not() -> None:
    classifier = small_classifier("low.1")
    saved = set(classifier.trained_state())
    for trainable in ("head", "high", "low.1"):
        classifier.thaw(trainable)
        prefix = classifier.prefix_state()
        assert {key.split(".")[2] for key in prefix} >= FROZEN_BLOCKS[trainable if trainable != "low.1" else "low"]
        before = copy.deepcopy(classifier.state_dict())
        train_a_little(classifier)
        after = classifier.state_dict()
        same = {key for key, value in after.items() if torch.equal(value, before[key])}
        idle = {f"backbone.model.{block}.0.bias" for block in ("low", "high")}  # a BatchNorm takes them out again
        assert same - idle == set(prefix) - idle
        assert set(prefix) <= same
        assert set(classifier.trained_state()) == saved
    assert set(classifier.frozen_state()) == set(prefix)


def test_layers_are_the_parameters_that_train_from_the_head_down() -> None:
    names = [(layer, [*parameters]) for layer, parameters in small_classifier("low.1").layers()]
    inside = "backbone.model."
    assert names == [
        ("head", ["head.1.weight", "head.1.bias", "head.4.weight", "head.4.bias"]),
        ("high.1", [f"{inside}high.1.weight", f"{inside}high.1.bias"]),
        ("high.0", [f"{inside}high.0.weight", f"{inside}high.0.bias"]),
        ("low.1", [f"{inside}low.1.weight", f"{inside}low.1.bias"]),
    ]


@pytest.mark.parametrize("trainable", FROZEN_BLOCKS)
def test_trained_and_frozen_state_are_the_state_dict_in_two(trainable: str) -> None:
    classifier = small_classifier(trainable)
    trained, frozen = classifier.trained_state(), classifier.frozen_state()
    assert not trained.keys() & frozen.keys()
    assert trained.keys() | frozen.keys() == classifier.state_dict().keys()
    assert {key.split(".")[2] for key in frozen} == FROZEN_BLOCKS[trainable]


@pytest.mark.parametrize(
    ("name", "tap", "trainable"),
    [
        ("alexnet", "penultimate", "head"),
        ("alexnet", "pooled", "features.10"),  # not features.1 as well
        ("resnet152", "penultimate", "layer4"),
        ("efficientnet_v2_s", "penultimate", "features.7"),
        ("densenet121", "penultimate", "features.transition3"),
        ("densenet121", "logits", "head"),
        ("swin_t", "logits", "features.7"),  # whose last Linear is called head
        ("vit_b_32", "penultimate", "head"),
        ("vit_b_32", "logits", "all"),
        ("googlenet", "penultimate", "inception5b"),
    ],
)
def test_state_goes_by_what_trains_for_torchvisions_models(name: str, tap: str, trainable: str) -> None:
    with torch.device("meta"):
        head = build_head(1, [], CLASSES, 0.0)
    classifier = Classifier(empty_backbone(name, False, tap), head, trainable)
    parameters = dict(classifier.named_parameters())
    trained, frozen = classifier.trained_state(), classifier.frozen_state()
    assert {key for key in trained if key in parameters} == {n for n, p in parameters.items() if p.requires_grad}
    assert not trained.keys() & frozen.keys()
    assert trained.keys() | frozen.keys() == classifier.state_dict().keys()
    assert bool(frozen) == (trainable != "all")


def test_trained_state_is_all_that_a_second_classifier_needs() -> None:
    first, second = small_classifier("high"), small_classifier("high")
    train_a_little(first)
    second.load_trained_state(first.trained_state())
    assert torch.equal(first.eval()(images()), second.eval()(images()))


@pytest.mark.parametrize("trainable", ["head", "layers.14", "all"])
def test_the_states_are_enough_for_a_model_that_asks_for_its_version(trainable: str) -> None:
    """MNASNet; the states are plain dicts, which carry none."""

    def classifier(seed: int) -> Classifier:
        torch.manual_seed(seed)
        backbone = build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", "none"), "penultimate", 0)
        return Classifier(backbone, build_head(1280, [5], CLASSES, 0.0), trainable)

    first, noise = classifier(1), torch.randn(4, 3, 32, 32)
    functional.cross_entropy(first(noise), torch.arange(4) % CLASSES)  # which moves BatchNorm's statistics
    trained, frozen = first.trained_state(), first.frozen_state()
    assert (type(trained), type(frozen)) == (dict, dict)
    others = [classifier(2) for _ in range(3)]
    others[0].load_trained_state(trained)
    others[1].restore(trained, None)
    others[2].restore(trained, frozen)
    expected = first.eval()(noise)
    assert all(torch.equal(other.eval()(noise), expected) for other in others)
    assert not torch.equal(classifier(2).eval()(noise), expected)


def test_trained_state_of_another_classifier_is_refused() -> None:
    with pytest.raises(AssertionError):
        small_classifier("high").load_trained_state(small_classifier("all").trained_state())


def test_a_pretrained_backbone_with_a_trained_end(tmp_path: Path) -> None:
    weights = build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", "none"), "logits", 1).model.state_dict()
    torch.save(dict(weights), tmp_path / "weights.pth")
    torch.manual_seed(0)
    pretrained = resolve_weights("mnasnet0_5", str(tmp_path / "weights.pth"))
    backbone = build_backbone("mnasnet0_5", pretrained, "penultimate", 0)
    classifier = Classifier(backbone, build_head(1280, [], CLASSES, 0.0), "layers.14").train()
    before = copy.deepcopy(classifier.state_dict())
    assert all(torch.equal(value, weights[key]) for key, value in backbone.model.state_dict().items())
    classifier(torch.randn(4, 3, 32, 32)).square().sum().backward()
    moved = {key for key, value in classifier.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {
        f"backbone.model.layers.15.{what}" for what in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert backbone.model.layers[14].weight.grad is not None
    assert backbone.model.layers[13][0].layers[0].weight.grad is None


def test_an_unknown_stage_names_the_key() -> None:
    with pytest.raises(SettingError, match="did you mean 'high") as caught:
        small_classifier("hihg")
    assert caught.value.key == "model.trainable"
