"""What is near an image: the training images that look most like it, and whether it is like any of them at all.

Features, of length 1, are computed when they are first asked for and kept beside the checkpoint. An image is accepted
where its k-th nearest training image is no further away than those of 95% of the validation images (Sun et al., ICML
2022, "Out-of-distribution detection with deep nearest neighbors").
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer.assembly import Parts, memory_of, reopened
from tl_trainer.data.verify import verified
from tl_trainer.errors import CheckpointError, InputError, RunError
from tl_trainer.ground.sealed import check_seal, load_plain, save_sealed, seal_of

log = logging.getLogger(__name__)

FILE = "neighbours.pth"
NEAREST = 5  # k
ACCEPTED = 0.95
FEWEST = 20  # validation images that can tell what 95% of them are


@dataclass(frozen=True)
class Neighbour:
    """A training image, its class, and the cosine of the angle between its features and those of the image."""

    path: str
    label: str
    similarity: float


@dataclass(frozen=True)
class Known:
    """features: (N, features) float16 of length 1, of the training images `paths` and their `targets`.

    val: the similarity of each validation image to its k-th nearest of them, (images,).
    """

    features: Tensor
    paths: list[str]
    targets: list[int]
    val: Tensor

    def similarities(self, embedded: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Those of the `count` nearest to each of (M, features), nearest first, and which they are; both (M, count)."""
        alike = functional.normalize(embedded.cpu().float()) @ self.features.float().T
        found = alike.topk(min(count, len(self.paths)), dim=1)
        return found.values, found.indices

    def nearest(self, embedded: Tensor, count: int, classes: Sequence[str]) -> list[list[Neighbour]]:
        """The `count` nearest training images of each of (M, features)."""
        alike, found = self.similarities(embedded, count)
        return [
            [
                Neighbour(self.paths[at], classes[self.targets[at]], round(value, 6))
                for value, at in zip(*row, strict=True)
            ]
            for row in zip(alike.tolist(), found.tolist(), strict=True)
        ]

    def accepted(self, embedded: Tensor) -> list[bool]:
        """Whether each of (M, features) is as near to the training images as 95% of the validation images are."""
        least = torch.quantile(self.val, 1 - ACCEPTED)
        return [bool(value >= least) for value in self.similarities(embedded, NEAREST)[0][:, -1]]


def known(parts: Parts, checkpoint: Path) -> Known:
    """What the checkpoint's training images look like: from the file beside it, else computed and written there.

    At most `output.neighbours_mb` of features, spread evenly over the training images. Raises InputError, with the
    remedy, where there is no file and the images are gone.
    """
    file, seal = checkpoint.with_name(FILE), seal_of(checkpoint)
    if file.exists():
        if not check_seal(file):
            raise CheckpointError(f"{file}: damaged; remove it, and it is made again")
        content = load_plain(file)
        if content.pop("checkpoint") == seal:
            return Known(**content)
        log.info("%s belongs to an earlier %s and is made again", file, checkpoint.name)
    found = _computed(parts, file)
    try:
        save_sealed(file, {"checkpoint": seal, **vars(found)})
    except RunError as error:
        log.warning("%s; the features are computed again next time", error)
    return found


def _computed(parts: Parts, file: Path) -> Known:
    try:
        dataset = reopened(parts)
        train, val = (dataset.split(name) for name in ("train", "val"))
    except InputError as error:
        raise InputError(
            f"{error}\n--neighbours and --reject need the features of the training images, which are in no {file}; "
            "give the images with data.root=DIR once, or bring that file from where they are"
        ) from error
    most = int(parts.config.output.neighbours_mb * 1e6) // (2 * parts.features)
    if most < len(train):
        log.info("output.neighbours_mb holds %d of the %d training images, evenly spread", most, len(train))
        train = train.sample(max(1, most))
    embedded = []
    for name, split in (("train", train), ("val", val)):
        split = verified(split, name, parts.config.data, memory_of(parts.config))
        embedded.append(functional.normalize(parts.feeds.embed(split, parts.pipeline)))
        train = split if name == "train" else train
    found = Known(embedded[0].half(), train.names, [*train.targets], torch.empty(0))
    return replace(found, val=found.similarities(embedded[1], NEAREST)[0][:, -1])
