"""The demo dataset: drawn once, the same bytes in any folder, in a layout that every other command can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tl_trainer.config.data import DataSection
from tl_trainer.data import demo
from tl_trainer.data.drawing import scenes
from tl_trainer.data.sources import open_dataset
from tl_trainer.errors import DataError

FEW = dict.fromkeys(demo.PER_CLASS, 2)


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PER_CLASS", FEW)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has the pictures, for the tests that only read them."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TL_CACHE", str(cache))
        patch.setattr(demo, "PER_CLASS", FEW)
        demo.demo_folder()
    return cache


@pytest.fixture
def drawn(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TL_CACHE", str(cache))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("drawn")
def test_open_dataset_reads_it() -> None:
    dataset = open_dataset(DataSection(source="demo"))
    assert set(dataset.splits) == {"train", "val", "test"}
    assert dataset.classes == sorted(dataset.classes)
    assert len(dataset.classes) > 5  # so that top-1 and top-5 differ
    for split in dataset.splits.values():
        assert len(split) == 2 * len(dataset.classes)
        assert split.open(0).size == (demo.SIZE, demo.SIZE)


@pytest.mark.usefixtures("drawn")
def test_the_splits_do_not_share_pictures() -> None:
    pictures = _bytes(demo.demo_folder())
    assert len(set(pictures.values())) == len(pictures)


@pytest.mark.usefixtures("drawn")
def test_the_classes_of_a_checkpoint_are_enforced() -> None:
    classes = open_dataset(DataSection(source="demo")).classes
    with pytest.raises(DataError, match="has no class 'zebra'"):
        open_dataset(DataSection(source="demo"), [*classes, "zebra"])


@pytest.mark.usefixtures("drawn")
def test_the_same_bytes_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _bytes(demo.demo_folder())
    monkeypatch.setenv("TL_CACHE", str(tmp_path / "another" / "cache"))
    assert demo.demo_folder().is_relative_to(tmp_path / "another")
    assert _bytes(demo.demo_folder()) == first


@pytest.mark.usefixtures("drawn")
def test_it_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo.demo_folder()

    def draw_again(*_: object) -> None:
        pytest.fail("drawn a second time")

    monkeypatch.setattr(demo, "_draw_all", draw_again)
    assert demo.demo_folder() == folder


def test_an_interrupted_drawing_is_not_taken_for_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def interrupted(*arguments: Any) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return scenes(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "scenes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.demo_folder()
    assert len(_bytes(demo.demo_folder())) == 2 * len(demo.PER_CLASS) * len(demo.SHAPES)


def test_another_process_may_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """It drew the same pictures: they are used, and nothing is left beside them."""
    draw_all = demo._draw_all

    def overtaken(draft: Path) -> None:
        draw_all(draft)
        draw_all(draft.with_name(f"demo-v{demo.VERSION}"))

    monkeypatch.setattr(demo, "_draw_all", overtaken)
    folder = demo.demo_folder()
    assert len(_bytes(folder)) == 2 * len(demo.PER_CLASS) * len(demo.SHAPES)
    assert list(folder.parent.iterdir()) == [folder]
