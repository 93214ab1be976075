"""What a run writes while it trains: metrics.csv, TensorBoard, a line per epoch."""

from __future__ import annotations

import csv
import functools
import io
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import to_pil_image

from tl_trainer.candidates import Found
from tl_trainer.errors import RunError
from tl_trainer.ground import distributed
from tl_trainer.ground.failures import is_worker_death
from tl_trainer.ground.files import csv_text, write_text
from tl_trainer.ground.progress import StatusLine
from tl_trainer.ground.wording import printable
from tl_trainer.metrics import Figures, Scores
from tl_trainer.plots import png
from tl_trainer.saver import EpochDone
from tl_trainer.tasks import Task

log = logging.getLogger(__name__)

Logged = ParamSpec("Logged")
Graph = list[tuple[str, str, bool]]
Pictures = Callable[[], dict[str, bytes]]  # PNG files by name, drawn when they are asked for
LEFT_OUT = "TensorBoard cannot be written, and is left out from here on: %s"
BLINK = 0.5  # seconds of an epoch, up to which it has no line of its own on a terminal
CAPTION_HEIGHT = 14
GAP = 4
SECONDS_BETWEEN_DRAWINGS = 10.0  # and before the first: the pictures take longer than a short run, and come at its end
PROJECTOR = "projector"  # the folder that add_embedding makes, which it names after a step
CANDIDATES = "search"  # the folder of the runs that show them
COMPONENTS = 128  # of the features, for the projector, whose own methods reduce them further


def _on_tensorboard(
    method: Callable[Concatenate[Tracker, Logged], None],
) -> Callable[Concatenate[Tracker, Logged], None]:
    """A method that does nothing without TensorBoard, whose failure must not end a run: it is left out from then on."""

    @functools.wraps(method)
    def tolerant(self: Tracker, /, *args: Logged.args, **kwargs: Logged.kwargs) -> None:
        if self.writer is None:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # its writer is a thread with a file, and raises whatever that met
            if is_worker_death(error):  # torch raises it from a signal handler, wherever the program is
                raise
            if self.writer is not None:  # else a step of this method has failed and said so
                log.warning(LEFT_OUT, error)
            self.writer = None

    return tolerant


class Tracker:
    """metrics.csv and, where wanted, TensorBoard, for a run that has `done` epochs behind it.

    Rows and points of epochs after `done` are dropped: a run that was killed will train and log these again.
    """

    def __init__(self, run_dir: Path, task: Task, epochs: int, *, tensorboard: bool, done: int = 0) -> None:
        self.path = run_dir / "metrics.csv"
        self.task = task
        self.epochs = epochs
        self._done = done
        self._drawn_at, self._drawn_epoch = time.monotonic(), 0
        columns = ("epoch", "train_loss", *(f"val_{name}" for name in task.columns), "lr", "seconds")
        if distributed.is_first():
            write_text(self.path, csv_text(columns, _rows(self.path)[:done]))
        self.writer: Any = None
        self._status = StatusLine()
        if tensorboard and distributed.is_first():
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run wants it

            try:
                self.writer = SummaryWriter(str(run_dir), purge_step=done + 1)
            except OSError as error:
                log.warning(LEFT_OUT, error)

    @_on_tensorboard
    def start(self, config: str, graph: Graph) -> None:
        """Log what does not change: the configuration as text and the chain of stages as a graph."""
        self.writer.add_text("config", "```yaml\n" + config + "```")
        _add_graph(self.writer, graph)

    @_on_tensorboard
    def images(self, tag: str, batch: Tensor, captions: Sequence[str], epoch: int = 0) -> None:
        """Log a grid of captioned pictures. batch: (N, 3, H, W) float in [0, 1]."""
        buffer = io.BytesIO()
        picture_grid(batch, captions).save(buffer, "PNG", compress_level=1)  # more makes photographs hardly smaller
        _add_png(self.writer, tag, buffer.getvalue(), epoch)

    def epoch(self, done: EpochDone, val: Figures, lr: float | None) -> None:
        """Log an epoch, its validation figures, and the rate of its last step; None where the head was found.

        On a terminal, epochs that are over in a blink share one line, unless they are the best so far. What is found
        again after a resume is logged already.
        """
        shown = {name: val[name] for name in self.task.columns}
        if done.epoch > self._done and distributed.is_first():
            self._append((done.epoch, done.train_loss, *shown.values(), lr, round(done.seconds, 3)))
            scalars = {"train/loss": done.train_loss, **{f"val/{name}": value for name, value in shown.items()}}
            if lr is not None:
                scalars |= {"lr": lr, "time/images_per_second": done.images / done.seconds}
            self._scalars(scalars, done.epoch)
        self._done = done.epoch
        what = f"epoch {done.epoch:{len(str(self.epochs))}}/{self.epochs}"
        if lr is None:
            what = "the head that was found:"
        line = f"{what}  loss {done.train_loss:.4f}  val {val['loss']:.4f}  {self.task.in_words(val)}"
        line += f"  {done.seconds:.1f} s"
        if done.improved or done.epoch == self.epochs or done.seconds > BLINK or not self._status.possible:
            log.info("%s", line)
        else:
            self._status.show(line)

    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, by column; without what has no value."""
        with self.path.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]

    @_on_tensorboard
    def improved(self, epoch: int, scores: Scores) -> None:
        """Log what is worth knowing of the best epoch so far: figures of each class, and from time to time pictures."""
        self._scalars(self.task.curves(scores), epoch)
        if time.monotonic() - self._drawn_at > SECONDS_BETWEEN_DRAWINGS:
            self._draw(epoch, scores, lambda: {name: png(figure) for name, figure in self.task.pictures(scores)})

    @_on_tensorboard
    def finish(
        self,
        best_epoch: int,
        scores: Scores,
        pictures: Pictures,
        figures: dict[str, float],
        settings: dict[str, str | float | bool],
    ) -> None:
        """Log the pictures of the best epoch, unless they are there, and the final figures beside the settings.

        The figures are a step behind the last epoch, which a resumed run drops: there is one end, and one of each
        figure.
        """
        if self._drawn_epoch != best_epoch:
            self._draw(best_epoch, scores, pictures)
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(settings, figures):  # type: ignore[no-untyped-call]
            self.writer._get_file_writer().add_summary(summary)
        self._scalars(figures, self._done + 1)

    @_on_tensorboard
    def candidates(self, parts: Mapping[str, Found]) -> None:
        """Log heads that were compared, in runs of their own, as TensorBoard's hparams tab wants them.

        parts: what was found for each of several heads, by its name; for one head the name is "". Of each, the
        candidates worth seeing, and curves of all linear ones by their scaling, in which a step is a strength.
        """
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = Path(self.writer.log_dir) / CANDIDATES
        shutil.rmtree(folder, ignore_errors=True)  # of before a resume
        for head, found in parts.items():
            of, of_head = (f"{head}_", {"search/head": head}) if head else ("", {})
            for number, (settings, figures) in enumerate(found.sessions(), 1):
                with SummaryWriter(str(folder / f"{of}{number}")) as writer:
                    for summary in hparams(settings | of_head, figures):  # type: ignore[no-untyped-call]
                        writer._get_file_writer().add_summary(summary)
                    for tag, value in figures.items():
                        writer.add_scalar(tag, value, 0)
            for name, points in found.curves().items():
                with SummaryWriter(str(folder / f"{of}{name}")) as writer:
                    for step, (_, loss, share) in enumerate(points):
                        writer.add_scalar("search_loss", loss, step)
                        writer.add_scalar(f"search_{found.key}", share, step)

    @_on_tensorboard
    def embedding(self, features: Tensor, labels: Sequence[str], thumbnails: Tensor) -> None:
        """Log features for the projector. features: (N, D); thumbnails: (N, 3, S, S) in [0, 1]."""
        features = features.flatten(1).double()
        rank = min(COMPONENTS, *features.shape)
        centred = features - features.mean(dim=0)
        squares, axes = torch.linalg.eigh(centred @ centred.T)  # (N, N); a singular value decomposition takes seconds
        components = (axes * squares.clamp(min=0).sqrt()).flip(1)[:, :rank].float()
        folder = Path(self.writer.log_dir)
        shutil.rmtree(folder / PROJECTOR, ignore_errors=True)  # of before a resume
        (folder / "projector_config.pbtxt").unlink(missing_ok=True)
        reduced = pad(components, (0, max(0, 2 - rank)))  # the projector shows no table of one column
        names = [printable(label) for label in labels]
        self.writer.add_embedding(reduced, names, thumbnails, PROJECTOR, "features")

    def _draw(self, epoch: int, scores: Scores, pictures: Pictures) -> None:
        for name, data in pictures().items():
            _add_png(self.writer, f"val/{name}", data, epoch)
        for name, labels, shares in self.task.precision_recall(scores):
            self.writer.add_pr_curve(f"precision_recall/{printable(name)}", labels, shares, epoch)
        self._drawn_at, self._drawn_epoch = time.monotonic(), epoch

    @_on_tensorboard
    def flush(self) -> None:
        """Have everything in the event file that was logged so far."""
        self.writer.flush()

    def close(self) -> None:
        """Flush the event file, and leave the terminal."""
        self._status.close()
        self._close_writer()

    @_on_tensorboard
    def _close_writer(self) -> None:
        self.writer.close()

    @_on_tensorboard
    def _scalars(self, values: dict[str, float], epoch: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, epoch)

    def _append(self, row: Sequence[object]) -> None:
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from error


def log_rates(folder: Path, points: Iterable[tuple[float, float, float]], picture: bytes) -> None:
    """Log a learning-rate range test: its picture, and rate, loss and mean loss of each batch, which is a step.

    The rates rise by the same factor with every step, so the curves look as they do over the logarithm of the rate.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, values in enumerate(points):
            for tag, value in zip(("rate", "loss", "mean_loss"), values, strict=True):
                writer.add_scalar(f"rates/{tag}", value, step)
        _add_png(writer, "rates", picture, 0)


def graph_of(stages: Iterable[tuple[str, nn.Module]], *, trained: bool) -> Graph:
    """(name, what it is, whether it trains) of each stage, for `Tracker.start`."""
    return [(name, f"{type(module).__name__}({module.extra_repr()})", trained) for name, module in stages]


def picture_grid(batch: Tensor, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Pictures side by side, each with its caption below. batch: (N, 3, H, W) float in [0, 1]."""
    count, _, height, width = batch.shape
    columns = min(columns, count)
    across, down = width + GAP, height + CAPTION_HEIGHT
    grid = Image.new("RGB", (columns * across - GAP, -(-count // columns) * down), "white")
    draw = ImageDraw.Draw(grid)
    for index, (picture, caption) in enumerate(zip(batch.cpu(), captions, strict=True)):
        x, y = index % columns * across, index // columns * down
        grid.paste(to_pil_image(picture), (x, y))
        draw.text((x + 2, y + height + 1), printable(caption)[: max(1, width // 6)], fill="black")
    return grid


def _rows(path: Path) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def _add_png(writer: Any, tag: str, data: bytes, epoch: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = Image.open(io.BytesIO(data)).size
    image = Summary.Image(width=width, height=height, encoded_image_string=data)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), epoch)


def _add_graph(writer: Any, graph: Graph) -> None:
    """The chain as TensorBoard's graph: a node per stage, so that no network has to be traced or run."""
    from tensorboard.compat.proto.attr_value_pb2 import AttrValue
    from tensorboard.compat.proto.config_pb2 import RunMetadata
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.node_def_pb2 import NodeDef

    nodes, before = [NodeDef(name="image", op="Input")], "image"
    for name, what, trains in graph:
        node = NodeDef(name=name.replace(".", "/"), op=what.split("(")[0], input=[before])
        node.attr["what"].CopyFrom(AttrValue(s=what.encode()))
        node.attr["trained"].CopyFrom(AttrValue(b=trains))
        nodes.append(node)
        before = node.name
    writer._get_file_writer().add_graph((GraphDef(node=nodes), RunMetadata()))
