"""Rows from images: many paths in, one row each out, in order, with constant memory."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from tl_trainer.data import images
from tl_trainer.data.folders import walk
from tl_trainer.errors import ImageError, InputError
from tl_trainer.restore import Restored

THREADS = 4


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

    Raises InputError for a folder without images and a glob that matches nothing. A file that does not exist is
    passed on: it becomes an error row.
    """
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            yield from (line.rstrip("\n") for line in stdin if line.strip())
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


def predict(restored: Restored, paths: Iterable[str], topk: int, batch_size: int) -> Iterator[Row]:
    """A row per path, in order. A batch is decoded while the one before is computed."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = None
        for chunk in _chunks(paths, batch_size):
            decoded = [pool.submit(_decode, restored, path) for path in chunk]
            if waiting is not None:
                yield from _rows(restored, waiting[0], [item.result() for item in waiting[1]], topk)
            waiting = chunk, decoded
        if waiting is not None:
            yield from _rows(restored, waiting[0], [item.result() for item in waiting[1]], topk)


def _chunks(paths: Iterable[str], size: int) -> Iterator[list[str]]:
    remaining = iter(paths)
    while chunk := list(islice(remaining, size)):
        yield chunk


def _decode(restored: Restored, path: str) -> Tensor | str:
    try:
        tensor: Tensor = restored.pipeline.image(images.load(Path(path)))
    except ImageError as error:
        return str(error)
    return tensor


def _rows(restored: Restored, paths: list[str], decoded: list[Tensor | str], topk: int) -> Iterator[Row]:
    tensors = [item for item in decoded if isinstance(item, Tensor)]
    ranked = iter(_ranked(restored, tensors, topk) if tensors else [])
    for path, item in zip(paths, decoded, strict=True):
        yield Row(path, error=item) if isinstance(item, str) else Row(path, next(ranked))


def _ranked(restored: Restored, tensors: list[Tensor], topk: int) -> list[list[Prediction]]:
    if len({tensor.shape for tensor in tensors}) > 1:  # the evaluation transforms fix no size: one by one
        return [_ranked(restored, [tensor], topk)[0] for tensor in tensors]
    with torch.inference_mode():
        inputs = restored.pipeline.batch(torch.stack(tensors).to(restored.network.device))
        probabilities = restored.network.images_to_logits(inputs).softmax(dim=1).cpu()
    best = probabilities.topk(min(topk, len(restored.classes)), dim=1)
    return [
        [
            Prediction(restored.classes[index], index, round(value, 6))
            for value, index in zip(values, indices, strict=True)
        ]
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


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
        guesses = "  ".join(f"{guess.label} {guess.probability:.1%}" for guess in row.predictions)
        # An image's error names its path already.
        file.write(f"{row.path}  {guesses}\n" if row.error is None else f"error: {row.error}\n")
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
