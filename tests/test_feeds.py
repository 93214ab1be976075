"""Feeds of a network: when they are of cached features, and that these give the logits and gradients of the images."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import PIL
import pytest
import torch
import torchvision
from torch import Tensor, nn

from tl_trainer import assembly
from tl_trainer import network as module_under_test
from tl_trainer.assembly import _feeds
from tl_trainer.config.data import DataSection
from tl_trainer.config.schema import Config, FeaturesSection
from tl_trainer.data.dataset import Split
from tl_trainer.data.folders import open_folders
from tl_trainer.data.loaders import ImageBatches
from tl_trainer.data.transforms import Pipeline, Preprocessing, spell_out
from tl_trainer.data.verify import verified
from tl_trainer.errors import InputError
from tl_trainer.features import FeatureBatches
from tl_trainer.feeds import Batches, Feed, Feeds
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.prefix import FrozenPrefix
from tl_trainer.models.weights import state_hash
from tl_trainer.network import Network

CPU = torch.device("cpu")
PRESET = Preprocessing(resize=32, crop=32, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
FIXED = Pipeline(spell_out([{"Resize": [32, 32]}], PRESET, train=False), "transforms.eval")
RANDOM = Pipeline(
    spell_out([{"RandomResizedCrop": 32}, {"ColorJitter": {"brightness": 0.5}}], PRESET, train=True), "transforms.train"
)
TAPS = {"head": ("maxpool", 24 * 8 * 8), "stage2": ("stage2", 48 * 4 * 4), "all": ("maxpool", 24 * 8 * 8)}


def feeds_of(
    trainable: str = "head",
    precision: str = "fp32",
    *,
    seed: int = 0,
    compiled: bool = False,
    **features: Any,
) -> Feeds:
    """Of ShuffleNet up to its first pooling or its second stage, with random weights of that seed."""
    tap, size = TAPS[trainable]
    backbone = build_backbone("shufflenet_v2_x0_5", resolve_weights("shufflenet_v2_x0_5", "none"), tap, seed)
    torch.manual_seed(seed)
    classifier = Classifier(backbone, nn.Linear(size, 3), trainable)
    identity: Any = {"name": "shufflenet_v2_x0_5", "sha256": state_hash(classifier.frozen_state())}
    net = Network(classifier, CPU, precision, compiled=compiled)
    config = Config(seed=3, features=FeaturesSection(**features), data=DataSection(workers=0))
    return replace(_feeds(config, net, identity), batch_size=7)


@pytest.fixture
def split(colours: Path) -> Split:
    """24 pictures of three colours."""
    return verified(open_folders(colours, None).split("train"), "train", DataSection(), None)


def logits(feed: Feed, epoch: int = 0) -> Tensor:
    with torch.inference_mode():
        return torch.cat([feed.logits(batch.inputs) for batch in feed.batches.epoch(epoch, CPU)])


def order(batches: Batches, epoch: int = 0) -> list[list[int]]:
    return [[*batch.indices.tolist(), *batch.targets.tolist()] for batch in batches.epoch(epoch, CPU)]


@pytest.mark.parametrize(
    ("options", "pipeline", "views", "cached"),
    [
        ({}, FIXED, 1, True),
        ({}, RANDOM, 1, False),
        ({}, RANDOM, 2, True),
        ({}, RANDOM, "auto", True),
        ({}, FIXED, "auto", True),
        ({"limit_gb": 1e-9}, RANDOM, "auto", False),
        ({"trainable": "all"}, RANDOM, "auto", False),
        ({"cache": "off"}, RANDOM, "auto", False),
        ({"trainable": "stage2"}, FIXED, 1, True),
        ({"trainable": "stage2"}, RANDOM, 1, False),
        ({"trainable": "all"}, FIXED, 1, False),
        ({"cache": "off"}, FIXED, 1, False),
        ({"cache": "off"}, RANDOM, 2, False),
    ],
)
def test_when_training_is_on_cached_features(
    split: Split, options: dict[str, Any], pipeline: Pipeline, views: int | Literal["auto"], cached: bool
) -> None:
    net = feeds_of(**options)
    feed = net.of_run({"train": split}, pipeline, FIXED, views, 2)["train"]
    assert isinstance(feed.batches, FeatureBatches if cached else ImageBatches)
    assert (feed.logits == net.network.logits) == cached
    assert bool(list(Path("cache").rglob("*.rows"))) == cached
    assert logits(feed).shape == (24, 3)
    if not cached:
        assert net.extractor is None or net.extractor.computed == 0


@pytest.mark.parametrize(
    ("options", "epochs", "kept", "said"),
    [
        ({}, 1, 1, "auto keeps a random view of each training image"),
        ({}, 4, 4, "auto keeps 4 random views of each training image"),
        ({}, 40, 10, "auto keeps 10 random views of each training image"),
        ({"trainable": "stage2", "limit_gb": 24 * 4 * 24 * 64 * 4 / 1e9}, 4, 4, "auto keeps 4 random views"),
        (
            {"trainable": "stage2", "limit_gb": 24 * 4 * 24 * 64 * 4 / 1e9 - 1e-9},
            4,
            0,
            "auto keeps none, so every epoch",
        ),
        ({"trainable": "all"}, 4, 0, "auto keeps nothing, since model.trainable is all"),
    ],
)
def test_auto_keeps_a_view_for_each_epoch_and_says_so_in_a_line(
    split: Split, caplog: pytest.LogCaptureFixture, options: dict[str, Any], epochs: int, kept: int, said: str
) -> None:
    net = feeds_of(**options)
    caplog.set_level(logging.INFO, "tl_trainer.feeds")
    feed = net.of_run({"train": split}, RANDOM, FIXED, "auto", epochs)["train"]
    assert [record.message for record in caplog.records if said in record.message] == caplog.messages[-1:]
    assert len([record for record in caplog.records if record.name == "tl_trainer.feeds"]) == 1
    assert (feed.batches.features.views if isinstance(feed.batches, FeatureBatches) else 0) == kept


def test_views_that_were_asked_for_by_number_and_do_not_fit_are_refused(split: Split) -> None:
    for pipeline, views in ((RANDOM, 2), (FIXED, "auto")):
        with pytest.raises(InputError, match=r"more than features\.limit_gb .*; raise it"):
            feeds_of(limit_gb=1e-9).of_run({"train": split}, pipeline, FIXED, views, 2)  # type: ignore[arg-type]


ROW = 24 * 8 * 8 * 4  # bytes of a feature


def test_the_splits_of_a_run_do_not_make_room_for_each_other(split: Split) -> None:
    """Another run's features go, though those of val were not used for longer."""
    splits, limit = {"val": split.subset(range(20)), "train": split.subset(range(20, 24))}, 40 * ROW / 1e9
    assert all(isinstance(f.batches, FeatureBatches) for f in feeds_of().of_run(splits, RANDOM, FIXED, 2, 2).values())
    feeds_of(seed=1).evaluation(split.subset(range(20)), "val", FIXED)
    for number, folder in enumerate(sorted(Path("cache/features").iterdir(), key=lambda store: store.stat().st_mtime)):
        os.utime(folder, (number, number))
    more = {**splits, "train": split.subset(range(19, 24))}
    again = feeds_of(limit_gb=limit)
    again.of_run(more, RANDOM, FIXED, 2, 2)
    assert again.extractor is not None
    assert again.extractor.computed == 2


def test_a_run_whose_splits_do_not_fit_together_is_refused_before_anything_is_computed(split: Split) -> None:
    splits = {"train": split.subset(range(12)), "val": split.subset(range(12, 24))}
    for limit, number in ((36, 0), (35, 1)):
        net = feeds_of(limit_gb=limit * ROW / 1e9)
        if number:
            match = r"^the features of 36 images, each view counted, take 0\.000221 GB, more than features\.limit_gb"
            with pytest.raises(InputError, match=match):
                net.of_run(splits, RANDOM, FIXED, 2, 2)
        else:
            net.of_run(splits, RANDOM, FIXED, 2, 2)
        assert net.extractor is not None
        assert net.extractor.computed == (0 if number else 36)
        shutil.rmtree("cache")


def test_where_auto_keeps_no_views_the_other_splits_are_kept(split: Split) -> None:
    splits = {"train": split.subset(range(12)), "val": split.subset(range(12, 24))}
    feeds = feeds_of(limit_gb=12 * ROW / 1e9).of_run(splits, RANDOM, FIXED, "auto", 2)
    assert isinstance(feeds["train"].batches, ImageBatches)
    assert isinstance(feeds["val"].batches, FeatureBatches)


@pytest.mark.parametrize(
    ("options", "pipeline", "cached"),
    [
        ({}, FIXED, True),
        ({"trainable": "stage2"}, FIXED, True),
        ({"trainable": "all"}, FIXED, False),
        ({"cache": "off"}, FIXED, False),
        ({}, RANDOM, False),
    ],
)
def test_when_evaluation_is_on_cached_features(
    split: Split, options: dict[str, Any], pipeline: Pipeline, cached: bool
) -> None:
    feed = feeds_of(**options).evaluation(split, "val", pipeline)
    assert isinstance(feed.batches, FeatureBatches if cached else ImageBatches)
    assert [index for batch in feed.batches.epoch(4, CPU) for index in batch.indices.tolist()] == list(range(24))


@pytest.mark.parametrize(("trainable", "sizes"), [("head", [23, 1]), ("stage2", [24]), ("all", [24])])
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_single_last_image_joins_the_batch_before_it_where_batch_norm_trains(
    split: Split, trainable: str, sizes: list[int], cache: str
) -> None:
    feeds = replace(feeds_of(trainable, cache=cache), batch_size=23)
    batches = feeds.training(split, FIXED).batches
    assert [len(batch.indices) for batch in batches.epoch(0, CPU)] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize("trainable", ["head", "stage2"])
def test_cached_features_give_the_logits_of_the_images(split: Split, trainable: str) -> None:
    cached, plain = feeds_of(trainable), feeds_of(trainable, cache="off")
    feeds = cached.training(split, FIXED), plain.training(split, FIXED)
    for epoch in (0, 1):
        assert order(feeds[0].batches, epoch) == order(feeds[1].batches, epoch)
        for net in (cached, plain):
            net.network.classifier.eval()
        actual, expected = (logits(feed, epoch) for feed in feeds)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        assert expected.std(dim=0).min() > 1e-3
    torch.testing.assert_close(
        logits(cached.evaluation(split, "val", FIXED)), logits(plain.evaluation(split, "val", FIXED))
    )


@pytest.mark.parametrize("trainable", ["head", "stage2", "all"])
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_gradients_reach_what_trains_and_nothing_else(split: Split, trainable: str, cache: str) -> None:
    net = feeds_of(trainable, cache=cache)
    before = {key: value.clone() for key, value in net.network.classifier.frozen_state().items()}
    net.network.classifier.train()
    feed = net.training(split, FIXED)
    batch = next(iter(feed.batches.epoch(0, CPU)))
    nn.functional.cross_entropy(feed.logits(batch.inputs), batch.targets).backward()
    trained = net.network.classifier.trained_state()
    with_gradient = {name for name, value in net.network.classifier.named_parameters() if value.grad is not None}
    assert with_gradient == {name for name, _ in net.network.classifier.named_parameters() if name in trained}
    assert len(with_gradient) > 2 or (trainable == "head" and with_gradient == {"head.weight", "head.bias"})
    after = net.network.classifier.frozen_state()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_views_are_used_in_turn(split: Split) -> None:
    feed = feeds_of().training(split, RANDOM, 2)
    inputs = [torch.cat([batch.inputs for batch in feed.batches.epoch(epoch, CPU)]).sort(0)[0] for epoch in range(4)]
    assert torch.equal(inputs[0], inputs[2])
    assert torch.equal(inputs[1], inputs[3])
    assert not torch.equal(inputs[0], inputs[1])


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("trainable", ["head", "stage2", "all"])
def test_an_embedding_is_the_input_of_the_head_in_the_splits_order(split: Split, trainable: str, cache: str) -> None:
    net = feeds_of(trainable, cache=cache)
    net.network.classifier.eval()
    features = net.embed(split, FIXED)
    with torch.inference_mode():
        expected = FIXED.batch(torch.stack([FIXED.image(split.open(index)) for index in range(len(split))]))
        for stage in [*net.network.classifier.frozen, *net.network.classifier.trained]:
            expected = stage.module(expected)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected.flatten(1), rtol=0, atol=1e-5)
    assert not torch.allclose(features[:-1], features[1:], rtol=0, atol=1e-3), "the order could not be seen"
    assert (net.extractor is not None and net.extractor.computed == 24) == (cache == "auto" and trainable != "all")


def test_an_embedding_in_lower_precision_is_given_in_full(split: Split) -> None:
    lower, full = (feeds_of("stage2", kind).embed(split, FIXED) for kind in ("bf16", "fp32"))
    assert lower.dtype == torch.float32
    assert 0 < (lower - full).norm() < 0.2 * full.norm()


def test_an_embedding_says_nothing(split: Split, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    feeds_of().embed(split, FIXED)
    assert not caplog.messages


@contextmanager
def no_prefix(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(module_under_test, "FrozenPrefix", lambda *_, **__: pytest.fail("a prefix was made"))
        yield


def test_the_prefix_is_made_once_and_only_when_something_is_computed(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = feeds_of()
    cold.training(split, FIXED)
    cold.evaluation(split, "val", FIXED)
    assert cold.network.prefix() is cold.network.prefix()
    assert cold.network.prefix().calls == 2  # 16 images and 8
    with no_prefix(monkeypatch):
        warm = feeds_of()
        feeds = warm.training(split, FIXED), warm.evaluation(split, "val", FIXED)
        assert [logits(feed, 5).shape for feed in feeds] == [(24, 3), (24, 3)]
        assert warm.extractor is not None
        assert warm.extractor.computed == 0


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"trainable": "stage2", "seed": 1}, {"precision": "bf16"}, {"dir": "elsewhere"}]
)
def test_other_weights_or_another_precision_or_folder_are_computed_anew(split: Split, change: dict[str, Any]) -> None:
    feeds_of().training(split, FIXED)
    changed = feeds_of(**change)
    changed.training(split, FIXED)
    assert changed.extractor is not None
    assert changed.extractor.computed == 24
    again = feeds_of()
    again.training(split, FIXED)
    assert again.extractor is not None
    assert again.extractor.computed == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [(torchvision, "__version__"), (PIL, "__version__"), (assembly, "CACHE_VERSION"), (assembly, "library_versions")],
)
def test_other_versions_are_computed_anew(
    split: Split, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    feeds_of().training(split, FIXED)
    monkeypatch.setattr(module, name, (lambda _: ["9.8"]) if name == "library_versions" else "9.8")
    changed = feeds_of()
    changed.training(split, FIXED)
    assert changed.extractor is not None
    assert changed.extractor.computed == 24


def test_another_device_has_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    here = feeds_of().extractor
    monkeypatch.setattr(Network, "device", property(lambda _: torch.device("mps"), lambda *_: None), raising=False)
    there = feeds_of().extractor
    assert here is not None
    assert there is not None
    assert there.identity == {**here.identity, "device": "mps"}


def test_training_from_a_later_stage_uses_the_same_features(split: Split) -> None:
    """ShuffleNet's second stage begins where its first pooling ends."""
    feeds_of().training(split, FIXED)
    later = feeds_of("stage2")
    later.training(split, FIXED)
    assert later.extractor is not None
    assert later.extractor.computed == 0


def test_the_cache_is_where_and_as_large_as_configured(split: Split, tmp_path: Path) -> None:
    default = feeds_of().extractor
    assert default is not None
    assert (default.folder, default.limit) == (tmp_path / "cache" / "features", 20_000_000_000)
    chosen = feeds_of(dir="here", limit_gb=0.5).extractor
    assert chosen is not None
    assert (chosen.folder, chosen.limit) == (Path("here"), 500_000_000)


@pytest.mark.parametrize(
    ("setting", "native", "frozen", "trained"),
    [
        ("auto", True, torch.bfloat16, None),
        ("auto", False, torch.float32, None),
        ("fp32", True, torch.float32, None),
        ("bf16", False, torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_of_the_frozen_and_the_trained_part(
    split: Split,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    native: bool,
    frozen: torch.dtype,
    trained: torch.dtype | None,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    net = feeds_of("stage2", setting)
    assert net.network.autocast == trained
    assert net.network.prefix()(torch.zeros(1, 3, 32, 32)).dtype == frozen
    feed = net.training(split, FIXED)
    assert isinstance(feed.batches, FeatureBatches)
    assert feed.batches.features.take(0, [0]).dtype == frozen
    seen: list[torch.dtype] = []
    net.network.classifier.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert logits(feed).dtype == torch.float32
    assert set(seen) == {trained or torch.float32}


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_compiled_prefix_is_made_for_features_and_for_images_and_has_a_store_of_its_own(
    split: Split, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    found: list[bool] = []

    def make(*arguments: Any, compiled: bool) -> FrozenPrefix:
        found.append(compiled)
        return FrozenPrefix(*arguments)

    monkeypatch.setattr(module_under_test, "FrozenPrefix", make)
    for compiled in (True, False):
        logits(feeds_of(compiled=compiled, cache=cache).training(split, FIXED))
    assert found == [True, False]
    assert len(list(Path("cache").rglob("*.rows"))) == (2 if cache == "auto" else 0)


def test_bad_images_are_skipped_on_either_way(split: Split, colours: Path) -> None:
    (colours / "train" / "green" / "03.jpg").write_bytes(b"no picture")
    for cache in ("auto", "off"):
        good = verified(open_folders(colours, None).split("train"), "train", DataSection(on_bad_image="skip"), None)
        feed = feeds_of(cache=cache).training(good, FIXED)
        assert len(feed.split) == 23
        batches = feed.batches.epoch(0, CPU)
        assert sorted(index for batch in batches for index in batch.indices.tolist()) == list(range(23))
