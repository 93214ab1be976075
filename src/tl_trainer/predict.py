"""Rows from images: many paths in, one row each out, in order, with constant memory."""

from __future__ import annotations

import csv
import glob
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from tl_trainer.data import images
from tl_trainer.data.folders import walk
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import ImageError, InputError, printable
from tl_trainer.evaluate import averaged
from tl_trainer.explain import GradCam
from tl_trainer.files import write_atomically
from tl_trainer.metrics import check_finite, probabilities, ranked
from tl_trainer.restore import Restored

THREADS = 4
Views = list[Tensor]  # of one image, one for each pipeline


@dataclass(frozen=True)
class Prediction:
    """A class and its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Row:
    """What is known about one input: its best classes, or why there are none."""

    path: str
    predictions: list[Prediction] = field(default_factory=list)
    error: str | None = None


def expand_inputs(arguments: Iterable[str], stdin: IO[str]) -> Iterator[str]:
    """Files as they are, the images below folders, what globs match, and for `-` the paths on stdin.

    Raises InputError for a folder without images and a glob that matches nothing. A file that does not exist is passed
    on: it becomes an error row.
    """
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            listed = (line.rstrip("\r\n") for line in stdin if line.strip())
            first = next(listed, None)
            if first is None:
                raise InputError("-: no paths on stdin; write one on each line")
            yield from itertools.chain([first], listed)
        elif path.is_dir():
            found = [str(file) for file in walk(path) if file.suffix.lower() in IMG_EXTENSIONS]
            if not found:
                raise InputError(f"{argument}: no images in this folder (endings: {' '.join(IMG_EXTENSIONS)})")
            yield from found
        elif glob.has_magic(argument) and not path.exists():
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
            if not matches:
                raise InputError(f"{argument}: nothing matches")
            yield from expand_inputs(matches, stdin)
        else:
            yield argument


class Predictor:
    """Rows from images. `pipelines` are the views whose probabilities are averaged, as `tta_pipelines` gives them.

    explanations: the folder for a picture per image of where the evidence for its first class is; None for none.
    """

    def __init__(self, restored: Restored, topk: int, pipelines: Sequence[Pipeline], explanations: Path | None) -> None:
        self.restored, self.topk, self.pipelines, self.explanations = restored, topk, pipelines, explanations
        if restored.network.classifier.frozen:
            restored.network.prefix()  # torch.fx makes it, and while it traces no other thread may call a module
        self.cam = GradCam(restored.network.classifier)
        self.number = 0

    def rows(self, paths: Iterable[str], batch_size: int) -> Iterator[Row]:
        """A row per path, in order. A batch is decoded while the one before is computed."""
        with ThreadPoolExecutor(THREADS) as pool:
            waiting: tuple[list[str], list[Future[Views | str]]] = [], []
            for chunk in itertools.chain(_chunks(paths, batch_size), [[]]):
                decoded = [pool.submit(self._decode, path) for path in chunk]
                yield from self._rows(waiting[0], [item.result() for item in waiting[1]])
                waiting = chunk, decoded

    def _decode(self, path: str) -> Views | str:
        try:
            picture = images.load(Path(path))
        except ImageError as error:
            return str(error)
        return [pipeline.image(picture) for pipeline in self.pipelines]

    def _rows(self, paths: list[str], decoded: list[Views | str]) -> Iterator[Row]:
        found = iter(self._ranked([item for item in decoded if not isinstance(item, str)]))
        for path, item in zip(paths, decoded, strict=True):
            self.number += 1
            row = Row(path, error=item) if isinstance(item, str) else Row(path, next(found))
            if self.explanations is not None and not isinstance(item, str):
                pipeline = self.restored.pipeline  # the whole view, whatever views were averaged
                picture = self.cam.picture(pipeline, pipeline.image(images.load(Path(path))), row.predictions[0].index)
                said = re.sub(r"[^\w.-]+", "_", row.predictions[0].label)
                name = f"{self.number:05}-{Path(path).stem[:60]}-{said[:40]}.png"
                write_atomically(self.explanations / name, partial(picture.save, format="PNG"))
            yield row

    def _ranked(self, pictures: list[Views]) -> list[list[Prediction]]:
        """The best classes of each image, given as its views."""
        if len({view.shape for views in pictures for view in views[:1]}) > 1:  # the transforms fix no size: one by one
            return [self._ranked([views])[0] for views in pictures]
        if not pictures:
            return []
        logits, classes = self._logits(pictures), self.restored.classes
        best = ranked(logits, self.topk)
        shares = probabilities(logits, self.restored.checkpoint.temperature).gather(1, best)
        return [
            [Prediction(classes[index], index, round(share, 6)) for index, share in zip(*row, strict=True)]
            for row in zip(best.tolist(), shares.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def _logits(self, pictures: list[Views]) -> Tensor:
        network, views = self.restored.network, []
        for pipeline, tensors in zip(self.pipelines, zip(*pictures, strict=True), strict=True):
            views.append(network.images_to_logits(pipeline.batch(torch.stack(tensors).to(network.device))))
        logits = averaged(views).cpu()
        check_finite(logits)
        return logits


def _chunks(paths: Iterable[str], size: int) -> Iterator[list[str]]:
    remaining = iter(paths)
    while chunk := list(islice(remaining, size)):
        yield chunk


def write_rows(rows: Iterable[Row], form: str, file: IO[str]) -> int:
    """Write the rows as they come, in one of FORMATS; the number of rows that are errors."""
    failed = 0

    def counted() -> Iterator[Row]:
        nonlocal failed
        for row in rows:
            failed += row.error is not None
            yield row

    FORMATS[form](counted(), file)
    return failed


def _write_text(rows: Iterable[Row], file: IO[str]) -> None:
    for row in rows:
        guesses = "  ".join(f"{printable(guess.label)} {guess.probability:.1%}" for guess in row.predictions)
        # An image's error names its path already.
        file.write(f"{printable(row.path)}  {guesses}\n" if row.error is None else f"error: {printable(row.error)}\n")
        file.flush()


def _write_jsonl(rows: Iterable[Row], file: IO[str]) -> None:
    for row in rows:
        file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        file.flush()


def _write_json(rows: Iterable[Row], file: IO[str]) -> None:
    separator = "[\n"
    for row in rows:
        file.write(separator + json.dumps(asdict(row), ensure_ascii=False))
        separator = ",\n"
    file.write("[]\n" if separator == "[\n" else "\n]\n")


def _write_csv(rows: Iterable[Row], file: IO[str]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "rank", "label", "index", "probability", "error"))
    for row in rows:
        if row.error is not None:
            writer.writerow((row.path, "", "", "", "", row.error))
        for rank, guess in enumerate(row.predictions, start=1):
            writer.writerow((row.path, rank, guess.label, guess.index, guess.probability, ""))
        file.flush()


FORMATS: dict[str, Callable[[Iterable[Row], IO[str]], None]] = {
    "text": _write_text,
    "json": _write_json,
    "jsonl": _write_jsonl,
    "csv": _write_csv,
}
