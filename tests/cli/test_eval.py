"""tl-eval on data that is not quite what the checkpoint was trained on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from conftest import COLOURS, Run, draw_split, last_json
from test_end_to_end import SMALL

pytestmark = pytest.mark.usefixtures("without_pictures", "own_logging")


@pytest.fixture
def run_dir(tl: Run, colours: Path) -> Path:
    """A run on blue, green and red."""
    return Path(last_json(tl("train", "--data-dir", colours, "--epochs", 2, "--json", *SMALL))["run_dir"])


def test_classes_that_are_absent_are_named_and_the_others_evaluated(tl: Run, run_dir: Path, tmp_path: Path) -> None:
    few = {name: COLOURS[name] for name in ("blue", "red")}
    draw_split(tmp_path / "new", 2, size=43, classes=few)
    (tmp_path / "new" / "green").mkdir()
    done = tl("eval", "--checkpoint", run_dir, "--data-dir", "new", "--json")
    found = last_json(done)
    assert (found["n"], found["balanced_accuracy"]) == (4, found["top1"])
    assert "has no image of 'green'; recalls and balanced accuracy are over the other classes" in done.stderr


def test_other_classes_are_refused_unless_they_are_ignored(tl: Run, run_dir: Path, tmp_path: Path) -> None:
    draw_split(tmp_path / "new", 2, size=43, classes={**COLOURS, "black": (0, 0, 0)})
    words = ("eval", "--checkpoint", run_dir, "--data-dir", "new")
    refused = tl(*words)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("tl-eval: new has the unknown class 'black'; the 3 classes are")
    done = tl(*words, "--ignore-extra", "--json")
    assert last_json(done)["n"] == 6
    assert "new: classes that the checkpoint does not have are left out: black" in done.stderr


def test_nothing_but_other_classes_is_refused(tl: Run, run_dir: Path, tmp_path: Path) -> None:
    draw_split(tmp_path / "new", 1, classes={"black": (0, 0, 0)})
    done = tl("eval", "--checkpoint", run_dir, "--data-dir", "new", "--ignore-extra")
    assert done.returncode == 2
    assert "new: nothing to evaluate: no image of the checkpoint's classes (blue, green, red)" in done.stderr


@pytest.mark.parametrize("words", [["--checkpoint", "runs"], ["runs"], ["runs/run-1"], ["runs/run-1/best.pth"], []])
def test_a_run_may_be_given_as_a_word_and_the_newest_one_is_found(tl: Run, run_dir: Path, words: list[str]) -> None:
    done = tl("eval", *words, "--json", "features.cache=off")
    assert last_json(done)["n"] == 12
    said = f"checkpoint: {run_dir / 'best.pth'} (val top-1 100.0%)" in done.stderr
    assert said == ("run-1" not in "".join(words))


def test_copies_of_training_images_are_named(tl: Run, run_dir: Path, colours: Path) -> None:
    shutil.copyfile(colours / "train" / "red" / "03.jpg", colours / "val" / "red" / "copy.jpg")
    for path in colours.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))  # what has just been written is not remembered
    words = ("--data-dir", colours, "--epochs", 1, "--output", "again", *SMALL)
    assert tl("train", *words).returncode == 0
    done = tl("eval", run_dir)
    assert "1 of 24 train images are in val too, e.g. train/red/03.jpg is val/red/copy.jpg; the network" in done.stderr
