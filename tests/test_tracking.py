"""What a run logs: the columns of metrics.csv and TensorBoard's tags, and how both go on after a resume.

The event files are read back with TensorBoard's own reader.
"""

from __future__ import annotations

import csv
import functools
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix, f1_score
from torch import Tensor, nn

from tiny import Clock
from tl_trainer import single_label
from tl_trainer import tracking as module_under_test
from tl_trainer.candidates import LINEAR, RIDGE, Found, Row
from tl_trainer.errors import RunError
from tl_trainer.ground.progress import StatusLine, bar
from tl_trainer.metrics import Figures, Scores, confusion, reliability
from tl_trainer.plots import confusion_figure, png, reliability_figure
from tl_trainer.saver import EpochDone
from tl_trainer.single_label import SingleLabel
from tl_trainer.tracking import COMPONENTS, GAP, SECONDS_BETWEEN_DRAWINGS, Tracker, graph_of, picture_grid

CLASSES = ["ant", "bee", "a $name$ <b>"]
TAGS = {"train/loss", "val/loss", "val/top1", "val/top5", "lr", "time/images_per_second"}
PICTURES = ["val/confusion_matrix", "val/reliability"]
TARGETS = [0, 0, 0, 1, 1, 2]
EPOCHS = {epoch: [0, 0, epoch % 3, 1, epoch % 2, 2] for epoch in range(1, 6)}  # what is predicted after each
EMBEDDING = Path("projector", "features")


@contextmanager
def tracking(
    run_dir: Path, classes: Sequence[str] = CLASSES, *, tensorboard: bool = True, done: int = 0
) -> Iterator[Tracker]:
    tracker = Tracker(run_dir, SingleLabel(classes), 9, tensorboard=tensorboard, done=done)
    try:
        yield tracker
    finally:
        tracker.close()


def val(loss: float, top1: float, top5: float) -> Figures:
    return {"loss": loss, "top1": top1, "top5": top5, "n": 8}


def log_epochs(tracker: Tracker, epochs: range, loss: float = 1.0) -> None:
    for epoch in epochs:
        tracker.epoch(EpochDone(epoch, loss / epoch, 2.0, 60, True), val(0.5 / epoch, 0.25, 0.75), 0.01)


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


def scores(epoch: int, targets: Sequence[int] = TARGETS) -> Scores:
    """Whose first class is that of EPOCHS, with another confidence for each image."""
    logits = nn.functional.one_hot(torch.tensor(EPOCHS[epoch]), 3) * torch.linspace(0.5, 6, 6).unsqueeze(1)
    return Scores(logits, torch.tensor(targets))


@functools.cache
def drawn(epoch: int) -> dict[str, bytes]:
    """The pictures of an epoch's scores, which are the same for every test."""
    return {name: png(figure) for name, figure in SingleLabel(CLASSES).pictures(scores(epoch))}


def pictures(epoch: int) -> Callable[[], dict[str, bytes]]:
    return lambda: drawn(epoch)


def steps(reader: Any, tag: str) -> list[int]:
    """When something was logged under a tag of pictures, or of tensors, as curves are."""
    found = reader.Images(tag) if tag in reader.Tags()["images"] else reader.Tensors(tag)
    return [event.step for event in found]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module_under_test, "time", clock)
    return clock


def test_metrics_csv_has_one_row_per_epoch(tmp_path: Path) -> None:
    with tracking(tmp_path, tensorboard=False) as tracker:
        assert (tmp_path / "metrics.csv").read_text() == "epoch,train_loss,val_loss,val_top1,val_top5,lr,seconds\n"
        tracker.epoch(EpochDone(1, 1.5, 3.14159, 60, True), val(0.7, 0.25, 0.875), 0.001)
        tracker.epoch(EpochDone(2, 1.25, 3.0, 60, True), val(0.1 + 0.2, 1.0, 1.0), 1e-5)
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
        tracker.images("train/images", torch.rand(3, 3, 20, 30), ["ant", "bee", "bee"])
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
        tracker.images("train/images", torch.rand(1, 3, 8, 8), ["ant"])
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
        tracker.images("train/images", batch, ["ant", "bee", "a name that is far too long for its picture"])
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
        tracker.images("train/images", torch.rand(1, 3, 8, 8), ["ant"])
        log_epochs(tracker, range(1, 2))
        tracker.improved(1, scores(1))
        tracker.finish(1, scores(1), dict, {"final/val_top1": 0.5}, {"seed": 0})
        tracker.embedding(torch.rand(2, 4), ["ant", "bee"], torch.rand(2, 3, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_improvement_logs_the_f1_of_each_class(tmp_path: Path) -> None:
    with tracking(tmp_path) as tracker:
        for epoch in (1, 2, 5):
            tracker.improved(epoch, scores(epoch))
    reader = events(tmp_path)
    assert set(reader.Tags()["scalars"]) == {f"f1/{name}" for name in CLASSES}
    for index, name in enumerate(CLASSES):
        expected = {epoch: f1_score(TARGETS, EPOCHS[epoch], average=None)[index] for epoch in (1, 2, 5)}
        assert points(reader, f"f1/{name}") == pytest.approx(expected)


def test_a_class_that_is_neither_there_nor_predicted_has_no_f1(tmp_path: Path) -> None:
    found = scores(1, targets=[0, 0, 0, 2, 2, 2])
    found.logits[:, 1] = -1
    with tracking(tmp_path) as tracker:
        tracker.improved(1, found)
    assert set(events(tmp_path).Tags()["scalars"]) == {"f1/ant", "f1/a $name$ <b>"}


def test_any_class_name_can_be_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names, shown = ["caf\udce9", "a\nb\t", "日本 🐝"], [r"caf\udce9", r"a\nb\t", "日本 🐝"]
    with tracking(tmp_path, names) as tracker:
        tracker.images("train/images", torch.rand(3, 3, 40, 90), names)
        tracker.improved(1, scores(1))
        tracker.finish(1, scores(1), pictures(1), {}, {})
    tags = events(tmp_path).Tags()
    assert not caplog.messages, "TensorBoard was left out"
    assert tags["scalars"] == [f"f1/{name}" for name in shown]
    assert tags["tensors"] == [f"precision_recall/{name}" for name in shown]
    assert set(tags["images"]) == {"train/images", *PICTURES}


@pytest.mark.parametrize(("limit", "there"), [(3, True), (2, False)])
def test_above_so_many_classes_there_are_no_curves_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, there: bool
) -> None:
    monkeypatch.setattr(single_label, "CURVES", limit)
    with tracking(tmp_path) as tracker:
        tracker.improved(1, scores(1))
        tracker.finish(1, scores(1), pictures(1), {}, {})
    tags = events(tmp_path).Tags()
    assert tags["images"] == PICTURES
    assert tags["scalars"] == [f"f1/{name}" for name in CLASSES if there]
    assert tags["tensors"] == [f"precision_recall/{name}" for name in CLASSES if there]


def test_pictures_are_drawn_from_time_to_time(tmp_path: Path, clock: Clock) -> None:
    limit = SECONDS_BETWEEN_DRAWINGS
    with tracking(tmp_path) as tracker:
        for epoch, moment in enumerate([0.0, limit, limit + 0.5, 2 * limit + 0.5, 2 * limit + 1], start=1):
            clock.now = moment
            tracker.improved(epoch, scores(epoch))
    reader = events(tmp_path)
    for tag in (*PICTURES, *(f"precision_recall/{name}" for name in CLASSES)):
        assert steps(reader, tag) == [3, 5], tag
    assert all(points(reader, f"f1/{name}").keys() == EPOCHS.keys() for name in CLASSES)


def test_the_pictures_are_those_of_the_epoch(tmp_path: Path) -> None:
    with tracking(tmp_path) as tracker:
        tracker.finish(2, scores(2), pictures(2), {}, {})
    reader = events(tmp_path)
    matrix = confusion(scores(2), 3)
    assert matrix.among(torch.arange(3)).tolist() == confusion_matrix(TARGETS, EPOCHS[2]).tolist()
    figures = confusion_figure(matrix, CLASSES), reliability_figure({"as trained": reliability(scores(2), None)})
    for tag, figure in zip(PICTURES, figures, strict=True):
        (event,) = reader.Images(tag)
        assert event.encoded_image_string == png(figure), tag


def test_the_curves_count_the_images_above_each_threshold(tmp_path: Path) -> None:
    from tensorboard.util.tensor_util import make_ndarray

    with tracking(tmp_path) as tracker:
        tracker.finish(2, scores(2), pictures(2), {}, {})
    reader = events(tmp_path)
    for index, name in enumerate(CLASSES):
        (event,) = reader.Tensors(f"precision_recall/{name}")
        right, wrong, *_ = make_ndarray(event.tensor_proto)
        thresholds = np.linspace(0, 1, len(right)).reshape(-1, 1)
        above = scores(2).logits.double().softmax(dim=1)[:, index].numpy() >= thresholds
        label = np.array(TARGETS) == index
        assert right.tolist() == (above & label).sum(axis=1).tolist()
        assert wrong.tolist() == (above & ~label).sum(axis=1).tolist()


@pytest.mark.parametrize(("improved", "drawn"), [([2], [2]), ([1, 2], [1, 2]), ([], [2])])
def test_the_best_epoch_is_drawn_in_the_end_unless_it_was(
    tmp_path: Path, clock: Clock, improved: list[int], drawn: list[int]
) -> None:
    with tracking(tmp_path) as tracker:
        for epoch in improved:
            clock.now += SECONDS_BETWEEN_DRAWINGS + 1
            tracker.improved(epoch, scores(epoch))
        tracker.finish(2, scores(2), pictures(2), {}, {})
    reader = events(tmp_path)
    for tag in (*PICTURES, *(f"precision_recall/{name}" for name in CLASSES)):
        assert steps(reader, tag) == drawn, tag


def test_the_final_figures_stand_beside_the_settings(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings: dict[str, str | float | bool] = {"seed": 3, "model.tap": "<b>", "lr": 0.25, "flag": True}
    with tracking(tmp_path) as tracker:
        tracker.finish(4, scores(4), dict, {"final/val_top1": 0.75, "final/test_loss": 1.5}, settings)
    reader = events(tmp_path)
    assert points(reader, "final/val_top1") == {1: 0.75}
    assert points(reader, "final/test_loss") == {1: 1.5}
    found = {
        tag.rpartition("/")[2]: HParamsPluginData.FromString(content)
        for tag, content in reader.PluginTagToContent("hparams").items()
    }
    start = found["session_start_info"].session_start_info.hparams
    assert {name: value.string_value or value.number_value for name, value in start.items()} == settings
    metrics = found["experiment"].experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["final/val_top1", "final/test_loss"]


def embed(run_dir: Path, features: Tensor, labels: Sequence[str] | None = None) -> None:
    """Log features as a run does, with thumbnails of 6 pixels, each as bright as its place in the order."""
    count = len(features)
    brightness = torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(-1, 3, 6, 6)
    with tracking(run_dir) as tracker:
        tracker.embedding(features, labels or ["ant"] * count, brightness)


def projected(run_dir: Path) -> np.ndarray:
    """The coordinates of the points, (N, components)."""
    return np.loadtxt(run_dir / EMBEDDING / "tensors.tsv", delimiter="\t", ndmin=2)


def configured(run_dir: Path) -> list[Any]:
    """The embeddings that the projector finds."""
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    text = (run_dir / "projector_config.pbtxt").read_text()
    return list(text_format.Parse(text, ProjectorConfig()).embeddings)


@pytest.mark.parametrize("shape", [(9, 4), (5, 40), (2, 3), (7, 2, 3, 3), (COMPONENTS + 20, COMPONENTS + 10)], ids=str)
def test_an_embedding_is_the_principal_components(tmp_path: Path, shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 5
    flat = features.flatten(1).numpy()
    expected = PCA(min(COMPONENTS, *flat.shape), svd_solver="full").fit_transform(flat)
    embed(tmp_path, features)
    np.testing.assert_allclose(
        abs(projected(tmp_path)), abs(expected), rtol=0, atol=1e-3
    )  # a sign is as good as the other


def test_a_single_image_is_embedded(tmp_path: Path) -> None:
    embed(tmp_path, torch.rand(1, 40), ["bee"])
    assert not projected(tmp_path).any()
    assert (tmp_path / EMBEDDING / "metadata.tsv").read_text() == "bee\n"


def test_an_embedding_has_the_files_that_its_configuration_names(tmp_path: Path) -> None:
    embed(tmp_path, torch.rand(7, 4))
    (found,) = configured(tmp_path)
    assert found.tensor_name == "features:projector"
    assert list(found.sprite.single_image_dim) == [6, 6]
    named = {found.tensor_path, found.metadata_path, found.sprite.image_path}
    assert named == {(EMBEDDING / name).as_posix() for name in ("tensors.tsv", "metadata.tsv", "sprite.png")}
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("projector/**/*.*")} == named
    with Image.open(tmp_path / EMBEDDING / "sprite.png") as sprite:
        assert sprite.size == (18, 18)  # seven thumbnails in a square of nine
        shades = [sprite.convert("L").getpixel((6 * (place % 3) + 3, 6 * (place // 3) + 3)) for place in range(7)]
    assert shades == pytest.approx([255 * place / 6 for place in range(7)], abs=1)


def test_a_name_cannot_break_the_table_of_an_embedding(tmp_path: Path) -> None:
    embed(tmp_path, torch.rand(6, 4), ["a\tb", "c\nd\r\n", "$e$", "<b>", "caf\udce9", "日本 🐝"])
    lines = (tmp_path / EMBEDDING / "metadata.tsv").read_bytes().decode().split("\n")
    assert lines == ["a\\tb", "c\\nd\\r\\n", "$e$", "<b>", "caf\\udce9", "日本 🐝", ""]


def test_an_embedding_after_a_resume_replaces_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(tmp_path, torch.rand(9, 4))
    embed(tmp_path, torch.rand(5, 3), ["bee"] * 5)
    assert len(configured(tmp_path)) == 1
    assert projected(tmp_path).shape == (5, 3)
    assert (tmp_path / EMBEDDING / "metadata.tsv").read_text() == "bee\n" * 5
    assert capsys.readouterr().out == "", "TensorBoard's writer found the folder of before"


def test_an_epoch_is_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with tracking(tmp_path, "abcdef", tensorboard=False) as tracker:
        tracker.epochs = 400
        tracker.epoch(EpochDone(3, 1.23456, 3.14159, 60, True), val(0.7, 0.25, 0.875), 0.001)
    (message,) = caplog.messages
    for words in ("epoch   3/400", "loss 1.2346", "val 0.7000", "25.0%", "87.5%", "3.1 s"):
        assert words in message
    assert len(message) <= 80


def test_a_bar_writes_nothing_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar(range(3), "epoch 1/2", 3)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_writer_that_cannot_be_made_is_left_out_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fail)
    with tracking(tmp_path) as tracker:
        log_epochs(tracker, range(1, 3))
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "TensorBoard cannot be written, and is left out from here on: [Errno 28] No space left on device"
    ]
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("broken", ["add_text", "_get_file_writer", "add_scalar", "add_pr_curve", "close"])
def test_a_writer_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with tracking(tmp_path) as tracker:
        setattr(tracker.writer, broken, fail)
        tracker.start("seed: 0\n", [])
        tracker.images("train/images", torch.rand(1, 3, 8, 8), ["ant"])
        log_epochs(tracker, range(1, 3))
        scores = Scores(torch.eye(3), torch.arange(3))
        tracker.improved(2, scores)
        tracker.finish(2, scores, dict, {"final/val_top1": 1.0}, {"seed": 0})
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
    tracker = Tracker(tmp_path, SingleLabel(["ant", "bee", "\x1b[2J"]), 9, tensorboard=True)
    tracker.improved(1, scores)
    tracker.finish(1, scores, dict, {}, {})
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


@pytest.mark.parametrize("terminal", [True, False])
def test_on_a_terminal_short_epochs_that_are_not_the_best_share_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    caplog.set_level("INFO", "tl_trainer")
    shown: list[str] = []
    monkeypatch.setattr(StatusLine, "possible", terminal)
    monkeypatch.setattr(StatusLine, "show", lambda self, text: shown.append(text))
    with tracking(tmp_path, tensorboard=False) as tracker:
        for epoch, seconds, improved in (
            (1, 0.1, True),
            (2, 0.1, False),
            (3, 2.0, False),
            (4, 0.1, True),
            (9, 0.1, False),
        ):
            tracker.epoch(EpochDone(epoch, 0.5, seconds, 60, improved), val(0.5, 0.25, 0.75), 0.01)
    lines = [f"epoch {epoch}/9  loss 0.5000  val 0.5000  top-1 25.0%" for epoch in (1, 2, 3, 4, 9)]
    assert [line.rpartition("  ")[0] for line in caplog.messages] == [
        lines[i] for i in range(5) if i != 1 or not terminal
    ]
    assert [line.rpartition("  ")[0] for line in shown] == lines[1:2] * terminal
    assert len(rows(tmp_path)) == 5


def test_heads_that_were_compared_are_runs_with_curves_and_hparams(tmp_path: Path) -> None:
    rows = [Row(RIDGE, "raw", 0.1, None, 0.5), Row(LINEAR, "raw", 100.0, 0.7, 0.25), Row(LINEAR, "raw", 10.0, 0.6, 0.5)]
    found = Found(rows, rows[2], [], "val", 4)
    for parts in ({"": found}, {"": replace(found, rows=rows[1:])}):  # the second time after a resume
        with tracking(tmp_path) as tracker:
            tracker.candidates(parts)
    assert [path.name for path in sorted((tmp_path / "search").iterdir())] == ["1", "2", "raw"]
    curves, head = events(tmp_path / "search" / "raw"), events(tmp_path / "search" / "2")
    assert points(curves, "search_top1") == {0: 0.25, 1: 0.5}
    assert points(curves, "search_loss") == pytest.approx({0: 0.7, 1: 0.6})
    assert points(head, "search/top1") == {0: 0.25}
    session = head.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"search/method" in session
    assert LINEAR.encode() in session
