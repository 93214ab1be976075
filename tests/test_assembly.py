"""The assembler: every backbone comes back from its checkpoint as it was, and a checkpoint decides no folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import get_model_weights

from conftest import Run, draw_split, last_json
from test_end_to_end import SMALL
from tiny import tiny_template
from tl_trainer import checkpoint
from tl_trainer.assembly import _images_to_compute, restore, set_up
from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.load import load
from tl_trainer.config.schema import Config, flat
from tl_trainer.data.dataset import Files, Split
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import CheckpointError, ConfigError, DataError
from tl_trainer.ground.sealed import save_sealed
from tl_trainer.models.backbones import BACKBONES, build_backbone, empty_backbone, feature_size, resolve_weights
from tl_trainer.models.chain import Backbone
from tl_trainer.models.classifier import Classifier, State
from tl_trainer.models.heads import build_head
from tl_trainer.settings import NOT_TAKEN

SIDES = {"inception_v3": 128, "maxvit_t": 224, "vit_b_16": 224, "vit_b_32": 224}  # that take no 64 pixels
LARGE = 19e6  # parameters, from which on no logits are compared
# but of these, so that every family is there but VGG, whose smallest has 133 million parameters
AS_WELL = {
    "alexnet", "convnext_tiny", "efficientnet_v2_s", "inception_v3", "maxvit_t", "resnet50", "swin_t", "swin_v2_t",
    "vit_b_32",
}  # fmt: skip


def parameters(name: str) -> float:
    if name == "efficientnet_lite0":
        return 4.7e6
    return float(get_model_weights(name).__members__["DEFAULT"].meta["num_params"])


def saved_from(name: str, tap: str, classifier: Classifier, features: int) -> Checkpoint:
    """What a run with this classifier would save."""
    words = [("model.backbone", name), ("model.weights", "none"), ("model.tap", tap)]
    config = Config(model=load(None, words).config.model)
    return replace(
        tiny_template(),
        config=config.model_dump(),
        features=features,
        backbone={"name": name, "weights": "none", "tap": tap, "sha256": ""},
        trained=dict(classifier.trained_state()),
        frozen=dict(classifier.frozen_state()),
    )


def numbered(state: State) -> State:
    """Tensors of the same shapes, each of which repeats a number of its own that is stored once."""
    return {
        key: torch.tensor(number, dtype=value.dtype).expand(value.shape)
        for number, (key, value) in enumerate(state.items())
    }


def repeated(value: Tensor) -> tuple[torch.Size, torch.dtype, float]:
    """Shape, dtype and number of a tensor made by `numbered`."""
    assert value.untyped_storage().nbytes() == value.element_size()
    return value.shape, value.dtype, value.as_strided((), ()).item()


def with_statistics(backbone: Backbone, side: int) -> None:
    """Take BatchNorm's from a batch of noise; with the initial ones, most models give all images the same logits."""
    found = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in found:
        module.momentum = 1.0
    if found:
        with torch.no_grad():
            backbone.train()(torch.randn(2, 3, side, side))
        backbone.eval()


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_backbone_comes_back_from_its_checkpoint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every tensor and the logits as they were; for a large one, with a number of its own in every tensor."""
    side, large = SIDES.get(name, 64), parameters(name) > LARGE and name not in AS_WELL
    tap = "pooled" if name.startswith("squeezenet") else "penultimate"
    if large:  # the RegNets cannot be built without memory; at least nothing has to be drawn for them
        for function in ("normal_", "kaiming_uniform_", "kaiming_normal_", "uniform_"):
            monkeypatch.setattr(torch.nn.init, function, lambda tensor, *_, **__: tensor)
    weights = resolve_weights(name, "none")
    backbone = empty_backbone(name, False, tap) if large else build_backbone(name, weights, tap, 3)
    features = feature_size(backbone, name, weights, tap, torch.empty(3, side, side))
    before = Classifier(backbone, build_head(features, [], 3, 0.0), "head").eval()
    if large:
        before.restore(numbered(before.state_dict()), {})
    else:
        with_statistics(backbone, side)
    path = Path("best.pth")
    checkpoint.save(saved_from(name, tap, before, features), path)
    after = restore(path, [("device", "cpu")]).network.classifier
    path.unlink()  # 2 GB of them would stay until the end of the tests
    assert not any(module.training for module in after.modules())
    assert [stage.name for stage in after.frozen] == [stage.name for stage in before.frozen] != []
    one, two = before.state_dict(), after.state_dict()
    assert list(one) == list(two)
    if large:
        assert [repeated(value) for value in one.values()] == [repeated(value) for value in two.values()]
        return
    for key, value in one.items():
        assert value.dtype == two[key].dtype, key
        assert torch.equal(value, two[key]), key
    images = torch.rand(2, 3, side, side)
    with torch.inference_mode():
        logits = before(images)
        assert torch.equal(after(images), logits)
    assert not torch.equal(logits[0], logits[1]), "the same for every image, so they show nothing"


def test_a_checkpoint_of_version_2_gives_the_same_logits(tl: Run, colours: Path) -> None:
    """It did not say how wide the head's input is."""
    best = Path(last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))["checkpoint"])
    content = torch.load(best, weights_only=True)
    del content["features"], content["val_split"]
    save_sealed(best.with_name("old.pth"), {**content, "version": 2, "val_names": None})
    new, old = restore(best), restore(best.with_name("old.pth"))
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(*(parts.network.logits(parts.network.features(images)) for parts in (new, old)))
    figures = [last_json(tl("eval", "--checkpoint", path, "--json")) for path in (best, best.with_name("old.pth"))]
    assert figures[0] == figures[1]
    rows = [tl("predict", colours / "val", "--checkpoint", path).stdout for path in (best, best.with_name("old.pth"))]
    assert rows[0] == rows[1] != ""


def test_an_absurd_head_is_refused_in_one_line(tl: Run, colours: Path) -> None:
    best = Path(last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))["checkpoint"])
    content = torch.load(best, weights_only=True)
    for features in (2**70, 1):
        save_sealed(best, {**content, "features": features})
        refused = tl("predict", colours / "val", "--checkpoint", best)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
        assert f"{best}: " in refused.stderr


def test_a_checkpoint_decides_no_folder_and_no_limit(tl: Run, colours: Path, tmp_path: Path) -> None:
    best = Path(last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))["checkpoint"])
    content = torch.load(best, weights_only=True)
    bait = tmp_path / "bait" / ("ab" * 16)
    bait.mkdir(parents=True)
    (bait / "thesis.txt").write_text("years of work")
    content["config"]["features"].update(dir=str(bait.parent), limit_gb=1e-9)
    content["config"]["output"]["dir"] = str(bait.parent)
    content["config"]["data"]["download"] = True
    save_sealed(best, content)
    before = sorted(path.relative_to(tmp_path) for path in bait.parent.rglob("*"))
    assert last_json(tl("eval", "--checkpoint", best, "--json"))["n"] == 12
    assert sorted(path.relative_to(tmp_path) for path in bait.parent.rglob("*")) == before
    parts = restore(best)
    nulls = dict.fromkeys(("data.group_pattern", "data.csv.group_column", "data.skip"))
    assert dict(NOT_TAKEN) == {"features.dir": None, "features.limit_gb": 20.0, "data.download": False, **nulls}
    found = dict(flat(parts.config.model_dump()))
    assert {key: found[key] for key, _ in NOT_TAKEN} == dict(NOT_TAKEN)
    chosen = restore(best, [("features.dir", "here"), ("features.limit_gb", 0.5), ("data.download", True)])
    assert (chosen.config.features.dir, chosen.config.features.limit_gb) == ("here", 0.5)
    assert chosen.config.data.download


def test_words_on_a_checkpoint_through_the_commands(tl: Run, colours: Path) -> None:
    best = Path(last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))["checkpoint"])
    assert last_json(tl("eval", "features.cache=off", "--checkpoint", best, "--json", "train.batch_size=3"))["n"] == 12
    refused = tl("eval", "--checkpoint", best, "features.cash=off")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "features.cash: unknown key 'cash'; did you mean 'cache'? (valid: cache, dir, limit_gb" in refused.stderr
    fixed = tl("predict", colours / "val", "--checkpoint", best, "model.backbone=vgg16")
    assert fixed.returncode == 2
    assert "model.backbone: is fixed by the checkpoint; keys that can be set: device, data.source" in fixed.stderr
    red = (colours / "val" / "red" / "00.jpg").read_bytes()
    Path("device=cpu").write_bytes(red)
    rows = tl("predict", "device=cpu", "train.precision=fp32", "--checkpoint", best)
    assert rows.stdout.startswith("device=cpu  ")
    assert len(rows.stdout.splitlines()) == 1
    assert "no images: give files" in tl("predict", "train.precision=fp32", "--checkpoint", best).stderr


def test_one_class_is_not_enough(colours: Path) -> None:
    for split in ("train", "val"):
        for name in ("green", "red"):
            for path in (colours / split / name).iterdir():
                path.unlink()
            (colours / split / name).rmdir()
    with pytest.raises(DataError, match=r"has one class, 'blue', and a classifier needs two"):
        set_up(load(None, [("data.root", str(colours)), ("model.backbone", "alexnet"), ("model.weights", "none")]))


def batch_norm_words(colours: Path, trainable: str) -> list[tuple[str, Any]]:
    return [
        ("data.root", str(colours)), ("model.backbone", "shufflenet_v2_x0_5"), ("model.weights", "none"),
        ("model.trainable", trainable), ("transforms.eval", [{"Resize": [32, 32]}]), ("transforms.train", "eval"),
    ]  # fmt: skip


def test_batches_of_one_image_are_refused_where_batch_norm_trains(colours: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: 1 is too few: BatchNorm trains here .* 2 or more"):
        set_up(load(None, [*batch_norm_words(colours, "conv5"), ("train.batch_size", 1)]))
    set_up(load(None, [*batch_norm_words(colours, "head"), ("train.batch_size", 1)]))


def test_a_single_training_image_is_refused_where_batch_norm_trains(colours: Path) -> None:
    for path in sorted(colours.glob("train/*/*.jpg"))[1:]:
        path.write_bytes(b"no picture")
    skip = ("data.on_bad_image", "skip")
    with pytest.raises(ConfigError, match=r"model\.trainable: there is one training image: .* or add images"):
        set_up(load(None, [*batch_norm_words(colours, "conv5"), skip]))
    set_up(load(None, [*batch_norm_words(colours, "head"), skip]))


def test_a_run_without_an_epoch_has_no_classifier_yet(tmp_path: Path) -> None:
    checkpoint.save(tiny_template(), tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=rf"no epoch of this run has ended yet; go on with --resume {tmp_path}"):
        restore(tmp_path / "best.pth")


@pytest.mark.parametrize(
    ("features", "random", "images"),
    [
        ({}, False, 24 + 12),
        ({}, True, 24 * 10 + 12),
        ({"views": 1}, True, 24 * 40 + 12),
        ({"views": 3}, True, 24 * 3 + 12),
        ({"cache": "off"}, False, (24 + 12) * 40),
    ],
)
def test_what_is_compiled_depends_on_the_images_that_a_run_computes_and_not_on_what_is_cached(
    features: dict[str, Any], random: bool, images: int
) -> None:
    config = Config.model_validate({"features": features, "train": {"epochs": 40}})
    splits = {name: Split(Files([], []), [0] * count, range(count)) for name, count in (("train", 24), ("val", 12))}
    steps = [{"RandomCrop": 8}] if random else [{"CenterCrop": 8}]
    assert _images_to_compute(config, splits, Pipeline(steps, "transforms.train")) == images


def test_a_drawn_val_split_divides_no_group(tmp_path: Path) -> None:
    draw_split(tmp_path / "photos", 10)
    keys = {"data": {"root": str(tmp_path / "photos"), "group_pattern": "([0-9])[.]jpg"}}
    splits = set_up(load({**keys, "model": {"backbone": "shufflenet_v2_x0_5", "weights": "none"}})).dataset.splits
    train, val = (splits[name] for name in ("train", "val"))
    assert {*train.groups}.isdisjoint(val.groups)
    assert (len({*train.groups}), len({*val.groups}), len(val)) == (8, 2, 6)
