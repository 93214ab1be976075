"""Rows from images: many paths in, one row each out, in order, with constant memory."""

from __future__ import annotations

import glob
import itertools
import os
import re
import select
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from tl_trainer import conformal
from tl_trainer.assembly import Parts
from tl_trainer.data import images
from tl_trainer.data.folders import walk
from tl_trainer.data.images import Decoding
from tl_trainer.data.loaders import chunked, stacked
from tl_trainer.data.tar import Member, images_in
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import ImageError, InputError
from tl_trainer.explain import GradCam, sheet
from tl_trainer.ground.files import write_atomically
from tl_trainer.ground.machine import cores
from tl_trainer.known import NEAREST, Known, Neighbour
from tl_trainer.metrics import Prediction, check_finite
from tl_trainer.multitask import Block

Source = str | Path | Member | Image.Image
Views = list[Tensor]  # of one image, one for each pipeline
Decoded = tuple[Views, float]  # and what `images.dark` says of it


@dataclass(frozen=True)
class Row:
    """What is known about one input: its best classes, or why there are none.

    labels: where an image may have several, those above their threshold, the most probable first. heads: of several
    heads what each says; `predictions` then has the class or the labels of each.
    set: the classes that hold the right one as often as was asked for. accepted: whether it is like the training
    images. neighbours: the nearest of them. features: what the head sees, (features,) float32. None where not asked
    for.
    """

    path: str
    predictions: list[Prediction] = field(default_factory=list)
    error: str | None = None
    labels: list[Prediction] | None = None
    heads: dict[str, Block] | None = None
    set: list[str] | None = None
    accepted: bool | None = None
    neighbours: list[Neighbour] | None = None
    features: Tensor | None = field(default=None, repr=False, compare=False)

    def plain(self) -> dict[str, Any]:
        """The row as plain data, without what was not asked for and without the features."""
        row = asdict(replace(self, features=None))
        return {key: value for key, value in row.items() if value is not None or key == "error"}


@dataclass(frozen=True)
class Extras:
    """What is to be said of an image beside its classes.

    evidence: a folder for a picture per image of what speaks for its first class (Grad-CAM). neighbours: how many of
    the nearest training images its row names. reject: whether `accepted` says if it is like these. coverage: how often
    its `set` of classes is to hold the right one, such as 0.9. embed: a .parquet or .npz file for path and features of
    each image; force: replace it where it exists.
    """

    evidence: str | os.PathLike[str] | None = None
    neighbours: int = 0
    reject: bool = False
    coverage: float | None = None
    embed: str | os.PathLike[str] | None = None
    force: bool = False


@dataclass(frozen=True)
class Near:
    """What rows say of the training images: the `count` nearest, and, if asked, whether the image is like them.

    picture: what opens a training image by its path, for pictures of the evidence.
    """

    known: Known
    count: int
    reject: bool
    picture: Callable[[str], Image.Image | None] = lambda _: None


@dataclass(frozen=True)
class Asked:
    """`Extras` with what they need.

    explanations: the folder for a picture per image. near: what rows say of the training images, whose features are
    compared with those of the first view. most: the conformal score up to which a class is in the set. features:
    whether rows have those of the first view.
    """

    explanations: Path | None = None
    near: Near | None = None
    most: float | None = None
    features: bool = False


def expand_inputs(arguments: Iterable[str], stdin: IO[str]) -> Iterator[str | Member]:
    """Files as they are, the images below folders and in tar archives, what globs match, for `-` the paths on stdin.

    Raises InputError for a folder or an archive without images and a glob that matches nothing. A file that does not
    exist and a folder that cannot be read are passed on: they become error rows.
    """
    for argument in arguments:
        if argument == "-":
            listed = (line.rstrip("\r\n") for line in stdin if line.strip())
            first = next(listed, None)
            if first is None:
                raise InputError("-: no paths on stdin; write one on each line")
            for path in itertools.chain([first], listed):
                yield from images_in(Path(path)) if _is_archive(path) else [path]
        elif os.path.isdir(argument):  # noqa: PTH112  (Path's own raises for a name that is too long)
            yield from _images_below(argument)
        elif _is_archive(argument):
            member = None
            for member in images_in(Path(argument)):
                yield member
            if member is None:
                raise InputError(f"{argument}: no images in this archive (endings: {' '.join(images.ENDINGS)})")
        elif glob.has_magic(argument) and not os.path.exists(argument):  # noqa: PTH110
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
            if not matches:
                raise InputError(f"{argument}: nothing matches")
            yield from expand_inputs(matches, stdin)
        else:
            yield argument


def _images_below(folder: str) -> list[str]:
    """The images, and last the folders that cannot be read."""
    unreadable: list[str] = []
    files = walk(Path(folder), lambda error: unreadable.append(error.filename))
    found = [str(file) for file in files if file.suffix.lower() in images.ENDINGS] + unreadable
    if not found:
        raise InputError(f"{folder}: no images in this folder (endings: {' '.join(images.ENDINGS)})")
    return found


def _is_archive(path: str) -> bool:
    return path.lower().endswith(".tar") and os.path.isfile(path)  # noqa: PTH113


def line_waiting(stdin: IO[str]) -> bool:
    """Whether the system has something to read without waiting; False where it cannot tell, as of pipes on Windows."""
    try:
        return bool(select.select([stdin], [], [], 0)[0])
    except (OSError, ValueError):
        return False


class Predictor:
    """Rows from images. `pipelines` are the views whose probabilities are averaged, as `tta_pipelines` gives them."""

    def __init__(
        self, parts: Parts, topk: int = 5, pipelines: Sequence[Pipeline] = (), asked: Asked | None = None
    ) -> None:
        self.parts, self.topk, self.asked = parts, topk, asked or Asked()
        self.pipelines = [*pipelines] or [parts.pipeline]
        if parts.network.classifier.frozen:
            parts.network.prefix()  # torch.fx makes it, and while it traces no other thread may call a module
        self.cam = GradCam(parts.network.classifier)
        self.number = 0
        self.dark = images.DarkImages()

    def rows(
        self, inputs: Iterable[Source], batch_size: int = 16, ready: Callable[[], bool] | None = None
    ) -> Iterator[Row]:
        """A row per image, in order. A batch is decoded while the one before is computed.

        ready: whether the next input is there: no row waits for one that is not. None: always in a list, else never.
        """
        remaining = iter(inputs)
        there = ready or (lambda: isinstance(inputs, Sequence))
        with ThreadPoolExecutor(cores()) as pool:

            def draw(count: int) -> list[tuple[Source, Future[Decoded]]]:
                return [(source, pool.submit(self._decode, source)) for source in islice(remaining, count)]

            batch = draw(batch_size)
            while batch:
                ahead: list[tuple[Source, Future[Decoded]]] = []
                while len(ahead) < batch_size and there() and (one := draw(1)):
                    ahead += one
                yield from self._rows(batch)
                batch = ahead + draw(batch_size - len(ahead))
        self.dark.warn(f"{self.number} images")

    def _decode(self, source: Source) -> Decoded:
        """The image's views, and last, where it is to be explained, all of it as in evaluation."""
        picture = _opened(source, self.parts.decoding)
        explained = [self.parts.pipeline] if self.asked.explanations is not None else []
        return [pipeline.image(picture) for pipeline in (*self.pipelines, *explained)], images.dark(picture)

    def _rows(self, decoded: list[tuple[Source, Future[Decoded]]]) -> Iterator[Row]:
        good = [future.result()[0] for _, future in decoded if future.exception() is None]
        found = iter(self._ranked(good))
        for source, future in decoded:
            self.number += 1
            path = _called(source, self.number)
            try:
                views, largest = future.result()
            except ImageError as error:
                yield Row(path, error=str(error))
                continue
            self.dark.add(path, largest)
            row = replace(next(found), path=path)
            if self.asked.explanations is not None:
                self._explain(self.asked.explanations, row, views[-1])
            yield row

    def _explain(self, folder: Path, row: Row, view: Tensor) -> None:
        for said in row.predictions if row.heads else row.labels or row.predictions[:1]:
            self._explain_one(folder, row, view, said)

    def _explain_one(self, folder: Path, row: Row, view: Tensor, of: Prediction) -> None:
        picture = self.cam.picture(self.parts.pipeline, view, of.index)
        if row.neighbours and self.asked.near is not None:
            shown = self.asked.near.picture
            picture = sheet(picture, [(shown(one.path), f"{one.similarity:.2f} {one.label}") for one in row.neighbours])
        said = re.sub(r"[^\w.-]+", "_", of.label)
        stem, label = (part.encode()[:99].decode(errors="ignore") for part in (Path(row.path).stem, said))
        name = f"{self.number:05}-{stem}-{label}.png"
        write_atomically(folder / name, partial(picture.save, format="PNG"))

    def _ranked(self, pictures: list[Views]) -> list[Row]:
        """The row of each image, given as its views, without its path."""
        if len({views[0].shape for views in pictures}) > 1:  # the transforms fix no size: one by one
            return [self._ranked([views])[0] for views in pictures]
        if not pictures:
            return []
        (logits, embedded), saved, near = self._logits(pictures), self.parts.saved, self.asked.near
        task, calibration = self.parts.task, saved.calibration if saved else None
        rows = [Row("", classes) for classes in task.predictions(logits, calibration, self.topk)]
        if (labels := task.labels(logits, calibration)) is not None:
            rows = [replace(row, labels=found) for row, found in zip(rows, labels, strict=True)]
        if (blocks := task.blocks(logits, calibration, self.topk)) is not None:
            rows = [replace(row, heads=found) for row, found in zip(rows, blocks, strict=True)]
        if self.asked.most is not None:
            sets = conformal.sets(logits, calibration, self.asked.most)
            rows = [
                replace(row, set=[task.classes[index] for index in one]) for row, one in zip(rows, sets, strict=True)
            ]
        if self.asked.features:
            rows = [replace(row, features=one) for row, one in zip(rows, embedded.cpu(), strict=True)]
        if near is None:
            return rows
        similarities = near.known.similarities(embedded, max(near.count, NEAREST))
        if near.count:
            nearest = near.known.nearest(similarities, near.count, task.caption)
            rows = [replace(row, neighbours=found) for row, found in zip(rows, nearest, strict=True)]
        if near.reject:
            accepted = near.known.accepted(similarities)
            rows = [replace(row, accepted=like) for row, like in zip(rows, accepted, strict=True)]
        return rows

    @torch.inference_mode()
    def _logits(self, pictures: list[Views]) -> tuple[Tensor, Tensor]:
        """The logits, and where they are asked for what the head sees of the first view."""
        network, embedded = self.parts.network, torch.empty(0)
        views: list[Tensor] = []
        for pipeline, *tensors in zip(self.pipelines, *pictures, strict=False):
            features = network.features(pipeline.batch(torch.stack(tensors).to(network.device)))
            if (self.asked.near is not None or self.asked.features) and not views:
                embedded = network.embed(features)
            views.append(network.logits(features))
        logits = self.parts.task.averaged(views).cpu()
        check_finite(logits)
        return logits, embedded


@torch.no_grad()
def embed(parts: Parts, inputs: Iterable[Source], batch_size: int) -> Tensor:
    """The input of the head for each image, (N, features) float32 on the CPU. Raises ImageError."""
    network, pipeline, rows = parts.network, parts.pipeline, [torch.empty(0, parts.features)]
    numbers, dark = itertools.count(1), images.DarkImages()

    def view(source: Source) -> Tensor:
        picture = _opened(source, parts.decoding)
        dark.add(_called(source, next(numbers)), images.dark(picture))
        return pipeline.image(picture)

    for chunk in chunked(inputs, batch_size):
        batch = pipeline.batch(stacked([view(source) for source in chunk]).to(network.device))
        rows.append(network.embed(network.features(batch)).cpu())
    embedded = torch.cat(rows)
    dark.warn(f"{len(embedded)} images")
    return embedded


def explain(parts: Parts, source: Source, target: int | None) -> Image.Image:
    """The image beside the evidence for class `target`, None for the predicted one. Raises ImageError, InputError."""
    network, pipeline = parts.network, parts.pipeline
    view = pipeline.image(_opened(source, parts.decoding))
    if target is None:
        with torch.inference_mode():
            batch = pipeline.batch(view[None].to(network.device))
            target = int(network.logits(network.features(batch)).argmax())
    return GradCam(network.classifier).picture(pipeline, view, target)


def _called(source: Source, number: int) -> str:
    return f"image {number}" if isinstance(source, Image.Image) else str(source)


def _opened(source: Source, decoding: Decoding) -> Image.Image:
    if isinstance(source, Image.Image):
        decoding.check(source.size, "the picture")
        return images.upright_rgb(source, decoding.value_range)
    if isinstance(source, Member):
        return images.decode(source.content(), source, decoding)
    return images.load(Path(source), decoding)
