"""The feature cache: which rows are computed, and that what comes out is what the prefix makes of each image, however
often it was interrupted, by whomever it was computed, and wherever it is kept."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from forked import forked
from tiny import FakeDevice, files_of, paths_of
from tl_trainer import features as module_under_test
from tl_trainer.config.data import DataSection
from tl_trainer.config.schema import FeaturesSection
from tl_trainer.data.dataset import Files, Pictures, Split
from tl_trainer.data.loaders import ImageBatches
from tl_trainer.data.transforms import Pipeline, Preprocessing, spell_out
from tl_trainer.data.verify import Memory, verified
from tl_trainer.errors import DataError, ImageError, InputError, RunError
from tl_trainer.features import (
    IMAGES_AT_ONCE,
    Extractor,
    FeatureBatches,
    Features,
    features_folder,
    views_that_fit,
)
from tl_trainer.ground.digests import Digests
from tl_trainer.models.chain import Stage
from tl_trainer.models.prefix import FrozenPrefix
from tl_trainer.views import Missing, drawn, reading

CPU = torch.device("cpu")
PRESET = Preprocessing(resize=16, crop=12, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
RANDOM = [{"RandomCrop": 12}, "RandomHorizontalFlip", {"ColorJitter": {"brightness": 0.5}}]
IDENTITY = {"backbone": "small", "sha256": "ab", "stages": ["conv"], "precision": "fp32", "device": "cpu"}
COUNT = 40
AT_ONCE = IMAGES_AT_ONCE["cpu"]


class Prefixes:
    """Makes the prefix, a convolution to (2, 3, 3), and counts: how often it was made, the images it got."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.prefix = FrozenPrefix([Stage("conv", nn.Conv2d(3, 2, 4, stride=4))], CPU, "fp32")
        self.made = 0
        self.images = 0

    def __call__(self) -> FrozenPrefix:
        self.made += 1
        return cast(FrozenPrefix, self.compute)

    def compute(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return self.prefix(images)


class Full(Prefixes):
    """On a device with memory for so many images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.sizes: list[int] = []

    def compute(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().compute(images)


class Cache:
    """Extractors one after the other, as in runs one after the other."""

    def __init__(self, folder: Path, limit: int = 10**9) -> None:
        self.folder = folder
        self.limit = limit

    def run(
        self,
        split: Split,
        items: str | list[Any] = "default",
        *,
        bad: Literal["error", "skip"] = "error",
        views: int = 1,
        seed: int = 0,
        **identity: Any,
    ) -> tuple[int, Features]:
        """Rows computed, features; a prefix is made only when there are rows to compute."""
        prefixes = Prefixes()
        extractor = Extractor(prefixes, {**IDENTITY, **identity}, self.folder, self.limit, CPU)
        known = verified(split, "train", DataSection(on_bad_image=bad), Memory(self.folder / "files.sqlite"))
        found = extractor.features(known, "train", pipeline(items), views, seed)
        assert prefixes.images == extractor.computed
        assert prefixes.made == (1 if extractor.computed else 0)
        return extractor.computed, found


def pipeline(items: str | list[Any] = "default") -> Pipeline:
    return Pipeline(spell_out(items, PRESET, train=False), "transforms.train")


def draw(path: Path, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (20, 18 + number % 3, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    written = time.time() - 60  # long enough ago to be remembered
    os.utime(path, (written, written))


def draw_split(folder: Path, count: int = COUNT) -> Split:
    folder.mkdir()
    for number in range(count):
        draw(folder / f"{number:02}.png", number)
    return split_of(folder)


def split_of(folder: Path) -> Split:
    paths = sorted(folder.iterdir())
    return files_of(paths, [index % 3 for index in range(len(paths))])


def known(split: Split) -> Split:
    return verified(split, "train", DataSection(), None)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Forty different small pictures."""
    return draw_split(tmp_path / "images")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache."""
    return Cache(tmp_path / "features")


def rows_of(features: Features, view: int = 0) -> Tensor:
    return features.take(view, range(len(features.split)))


def expected(split: Split) -> Tensor:
    """What the prefix makes of the images without any cache."""
    prefix, steps = Prefixes().prefix, pipeline()
    return torch.cat([prefix(steps.batch(steps.image(split.open(index))[None])) for index in range(len(split))])


def assert_right(features: Features) -> None:
    torch.testing.assert_close(rows_of(features), expected(features.split), rtol=0, atol=1e-5)


def test_cold_computes_all_and_warm_nothing(cache: Cache, split: Split) -> None:
    computed, cold = cache.run(split)
    assert computed == COUNT
    assert rows_of(cold).shape == (COUNT, 2, 3, 3)
    assert_right(cold)
    assert cold.targets.tolist() == split.targets
    computed, warm = cache.run(split)
    assert computed == 0
    assert torch.equal(rows_of(warm), rows_of(cold))


def test_the_count_is_logged(cache: Cache, split: Split, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tl_trainer")
    cache.run(split.subset(range(3)))
    cache.run(split)
    assert [record.message for record in caplog.records] == [
        "features of train: 3 computed, 0 cached",
        "features of train: 37 computed, 3 cached",
    ]


def test_ten_more_images_cost_ten(cache: Cache, split: Split, tmp_path: Path) -> None:
    cache.run(split)
    for number in range(100, 110):
        draw(tmp_path / "images" / f"{number % 7}-{number}.png", number)
    computed, found = cache.run(split_of(tmp_path / "images"))
    assert computed == 10
    assert len(found.split) == COUNT + 10
    assert_right(found)


def test_a_rewritten_image_costs_one(cache: Cache, split: Split, tmp_path: Path) -> None:
    cache.run(split)
    draw(tmp_path / "images" / "07.png", 200)
    computed, found = cache.run(split)
    assert computed == 1
    assert_right(found)


def test_touched_moved_and_removed_images_cost_nothing(cache: Cache, split: Split, tmp_path: Path) -> None:
    cache.run(split)
    for path in paths_of(split):
        os.utime(path)
    computed, found = cache.run(split)
    assert computed == 0
    assert_right(found)
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "moved" / "05.png").rename(tmp_path / "moved" / "zz.png")
    (tmp_path / "moved" / "11.png").unlink()
    computed, found = cache.run(split_of(tmp_path / "moved"))
    assert computed == 0
    assert_right(found)


@pytest.mark.parametrize(
    "change",
    [
        {"items": [{"Resize": [12, 12]}]},
        {"items": [{"Resize": [12, 12]}, {"Normalize": [[0.0] * 3, [1.0] * 3]}]},
        {"backbone": "other"},
        {"sha256": "cd"},
        {"stages": ["conv", "relu"]},
        {"precision": "bf16"},
        {"device": "cuda"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_a_features_value_makes_a_cache_of_its_own(
    cache: Cache, split: Split, change: dict[str, Any]
) -> None:
    cache.run(split)
    assert cache.run(split, **change)[0] == COUNT
    assert cache.run(split, **change)[0] == 0
    computed, found = cache.run(split)
    assert computed == 0
    assert_right(found)


def test_equal_images_are_computed_once(cache: Cache, split: Split, tmp_path: Path) -> None:
    for number in (3, 4, 5):
        shutil.copy(tmp_path / "images" / "01.png", tmp_path / "images" / f"copy{number}.png")
    computed, found = cache.run(split_of(tmp_path / "images"))
    assert computed == COUNT
    assert_right(found)
    assert torch.equal(rows_of(found)[1], rows_of(found)[-1])


def test_pictures_in_memory(cache: Cache, split: Split) -> None:
    pictures = [(split.open(index), 0) for index in range(20)]
    first = Split(Pictures(pictures), [index % 3 for index in range(20)], range(20))
    computed, found = cache.run(first)
    assert computed == 20
    assert_right(found)
    computed, found = cache.run(first.subset([19, 3, 3, 8]))
    assert computed == 0
    assert found.targets.tolist() == [1, 0, 0, 2]
    assert_right(found)


def test_views_differ_and_each_epoch_takes_the_next(cache: Cache, split: Split) -> None:
    computed, found = cache.run(split, RANDOM, views=3)
    assert computed == 3 * COUNT
    views = [rows_of(found, view) for view in range(3)]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert not any(torch.equal(views[one][index], views[other][index]) for index in range(COUNT))
    batches = FeatureBatches(found, batch_size=16)
    for epoch in range(7):
        inputs = torch.cat([batch.inputs for batch in batches.epoch(epoch, CPU)])
        assert torch.equal(inputs, views[epoch % 3])


def test_views_are_the_same_in_every_run_and_order(cache: Cache, split: Split, tmp_path: Path) -> None:
    _, first = cache.run(split, RANDOM, views=2)
    computed, warm = cache.run(split, RANDOM, views=2)
    assert computed == 0
    torch.manual_seed(1234)
    computed, cold = Cache(tmp_path / "another").run(split, RANDOM, views=2)
    assert computed == 2 * COUNT
    order = [*range(30, 40), *range(9, -1, -1)]
    computed, reordered = Cache(tmp_path / "third").run(split.subset(order), RANDOM, views=2)
    assert computed == 2 * len(order)
    for view in range(2):
        assert torch.equal(rows_of(warm, view), rows_of(first, view))
        assert torch.equal(rows_of(cold, view), rows_of(first, view))
        torch.testing.assert_close(rows_of(reordered, view), rows_of(first, view)[order], rtol=0, atol=1e-5)


forks = pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="a patch reaches forked processes only")
FLOWERS = [
    {"RandomRotation": 45},
    {"CenterCrop": 12},
    {"ColorJitter": {"brightness": 0.2, "hue": 0.1}},
    {"RandomApply": {"transforms": [{"GaussianBlur": 3}], "p": 0.5}},
    "RandAugment",
]


@forks
@pytest.mark.parametrize("items", [RANDOM, FLOWERS])
@pytest.mark.parametrize("overlap", [False, True])
def test_processes_draw_what_one_thread_draws_and_open_each_image_once(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: list[Any], overlap: bool
) -> None:
    opened, steps, known_split = tmp_path / "opened", pipeline(items), known(split)
    keys = [
        hashlib.sha256(digest + f"0 {view}".encode()).digest() for digest in known_split.hashes for view in (0, 1, 2)
    ]
    wanted = [steps.draw(split.open(number // 3), int.from_bytes(key[:8], "little")) for number, key in enumerate(keys)]
    load = Files.load

    def counted(self: Files, index: int, expected: bytes = b"", **options: Any) -> Any:
        with opened.open("a") as file:
            file.write(f"{index} {os.getpid()}\n")
        return load(self, index, expected, **options)

    monkeypatch.setattr(Files, "load", counted)
    by_view = [Digests.of(keys[view::3]) for view in range(3)]
    missing = Missing(by_view, [np.arange(COUNT)] * 3)
    before = torch.get_rng_state()
    with reading(known_split, steps, workers=2) as read:
        blocks = (missing.block(first, first + 7) for first in range(0, COUNT, 7))
        found = list(drawn(blocks, read, overlap=overlap))
    assert [key for key, _ in found] == keys
    assert all(torch.equal(image, expected) for (_, image), expected in zip(found, wanted, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    lines = [line.split() for line in opened.read_text().splitlines()]
    assert sorted(int(index) for index, _ in lines) == list(range(COUNT))
    assert len({process for _, process in lines} - {str(os.getpid())}) == 2


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few images are drawn by processes."""
    monkeypatch.setattr(module_under_test, "READ_AT_ONCE", COUNT)


@pytest.mark.usefixtures("short_blocks")
def test_views_are_the_same_with_any_number_of_processes(cache: Cache, split: Split, tmp_path: Path) -> None:
    _, alone = cache.run(split, RANDOM, views=2)
    extractor = Extractor(Prefixes(), IDENTITY, tmp_path / "another", cache.limit, CPU, workers=2)
    found = extractor.features(known(split), "train", pipeline(RANDOM), views=2)
    assert extractor.computed == 2 * COUNT
    assert all(torch.equal(rows_of(found, view), rows_of(alone, view)) for view in (0, 1))


@pytest.mark.usefixtures("short_blocks")
def test_an_image_that_changed_is_named_by_the_process_that_reads_it(
    cache: Cache, split: Split, tmp_path: Path
) -> None:
    extractor = Extractor(Prefixes(), IDENTITY, cache.folder, cache.limit, CPU, workers=2)
    checked = known(split)
    (tmp_path / "images" / "20.png").write_bytes(b"another")
    with pytest.raises(ImageError, match=r"20\.png: has changed"):
        extractor.features(checked, "train", pipeline(RANDOM), views=2)


@forks
@pytest.mark.usefixtures("short_blocks")
def test_a_process_that_is_killed_is_a_sentence(
    cache: Cache, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Files, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    checked = Split(split.images, split.targets, split.rows, [bytes([index]) * 32 for index in range(COUNT)])
    extractor = Extractor(Prefixes(), IDENTITY, cache.folder, cache.limit, CPU, workers=1)
    with pytest.raises(RunError, match="a process that loads images was killed"):
        extractor.features(checked, "train", pipeline(RANDOM), views=2)


def test_views_depend_on_the_seed_and_more_of_them_keep_the_first(cache: Cache, split: Split) -> None:
    _, first = cache.run(split, RANDOM, views=2)
    computed, other = cache.run(split, RANDOM, views=2, seed=1)
    assert computed == 2 * COUNT
    assert not torch.equal(rows_of(other, 0), rows_of(first, 0))
    computed, more = cache.run(split, RANDOM, views=3)
    assert computed == COUNT
    for view in range(2):
        assert torch.equal(rows_of(more, view), rows_of(first, view))


def test_without_anything_random_all_views_and_seeds_are_one(cache: Cache, split: Split) -> None:
    computed, found = cache.run(split, views=3)
    assert computed == COUNT
    assert all(torch.equal(rows_of(found, view), rows_of(found)) for view in range(3))
    assert cache.run(split, seed=9)[0] == 0


@pytest.mark.parametrize("items", ["default", RANDOM])
def test_the_random_state_of_the_run_is_left_alone(cache: Cache, split: Split, items: str | list[Any]) -> None:
    prefixes = Prefixes()
    extractor = Extractor(prefixes, IDENTITY, cache.folder, cache.limit, CPU)
    before = torch.get_rng_state()
    extractor.features(known(split), "train", pipeline(items), views=2 if items == RANDOM else 1)
    assert extractor.computed
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 7, 40, 64])
@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_come_as_those_of_images_would(
    cache: Cache, split: Split, monkeypatch: pytest.MonkeyPatch, in_memory: bool, size: int
) -> None:
    if not in_memory:
        monkeypatch.setattr(module_under_test, "free_memory", lambda: 0)
    _, found = cache.run(split)
    assert (found.tables is not None) == in_memory
    prefix = Prefixes().prefix
    features = FeatureBatches(found, batch_size=size, seed=3, shuffle=True, balanced=size == 7)
    images = ImageBatches(split, pipeline(), batch_size=size, workers=0, seed=3, shuffle=True, balanced=size == 7)
    assert len(features) == len(images)
    passed = [index for batch in features.in_order().epoch(0, CPU) for index in batch.indices.tolist()]
    assert passed == [*range(COUNT)]
    for epoch, start in [(0, 0), (1, 0), (1, 1)]:
        pairs = zip(features.epoch(epoch, CPU, start), images.epoch(epoch, CPU, start), strict=True)
        for actual, wanted in pairs:
            assert actual.inputs.dtype == torch.float32
            assert torch.equal(actual.indices, wanted.indices)
            assert torch.equal(actual.targets, wanted.targets)
            torch.testing.assert_close(actual.inputs, prefix(wanted.inputs), rtol=0, atol=1e-5)


class Arrivals(TorchFunctionMode):
    """Counts the tensors that come from the CPU to another device."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += func is Tensor.to and args[0].device == CPU and found.device != CPU
        return found


@pytest.mark.parametrize(("free", "kept"), [(0, False), (2 * COUNT * 18 * 4, False), (2 * COUNT * 18 * 4 + 2, True)])
def test_features_that_fit_stay_on_the_gpu(
    cache: Cache, split: Split, monkeypatch: pytest.MonkeyPatch, free: int, kept: bool
) -> None:
    """Each epoch then copies its order alone."""
    monkeypatch.setattr(module_under_test, "free_on", lambda device: free)  # else 0 for this stand-in
    _, found = cache.run(split)
    batches, gpu = FeatureBatches(found, batch_size=16, shuffle=True), torch.device("meta")
    arrived = []
    for epoch in (0, 1):
        with Arrivals() as arrivals:
            given = list(batches.epoch(epoch, gpu))
        assert {tensor.device for batch in given for tensor in (batch.inputs, batch.targets)} == {gpu}
        assert [batch.inputs.shape for batch in given] == [(16, 2, 3, 3), (16, 2, 3, 3), (8, 2, 3, 3)]
        arrived.append(arrivals.count)
    assert arrived == ([3, 1] if kept else [6, 6])
    assert len(batches) == 3


def test_batches_in_the_order_of_the_split(cache: Cache, split: Split) -> None:
    _, found = cache.run(split)
    batches = list(FeatureBatches(found, batch_size=16).epoch(5, CPU))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(COUNT))
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), rows_of(found))


def test_a_copy_is_only_asynchronous_from_pinned_memory_to_cuda(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an Apple GPU such copies of what is freed meanwhile have come out wrong."""
    monkeypatch.setattr(module_under_test, "free_on", lambda device: 0)
    for kind in ("cuda", "mps", "cpu"):
        place = torch.device(kind)
        extractor = Extractor(Prefixes(), IDENTITY, tmp_path / kind, 10**9, place)
        with FakeDevice() as device:
            features = extractor.features(known(split), "train", pipeline())
            assert device.copies
            list(FeatureBatches(features, batch_size=32).epoch(0, place))
        assert {copy[0] for copy in device.copies} == {kind, "cpu"}
        assert {copy[1:] for copy in device.copies} <= (
            {(True, True), (False, False)} if kind == "cuda" else {(False, False)}
        )
        assert ((kind, True, True) in device.copies) == (kind == "cuda")


def test_images_are_decoded_while_a_gpu_computes_those_before(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified_split, prefixes, opened, ahead = known(split), Prefixes(), threading.Semaphore(0), []
    load = Split.open

    def note(self: Split, index: int) -> Image.Image:
        opened.release()
        return load(self, index)

    def compute(images: Tensor) -> Tensor:
        ahead.append(all(opened.acquire(timeout=20) for _ in range(AT_ONCE + 1)) if not ahead else None)
        return prefixes.prefix(images)

    monkeypatch.setattr(Split, "open", note)
    monkeypatch.setattr(prefixes, "compute", compute)
    monkeypatch.setattr(module_under_test, "READ_AT_ONCE", AT_ONCE)  # else these few would be decoded at once
    with FakeDevice():
        extractor = Extractor(prefixes, IDENTITY, tmp_path, 10**9, torch.device("mps"))
        assert_right(extractor.features(verified_split, "train", pipeline()))
    assert ahead == [True, None, None]


def test_features_fit_in_memory_up_to_half_of_what_is_free(
    cache: Cache, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * COUNT * 18 * 4
    for free, kept in [(2 * size, False), (2 * size + 2, True)]:
        monkeypatch.setattr(module_under_test, "free_memory", lambda free=free: free)
        _, found = cache.run(split, RANDOM, views=2)
        assert (found.tables is not None) == kept


def test_too_many_features_for_the_limit_are_refused(tmp_path: Path, split: Split) -> None:
    row = 2 * 3 * 3 * 4
    with pytest.raises(InputError, match=re.escape("features.limit_gb (2.879e-06); raise it, tap a later stage, or")):
        Cache(tmp_path / "features", limit=COUNT * row - 1).run(split)
    assert not list((tmp_path / "features").rglob("*.rows"))
    assert Cache(tmp_path / "features", limit=COUNT * row).run(split)[0] == COUNT


def test_the_limit_holds_for_every_split(tmp_path: Path, split: Split) -> None:
    extractor = Extractor(Prefixes(), IDENTITY, tmp_path / "features", 20 * 72, CPU)
    extractor.features(known(split.subset(range(5))), "train", pipeline())
    with pytest.raises(
        InputError, match=r"features of 35 images, each view counted, take 2\.52e-06 GB, more than features\.limit_gb"
    ):
        extractor.features(known(split), "val", pipeline())


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path, split: Split) -> None:
    cache = Cache(tmp_path / "features", limit=10**6)
    for number in range(3):
        cache.run(split, sha256=str(number))
    for number, folder in enumerate(sorted((tmp_path / "features").iterdir(), key=os.path.getmtime)):
        os.utime(folder, (number, number))
    stored = sum(path.stat().st_size for path in (tmp_path / "features").rglob("*.*"))
    assert cache.run(split, sha256="0")[0] == 0  # now the one used last
    cache.limit = stored + 100
    assert cache.run(split, sha256="new")[0] == COUNT
    assert cache.run(split, sha256="0")[0] == 0
    assert cache.run(split, sha256="2")[0] == 0
    assert cache.run(split, sha256="1")[0] == COUNT


def damaged(folder: Path) -> Split:
    """Of forty images the 4th is cut off, the 9th and the last are the same page of text, and the 13th is empty."""
    data = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(data[: len(data) // 2])
    for name in ("08.png", "39.png"):
        (folder / name).write_bytes(b"<html>not found</html>")
    (folder / "12.png").write_bytes(b"")
    return split_of(folder)


@pytest.mark.parametrize("items", ["default", RANDOM])
def test_bad_images_are_errors(cache: Cache, split: Split, tmp_path: Path, items: str | list[Any]) -> None:
    bad = damaged(tmp_path / "images")
    with pytest.raises(DataError, match=r"^4 of 40 train images cannot be used; .*\n.*03\.png.*\n.*08\.png"):
        cache.run(bad, items)
    assert not list(cache.folder.rglob("*.rows"))  # they are told before anything is computed
    computed, _ = cache.run(bad.subset([index for index in range(COUNT) if index not in (3, 8, 12, 39)]), items)
    assert computed == COUNT - 4


@pytest.mark.parametrize("items", ["default", RANDOM])
def test_bad_images_are_skipped(
    cache: Cache, split: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture, items: str | list[Any]
) -> None:
    good = [index for index in range(COUNT) if index not in (3, 8, 12, 39)]
    views = 2 if items == RANDOM else 1
    bad = damaged(tmp_path / "images")
    for computed in (views * len(good), 0):
        caplog.clear()
        caplog.set_level("INFO", logger="tl_trainer")
        extractor = Extractor(Prefixes(), IDENTITY, cache.folder, cache.limit, CPU)
        found = extractor.features(
            verified(bad, "train", DataSection(on_bad_image="skip"), None), "train", pipeline(items), views
        )
        assert extractor.computed == computed
        assert "left out 4 of 40 train images" in caplog.text
        assert f"features of train: {computed} computed, {views * len(good) - computed} cached" in caplog.text
        assert list(found.split.names) == [bad.names[index] for index in good]
        assert found.targets.tolist() == [bad.targets[index] for index in good]
        assert rows_of(found, views - 1).shape == (36, 2, 3, 3)
        if items == "default":
            assert_right(found)


def test_an_image_that_changes_after_it_was_verified_gives_no_wrong_row(cache: Cache, split: Split) -> None:
    extractor, checked = Extractor(Prefixes(), IDENTITY, cache.folder, cache.limit, CPU), known(split)
    draw(paths_of(split)[6], 300)
    with pytest.raises(ImageError, match=r"06\.png: has changed since it was read first; put it back"):
        extractor.features(checked, "train", pipeline())
    computed, found = cache.run(split)
    assert computed == COUNT
    assert_right(found)


def test_an_image_that_was_rewritten_with_its_time_kept_is_computed_again(
    cache: Cache, split: Split, tmp_path: Path
) -> None:
    """As some editors of metadata do: the time of its last change tells."""
    cache.run(split)
    path = tmp_path / "images" / "06.png"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last checksum, which Pillow does not look at
    path.write_bytes(data)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    computed, found = cache.run(split)
    assert computed == 1
    assert_right(found)
    assert cache.run(split)[0] == 0


def test_nothing_but_bad_images(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index in range(3):
        (tmp_path / "images" / f"{index}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 3 train images can be used"):
        cache.run(split_of(tmp_path / "images"), bad="skip")


def test_images_of_different_sizes_are_told_from_batches_too(cache: Cache, tmp_path: Path) -> None:
    """Each batch may be of one size, and another one of another size."""
    (tmp_path / "images").mkdir()
    for index in range(2 * AT_ONCE):
        size = (12, 12) if index < AT_ONCE else (20, 12)
        Image.new("RGB", size, (index, 0, 0)).save(tmp_path / "images" / f"{index:02}.png")
    with pytest.raises(DataError, match=r"images of different sizes"):
        cache.run(split_of(tmp_path / "images"), [{"Resize": 12}])


def test_a_folder_that_cannot_be_written_is_named_with_its_setting(tmp_path: Path, split: Split) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/features.*features\.dir"):
        Cache(tmp_path / "file" / "features").run(split)


def test_the_folder_is_the_configured_one_or_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert features_folder(FeaturesSection()) == tmp_path / "cache" / "features"
    assert features_folder(FeaturesSection(dir="elsewhere")) == Path("elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert features_folder(FeaturesSection(dir="~/cached")) == tmp_path / "home" / "cached"


@pytest.mark.parametrize("most", [9, 3, 1])
def test_a_full_gpu_computes_fewer_images_at_once_and_says_so_once(
    cache: Cache, split: Split, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    prefixes = Full(most)
    extractor = Extractor(prefixes, IDENTITY, cache.folder, cache.limit, CPU)
    found = extractor.features(known(split), "train", pipeline())
    assert_right(found)
    assert extractor.computed == COUNT
    assert sum(size > most for size in prefixes.sizes) == {9: 1, 3: 3, 1: 4}[most]
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the GPU has too little memory for 16 images at once; going on with fewer"
    ]


def test_a_gpu_without_memory_for_one_image_is_a_sentence(cache: Cache, split: Split) -> None:
    extractor = Extractor(Full(0), IDENTITY, cache.folder, cache.limit, CPU)
    with pytest.raises(RunError, match="the GPU is out of memory with a single image; end other programs") as caught:
        extractor.features(known(split), "train", pipeline())
    assert "--batch-size" not in str(caught.value)


@pytest.fixture
def not_allowed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder another user's, which may be read only. Not by its mode: root may write to it all the same."""

    def forbid(folder: Path) -> None:
        def refusing(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
            def call(path: Any, *arguments: Any, **options: Any) -> Any:
                if Path(path).is_relative_to(folder) and writes(Path(path), *arguments, **options):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return function(path, *arguments, **options)

            return call

        def always(*_: object, **__: object) -> bool:
            return True

        monkeypatch.setattr(Path, "open", refusing(Path.open, lambda _, mode="r", **__: mode not in ("r", "rb")))
        monkeypatch.setattr(Path, "mkdir", refusing(Path.mkdir, lambda path, **_: not path.exists()))
        monkeypatch.setattr(Path, "unlink", refusing(Path.unlink, always))
        for name in ("utime", "truncate"):
            monkeypatch.setattr(os, name, refusing(getattr(os, name), always))
        temporary = tempfile.TemporaryFile
        monkeypatch.setattr(
            tempfile, "TemporaryFile", lambda dir: refusing(lambda path: temporary(dir=path), always)(dir)
        )

    return forbid


@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "only the store"])
def test_of_another_users_features_those_there_are_used_and_the_rest_is_kept_in_memory(
    cache: Cache, split: Split, caplog: pytest.LogCaptureFixture, not_allowed: Callable[[Path], None], whole: bool
) -> None:
    cache.run(split.subset(range(30)))
    (records,) = cache.folder.glob("*/*.keys")
    rows = bytearray(records.with_suffix(".rows").read_bytes())
    rows[1000] ^= 4
    records.with_suffix(".rows").write_bytes(rows)
    stored = {path: path.read_bytes() for path in cache.folder.glob("*/*")}
    not_allowed(cache.folder if whole else records.parent)
    caplog.clear()
    for _ in range(2):
        extractor = Extractor(Prefixes(), IDENTITY, cache.folder, cache.limit, CPU)
        found = extractor.features(known(split), "train", pipeline())
        assert extractor.computed == 11
        assert_right(found)
        assert_right(extractor.features(known(split), "val", pipeline()))
        assert sum("is another user's or read-only" in record.message for record in caplog.records) == 1
        caplog.clear()
    computed = Extractor(Prefixes(), {**IDENTITY, "sha256": "new"}, cache.folder, cache.limit, CPU)
    assert_right(computed.features(known(split), "train", pipeline()))
    assert {path: path.read_bytes() for path in stored} == stored
    assert len(list(cache.folder.glob("*/*.keys"))) == (1 if whole else 2)


def test_a_store_that_may_not_even_be_read_is_not_called_damaged(
    cache: Cache, split: Split, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.run(split)
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "store.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        computed, found = cache.run(split)
    assert computed == COUNT
    assert_right(found)
    assert "cannot be read (Permission denied)" in caplog.text
    assert "damaged" not in caplog.text
    assert cache.run(split)[0] == 0


def test_a_store_that_is_removed_in_between_is_computed_again(cache: Cache, split: Split) -> None:
    cache.run(split)
    for folder in cache.folder.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    computed, found = cache.run(split)
    assert computed == COUNT
    assert_right(found)


def test_a_damaged_row_costs_one(cache: Cache, split: Split, caplog: pytest.LogCaptureFixture) -> None:
    cache.run(split)
    (path,) = cache.folder.glob("*/*.rows")
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    computed, found = cache.run(split)
    assert computed == 1
    assert "1 cached features in" in caplog.text
    assert_right(found)
    assert cache.run(split)[0] == 0


class Waiting(Prefixes):
    """Before each batch from number `stop` on it says so and waits for a word."""

    def __init__(self, stop: int, pipe: Connection) -> None:
        super().__init__()
        self.stop, self.pipe = stop, pipe

    def compute(self, images: Tensor) -> Tensor:
        if self.prefix.calls >= self.stop:
            self.pipe.send("waiting")
            self.pipe.recv()
        return super().compute(images)


def extract(images: Path, cache: Path, stop: int, pipe: Connection) -> None:
    """Send how many features were computed, and all of them."""
    extractor = Extractor(Waiting(stop, pipe), IDENTITY, cache, 10**9, CPU)
    found = extractor.features(known(split_of(images)), "train", pipeline())
    pipe.send((extractor.computed, rows_of(found).numpy()))


def start(images: Path, cache: Path, stop: int) -> tuple[BaseProcess, Connection]:
    """Another process that extracts a folder's features into a cache, once it waits."""
    process, pipe = forked(extract, images, cache, stop)
    assert pipe.recv() == "waiting"
    return process, pipe


def test_two_processes_at_once_both_end_with_the_right_features(cache: Cache, split: Split, tmp_path: Path) -> None:
    started = [start(tmp_path / "images", cache.folder, 0) for _ in range(2)]  # each found that all rows are missing
    for _, pipe in reversed(started):
        pipe.send("go")  # the first batches at the same time, the others after each other
    for process, pipe in started:
        while (said := pipe.recv()) == "waiting":
            pipe.send("go")
        computed, values = said
        assert computed == COUNT
        torch.testing.assert_close(torch.from_numpy(values), expected(split), rtol=0, atol=1e-5)
        process.join()
        assert process.exitcode == 0
    computed, found = cache.run(split)
    assert computed == 0
    assert_right(found)


def test_a_killed_extraction_is_gone_on_with(cache: Cache, split: Split, tmp_path: Path) -> None:
    batches = COUNT // AT_ONCE
    process, _ = start(tmp_path / "images", cache.folder, batches)
    process.kill()
    process.join()
    computed, found = cache.run(split)
    assert computed == COUNT - batches * AT_ONCE
    _, undisturbed = Cache(tmp_path / "another").run(split)
    assert torch.equal(rows_of(found), rows_of(undisturbed))


def test_ctrl_c_keeps_what_was_computed_and_says_so(
    cache: Cache, split: Split, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = Prefixes()
    calls = iter(range(9))

    def compute(images: Tensor) -> Tensor:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return prefixes.prefix(images)

    monkeypatch.setattr(prefixes, "compute", compute)
    extractor = Extractor(prefixes, IDENTITY, cache.folder, cache.limit, CPU)
    with pytest.raises(KeyboardInterrupt):
        extractor.features(known(split), "train", pipeline())
    assert "16 features were computed and are kept: the same command computes only the others" in caplog.text
    computed, _ = cache.run(split)
    assert computed == COUNT - 16


def test_the_views_that_fit_are_counted_where_they_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_trainer.features.free_on", lambda _: 0)
    kept: Any = SimpleNamespace(targets=[0], views=2, take=lambda *_: torch.zeros(1, 8))
    assert views_that_fit(kept, 10, 0, torch.device("cpu")) == 2
    assert views_that_fit(kept, 10, 0, torch.device("cuda")) == 0
