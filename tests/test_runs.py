"""Run directories: which one is meant, and the table of all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from conftest import Run
from tl_trainer.config.load import load, to_yaml
from tl_trainer.errors import InputError
from tl_trainer.runs import best_of, table

EVAL = {"transforms.train": "eval"}  # as in default.yaml
USUAL = load(None).config.model_dump(mode="json")


def _run(name: str, age: int, top1: float | None, **settings: object) -> Path:
    """A run directory `runs/<name>` whose best.pth is so many seconds old; top1 is None for one that has not ended."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "best.pth").touch()
    os.utime(folder / "best.pth", (1e9 - age, 1e9 - age))
    (folder / "config.yaml").write_text(to_yaml(load(None, settings.items()).config))
    if top1 is not None:
        (folder / "result.json").write_text(json.dumps({"val": {"top1": top1}, "seconds": 75.2}))
    return folder


def test_of_a_folder_of_runs_the_newest_that_has_ended_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tl_trainer")
    failed = _run("b-2", 0, None)
    assert best_of(Path("runs")) == failed / "best.pth"  # better than none
    older, newer = _run("a-1", 20, 0.75), _run("b-1", 10, 0.5)
    assert best_of(Path("runs")) == newer / "best.pth"
    assert best_of(older) == best_of(older / "best.pth") == older / "best.pth"
    assert caplog.messages == [
        "checkpoint: runs/b-2/best.pth (its run has not ended)",
        "checkpoint: runs/b-1/best.pth (val top-1 50.0%)",
    ]


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no best\.pth in it, nor in a folder in it; give a run directory"):
        best_of(tmp_path)


def test_a_damaged_result_is_one_of_a_run_that_has_not_ended() -> None:
    (_run("a-1", 0, 0.5) / "result.json").write_text("{")
    (_run("b-1", 0, 0.5) / "result.json").write_text("[]")
    assert [line.split()[-2:] for line in table("*", USUAL)[1:]] == [["not", "ended"]] * 2


@pytest.mark.parametrize(
    "damaged", ["a: [", "", "- a", "model:\ndata: {source: csv}", "train: {lr: 2026-01-01}\nmodel: 3"]
)
def test_a_damaged_configuration_ends_no_list(damaged: str) -> None:
    (_run("a-1", 0, 0.5) / "config.yaml").write_text(damaged)
    assert [line.split()[0] for line in table("*", USUAL)] == ["run", "runs/a-1"]


def test_settings_are_cut_and_move_no_cursor() -> None:
    _run("a-1", 0, 0.5, **{"model.weights": "w" * 90, "model.tap": "a\x1b[31mb"})
    settings = table("*", USUAL)[1].split()[-2:]
    assert settings == [f"model.weights={'w' * 31}…", "model.tap=a\\x1b[31mb"]


def test_the_runs_are_listed_beside_each_other(tl: Run, own_logging: None) -> None:
    _run("photos-1", 20, 0.9375, **{"data.root": "my/photos", "train.epochs": 3, **EVAL})
    _run(
        "breeds-1",
        10,
        None,
        **{"data.source": "csv", "data.root": "d", "model.backbone": "timm/vit_small_patch16", **EVAL},
    )
    done = tl("train", "--list", "runs")
    assert done.stdout == (
        "run            data          backbone                val    test  time       settings\n"
        "runs/breeds-1  d/labels.csv  timm/vit_small_patch16               not ended\n"
        "runs/photos-1  my/photos     efficientnet_lite0      93.8%        0:01:15    train.search=off train.epochs=3\n"
    )
    assert tl("train", "--list", "runs", "runs/p*").stdout.count("\n") == 2
    assert "--list runs q*: nothing matches" in tl("train", "--list", "runs", "q*").stderr
