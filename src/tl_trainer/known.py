"""What is near an image: the training images that look most like it, and whether it is like any of them at all.

Features, of length 1, are computed when they are first asked for and kept beside the checkpoint. An image is accepted
where its k-th nearest training image is no further away than those of 95% of the validation images (Sun et al., ICML
2022, "Out-of-distribution detection with deep nearest neighbors").
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tl_trainer.assembly import Parts, memory_of, reopened
from tl_trainer.config.load import COMMAND_LINE
from tl_trainer.data.dataset import Split
from tl_trainer.data.label_texts import classes_in, is_target
from tl_trainer.data.verify import verified
from tl_trainer.errors import CheckpointError, ImageError, InputError, RunError
from tl_trainer.ground.sealed import check_seal, load_plain, save_sealed, seal_of
from tl_trainer.ground.wording import listed, printable

log = logging.getLogger(__name__)

FILE = "neighbours.pth"
NEAREST = 5  # k
ACCEPTED = 0.95
ROWS = 1024  # that are compared at once
SIDE = 224  # pixels, of a training image that is shown
FEWEST = 20  # validation images that can tell what 95% of them are


Similarities = tuple[Tensor, Tensor]  # of each image to its nearest training images, and which they are


@dataclass(frozen=True)
class Neighbour:
    """A training image, its class, and the cosine of the angle between its features and those of the image."""

    path: str
    label: str
    similarity: float


_KINDS: dict[str, type] = {"features": Tensor, "paths": list, "targets": list, "val": Tensor}


@dataclass(frozen=True)
class Known:
    """features: (N, features) float16 of length 1, of the training images `paths` and their `targets`.

    val: the similarity of each validation image to its k-th nearest of them, (images,).
    """

    features: Tensor
    paths: list[str]
    targets: list[Any]
    val: Tensor

    @cached_property
    def _compared(self) -> Tensor:
        return self.features.float()

    def similarities(self, embedded: Tensor, count: int) -> Similarities:
        """Those of the `count` nearest to each of (M, features), nearest first, and which they are; both (M, count)."""
        parts = [
            (functional.normalize(rows.cpu().float()) @ self._compared.T).topk(min(count, len(self.paths)), dim=1)
            for rows in torch.split(embedded, ROWS)
        ]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def nearest(self, similarities: Similarities, count: int, caption: Callable[[Any], str]) -> list[list[Neighbour]]:
        """The `count` nearest training images of each image, from the similarities of as many or more.

        caption: a target in words.
        """
        alike, found = (part[:, :count] for part in similarities)
        return [
            [
                Neighbour(self.paths[at], caption(self.targets[at]), round(value, 6))
                for value, at in zip(*row, strict=True)
            ]
            for row in zip(alike.tolist(), found.tolist(), strict=True)
        ]

    def nearest_in(self, parts: Parts, split: Split, count: int) -> list[list[Neighbour]]:
        """The `count` nearest training images of each image of a split."""
        similarities = self.similarities(parts.feeds.embed(split, parts.pipeline), count)
        return self.nearest(similarities, count, parts.task.caption)

    def accepted(self, similarities: Similarities) -> list[bool]:
        """Whether each is as near to the training images as 95% of the validation images are; of NEAREST or more."""
        least = torch.quantile(self.val, 1 - ACCEPTED)
        return [bool(value >= least) for value in similarities[0][:, :NEAREST][:, -1]]


def known(parts: Parts, checkpoint: Path) -> Known:
    """What the checkpoint's training images look like: from the file beside it, else computed and written there.

    At most `output.neighbours_mb` of features, spread evenly over the training images. Raises InputError, with the
    remedy, where there is no file and the images are gone.
    """
    file = checkpoint.with_name(FILE)
    if (kept := at_hand(parts, checkpoint)) is not None:
        _ignored(parts, file, len(kept.paths))
        return kept
    if file.exists():
        log.info("%s belongs to an earlier %s and is made again", file, checkpoint.name)
    found = _computed(parts, file)
    try:
        keep(found, checkpoint)
    except RunError as error:
        log.warning("%s; the features are computed again next time", error)
    return found


def known_of(embedded: Tensor, names: Sequence[str], targets: Sequence[Any], val: Tensor) -> Known:
    """From what the head sees of the training images `names`, (N, features), and of the validation images."""
    found = Known(functional.normalize(embedded).half(), [*names], [*targets], torch.empty(0))
    return replace(found, val=found.similarities(val, NEAREST)[0][:, -1])


def most_kept(parts: Parts) -> int:
    """How many training images' features `output.neighbours_mb` holds."""
    return max(1, int(parts.config.output.neighbours_mb * 1e6) // (2 * parts.features))


def keep(found: Known, checkpoint: Path) -> None:
    """Write the file beside the checkpoint."""
    content = {name: getattr(found, name) for name in _KINDS}
    save_sealed(checkpoint.with_name(FILE), {"checkpoint": seal_of(checkpoint), **content})


def at_hand(parts: Parts, checkpoint: Path) -> Known | None:
    """What the file beside the checkpoint says of it; None where there is none, or that of an earlier checkpoint.

    Raises CheckpointError for a file that is damaged or another's.
    """
    file = checkpoint.with_name(FILE)
    if not file.exists():
        return None
    if not check_seal(file):
        raise CheckpointError(f"{file}: damaged; remove it, and it is made again")
    content = load_plain(file, mapped=False)  # Windows replaces no file that is mapped
    if not _is_ours(content):
        raise CheckpointError(f"{file}: not a file of tl-trainer's features; remove it, and it is made again")
    if content.pop("checkpoint") != seal_of(checkpoint):
        return None
    if not _fits(kept := Known(**content), parts):
        raise CheckpointError(f"{file}: does not fit {checkpoint}; remove it, and it is made again")
    return kept


def training_pictures(parts: Parts, checkpoint: Path) -> Callable[[str], Image.Image | None]:
    """What opens a training image by its name in `Known.paths`, small; it gives None where it cannot, saying why."""
    try:
        train = reopened(parts, checkpoint).split("train")
    except InputError as error:
        log.warning("the pictures show no training images: %s", error)
        return lambda _: None
    index = {name: number for number, name in enumerate(train.names)}

    def opened(name: str) -> Image.Image | None:
        if name not in index:
            log.warning("%s is no training image here any more, so it is not shown", printable(name))
            return None
        try:
            return train.open(index[name], draft=SIDE)
        except ImageError as error:
            log.warning("%s", error)
            return None

    return opened


def _is_ours(content: Any) -> bool:
    """Whether the features file holds what belongs there, each of its kind and as long as the others."""
    kinds = {"checkpoint": str, **_KINDS}
    if not isinstance(content, dict) or {*content} != {*kinds}:
        return False
    if not all(isinstance(content[name], kind) for name, kind in kinds.items()):
        return False
    features, val = content["features"], content["val"]
    return (features.ndim, val.ndim) == (2, 1) and len(features) == len(content["paths"]) == len(content["targets"])


def _fits(kept: Known, parts: Parts) -> bool:
    """Whether the features are as wide as those of the checkpoint, and each has a name and a target of its task."""
    classes, kind = len(parts.task.classes), int if parts.task.kind == "single" else tuple
    named = all(isinstance(path, str) for path in kept.paths)
    labelled = all(isinstance(target, kind) and is_target(target, classes) for target in kept.targets)
    floats = kept.features.is_floating_point() and kept.val.is_floating_point()
    return kept.features.shape[1] == parts.features and floats and named and labelled


def _ignored(parts: Parts, file: Path, kept: int) -> None:
    """Say which of the keys that were asked for change nothing, since the file is there."""
    origins, keys = parts.loaded.origins, ("data.root", "output.neighbours_mb")
    if given := [key for key in keys if origins.get((*key.split("."),)) == COMMAND_LINE]:
        log.info(
            "%s holds the features of %d training images, and %s changes nothing; remove it to have it made again",
            file, kept, " and ".join(given),
        )  # fmt: skip


def _computed(parts: Parts, file: Path) -> Known:
    try:
        dataset = reopened(parts, file)
        train, val = (dataset.split(name) for name in ("train", "val"))
    except InputError as error:
        raise InputError(
            f"{error}\n--neighbours and --reject need the features of the training images, which are in no {file}; "
            "give the images with data.root=DIR once, or bring that file from where they are"
        ) from error
    if (most := most_kept(parts)) < len(train):
        log.info("output.neighbours_mb holds %d of the %d training images, evenly spread", most, len(train))
        train = train.sample(most)
    data, memory = parts.config.data, memory_of(parts.config)
    train, val = verified(train, "train", data, memory), verified(val, "val", data, memory)
    present = classes_in(train.targets)
    if absent := [name for label, name in enumerate(parts.task.classes) if label not in present]:
        log.warning("no training image of %s is there, so what is like these is like nothing", listed(absent))
    rows, others = (parts.feeds.embed(split, parts.pipeline) for split in (train, val))
    return known_of(rows, train.names, train.targets, others)
