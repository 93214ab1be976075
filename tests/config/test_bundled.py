"""Every configuration that is installed with the package: its header, its names, its round trip, what it says."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest

from tl_trainer.cli.train import build_parser
from tl_trainer.config.load import bundled_folder, load, parse_override, to_yaml
from tl_trainer.data import transforms
from tl_trainer.models.backbones import resolve_weights

BUNDLED = sorted(path.name for path in bundled_folder().glob("*"))


def test_these_are_bundled() -> None:
    assert BUNDLED == [
        "cifar10-vgg16.yaml",
        "cifar100.yaml",
        "convnext.yaml",
        "csv.yaml",
        "default.yaml",
        "demo.yaml",
        "dinov2.yaml",
        "finetune.yaml",
        "flowers102.yaml",
        "imagefolder-alexnet.yaml",
        "multilabel.yaml",
        "multitask.yaml",
    ]


@pytest.mark.parametrize("name", BUNDLED)
def test_the_header_gives_the_command_what_it_needs_and_what_it_does(name: str) -> None:
    lines = (bundled_folder() / name).read_text(encoding="utf-8").splitlines()
    header = list(takewhile(lambda line: line.startswith("#"), lines))
    (command,) = (line for line in header if re.match(r"#\s+tl-train ", line))
    Path("photos").mkdir()
    if name == "default.yaml":
        assert command.split()[1:] == ["tl-train", "photos/"]
    else:
        assert command.split()[1:4] == ["tl-train", "--config", name]
    args = build_parser().parse_intermixed_args(command.split()[2:])
    load(args.config or "./photos", [parse_override(word) for word in args.words if "=" in word])
    for opening in ("# Needs: ", "# Does: "):
        assert sum(line.startswith(opening) for line in header) == 1


@pytest.mark.parametrize("name", BUNDLED)
def test_every_name_in_it_exists(name: str) -> None:
    config = load(name).config
    transforms.check(config.transforms.train, "transforms.train")
    transforms.check(config.transforms.eval, "transforms.eval")
    resolve_weights(config.model.backbone, config.model.weights)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_resolved_file_is_the_same_configuration(name: str) -> None:
    config = load(name).config
    Path("resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load("resolved.yaml").config == config


def test_flowers102_is_the_published_recipe() -> None:
    config = load("flowers102.yaml").config
    assert (config.data.source, config.model.backbone) == ("flowers102", "resnet152")
    assert config.transforms.train == [
        {"RandomRotation": 45},
        {"CenterCrop": 224},
        {"RandomHorizontalFlip": 0.5},
        {"RandomVerticalFlip": 0.5},
        {"ColorJitter": {"brightness": 0.2, "contrast": 0.1, "saturation": 0.1, "hue": 0.1}},
        {"RandomGrayscale": 0.025},
    ]
    assert (config.train.epochs, config.train.batch_size) == (40, 48)
    assert (config.train.optimizer.name, config.train.optimizer.lr) == ("adam", 1e-3)


def test_cifar100_is_the_published_recipe() -> None:
    config = load("cifar100.yaml").config
    assert (config.data.source, config.model.backbone) == ("cifar100", "efficientnet_v2_s")
    assert config.transforms.train == [{"Resize": [300, 300]}, {"RandomHorizontalFlip": 0.5}]
    assert config.transforms.eval == [{"Resize": [300, 300]}]
    assert config.model.head.hidden == [256, 256]
    assert (config.train.optimizer.name, config.train.optimizer.lr) == ("adam", 1e-3)


def test_finetune_is_the_measured_recipe() -> None:
    config = load("finetune.yaml").config
    assert [(phase.trainable, phase.search, phase.epochs) for phase in config.phases] == [
        ("head", "auto", 1),
        ("all", "off", 8),
    ]
    optimizer = config.phases[1].optimizer
    assert (optimizer.name, optimizer.lr, optimizer.head_lr, optimizer.layer_decay) == ("adamw", 1e-4, 5e-4, 1.0)
    train = config.train
    assert (train.loss.label_smoothing, train.freeze_batchnorm, train.ema.decay) == (0.1, True, 0.98)
    assert config.transforms.train[1:] == ["RandomHorizontalFlip", "TrivialAugmentWide"]


def test_csv_reads_the_dog_breed_layout() -> None:
    data = load("csv.yaml").config.data
    assert (data.source, data.csv.labels, data.csv.suffix) == ("csv", "labels.csv", ".jpg")
    assert (data.csv.image_column, data.csv.label_column) == ("id", "breed")


def test_the_demo_needs_no_network() -> None:
    config = load("demo.yaml").config
    weights = resolve_weights(config.model.backbone, config.model.weights)
    assert config.data.source == "demo"
    assert weights.fetch is not None
    assert weights.fetch().is_file()
