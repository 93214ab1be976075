"""The three commands as a user runs them: train, the files it leaves, evaluate, predict, resume."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import COLOURS, Run, console, draw_split, last_json
from stress import tools
from tl_trainer import assembly, checkpoint, outcome, predict
from tl_trainer.data.images import Decoding
from tl_trainer.feature_store import FeatureStore
from tl_trainer.ground.sealed import save_sealed
from tl_trainer.models import prefix
from tl_trainer.saver import Saver

pytestmark = pytest.mark.usefixtures("without_pictures")

# Pretrained weights cannot be had here; the first layers of a random network tell three colours apart all the same.
SMALL = (
    "model.backbone=shufflenet_v2_x0_5",
    "model.weights=none",
    "model.tap=maxpool",
    "data.workers=0",
    "transforms.train=eval",
    "transforms.eval=[{Resize: [64, 64]}]",
    "train.batch_size=8",
    "train.optimizer.lr=0.02",
    "output.report=false",
)
FILES = {
    "best.pth", "classes.txt", "config.yaml", "last.pth", "metrics.csv", "projector", "projector_config.pbtxt",
    "result.json",
}  # fmt: skip


def _files(run_dir: str | Path) -> set[str]:
    return {path.name for path in Path(run_dir).iterdir() if not path.name.startswith("events.out.tfevents")}


def _trained(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path).trained


def _headline(evaluated: dict[str, Any]) -> dict[str, Any]:
    """What tl-eval has in common with a split's figures in the summary of tl-train."""
    return {key: evaluated[key] for key in ("split", "loss", "top1", "top5", "n")}


def _table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_train_evaluate_predict(tl: Run, colours: Path) -> None:
    draw_split(colours / "test", 3)
    result = last_json(console("train", "--data-dir", colours, "--epochs", 4, "--json", *SMALL))
    run_dir = Path(result["run_dir"])
    assert run_dir == Path("runs/run-1")
    assert _files(run_dir) - {".last.previous.pth"} == FILES  # that is there where a run takes more than 5 seconds
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 1
    assert result["checkpoint"] == str(run_dir / "best.pth")
    assert result["epochs"] == 4
    assert result["val"]["n"] == 12
    assert result["test"]["n"] == 9
    assert result["val"]["top1"] > 0.9
    assert result["val"]["top5"] == 1.0
    assert (run_dir / "classes.txt").read_text() == "blue\ngreen\nred\n"
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["backbone"] == "shufflenet_v2_x0_5"

    header, *rows = _table(run_dir / "metrics.csv")
    assert header == ["epoch", "train_loss", "val_loss", "val_top1", "val_top5", "lr", "seconds"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [float(cell) for cell in rows[result["best_epoch"] - 1][2:5]] == [
        result["val"][name] for name in ("loss", "top1", "top5")
    ]

    evaluated = last_json(tl("eval", "--checkpoint", run_dir / "best.pth", "--split", "val", "--json"))
    assert _headline(evaluated) == {"split": "val", **result["val"]}
    tested = last_json(tl("eval", "--checkpoint", run_dir / "best.pth", "--json"))
    assert _headline(tested) == {"split": "test", **result["test"]}

    picture = colours / "test" / "green" / "00.jpg"
    predicted = console("predict", picture, "--format", "jsonl")
    assert predicted.returncode == 0, predicted.stderr
    assert f"checkpoint: {run_dir / 'best.pth'}" in predicted.stderr
    row = json.loads(predicted.stdout)
    assert row["path"] == str(picture)
    assert row["error"] is None
    assert row["predictions"][0]["label"] == "green"
    assert row["predictions"][0]["index"] == 1
    assert sum(guess["probability"] for guess in row["predictions"]) == pytest.approx(1, abs=1e-4)


def test_the_checkpoint_alone_is_enough(
    tl: Run, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    moved = tmp_path / "elsewhere" / "model.pth"
    moved.parent.mkdir()
    Path("runs/run-1/best.pth").rename(moved)
    picture = Image.open(colours / "val" / "red" / "00.jpg")
    picture.save(tmp_path / "elsewhere" / "red.png")
    for folder in ("runs", "colours"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-gone")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    result = tl("predict", tmp_path / "elsewhere" / "red.png", "--checkpoint", moved, "--topk", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'elsewhere' / 'red.png'}  red ")


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_with_one_seed_have_identical_weights(tl: Run, colours: Path, workers: int) -> None:
    random = "transforms.train=[{RandomResizedCrop: 64}, RandomHorizontalFlip, {ColorJitter: 0.2}]"
    tuned = ("model.tap=penultimate", "model.trainable=conv5", "model.head.dropout=0.3", random)
    arguments = ("--data-dir", colours, "--epochs", 2, "--json", *SMALL, *tuned)
    first = last_json(tl("train", *arguments))
    second = last_json(tl("train", *arguments, f"data.workers={workers}"))
    assert first["val"] == second["val"]
    one, two = (_trained(Path(result["checkpoint"])) for result in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = last_json(tl("train", *arguments, "--seed", 1))
    assert not torch.equal(one["head.1.weight"], _trained(Path(other["checkpoint"]))["head.1.weight"])


def test_resume_after_sigterm_ends_where_an_uninterrupted_run_ends(tl: Run, colours: Path) -> None:
    arguments = ["--data-dir", str(colours), "--epochs", "30", *SMALL, "model.head.dropout=0.3",
                 "transforms.train=[{RandomResizedCrop: 64}]", "output.tensorboard=false"]  # fmt: skip
    whole = last_json(tl("train", *arguments, "--json", "--output", "whole"))
    child = tools.command("train", *arguments, "--output", "cut", logs=Path("logs"), cache=Path("cache"))
    while "\nepoch  3/30" not in child.said():
        assert not child.poll(), child.said()
        time.sleep(0.005)
    child.signal(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    assert "continue with --resume cut/run-1" in child.said()
    stopped = checkpoint.load(Path("cut/run-1/last.pth"))
    assert 3 <= stopped.epoch < 30

    resumed = last_json(tl("train", *arguments, "--json", "--output", "cut", "--resume"))
    assert resumed["run_dir"] == "cut/run-1"
    assert {**resumed, "seconds": 0} == {
        **whole,
        "seconds": 0,
        "run_dir": "cut/run-1",
        "checkpoint": "cut/run-1/best.pth",
    }
    one, two = (_trained(Path(name) / "run-1" / "last.pth") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    logged = [[row[:-1] for row in _table(Path(name, "run-1/metrics.csv"))] for name in ("whole", "cut")]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_last_epoch_is_saved_counts(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    finish = Saver.finish
    monkeypatch.setattr(Saver, "finish", lambda self: (signal.raise_signal(number), finish(self))[1])
    result = tl("train", "--data-dir", colours, "--epochs", 2, *SMALL)
    assert result.returncode == 128 + number
    assert "stopped after the last epoch; runs/run-1/best.pth is complete; --resume runs/run-1 makes" in result.stderr
    assert checkpoint.load(Path("runs/run-1/last.pth")).epoch == 2
    assert last_json(tl("eval", "--checkpoint", "runs/run-1", "--json"))["n"] == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_epoch_says_what_is_saved_and_what_is_not(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(outcome, "write_text", lambda *_: signal.raise_signal(number))
        draw_split(colours / "test", 2)
        stopped = tl("train", "--data-dir", colours, "--epochs", 1, *SMALL)
    assert stopped.returncode == 128 + number
    assert stopped.stderr.splitlines()[-1] == (
        "tl-train: stopped; every epoch is done, the best one in runs/run-1/best.pth; "
        "--resume runs/run-1 makes what is missing, such as the report"
    )
    assert last_json(tl("train", "--resume", "runs/run-1", "--json"))["test"]["n"] == 6


def test_resume_refuses_what_does_not_fit(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    last, best = Path("runs/run-1/last.pth"), Path("runs/run-1/best.pth")
    content = torch.load(last, weights_only=True)
    wider = {key: torch.cat([value, value]) for key, value in content["trained"].items()}
    without = {key: value for key, value in content["resume"].items() if key != "optimizer"}
    moments = {**content["resume"]["optimizer"], "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}}
    cases = [
        ({"trained": wider}, "size mismatch"),
        ({"resume": without}, "'optimizer'"),
        ({"resume": {**content["resume"], "optimizer": moments}}, "the optimizer's exp_avg is (2,), its weight ("),
    ]
    for changed, message in cases:
        save_sealed(last, {**content, **changed})
        refused = tl("train", "--resume", "runs/run-1", "--epochs", 2)
        assert refused.returncode == 2
        assert f"{last}: does not fit this run: " in refused.stderr.splitlines()[-1]
        assert message in refused.stderr.splitlines()[-1]
    best.unlink()
    assert f"{best}: no such file" in tl("train", "--resume", "runs/run-1", "--epochs", 2).stderr


def test_resume_refuses_another_experiment_and_a_finished_run(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    finished = tl("train", "--resume", "runs/run-1")
    assert finished.returncode == 2
    assert "all 1 epochs are done; set train.epochs higher" in finished.stderr
    changed = tl("train", "--resume", "runs/run-1", "--epochs", 2, "train.optimizer.lr=0.5")
    assert changed.returncode == 2
    assert "train.optimizer.lr: 0.02, not 0.5" in changed.stderr
    longer = last_json(tl("train", "--resume", "runs/run-1", "--epochs", 2, "--json"))
    assert longer["epochs"] == 2
    assert len(_table(Path("runs/run-1/metrics.csv"))) == 3


def test_a_folder_without_splits_is_split_and_the_split_is_kept(tl: Run, tmp_path: Path) -> None:
    draw_split(tmp_path / "flat", 10)
    before = sorted(path for path in (tmp_path / "flat").rglob("*"))
    result = last_json(tl("train", "--data-dir", "flat", "--epochs", 2, "--json", *SMALL))
    assert result["val"]["n"] == 6
    splits = [split for _, split in _table(Path("runs/run-1/split.csv"))[1:]]
    assert (splits.count("train"), splits.count("val")) == (24, 6)
    assert sorted(path for path in (tmp_path / "flat").rglob("*")) == before
    draw_split(tmp_path / "more", 1, classes={"blue": COLOURS["blue"]})
    (tmp_path / "more" / "blue" / "00.jpg").rename(tmp_path / "flat" / "blue" / "added.jpg")
    again = last_json(tl("eval", "--checkpoint", "runs/run-1/best.pth", "--json"))
    assert _headline(again) == {"split": "val", **result["val"]}
    everything = last_json(tl("eval", "--checkpoint", "runs/run-1/best.pth", "--split", "all", "--json"))
    assert everything["n"] == 31


def test_predict_takes_files_folders_globs_and_stdin_and_reports_bad_images(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    (colours / "broken.jpg").write_bytes(b"not a picture")
    listed = f"{colours / 'broken.jpg'}\n{colours / 'val' / 'red' / '01.jpg'}\n"
    inputs = (colours / "val" / "red" / "00.jpg", colours / "val" / "green", f"{colours}/val/blue/0[01].jpg", "-")
    result = tl("predict", *inputs, "--format", "jsonl", "--batch-size", 2, stdin=listed)
    assert result.returncode == 1
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["red/00", "green/00", "green/01", "green/02", "green/03", "blue/00", "blue/01", "broken", "red/01"]
    assert [row["path"] for row in rows] == [
        str(colours / ("val" if "/" in name else "") / f"{name}.jpg") for name in names
    ]
    assert [row["error"] is None for row in rows] == [True] * 7 + [False, True]
    assert rows[7]["predictions"] == []
    assert "broken.jpg" in rows[7]["error"]

    table = tl("predict", *inputs[:2], "--format", "csv", "--topk", 2, "--output", "rows.csv")
    assert table.returncode == 0, table.stderr
    assert table.stdout == ""
    header, *cells = _table(Path("rows.csv"))
    assert header == ["path", "label", "predicted", "probability", "class_2", "probability_2", "error"]
    assert [row[0] for row in cells] == [row["path"] for row in rows[:5]]
    assert [row[2] for row in cells] == [row["predictions"][0]["label"] for row in rows[:5]]
    assert {len(row) for row in cells} == {7}
    assert table.stderr.splitlines()[-1] == "5 images: green 4, red 1"
    whole = json.loads(tl("predict", inputs[1], "--format", "json").stdout)
    assert [row["path"] for row in whole] == [row["path"] for row in rows[1:5]]
    monkeypatch.setenv("TL_CHECKPOINT", "runs/run-1/best.pth")
    text = tl("predict", inputs[0], "--topk", 1)
    assert text.stdout.startswith(f"{inputs[0]}  ")
    [_, missing] = csv.reader(io.StringIO(tl("predict", "nofile.jpg", "--format", "csv").stdout))
    assert missing == ["nofile.jpg", *[""] * 7, "nofile.jpg: cannot be read: No such file or directory"]


@pytest.mark.skipif(sys.platform == "win32", reason="nothing says there whether a pipe has a line")
def test_a_row_is_written_before_the_next_path_is_read(tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    paths, rows, seen = sorted((colours / "val" / "red").iterdir())[:3], Path("rows.jsonl"), list[int]()

    def ask() -> None:
        for number, path in enumerate(paths):
            os.write(writing, f"{path}\n".encode())
            until = time.monotonic() + 20
            while not rows.exists() or rows.read_text().count("\n") <= number:
                if time.monotonic() > until:
                    break
                time.sleep(0.01)
            seen.append(rows.read_text().count("\n"))
        os.close(writing)

    asking = threading.Thread(target=ask)
    asking.start()
    words = ["-", "-b", "1", "--format", "jsonl", "--output", str(rows), "--quiet"]
    assert importlib.import_module("tl_trainer.cli.predict").main(words) == 0
    asking.join()
    sys.stdin.close()
    assert seen == [1, 2, 3]


def test_the_frozen_prefix_is_made_before_threads_decode(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.fx replaces the call of every module while it traces, also of those that transform the next images."""
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    happened, load, folded = [], predict.images.load, prefix._folded
    monkeypatch.setattr(predict.images, "load", lambda *given: (happened.append("image"), load(*given))[1])
    monkeypatch.setattr(prefix, "_folded", lambda stages: (happened.append("prefix"), folded(stages))[1])
    result = tl("predict", colours / "val", "--batch-size", 2)
    assert result.returncode == 0, result.stderr
    assert happened == ["prefix"] + 12 * ["image"]


def test_an_image_that_would_become_huge_is_a_bad_image_to_every_command(tl: Run, colours: Path) -> None:
    words = ("--data-dir", colours, "--epochs", 1, *SMALL, "transforms.eval=[{Resize: 64}, {CenterCrop: 64}]")
    last_json(tl("train", *words, "--json"))
    strip = colours / "val" / "red" / "strip.png"
    Image.new("RGB", (100_000, 1)).save(strip)
    complaint = f"{strip}: 100,000 x 1 pixels would be resized to 6,400,000 x 64, more than data.max_megapixels (89.5)"
    for command in (("train", *words), ("eval", "--checkpoint", "runs/run-1")):
        result = tl(*command)
        assert result.returncode == 2
        assert "1 of 13 val images cannot be used" in result.stderr
        assert complaint in result.stderr
    skipped = last_json(tl("eval", "--checkpoint", "runs/run-1", "--on-bad-image", "skip", "--json"))
    assert skipped["n"] == 12
    predicted = tl("predict", strip, colours / "val" / "blue" / "00.jpg", "--format", "jsonl")
    assert predicted.returncode == 1
    assert "1 of 2 images could not be used" in predicted.stderr
    bad, good = map(json.loads, predicted.stdout.splitlines())
    assert bad["error"].startswith(complaint)
    assert good["error"] is None


def test_the_range_of_grey_values_is_the_same_from_training_to_prediction(tl: Run, tmp_path: Path) -> None:
    """A cached feature of another range is not taken, and nothing on top of a checkpoint changes it."""
    generator = np.random.default_rng(0)
    for split, name, index in itertools.product(("train", "val"), ("dark", "light"), range(4)):
        folder = tmp_path / "scans" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 1500, (64, 64)) + 2500 * (name == "light")
        Image.fromarray(pixels.astype(np.uint16)).save(folder / f"{index}.png")
    words = ("--data-dir", "scans", "--epochs", 3, "--lr", 1e-3, "--json", *SMALL)
    plain = tl("train", *words)
    assert plain.stderr.count("no grey value above a quarter of their range") == 1
    assert "warning: 16 of 16 images have no grey value above a quarter of their range" in plain.stderr
    ranged = tl("train", *words, "data.value_range=4095")
    assert "no grey value" not in ranged.stderr
    assert "features of train: 8 computed, 0 cached" in ranged.stderr
    rows = {}
    for run, warned in (("run-1", True), ("run-2", False)):
        predicted = tl("predict", "scans/val", "--checkpoint", f"runs/{run}", "--format", "jsonl")
        assert ("8 of 8 images have no grey value above a quarter" in predicted.stderr) == warned
        assert last_json(tl("eval", "--checkpoint", f"runs/{run}", "--json"))["loss"] == pytest.approx(
            last_json(plain if warned else ranged)["val"]["loss"], abs=1e-5
        )
        rows[run] = predicted.stdout
    assert rows["run-1"] != rows["run-2"]
    refused = tl("predict", "scans/val", "--checkpoint", "runs/run-2", "data.value_range=255")
    assert refused.returncode == 2
    assert "data.value_range: is fixed by the checkpoint" in refused.stderr


def test_how_large_an_image_may_be_is_the_checkpoints_unless_it_is_set(tl: Run, colours: Path) -> None:
    words = ("--data-dir", colours, "--epochs", 1, *SMALL)
    small = tl("train", *words, "data.max_megapixels=0.0016")
    assert small.returncode == 2
    assert "21 of 24 train images cannot be used" in small.stderr
    last_json(tl("train", *words, "data.max_megapixels=0.0019", "--json"))
    Image.new("RGB", (48, 40)).save("large.png")
    refused = tl("predict", "large.png")
    assert refused.returncode == 1
    assert "large.png: 48 x 40 pixels are too many (0.00192 megapixels); scale it down, or raise " in refused.stdout
    assert "data.max_megapixels (0.0019) if it is a photograph" in refused.stdout
    assert tl("predict", "large.png", "data.max_megapixels=120").returncode == 0


def test_keys_are_set_on_top_of_a_checkpoint(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    shutil.rmtree("cache")
    words = ("--checkpoint", "runs/run-1", "--json")
    off = last_json(tl("eval", *words, "features.cache=off"))
    assert _stores("cache/features") == []
    cached = last_json(tl("eval", *words, "features.dir=mine"))
    assert _stores("cache/features") == []
    assert len(_stores("mine")) == 1
    assert cached == {**off, "loss": pytest.approx(off["loss"], abs=1e-5), "calibration": cached["calibration"]}
    picture = colours / "val" / "red" / "00.jpg"
    plain, with_key = (tl("predict", *more, "--checkpoint", "runs/run-1") for more in
                       ([picture], ["features.cache=off", picture, "device=cpu"]))  # fmt: skip
    assert plain.returncode == with_key.returncode == 0
    assert plain.stdout == with_key.stdout


def test_a_file_is_a_file_though_it_is_called_as_a_key(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    words = ("--checkpoint", "runs/run-1", "--format", "jsonl")
    shutil.copyfile(colours / "val" / "red" / "00.jpg", "a=b.jpg")
    shutil.copytree(colours / "val" / "green", "data.root=x")
    result = tl("predict", "a=b.jpg", "features.cache=off", "data.root=x", *words)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line)["path"] for line in result.stdout.splitlines()]
    assert found == ["a=b.jpg", *(f"data.root=x/{number:02}.jpg" for number in range(4))]
    Path("a=b.jpg").unlink()
    gone = tl("predict", "a=b.jpg", colours, *words)
    assert gone.returncode == 2
    assert gone.stderr.startswith("tl-predict: the command line: a: unknown key 'a'")
    named = tl("predict", "./a=b.jpg", *words)
    assert named.returncode == 1
    assert json.loads(named.stdout)["path"] == "./a=b.jpg"


def _stores(folder: str) -> list[Path]:
    return [path for path in Path(folder).glob("*") if path.is_dir()]


def _everything_in(folder: str) -> dict[str, tuple[int, bytes]]:
    """Each file and folder with its time and bytes: a temporary file in a folder moves its time as well."""
    paths = [Path(folder), *Path(folder).rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes()) for path in paths}


def _fill(folder: str) -> None:
    """A store of 2 MB that was not used for long, and a damaged files.sqlite."""
    store = FeatureStore(Path(folder, "0" * 32))
    store.append([bytes([index]) * 32 for index in range(2)], torch.zeros(2, 1 << 18))
    store.close()
    Path(folder, "files.sqlite").write_bytes(b"no database" * 1000)
    for path in (store.folder, Path(folder, "files.sqlite"), Path(folder)):
        os.utime(path, (1, 1))


def test_a_checkpoint_does_not_say_where_features_are_kept_nor_how_many(tl: Run, colours: Path) -> None:
    """It may come from a stranger, and what is kept there would be removed to make room."""
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    best, (own,) = Path("runs/run-1/best.pth"), _stores("cache/features")
    for folder in ("bait", "cache/features"):
        _fill(folder)
    before, limit = _everything_in("bait"), 0.001
    content = torch.load(best, weights_only=True)
    content["config"]["features"] |= {"dir": str(Path("bait").absolute()), "limit_gb": limit}
    save_sealed(best, content)

    draw_split(Path("more"), 4, size=48)
    words = ("--checkpoint", best, "--data-dir", "more", "--split", "all", "--json")
    result = tl("eval", *words)
    assert last_json(result)["n"] == 12
    assert "features of all: 12 computed" in result.stderr
    assert tl("predict", "more", "--checkpoint", best).returncode == 0
    assert _everything_in("bait") == before
    assert sorted(path.name for path in _stores("cache/features")) == sorted(["0" * 32, own.name])

    draw_split(Path("other"), 4, size=56)
    asked = ("features.dir=bait", f"features.limit_gb={limit}")
    last_json(tl("eval", *words, "--data-dir", "other", *asked))  # else the test above showed nothing
    assert not Path("bait", "0" * 32).exists()
    assert _everything_in("bait") != before


def test_a_checkpoint_does_not_make_this_machine_download(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    best = Path("runs/run-1/best.pth")
    content = torch.load(best, weights_only=True)
    content["config"]["data"] |= {"source": "cifar10", "root": "elsewhere", "download": True}
    save_sealed(best, content)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was used"))
    refused = tl("eval", "--checkpoint", best)
    assert refused.returncode == 2
    assert "set data.download: true, or set data.root to where the files are" in refused.stderr
    assert not Path("elsewhere").exists()


def test_a_file_that_has_gone_by_then_still_gets_its_picture(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    words = ("predict", colours / "val", "--batch-size", 5, "--format", "jsonl", "--explain")
    whole, opened, load = tl(*words, "whole"), list[Path](), predict.images.load

    def once(path: Path, decoding: Decoding) -> Image.Image:
        opened.append(path)
        picture = load(path, decoding)
        path.unlink()
        return picture

    monkeypatch.setattr(predict.images, "load", once)
    gone = tl(*words, "gone")
    assert (whole.returncode, gone.returncode) == (0, 0), gone.stderr
    assert gone.stdout == whole.stdout
    assert len(opened) == len(set(opened)) == 12
    pictures = [{path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("whole", "gone")]
    assert len(pictures[0]) == 12
    assert pictures[0] == pictures[1]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quiet_draws_no_bar(colours: Path) -> None:
    def shown(command: str, *words: object) -> str:
        with contextlib.redirect_stderr(_Terminal()) as screen, contextlib.redirect_stdout(io.StringIO()):
            assert importlib.import_module(f"tl_trainer.cli.{command}").main([str(word) for word in words]) == 0
        return screen.getvalue()

    rows = ("--output", "rows.csv", "--format", "csv")
    calls: list[tuple[tuple[object, ...], list[str]]] = [
        (
            ("train", "--data-dir", colours, "--epochs", 1, *SMALL),
            ["checking train images", "checking val images", "train features", "epoch 1/1"],
        ),
        (("eval", "--checkpoint", "runs/run-1"), ["checking val images"]),
        (("predict", colours / "val", "--checkpoint", "runs/run-1", *rows), ["images"]),
    ]
    for (command, *words), bars in calls:
        drawn = shown(str(command), *words)
        assert [name for name in bars if f"{name}: " not in drawn] == []
        shutil.rmtree("cache")  # what was checked and computed is not drawn again
        assert shown(str(command), *words, "--quiet") == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--config", "flowers"], "did you mean 'flowers102.yaml'"),
        (["train", "--data-dir", "nowhere"], "nowhere: no such folder; set data.root or --data-dir"),
        (["train", "model.backbone=resnet512"], "did you mean"),
        (["train", "transforms.train=[RandomRotate]"], "did you mean 'RandomRotation'"),
        (["train", "train.epochs=0"], "the command line: train.epochs: should be 1 or more, not 0"),
        (["train", "--device", "cuda:7"], "CUDA devices; use --device cpu"),
        (["train", "--resume", "nowhere"], "--resume nowhere: no such file; give a run directory or its last.pth"),
        (["train", "--resume"], "no run of this configuration under runs"),
        (
            ["train", "--config", "demo", "--data-dir", "colours"],
            "the command line: data.root: --data-dir has no effect on the demo",
        ),
        (["train", "--config", "demo", "data.root=data", "--dry-run"], "data.root: --data-dir has no effect"),
        (["train", "--dry-run", "model.backbone=nope", "model.tap=nope"], "model.backbone: unknown backbone 'nope'"),
        (["train", "--dry-run", "model.weights=NOPE_V1", "model.tap=nope"], "model.weights: unknown weights"),
        (["train", "--dry-run", "model.weights=NOPE_V1", "model.tap=nope"], "model.tap: unknown tap 'nope'"),
        (["train", "oops"], "'oops' is no folder and no CSV file here, and not key=value"),
        (["eval", "--checkpoint", "colours/val/red/00.jpg"], "damaged or not a PyTorch file"),
        (["eval", "--checkpoint", "nofile.pth"], "nofile.pth: cannot be read: No such file or directory"),
        (["predict", "colours/val"], "no checkpoint: give --checkpoint FILE or set TL_CHECKPOINT"),
    ],
)
def test_a_wrong_input_is_named_in_three_lines_at_most(
    tl: Run, colours: Path, command: list[str], message: str
) -> None:
    result = tl(*command)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert result.stdout == ""
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_bad_images_stop_a_run_before_its_first_epoch_or_are_skipped(tl: Run, colours: Path) -> None:
    whole = (colours / "train" / "red" / "00.jpg").read_bytes()
    (colours / "train" / "red" / "00.jpg").write_bytes(whole[: len(whole) // 2])
    (colours / "train" / "red" / "01.jpg").write_bytes(b"")
    stopped = tl("train", "--data-dir", colours, "--epochs", 1, *SMALL)
    assert stopped.returncode == 2
    assert "2 of 24 train images cannot be used" in stopped.stderr
    assert "00.jpg: damaged image" in stopped.stderr
    assert "01.jpg: empty file" in stopped.stderr
    assert not list(Path("runs").iterdir())
    skipped = tl("train", "--data-dir", colours, "--epochs", 1, *SMALL, "data.on_bad_image=skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "left out 2 of 24 train images" in skipped.stderr


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_an_image_that_changes_between_two_views_is_not_skipped_in_one_of_them(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL, f"features.cache={cache}"))
    original = assembly.evaluate_together

    def then_change(*arguments: Any) -> Any:
        scores = original(*arguments)
        (colours / "val" / "red" / "00.jpg").write_bytes(b"not an image any more")
        return scores

    monkeypatch.setattr(assembly, "evaluate_together", then_change)
    words = ("--checkpoint", "runs/run-1", "--tta", "flip", "--on-bad-image", "skip")
    result = tl("eval", *words)
    assert result.returncode == 2
    assert re.fullmatch(r"tl-eval: .*00\.jpg: has changed since it was read first; .*", result.stderr.splitlines()[-1])
    assert last_json(tl("eval", *words, "--json"))["n"] == 11


def test_unwritable_output_is_refused_before_anything_is_loaded(tl: Run, colours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = tl("train", "--data-dir", colours, "--output", "file/runs", *SMALL)
    assert result.returncode == 2
    assert "cannot write to file/runs" in result.stderr


def test_dry_run_writes_nothing(tl: Run, colours: Path) -> None:
    result = tl("train", "--data-dir", colours, "--dry-run", *SMALL)
    assert result.returncode == 0, result.stderr
    assert "the first batch is 8 x 3 x 64 x 64, its loss " in result.stdout
    assert "\na run takes about " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = last_json(tl("train", "--data-dir", colours, "--dry-run", "--json", *SMALL))
    assert found["first_batch"] == [8, 3, 64, 64]
    assert found["estimate"]["cache_bytes"] in (36 * 24 * 16 * 16 * size for size in (2, 4))
    assert found["estimate"]["memory_bytes"] > found["estimate"]["cache_bytes"]
    assert found["estimate"]["seconds"] >= 0
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
    assert not Path("cache").exists()


def test_no_folder_is_measured_with_the_demo_in_its_place(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    best = Path("runs/run-1/best.pth")
    content = torch.load(best, weights_only=True)
    content["config"]["data"]["source"] = "demo"
    save_sealed(best, content)
    result = tl("eval", "--checkpoint", best, "--data-dir", colours)
    assert result.returncode == 2
    assert result.stderr.startswith("tl-eval: the command line: data.root: --data-dir has no effect on the demo")


def test_checkpoint_classes_are_enforced_in_eval(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    (colours / "val" / "red").rename(colours / "val" / "rouge")
    (colours / "train" / "red").rename(colours / "train" / "rouge")
    result = tl("eval", "--checkpoint", "runs/run-1/best.pth")
    assert result.returncode == 2
    assert "has the unknown class 'rouge'" in result.stderr
    assert "the 3 classes are those of the checkpoint" in result.stderr
    missing = tl("eval", "--checkpoint", "runs/run-1/best.pth", "--split", "test", "--data-dir", "colours-gone")
    assert missing.returncode == 2


@pytest.mark.parametrize("backbone", ["alexnet", "efficientnet_v2_s"])
def test_real_photographs(tl: Run, photos: Path, backbone: str) -> None:
    arguments = ("--config", "imagefolder-alexnet.yaml", "--data-dir", photos, f"model.backbone={backbone}")
    trained = tl(
        "train", *arguments, "model.weights=none", "train.epochs=1", "--json", "transforms.eval=[{Resize: [64, 64]}]"
    )
    result = last_json(trained)
    assert "245 train, 153 val images in 2 classes" in trained.stderr  # a .gif is one of them
    assert result["val"]["n"] == 153
    assert result["val"]["top5"] == 1.0
    evaluated = last_json(tl("eval", "--checkpoint", result["checkpoint"], "--json"))
    assert evaluated["top1"] == result["val"]["top1"]
    picture = photos / "val" / "ants" / "10308379_1b6c72e180.jpg"
    assert tl("predict", picture).returncode == 0
