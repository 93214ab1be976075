"""What a run writes while it trains: metrics.csv, TensorBoard, progress on stderr."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from tl_trainer.metrics import Figures

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Graph = list[tuple[str, str, bool]]
COLUMNS = ("epoch", "train_loss", "val_loss", "val_top1", "val_top5", "lr", "seconds")
CAPTION_HEIGHT = 14
GAP = 4


def bar(items: Iterable[Item], description: str, total: int, *, start: int = 0) -> Iterable[Item]:
    """A progress bar on stderr; nothing where stderr is no terminal or --quiet was given."""
    quiet = not log.isEnabledFor(logging.INFO)
    return tqdm(items, description, total, initial=start, leave=False, unit="batch", disable=True if quiet else None)


class Tracker:
    """metrics.csv and, where wanted, TensorBoard, for a run that has `done` epochs behind it.

    Rows and points of epochs after `done` are dropped: a run that was killed will train and log these again.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, done: int = 0) -> None:
        self.path = run_dir / "metrics.csv"
        rows = _rows(self.path)[:done]
        with self.path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run wants it

            self.writer = SummaryWriter(str(run_dir), purge_step=done + 1)

    def start(self, config: str, graph: Graph) -> None:
        """Log what does not change: the configuration as text and the chain of stages as a graph."""
        if self.writer is not None:
            self.writer.add_text("config", "```yaml\n" + config + "```")
            _add_graph(self.writer, graph)

    def images(self, batch: Tensor, captions: Sequence[str]) -> None:
        """Log a grid of captioned pictures. batch: (N, 3, H, W) float in [0, 1]."""
        if self.writer is not None:
            self.writer.add_image("train/images", functional.pil_to_tensor(picture_grid(batch, captions)), 0)

    def epoch(
        self, epoch: int, epochs: int, train_loss: float, val: Figures, lr: float, seconds: float, images: int
    ) -> None:
        """Log an epoch, counted from 1; `images` were trained on in `seconds`, validation not included."""
        row = (epoch, train_loss, val.loss, val.top1, val.top5, lr, round(seconds, 3))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        if self.writer is not None:
            scalars = {"train/loss": train_loss, "val/loss": val.loss, "val/top1": val.top1, "val/top5": val.top5}
            for tag, value in {**scalars, "lr": lr, "time/images_per_second": images / seconds}.items():
                self.writer.add_scalar(tag, value, epoch)
        log.info(
            "epoch %*d/%d  train loss %.4f  val loss %.4f  top-1 %5.1f%%  top-5 %5.1f%%  lr %.2g  %.1f s",
            len(str(epochs)), epoch, epochs, train_loss, val.loss, 100 * val.top1, 100 * val.top5, lr, seconds,
        )  # fmt: skip

    def close(self) -> None:
        """Flush the event file."""
        if self.writer is not None:
            self.writer.close()


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
        grid.paste(functional.to_pil_image(picture), (x, y))
        draw.text((x + 2, y + height + 1), caption[: max(1, width // 6)], fill="black")
    return grid


def _rows(path: Path) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


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
