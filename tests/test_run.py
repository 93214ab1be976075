"""A run: in which order its parts are made, what it logs to, and that it stops where it is asked to."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest

from tl_trainer import assembly, run
from tl_trainer.assembly import set_up
from tl_trainer.config.load import Loaded, load
from tl_trainer.errors import DataError, Interrupted
from tl_trainer.ground.signals import StopRequest
from tl_trainer.loop import Gather
from tl_trainer.tracking import Tracker

WORDS: list[tuple[str, Any]] = [
    ("model", {"backbone": "alexnet", "weights": "none"}), ("transforms.train", "eval"),
    ("transforms.eval", [{"Resize": [64, 64]}]), ("train.epochs", 2), ("train.batch_size", 8),
    ("data.workers", 0), ("output.report", False), ("output.tensorboard", False),
]  # fmt: skip


@pytest.fixture
def loaded(colours: Path) -> Loaded:
    return load(None, [("data.root", str(colours)), *WORDS])


def test_images_are_verified_before_anything_is_built_and_once_each(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    verified, build = assembly.verified, assembly.build_backbone

    def note_split(split: Any, what: str, *arguments: Any) -> Any:
        happened.append(what)
        return verified(split, what, *arguments)

    def note_backbone(*arguments: Any) -> Any:
        happened.append("backbone")
        return build(*arguments)

    monkeypatch.setattr(assembly, "verified", note_split)
    monkeypatch.setattr(assembly, "build_backbone", note_backbone)
    run.train(loaded, None, StopRequest())
    assert happened == ["train", "val", "backbone"]


def test_a_run_that_cannot_begin_leaves_no_folder(loaded: Loaded, colours: Path) -> None:
    (colours / "val" / "red" / "00.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 12 val images cannot be used"):
        run.train(loaded, None, StopRequest())
    assert not list(Path("runs").iterdir())


def test_a_single_last_image_does_not_end_a_run_whose_batch_norm_trains(colours: Path) -> None:
    """24 images in batches of 23, of which 1 x 1 pixels are left at the end of the network."""
    words = [
        *WORDS, ("model", {"backbone": "shufflenet_v2_x0_5", "weights": "none", "trainable": "conv5"}),
        ("transforms.eval", [{"Resize": [32, 32]}]), ("train.batch_size", 23),
    ]  # fmt: skip
    assert run.train(load(None, [("data.root", str(colours)), *words]), None, StopRequest())["epochs"] == 2


def test_every_option_of_the_step_reaches_it(loaded: Loaded, colours: Path) -> None:
    options = {
        "optimizer": {
            "name": "adamw", "betas": [0.5, 0.9], "weight_decay": 0.1, "decay": "weights", "layer_decay": 0.5,
        },
        "clip_norm": 0.25, "accumulate": 2, "batch_size": 8, "freeze_batchnorm": True,
    }  # fmt: skip
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "trainable": "conv5"}
    setup = set_up(load(None, [("data.root", str(colours)), *WORDS, ("model", model), ("train", options)]))
    state = setup.new_state(3)
    groups = state.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1e-3, 0.1, 1), (1e-3, 0.0, 1), (5e-4, 0.1, 1),  # head, its bias, the convolution; its BatchNorm is frozen
    ]  # fmt: skip
    assert groups[0]["betas"] == (0.5, 0.9)
    training = run.new_training(setup, {"train": setup.feeds()["train"]}, state, lambda: None)
    assert (training.step.clip_norm, training.step.gather) == (0.25, Gather(state, 3, 2))


class StopsAfter(StopRequest):
    """Asks for the end of the run when it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    @property
    def signal(self) -> int | None:
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None

    @signal.setter
    def signal(self, number: int | None) -> None:
        assert number is None


@pytest.mark.parametrize("looks", [1, 4, 7])
def test_a_stop_request_is_looked_at_after_every_batch(loaded: Loaded, looks: int) -> None:
    """Three batches of training and one of validation in an epoch."""
    with pytest.raises(Interrupted, match=r"^stopped; continue with --resume runs/run-1$") as stopped:
        run.train(loaded, None, StopsAfter(looks - 1))
    assert stopped.value.exit_code == 143
    rows = Path("runs/run-1/metrics.csv").read_text().splitlines()[1:]
    assert len(rows) == (looks - 1) // 4
    assert Path("runs/run-1/last.pth").exists()


def test_the_workers_end_with_the_run_that_raises(loaded: Loaded, colours: Path) -> None:
    """Those of the validation split too, while the error still holds on to all that the run had."""
    others = set(multiprocessing.active_children())
    words = [("data.root", str(colours)), *WORDS, ("data.workers", 2), ("features.cache", "off")]
    with pytest.raises(Interrupted) as stopped:
        run.train(load(None, words), None, StopsAfter(6))
    assert stopped.value.__traceback__ is not None
    assert set(multiprocessing.active_children()) <= others


def test_a_run_logs_to_the_tracker_that_it_is_given(loaded: Loaded) -> None:
    made: list[Tracker] = []

    def make(*arguments: Any, **options: Any) -> Tracker:
        made.append(Tracker(*arguments, **options))
        return made[-1]

    result = run.train(loaded, None, StopRequest(), make)
    assert [tracker.path for tracker in made] == [Path(result["run_dir"], "metrics.csv")]


def test_a_dry_run_reads_images_and_writes_nothing(loaded: Loaded, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run.dry_run(loaded)["first_batch"] == [8, 3, 64, 64]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_second_run_reads_no_image_that_it_need_not(
    loaded: Loaded, colours: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """Also without the feature cache: what was verified is remembered, so each file is opened once an epoch only."""
    import os
    import time

    from tl_trainer.data import images

    old = time.time() - 60
    for path in colours.rglob("*.jpg"):
        os.utime(path, (old, old))
    words = [("data.root", str(colours)), *WORDS, ("features.cache", cache), ("train.epochs", 1)]
    run.train(load(None, words), None, StopRequest())
    opened: list[str] = []
    read = images.read

    def counted(path: Path) -> bytes:
        opened.append(str(path))
        return read(path)

    monkeypatch.setattr(images, "read", counted)
    run.train(load(None, words), None, StopRequest())
    assert len(opened) == 1 + (0 if cache == "auto" else 24 + 12)  # the one tells the size of the images
