"""What a run logs: the columns of metrics.csv and TensorBoard's tags, and how both go on after a resume.

The event files are read back with TensorBoard's own reader.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tl_trainer.errors import RunError
from tl_trainer.metrics import Figures, Scores
from tl_trainer.tracking import GAP, Tracker, bar, graph_of, picture_grid

CLASSES = ["ant", "bee", "a $name$ <b>"]
TAGS = {"train/loss", "val/loss", "val/top1", "val/top5", "lr", "time/images_per_second"}


@contextmanager
def tracking(run_dir: Path, *, tensorboard: bool = True, done: int = 0) -> Iterator[Tracker]:
    tracker = Tracker(run_dir, CLASSES, tensorboard=tensorboard, done=done)
    try:
        yield tracker
    finally:
        tracker.close()


def log_epochs(tracker: Tracker, epochs: range, loss: float = 1.0) -> None:
    for epoch in epochs:
        tracker.epoch(epoch, 9, loss / epoch, Figures(0.5 / epoch, 0.25, 0.75, 8), 0.01, 2.0, 60)


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def events(run_dir: Path) -> Any:
    """TensorBoard's reader of all event files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return reader.Reload()


def points(reader: Any, tag: str) -> dict[int, float]:
    found = [(event.step, event.value) for event in reader.Scalars(tag)]
    assert len(dict(found)) == len(found), "two points at one step"
    return dict(found)


def test_metrics_csv_has_one_row_per_epoch(tmp_path: Path) -> None:
    with tracking(tmp_path, tensorboard=False) as tracker:
        assert (tmp_path / "metrics.csv").read_text() == "epoch,train_loss,val_loss,val_top1,val_top5,lr,seconds\n"
        tracker.epoch(1, 2, 1.5, Figures(0.7, 0.25, 0.875, 8), 0.001, 3.14159, 60)
        tracker.epoch(2, 2, 1.25, Figures(0.1 + 0.2, 1.0, 1.0, 8), 1e-5, 3.0, 60)
    assert (tmp_path / "metrics.csv").read_bytes().decode() == (
        "epoch,train_loss,val_loss,val_top1,val_top5,lr,seconds\n"
        "1,1.5,0.7,0.25,0.875,0.001,3.142\n"
        "2,1.25,0.30000000000000004,1.0,1.0,1e-05,3.0\n"
    )


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_rows_of_epochs_that_are_trained_again_are_dropped(tmp_path: Path, done: int) -> None:
    with tracking(tmp_path, tensorboard=False) as tracker:
        log_epochs(tracker, range(1, 4))
    with tracking(tmp_path, tensorboard=False, done=done) as tracker:
        assert [row["epoch"] for row in rows(tmp_path)] == [str(epoch) for epoch in range(1, done + 1)]
        log_epochs(tracker, range(done + 1, 5), loss=7.0)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]
    assert [row["train_loss"] for row in rows(tmp_path)] == [
        str((1.0 if epoch <= done else 7.0) / epoch) for epoch in range(1, 5)
    ]


def test_a_row_that_was_cut_is_dropped(tmp_path: Path) -> None:
    with tracking(tmp_path, tensorboard=False) as tracker:
        log_epochs(tracker, range(1, 3))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,0.3")
    with tracking(tmp_path, tensorboard=False, done=2):
        assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]


def test_tensorboard_has_exactly_the_documented_tags(tmp_path: Path) -> None:
    with tracking(tmp_path) as tracker:
        tracker.start("seed: 0\nmodel: {backbone: alexnet}\n", [("features.0", "Conv2d(3, 64)", False)])
        tracker.images(torch.rand(3, 3, 20, 30), ["ant", "bee", "bee"])
        log_epochs(tracker, range(1, 3))
    reader = events(tmp_path)
    tags = reader.Tags()
    assert set(tags["scalars"]) == TAGS
    assert tags["images"] == ["train/images"]
    assert tags["tensors"] == ["config/text_summary"]
    assert tags["graph"]
    assert not tags["histograms"]
    assert not tags["audio"]


def test_the_points_are_the_rows(tmp_path: Path) -> None:
    with tracking(tmp_path) as tracker:
        log_epochs(tracker, range(1, 4))
    reader = events(tmp_path)
    for column, tag in [
        ("train_loss", "train/loss"), ("val_loss", "val/loss"), ("val_top1", "val/top1"), ("val_top5", "val/top5"),
        ("lr", "lr"),
    ]:  # fmt: skip
        expected = {int(row["epoch"]): float(row[column]) for row in rows(tmp_path)}
        assert points(reader, tag) == pytest.approx(expected, rel=1e-6)
    assert points(reader, "time/images_per_second") == {1: 30.0, 2: 30.0, 3: 30.0}


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_points_of_epochs_that_are_trained_again_are_dropped(tmp_path: Path, done: int) -> None:
    with tracking(tmp_path) as tracker:
        tracker.start("seed: 0\n", [])
        tracker.images(torch.rand(1, 3, 8, 8), ["ant"])
        log_epochs(tracker, range(1, 4))
    with tracking(tmp_path, done=done) as tracker:
        log_epochs(tracker, range(done + 1, 4), loss=7.0)
    reader = events(tmp_path)
    expected = {epoch: (1.0 if epoch <= done else 7.0) / epoch for epoch in range(1, 4)}
    assert points(reader, "train/loss") == pytest.approx(expected)
    assert reader.Tags()["images"] == ["train/images"]
    assert reader.Tags()["tensors"] == ["config/text_summary"]


def test_the_configuration_is_logged_as_it_stands(tmp_path: Path) -> None:
    with tracking(tmp_path) as tracker:
        tracker.start("seed: 0\nname: <b>\n", [])
    (event,) = events(tmp_path).Tensors("config/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "```yaml\nseed: 0\nname: <b>\n```"


def test_the_graph_is_the_chain_of_stages(tmp_path: Path) -> None:
    graph = graph_of([("features.0", nn.Conv2d(3, 64, 11)), ("features.1", nn.ReLU())], trained=False)
    graph += graph_of([("head", nn.Linear(64, 2))], trained=True)
    with tracking(tmp_path) as tracker:
        tracker.start("", graph)
    nodes = events(tmp_path).Graph().node
    assert [(node.name, node.op, list(node.input)) for node in nodes] == [
        ("image", "Input", []),
        ("features/0", "Conv2d", ["image"]),
        ("features/1", "ReLU", ["features/0"]),
        ("head", "Linear", ["features/1"]),
    ]
    assert [node.attr["trained"].b for node in nodes[1:]] == [False, False, True]
    assert b"kernel_size=(11, 11)" in nodes[1].attr["what"].s


def test_the_images_are_those_that_were_given(tmp_path: Path) -> None:
    batch = torch.stack([torch.full((3, 40, 50), shade) for shade in (0.0, 0.4, 1.0)])
    with tracking(tmp_path) as tracker:
        tracker.images(batch, ["ant", "bee", "a name that is far too long for its picture"])
    (event,) = events(tmp_path).Images("train/images")
    grid = Image.open(io.BytesIO(event.encoded_image_string))
    assert event.step == 0
    assert (
        grid.tobytes() == picture_grid(batch, ["ant", "bee", "a name that is far too long for its picture"]).tobytes()
    )
    assert [grid.getpixel((x, 20)) for x in (10, 60, 110)] == [(0,) * 3, (102,) * 3, (255,) * 3]


@pytest.mark.parametrize(("count", "columns", "lines"), [(1, 1, 1), (8, 8, 1), (9, 8, 2), (16, 8, 2)])
def test_a_grid_has_a_caption_below_each_picture(count: int, columns: int, lines: int) -> None:
    grid = picture_grid(torch.zeros(count, 3, 10, 12), [f"{index}" for index in range(count)])
    height = grid.height // lines
    assert grid.width == columns * 12 + (columns - 1) * GAP
    assert height > 10
    for index in range(count):
        x, y = index % columns * (12 + GAP), index // columns * height
        assert grid.crop((x, y, x + 12, y + 10)).getextrema() == ((0, 0),) * 3
        darkest, brightest = grid.crop((x, y + 10, x + 12, y + height)).convert("L").getextrema()
        assert darkest < 100, "no caption"
        assert brightest == 255


def test_without_tensorboard_there_is_no_event_file(tmp_path: Path) -> None:
    with tracking(tmp_path, tensorboard=False) as tracker:
        tracker.start("", [])
        tracker.images(torch.rand(1, 3, 8, 8), ["ant"])
        log_epochs(tracker, range(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_epoch_is_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with tracking(tmp_path, tensorboard=False) as tracker:
        tracker.epoch(3, 40, 1.23456, Figures(0.7, 0.25, 0.875, 8), 0.001, 3.14159, 60)
    (message,) = caplog.messages
    for words in ("epoch  3/40", "train loss 1.2346", "val loss 0.7000", "25.0%", "87.5%", "0.001", "3.1 s"):
        assert words in message


def test_a_bar_writes_nothing_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar(range(3), "epoch 1/2", 3)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("broken", ["add_text", "add_image", "add_scalar", "add_pr_curve", "close"])
def test_a_writer_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with tracking(tmp_path) as tracker:
        setattr(tracker.writer, broken, fail)
        tracker.start("seed: 0\n", [])
        tracker.images(torch.rand(1, 3, 8, 8), ["ant"])
        log_epochs(tracker, range(1, 3))
        scores = Scores(torch.eye(3), torch.arange(3))
        tracker.improved(2, scores)
        tracker.finish(2, scores, {"final/val_top1": 1.0}, {"seed": 0})
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "TensorBoard cannot be written, and is left out from here on: [Errno 28] No space left on device"
    ]
    assert len(rows(tmp_path)) == 2


def test_a_full_disk_ends_the_run_with_the_files_name(tmp_path: Path) -> None:
    with tracking(tmp_path, tensorboard=False) as tracker:
        (tmp_path / "metrics.csv").unlink()
        (tmp_path / "metrics.csv").mkdir()
        with pytest.raises(RunError, match=r"cannot write .*metrics\.csv: Is a directory"):
            log_epochs(tracker, range(1, 2))


def test_a_class_name_is_printable_as_a_tag(tmp_path: Path) -> None:
    scores = Scores(torch.eye(3), torch.arange(3))
    tracker = Tracker(tmp_path, ["ant", "bee", "\x1b[2J"], tensorboard=True)
    tracker.improved(1, scores)
    tracker.close()
    tags = [tag for found in events(tmp_path).Tags().values() if isinstance(found, list) for tag in found]
    assert "f1/\\x1b[2J" in tags
    assert "precision_recall/\\x1b[2J" in tags
    assert all(tag.isprintable() for tag in tags)


def test_what_was_flushed_is_in_the_file(tmp_path: Path) -> None:
    with tracking(tmp_path) as tracker:
        log_epochs(tracker, range(1, 3))
        tracker.flush()
        assert points(events(tmp_path), "lr").keys() == {1, 2}


def test_a_dead_worker_is_no_failure_of_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises it from a signal handler, whatever is going on."""

    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with tracking(tmp_path) as tracker:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="DataLoader worker"):
            patch.setattr(tracker.writer, "add_scalar", killed)
            log_epochs(tracker, range(1, 2))
        assert tracker.writer is not None
