"""A run: in which order its parts are made, what it logs to, and that it stops where it is asked to."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

import tl_trainer
from tl_trainer import assembly, checkpoint, run, search
from tl_trainer.assembly import set_up
from tl_trainer.config.load import Loaded, load
from tl_trainer.data import verify
from tl_trainer.errors import DataError, InputError, Interrupted
from tl_trainer.features import FeatureBatches
from tl_trainer.ground.signals import StopRequest
from tl_trainer.loop import Gather
from tl_trainer.optim import Soup
from tl_trainer.resume import resume
from tl_trainer.tracking import Tracker

WORDS: list[tuple[str, Any]] = [
    ("model", {"backbone": "timm/test_resnet", "weights": "none"}), ("transforms.train", "eval"),
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
    verified, build = verify.verified, assembly.new_classifier

    def note_split(split: Any, what: str, *arguments: Any) -> Any:
        happened.append(what)
        return verified(split, what, *arguments)

    def note_classifier(*arguments: Any, **options: Any) -> Any:
        happened.append("classifier")
        return build(*arguments, **options)

    monkeypatch.setattr(verify, "verified", note_split)
    monkeypatch.setattr(assembly, "new_classifier", note_classifier)
    run.train(loaded, None, StopRequest())
    assert happened == ["train", "val", "classifier"]


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
            "head_lr": 0.01,
        },
        "clip_norm": 0.25, "mixup": 0.3, "sampler": "balanced", "accumulate": 2, "batch_size": 8,
        "freeze_batchnorm": True,
    }  # fmt: skip
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "trainable": "conv5"}
    setup = set_up(load(None, [("data.root", str(colours)), *WORDS, ("model", model), ("train", options)]))
    state = setup.new_state(3)
    groups = state.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.01, 0.1, 1), (0.01, 0.0, 1), (5e-4, 0.1, 1),  # head, its bias, the convolution; its BatchNorm is frozen
    ]  # fmt: skip
    assert groups[0]["betas"] == (0.5, 0.9)
    training = run.new_training(setup, {"train": setup.feeds()["train"]}, state, lambda: None)
    assert isinstance(training.feed.batches, FeatureBatches)
    assert training.feed.batches.balanced
    assert (training.step.clip_norm, training.step.gather) == (0.25, Gather(state, 3, 2))
    assert training.step.mix is not None
    assert [(type(way), way.alpha, way.num_classes) for way in training.step.mix.ways] == [(v2.MixUp, 0.3, 3)]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_of_the_best_epochs_is_kept_where_it_is_no_worse(
    colours: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sign: int
) -> None:
    """Here it is made to be the best epoch itself, or that with the sign of its weights changed."""
    monkeypatch.setattr(Soup, "mean", lambda soup: {key: sign * value for key, value in soup.kept[0][2].items()})
    caplog.set_level("INFO", logger="tl_trainer.run")
    train = {"epochs": 4, "soup": 2, "batch_size": 8, "best": "loss"}
    words = [("data.root", str(colours)), *WORDS, ("train", train), ("output.report", True)]
    result = run.train(load(None, words), None, StopRequest())
    last = checkpoint.load(Path(result["run_dir"], "last.pth"))
    assert last.resume is not None
    (first, figures, tensors), (second, *_) = last.resume["soup"]
    best = checkpoint.load(Path(result["checkpoint"]))
    assert all(torch.equal(best.trained[key], value) for key, value in tensors.items())
    assert best.metrics == figures
    assert result.get("soup") == (sorted([first, second]) if sign == 1 else None)
    assert (best.epoch, result["best_epoch"]) == ((4, 4) if sign == 1 else (first, first))
    earlier, later = sorted([first, second])
    weights = f"those of epoch {first}" if sign == -1 else f"the mean of those of epochs {earlier}, {later}"
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert f"The weights are {weights}, the best by loss on the validation images." in page
    said = "no worse, so it is best.pth" if sign == 1 else f"no better than epoch {first}, which is best.pth"
    assert any(line.startswith("mean of the weights of epochs ") and line.endswith(said) for line in caplog.messages)


HEAD = {"trainable": "head", "search": "auto"}
PHASES: dict[str, dict[str, Any]] = {
    "found": {"phases": [HEAD, {"trainable": "conv5"}, {"trainable": "stage4.2", "epochs": 1}]},
    "trained": {
        "phases": [{"trainable": "head", "augment": False}, {"trainable": "conv5"}],
        "accumulate": 2,
        "ema": {"decay": 0.9},
    },
}


def phased(colours: Path, which: str, folder: str = "runs") -> Loaded:
    """A run in phases; a head that is trained has dropout."""
    head = {} if which == "found" else {"dropout": 0.3}
    train = {"epochs": 2, "optimizer": {"name": "adamw", "layer_decay": 0.8}, "schedule": {"name": "cosine"}}
    words = [
        ("data.root", str(colours)), *WORDS, ("output.dir", folder), ("features.dir", "cache"),
        ("model", {"backbone": "shufflenet_v2_x0_5", "weights": "none", "head": head}),
        ("transforms.train", [{"RandomResizedCrop": 64}]), ("train", {**train, "batch_size": 8, **PHASES[which]}),
    ]  # fmt: skip
    return load(None, words)


def same_ends(one: Path, other: Path) -> None:
    for name in ("best.pth", "last.pth"):
        first, second = checkpoint.load(one / name), checkpoint.load(other / name)
        assert first.trained.keys() == second.trained.keys()
        assert all(torch.equal(value, second.trained[key]) for key, value in first.trained.items())
        assert (first.epoch, first.metrics, first.config["model"]) == (
            second.epoch,
            second.metrics,
            second.config["model"],
        )
    rows = [[row.rsplit(",", 1)[0] for row in (run / "metrics.csv").read_text().splitlines()] for run in (one, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("which", PHASES)
def test_phases_are_one_run_that_can_be_stopped_anywhere(
    colours: Path, which: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "scalings_for", lambda _: [search.UNIT])  # fewer, and another head
    caplog.set_level("INFO", logger="tl_trainer")
    whole = run.train(phased(colours, which), None, StopRequest())
    run_dir = Path(whole["run_dir"])
    assert whole["epochs"] == 4
    assert len((run_dir / "metrics.csv").read_text().splitlines()) == 1 + 4
    assert (run_dir / "search.csv").exists() == (which == "found")
    count = len(PHASES[which]["phases"])
    assert [line.split(":")[0] for line in caplog.messages if line.startswith("phase ")] == [
        f"phase {number} of {count}" for number in range(1, count + 1)
    ]
    computed = [line for line in caplog.messages if line.startswith("features of train: ")]
    assert [int(line.split()[3]) for line in computed] == [24, 48, 24][:count]  # two views, one view
    averages = [line for line in caplog.messages if line.startswith("average of the weights: val ")]
    assert len(averages) == (4 if which == "trained" else 0)
    assert tl_trainer.load(run_dir).evaluate("val")["top1"] == whole["val"]["top1"]

    with pytest.raises(InputError, match="all phases of the run are done"), resume(str(run_dir), None, []):
        pass
    looks = [3, 8] if which == "trained" else [42, 45, 52]  # after a batch, a phase, a validation
    for number, look in enumerate(looks):
        folder = f"stopped-{number}"
        try:
            run.train(phased(colours, which, folder), None, StopsAfter(look))
        except Interrupted:
            with resume(f"{folder}/run-1", None, []) as (loaded, resumption):
                run.train(loaded, resumption, StopRequest())
        else:
            pytest.fail(f"the run ended before look {look}")
        same_ends(Path(folder, "run-1"), run_dir)


def test_a_phase_that_ends_early_hands_over_to_the_next(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss falls by 10: each phase ends after its second epoch."""
    phases = [{"trainable": "head", "augment": False, "epochs": 5}, {"trainable": "conv5", "epochs": 4}]
    stop = {"metric": "loss", "patience": 1, "min_delta": 10.0}
    train = {"epochs": 9, "phases": phases, "stop": stop, "best": "loss"}
    monkeypatch.setitem(PHASES, "early", train)
    whole = run.train(phased(colours, "early"), None, StopRequest())
    assert whole["epochs"] == 4
    rows = [line.split(",") for line in Path(whole["run_dir"], "metrics.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("val_loss")]) for row in rows[1:]]
    assert whole["best_epoch"] == 1 + losses.index(min(losses))
    with pytest.raises(Interrupted):
        run.train(phased(colours, "early", "stopped"), None, StopsAfter(16))  # in the fourth epoch
    with resume("stopped/run-1", None, []) as (loaded, resumption):
        assert resumption.progress.epoch == 3
        run.train(loaded, resumption, StopRequest())
    same_ends(Path("stopped/run-1"), Path(whole["run_dir"]))


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
