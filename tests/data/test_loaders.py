"""Batches: every image once per epoch, an order and an augmentation that depend on (seed, epoch, image) alone."""

from __future__ import annotations

import errno
import itertools
import math
import multiprocessing
import os
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import FakeDevice, files_of, paths_of
from tl_trainer.config.data import DataSection
from tl_trainer.data import loaders
from tl_trainer.data.dataset import Pictures, Split
from tl_trainer.data.loaders import (
    Batch,
    ImageBatches,
    _Batches,
    _named_deaths,
    batch_order,
    epoch_rows,
    epoch_size,
    worker_count,
)
from tl_trainer.data.transforms import Pipeline, Preprocessing, spell_out
from tl_trainer.data.verify import verified
from tl_trainer.errors import DataError, ImageError, RunError

CPU = torch.device("cpu")
PRESET = Preprocessing(resize=12, crop=8, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
AUGMENTED = [{"RandomCrop": 8}, "RandomHorizontalFlip", {"ColorJitter": [0.4, 0.4, 0.4, 0.1]}, "RandomErasing"]

# Python 3.12 and later warn of any fork while other threads run, and torch's DataLoader forks on Linux.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Eleven different pictures of different sizes."""
    return _split(tmp_path, [(16 + index, 14) for index in range(11)])


def _split(folder: Path, sizes: list[tuple[int, int]]) -> Split:
    paths = []
    for index, (width, height) in enumerate(sizes):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        paths.append(folder / f"{index}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return files_of(paths, [index % 3 for index in range(len(paths))])


def _batches(split: Split, items: str | list[Any] = "default", **options: Any) -> ImageBatches:
    pipeline = Pipeline(spell_out(items, PRESET, train=False), "transforms.train")
    return ImageBatches(split, pipeline, **{"batch_size": 4, "workers": 0, "seed": 5, "shuffle": True, **options})


def _order(batches: list[Batch]) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def _equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left[:3], right[:3], strict=True)
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_every_image_once_per_epoch(split: Split, batch_size: int, shuffle: bool) -> None:
    batches = _batches(split, batch_size=batch_size, shuffle=shuffle)
    found = list(batches.epoch(0, CPU))
    indices = [index for chunk in _order(found) for index in chunk]
    assert sorted(indices) == list(range(11))
    assert (indices == sorted(indices)) == (not shuffle)
    assert len(found) == len(batches)
    assert {len(batch.indices) for batch in found[:-1]} <= {batch_size}
    assert len(found[-1].indices) == (11 % batch_size or batch_size)


def test_a_batch_is_what_the_pipeline_makes_of_its_images(split: Split) -> None:
    batches = _batches(split)
    for batch in batches.epoch(3, CPU):
        assert batch.targets.tolist() == [split.targets[index] for index in batch.indices.tolist()]
        assert batch.inputs.shape == (len(batch.indices), 3, 8, 8)
        for row, index in zip(batch.inputs, batch.indices.tolist(), strict=True):
            alone = batches.pipeline.batch(batches.pipeline.image(split.open(index)).unsqueeze(0))
            assert torch.equal(row, alone[0])


def test_the_order_depends_on_seed_and_epoch_only(split: Split) -> None:
    orders = {
        (seed, epoch): _order(list(_batches(split, seed=seed).epoch(epoch, CPU)))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len({str(order) for order in orders.values()}) == 6
    torch.manual_seed(99)
    assert _order(list(_batches(split, AUGMENTED, seed=1).epoch(2, CPU))) == orders[1, 2]
    assert orders[1, 2] == [rows.tolist() for rows in batch_order(np.arange(11), 4, 1, 2, True)]


@pytest.mark.parametrize("counts", [[50, 1], [4, 4, 4], [7, 3, 1], [1, 0, 9]])
def test_a_balanced_epoch_has_every_class_equally_often(counts: list[int]) -> None:
    targets = [label for label, count in enumerate(counts) for _ in range(count)]
    quota = math.ceil(len(targets) / sum(count > 0 for count in counts))
    epochs = []
    for epoch in range(3):
        rows = [*epoch_rows(targets, 5, epoch, True)]
        assert len(rows) == len({*rows}) == epoch_size(targets, True)
        assert Counter(targets[row % len(targets)] for row in rows) == dict.fromkeys(targets, quota)
        times = Counter(row % len(targets) for row in rows)
        for label, count in enumerate(counts):
            of_class = {times[index] for index, target in enumerate(targets) if target == label}
            assert of_class <= {quota // max(1, count), -(-quota // max(1, count))}
        epochs.append(rows)
    assert epochs[0] == [*epoch_rows(targets, 5, 0, True)]
    assert (epochs[0] != epochs[1]) == (counts != [4, 4, 4])


def test_an_image_that_comes_again_is_drawn_anew(tmp_path: Path) -> None:
    split = replace(_split(tmp_path, [(16, 14)] * 9), targets=[0] * 8 + [1])
    batches = _batches(split, AUGMENTED, balanced=True)
    assert len(batches) == 3  # of four, four and two
    found = list(batches.epoch(0, CPU))
    alone = torch.cat([batch.inputs[batch.targets == 1] for batch in found])
    assert len(alone) == 5
    assert len({tuple(image.flatten().tolist()) for image in alone}) > 1
    assert all((batch.indices == 8).equal(batch.targets == 1) for batch in found)
    assert _equal(list(batches.epoch(0, CPU, start=1)), found[1:])


def test_balanced_batches_find_the_class_that_is_rare() -> None:
    """50 to 1, and the classes overlap: a classifier that saw the rare one as often as the other recalls more of it."""
    generator = torch.Generator().manual_seed(0)
    targets = [0] * 500 + [1] * 10
    labels = torch.tensor(targets)
    points = torch.randn(510, 2, generator=generator) + 2 * labels[:, None]
    fresh = torch.randn(500, 2, generator=generator) + 2
    recalls = []
    for balanced in (False, True):
        model = torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for epoch in range(10):
            for batch in batch_order(epoch_rows(targets, 0, epoch, balanced), 32, 0, epoch, True):
                rows = [row % 510 for row in batch]
                loss = torch.nn.functional.cross_entropy(model(points[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        recalls.append((model(fresh).argmax(dim=1) == 1).double().mean().item())
    assert recalls[0] < 0.75 < 0.85 < recalls[1]


def test_large_seeds_are_seeds_too(split: Split) -> None:
    orders = {str(batch_order(np.arange(11), 4, seed, epoch, True)) for seed in (0, 2**63 - 1) for epoch in range(3)}
    assert len(orders) == 6
    assert len(list(_batches(split, AUGMENTED, seed=2**63 - 1).epoch(10**6, CPU))) == 3


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(49, 48, [49]), (97, 48, [48, 49]), (50, 48, [48, 2]), (48, 48, [48]), (1, 48, [1]), (3, 1, [1, 2])],
)
def test_a_last_batch_that_is_too_small_joins_the_one_before_it_in_the_same_order(
    count: int, batch_size: int, sizes: list[int]
) -> None:
    joined, plain = (batch_order(np.arange(count), batch_size, 3, 1, True, smallest) for smallest in (2, 1))
    assert [len(indices) for indices in joined] == sizes
    assert [*itertools.chain(*joined)] == [*itertools.chain(*plain)]


def test_a_joined_batch_is_counted_as_one_for_any_number_of_workers(split: Split) -> None:
    found = [_batches(split, batch_size=5, workers=workers, smallest=2) for workers in (0, 2)]
    orders = [_order(list(batches.epoch(1, CPU))) for batches in found]
    assert orders[0] == orders[1]
    assert [len(indices) for indices in orders[0]] == [5, 6]
    assert [len(batches) for batches in found] == [2, 2]
    assert _order(list(found[0].epoch(1, CPU, start=1))) == orders[0][1:]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_an_epoch_can_be_entered_at_any_batch(split: Split, start: int) -> None:
    batches = _batches(split, AUGMENTED)
    assert _equal(list(batches.epoch(1, CPU, start=start)), list(batches.epoch(1, CPU))[start:])


def test_augmentation_depends_on_seed_epoch_and_image(split: Split) -> None:
    """Not on the batch that the image is in, and not on what was drawn before."""

    def first_image(seed: int, epoch: int, batch_size: int) -> torch.Tensor:
        torch.manual_seed(batch_size)
        for batch in _batches(split, AUGMENTED, seed=seed, batch_size=batch_size).epoch(epoch, CPU):
            if 0 in batch.indices:
                return batch.inputs[batch.indices.tolist().index(0)]
        raise AssertionError("the image is in no batch")

    assert torch.equal(first_image(0, 0, 3), first_image(0, 0, 8))
    assert not torch.equal(first_image(0, 0, 3), first_image(0, 1, 3))
    assert not torch.equal(first_image(0, 0, 3), first_image(1, 0, 3))


def test_images_of_one_epoch_are_augmented_differently(tmp_path: Path) -> None:
    twins = _split(tmp_path, [(16, 14)])
    [batch] = _batches(twins.subset([0] * 4), AUGMENTED, shuffle=False).epoch(0, CPU)
    assert len({str(image) for image in batch.inputs}) == 4


def test_any_number_of_workers_gives_the_same_batches(split: Split) -> None:
    expected = list(_batches(split, AUGMENTED).epoch(1, CPU))
    for workers in (1, 2):
        assert _equal(list(_batches(split, AUGMENTED, workers=workers).epoch(1, CPU)), expected)


def test_the_workers_of_one_epoch_read_the_next_ones_until_they_are_closed(split: Split) -> None:
    reference, batches = _batches(split, AUGMENTED), _batches(split, AUGMENTED, workers=2)
    others = set(multiprocessing.active_children())

    def workers() -> set[int | None]:
        return {process.pid for process in set(multiprocessing.active_children()) - others}

    found = []
    for epoch in (0, 1, 1, 4):
        assert _equal(list(batches.epoch(epoch, CPU, start=epoch // 4)), list(reference.epoch(epoch, CPU, epoch // 4)))
        found.append(workers())
    assert found == [found[0]] * 4
    assert len(found[0]) == 2
    batches.close()
    assert not workers()
    assert _equal(list(batches.epoch(3, CPU)), list(reference.epoch(3, CPU)))
    next(batches.epoch(2, CPU))  # and is left in the middle
    assert not workers()


class Unending(Pictures):
    """Pictures of which each takes a minute to load, and says when it begins to."""

    def load(self, index: int, expected: bytes = b"", *, draft: bool = False) -> tuple[Image.Image, bytes]:
        os.write(self.dataset, b".")
        time.sleep(60)
        raise AssertionError("nobody stopped it")


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_a_copy_is_only_asynchronous_from_pinned_memory_to_cuda(
    split: Split, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On an Apple GPU such copies of what is freed meanwhile have come out wrong."""
    make, pinned = loaders.DataLoader, []

    def unpinned(*arguments: Any, pin_memory: bool, **options: Any) -> Any:
        pinned.append(pin_memory)
        return make(*arguments, **options)

    monkeypatch.setattr(loaders, "DataLoader", unpinned)
    with FakeDevice() as device:
        assert len(list(_batches(split).epoch(0, torch.device(kind)))) == 3
    assert pinned == [kind == "cuda"]
    assert device.copies == [(kind, kind == "cuda", False)] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_end_with_the_main_process_also_in_the_middle_of_an_image() -> None:
    reader, writer = os.pipe()  # which the workers inherit, so that its end comes with the last of them
    if (pid := os.fork()) == 0:
        try:
            split = Split(Unending(writer), [0, 1], range(2))
            next(_batches(split, batch_size=1, workers=2).epoch(0, CPU))
        finally:
            os._exit(1)
    os.close(writer)
    assert [os.read(reader, 1), os.read(reader, 1)] == [b".", b"."]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert select.select([reader], [], [], 20)[0], "a worker is left"
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("items", ["default", AUGMENTED], ids=["deterministic", "augmented"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(split: Split, items: str | list[Any], workers: int) -> None:
    """Else dropout would differ with the number of images that were augmented before."""
    state = torch.get_rng_state()
    for _ in _batches(split, items, workers=workers).epoch(0, CPU):
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_different_sizes(split: Split, workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(_batches(split, [{"Resize": 12}], workers=workers).epoch(0, CPU))
    message = str(caught.value)
    assert message.startswith("the transforms give images of different sizes ((3, 12, ")
    assert message.endswith("end them with a crop or a Resize to [height, width], e.g. {CenterCrop: 224}")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named_in_one_line(split: Split, workers: int) -> None:
    paths_of(split)[7].unlink()
    with pytest.raises(ImageError) as caught:
        list(_batches(split, AUGMENTED, workers=workers).epoch(0, CPU))
    assert str(caught.value).startswith(f"{paths_of(split)[7]}: cannot be read: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cores", "expected"), [(1, 0), (2, 2), (8, 8), (64, 8)])
def test_worker_count(monkeypatch: pytest.MonkeyPatch, cores: int, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert worker_count("auto") == expected
    assert [worker_count(0), worker_count(3), worker_count(100)] == [0, 3, 100]


def _another_image(path: Path) -> None:
    Image.new("RGB", (16, 14), "red").save(path)


def test_pictures_in_memory_are_verified_too() -> None:
    split = Split(Pictures([(Image.new("RGB", (16, 14)), 0)]), [0], range(1))
    [batch] = _batches(verified(split, "train", DataSection(), None)).epoch(0, CPU)
    assert batch.inputs.shape == (1, 3, 8, 8)


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("replace_", "complaint"),
    [
        (Path.unlink, "cannot be read: No such file or directory"),
        (_another_image, "has changed since it was read first; put it back, or start again"),
        (lambda path: path.write_bytes(b"garbage"), "has changed since it was read first"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (_a_folder, "not an ordinary file"),
        pytest.param(_a_pipe, "not an ordinary file", marks=[
            pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")]),
    ],
)  # fmt: skip
def test_an_image_that_is_replaced_between_two_epochs_is_named(
    split: Split, replace_: Callable[[Path], object], complaint: str, workers: int
) -> None:
    batches = _batches(verified(split, "train", DataSection(), None), workers=workers)
    assert len(list(batches.epoch(0, CPU))) == 3
    replace_(paths_of(split)[4])
    with pytest.raises(ImageError, match=re.escape(f"{paths_of(split)[4]}: {complaint}")):
        list(batches.epoch(1, CPU))


def test_an_image_that_was_written_again_as_it_was_is_the_same(split: Split) -> None:
    batches = _batches(verified(split, "train", DataSection(), None))
    paths_of(split)[4].write_bytes(paths_of(split)[4].read_bytes())
    assert len(list(batches.epoch(1, CPU))) == 3


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "try fewer with --workers"),
        (ConnectionResetError(104, "Connection reset by peer"), "try fewer with --workers"),
        (EOFError(), "try fewer with --workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
        (OSError(errno.ENOSPC, "No space left on device"), "--shm-size"),
    ],
)
def test_a_dead_worker_is_named_with_the_remedy(error: Exception, remedy: str) -> None:
    def dying() -> Iterator[int]:
        yield 1
        raise error

    before = signal.getsignal(signal.SIGCHLD)
    try:
        batches = _named_deaths(dying())
        assert next(batches) == 1
        with pytest.raises(RunError, match=remedy):
            next(batches)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_dead_worker_is_named_in_a_thread_too() -> None:
    """Where the handler of a signal cannot be set, as for whoever trains in a notebook's thread."""

    def dying() -> Iterator[int]:
        yield 1
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    before = signal.getsignal(signal.SIGCHLD)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RunError, match="try fewer with --workers"):
        pool.submit(lambda: list(_named_deaths(dying()))).result()
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("something else"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"),
        OSError(errno.EACCES, "Permission denied"),
    ],
)
def test_another_error_is_passed_on(error: Exception) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise error

    with pytest.raises(type(error), match=re.escape(str(error))):
        list(_named_deaths(failing()))


@pytest.mark.parametrize(
    ("message", "raised", "said"),
    [
        ("unable to write to file </torch_7>: No space left on device (28)", RunError, "--shm-size"),
        ("DefaultCPUAllocator: can't allocate memory", RuntimeError, "can't allocate memory"),
    ],
)
def test_a_worker_that_cannot_hand_over_its_batch_says_why(
    split: Split, monkeypatch: pytest.MonkeyPatch, message: str, raised: type[Exception], said: str
) -> None:
    """The thread that would do it for the worker says nothing, and the run would wait for ever."""

    def fail(tensor: torch.Tensor) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    batches = _Batches(split, _batches(split).pipeline, seed=0)
    assert isinstance(batches[0, np.array([0, 1])], Batch)
    monkeypatch.setattr(loaders, "get_worker_info", lambda: "a worker's")
    with pytest.raises(raised, match=said):
        if isinstance(found := batches[0, np.array([0, 1])], Exception):
            raise found
