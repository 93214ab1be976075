"""What may be wrong with a dataset: copies, labels, odd images, classes; from a look at each image and its features."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer import suspects
from tl_trainer.assembly import Setup, set_up
from tl_trainer.config.load import Loaded
from tl_trainer.config.schema import Config, HeadSection, ModelSection, PerformanceSection, TransformsSection
from tl_trainer.config.training import TrainSection
from tl_trainer.copies import Pair, copies, groups
from tl_trainer.data.dataset import SPLIT_OF, Split
from tl_trainer.data.loaders import chunked
from tl_trainer.data.pixels import BITS, NUMBERS, SIDE, Look, look
from tl_trainer.errors import DataError, SettingError
from tl_trainer.feature_folders import make_room
from tl_trainer.feature_store import FeatureStore
from tl_trainer.features import features_folder
from tl_trainer.ground.digests import Digests
from tl_trainer.ground.machine import cores, free_memory
from tl_trainer.ground.progress import bar
from tl_trainer.ground.wording import listed
from tl_trainer.metrics import check_finite
from tl_trainer.models.backbones import resolve_weights
from tl_trainer.settings import check_one, located
from tl_trainer.suspects import Confused
from tl_trainer.tables import FOLDS

log = logging.getLogger(__name__)

LOOK_VERSION = 2  # to be raised with every change to `data.pixels`
DARK = 0.1  # mean brightness of 1: a tenth of the grey values is left to tell one thing from another
EMPTY = 0.9  # of the pixels of one shade: a line of text on paper, hardly a photograph of something
BLANK = 2 / 255  # deviation of grey of 1: what compression alone makes of a single colour
LONG = 3.0  # times the shorter side: a centre crop leaves less than a third of the image
LISTED = 0.1  # of all images, the label suspects that are listed: what a person can look through
KEPT_FIRST = ("test", "val", "train", "all")  # of copies in two splits the one in the earlier split is kept
_AT_ONCE = 256  # images whose numbers are kept at once


class Finding(NamedTuple):
    """Something that may be wrong with an image, as its index in `Checked`; `score` orders findings of one kind.

    other: the image that it is to be compared with. skip: whether it can be left out without anybody's judgement.
    """

    kind: str
    image: int
    reason: str
    score: float
    other: int | None = None
    skip: bool = False


@dataclass(frozen=True)
class Checked:
    """The images of all splits in one row, and what was found about them, by kind and score.

    places: of each image its split and its index there. wrong_labels: how many are estimated to be wrong. unreadable:
    of each split the images that cannot be read, and why. notes: what concerns no single image, a sentence for each.
    """

    where: str
    backbone: str
    classes: list[str]
    splits: dict[str, Split]
    findings: list[Finding]
    confused: list[Confused]
    wrong_labels: int
    unreadable: dict[str, dict[str, str]]
    notes: list[str]

    @property
    def places(self) -> list[tuple[str, int]]:
        """Of each image its split and its index there."""
        return _places(self.splits)


def check(loaded: Loaded) -> Checked:
    """Check the images of all splits of a configuration. Raises a TrainerError for whatever is wrong with it."""
    setup = set_up(_for_checking(loaded))
    parts, splits, config = setup.parts, setup.dataset.splits, setup.parts.config
    backbone = f"{parts.backbone['name']} ({parts.backbone['weights']})"
    counts = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    log.info("checking %s images in %d classes with %s", counts, len(setup.dataset.classes), backbone)
    _require_memory(sum(map(len, splits.values())), parts.features, len(setup.dataset.classes))
    features = torch.cat([parts.feeds.embed(split, parts.pipeline, name) for name, split in splits.items()])
    check_finite(features)
    seen = Look.of(np.concatenate([_looks(split, name, config) for name, split in splits.items()]))
    targets = torch.tensor([target for split in splits.values() for target in split.targets])
    images = _Images(splits, setup.dataset.classes, targets, functional.normalize(features))
    pairs = _pairs(images, seen)
    same = torch.from_numpy(groups(pairs, len(targets))).long()
    probabilities = suspects.out_of_fold(features, targets, same, len(images.classes))
    looked = [*_looked(seen, parts.backbone["size"])]
    counted = Counter(finding.kind for finding in looked)
    usual = {kind: count for kind, count in counted.items() if count > len(targets) / 2}
    findings = [
        *_copies(images, pairs),
        *_labels(images, probabilities),
        *_outliers(images, same),
        *(finding for finding in looked if finding.kind not in usual),
    ]
    return Checked(
        where=setup.dataset.where,
        backbone=backbone,
        classes=images.classes,
        splits=splits,
        findings=sorted(findings, key=lambda finding: -finding.score),
        confused=suspects.confused(probabilities, targets),
        wrong_labels=suspects.wrong_labels(probabilities, targets),
        unreadable={name: bad for name, bad in setup.skipped.items() if bad},
        notes=[*_notes(setup), *(_usual(kind, count, len(targets)) for kind, count in usual.items())],
    )


def _require_memory(images: int, width: int, classes: int) -> None:
    """Raise DataError where the features and the logits of every fold would not fit into the memory that is free."""
    needed, free = 4 * images * (4 * width + 2 * FOLDS * classes), free_memory()
    if needed > free:
        raise DataError(
            f"checking {images:,} images takes about {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are "
            "free; check a part of them, such as a CSV file with fewer rows"
        )


class _Images(NamedTuple):
    """All images in one row: labels (N,) and features of length 1 (N, D)."""

    splits: dict[str, Split]
    classes: list[str]
    targets: Tensor
    features: Tensor

    def label(self, image: int) -> str:
        return self.classes[int(self.targets[image])]


def _places(splits: dict[str, Split]) -> list[tuple[str, int]]:
    return [(name, index) for name, split in splits.items() for index in range(len(split))]


def _for_checking(loaded: Loaded) -> Loaded:
    """The configuration with a backbone that only computes features, and with bad images and copies to be reported."""
    config = loaded.config
    with located(loaded):
        check_one(loaded)
        if config.data.task != "single":
            why = "a check compares the one class of each image, and here it may have several;"
            remedy = "to find copies and odd images, check a table of these images with one label each"
            raise SettingError("data.task", f"{why} {remedy}")
        weights = resolve_weights(config.model.backbone, config.model.weights, source=config.model.weights_from).name
    model, transforms = (
        config.model.model_copy(update={"trainable": "head", "extra": [], "head": HeadSection()}),
        config.transforms,
    )
    if weights == "none" or weights.endswith("_V2"):
        why = "random weights" if weights == "none" else "weights trained on mixed images"
        model, transforms = ModelSection(), TransformsSection()
        log.info(
            "%s (%s) is not used for the check: %s do not tell similar images apart; %s is used instead",
            *(config.model.backbone, weights, why, model.backbone),
        )
    data = config.data.skipping_bad().model_copy(update={"on_duplicates": "warn"})
    features = config.features.model_copy(update={"views": "auto"})
    train = TrainSection(batch_size=config.train.batch_size, precision=config.train.precision)
    changed = {"data": data, "model": model, "transforms": transforms, "features": features, "train": train}
    return replace(loaded, config=config.model_copy(update={**changed, "performance": PerformanceSection()}))


def _looks(split: Split, name: str, config: Config) -> np.ndarray:
    """What `data.pixels` sees of each image, (N, NUMBERS); kept beside the features, under the image's content."""
    hashes = Digests.of(split.hashes)
    with ThreadPoolExecutor(cores()) as pool:

        def rows(places: Sequence[int]) -> np.ndarray:
            return np.stack([*pool.map(lambda place: look(split.open(place, draft=SIDE)), places)])

        if config.features.cache == "off":
            return rows(range(len(split)))
        identity = f"pixels {LOOK_VERSION} {PIL.__version__} {config.data.value_range}"
        folder = features_folder(config.features)
        store = FeatureStore(folder / hashlib.sha256(identity.encode()).hexdigest()[:32])
        missing = store.lacking(hashes).tolist()
        make_room(folder, 4 * NUMBERS * len(missing), int(config.features.limit_gb * 1e9), keep={store.folder})
        with contextlib.closing(store):
            chunks = chunked(missing, _AT_ONCE)
            for places in bar(chunks, f"looking at {name} images", -(-len(missing) // _AT_ONCE)):
                store.append([*hashes.take(places)], torch.from_numpy(rows(places)))
        return store.take(store.rows(hashes)).numpy()


def _pairs(images: _Images, seen: Look) -> list[Pair]:
    """The copies: files with the same content, and pictures that are the same by hash and features."""
    first: dict[bytes, int] = {}
    contents = [digest for split in images.splits.values() for digest in split.hashes]
    exact = [
        Pair(first[digest], image, 0, False)
        for image, digest in enumerate(contents)
        if first.setdefault(digest, image) != image
    ]
    known = {pair[:2] for pair in exact}
    near = copies(seen.hashes, images.features.numpy())
    blank = seen.contrast < BLANK  # the hash of an empty image is noise
    return exact + [pair for pair in near if pair[:2] not in known and not blank[[*pair[:2]]].any()]


def _copies(images: _Images, pairs: list[Pair]) -> Iterator[Finding]:
    """A finding for each image that is a copy of one that is kept, or has a copy under another label."""
    places, contents = _places(images.splits), [digest for split in images.splits.values() for digest in split.hashes]
    order = [(KEPT_FIRST.index(name), image) for image, (name, _) in enumerate(places)]
    nearest: dict[int, tuple[int, Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.bits, reverse=True):  # the nearest comes last and stays
        kept, copy = sorted(pair[:2], key=lambda image: order[image])
        contradict = images.targets[kept] != images.targets[copy]
        for image, other in ((copy, kept), (kept, copy)) if contradict else ((copy, kept),):
            before = nearest.get(image)
            if contradict or before is None or images.targets[before[0]] == images.targets[image]:
                nearest[image] = other, pair
    for image, (other, pair) in nearest.items():
        what = "the mirror image of" if pair.mirrored else "the same picture as"
        what = "the same file as" if contents[image] == contents[other] else what
        (split, _), (other_split, index) = places[image], places[other]
        kind, more = "copy", ""
        if images.targets[image] != images.targets[other]:
            kind, more = "two labels", f", which has the label {images.label(other)}"
        elif split != other_split:
            kind, more = "copy across splits", f", which is in {other_split}"
        reason = f"{what} {images.splits[other_split].name(index)}{more}"
        yield Finding(kind, image, reason, 1 - pair.bits / BITS, other, skip=True)


def _labels(images: _Images, probabilities: Tensor) -> Iterator[Finding]:
    """The images whose own label is the least probable, where another class is more so."""
    predicted, sizes = probabilities.argmax(dim=1), torch.bincount(images.targets, minlength=len(images.classes))
    order = suspects.by_self_confidence(probabilities, images.targets)
    order = order[: max(1, int(LISTED * len(order)))]
    labels = images.targets[order]
    order = order[(predicted[order] != labels) & (sizes[labels] >= FOLDS)]
    others = suspects.nearest(images.features, images.targets, order, predicted[order])
    for image, other in zip(order.tolist(), others.tolist(), strict=True):
        own, said = float(probabilities[image, images.targets[image]]), int(predicted[image])
        reason = (
            f"looks like {images.classes[said]} ({float(probabilities[image, said]):.0%}), not {images.label(image)} "
            f"({own:.0%}), judged without this image"
        )
        yield Finding("label", image, reason, 1 - own, other)


def _outliers(images: _Images, same: Tensor) -> Iterator[Finding]:
    found = suspects.outliers(images.features, images.targets, same)
    for image in np.flatnonzero(found.deviations > suspects.FAR).tolist():
        reason = (
            f"unlike the other images of {images.label(image)}: {found.deviations[image]:.1f} deviations farther from "
            "its neighbours than is usual there"
        )
        yield Finding("outlier", image, reason, float(found.deviations[image]), int(found.nearest[image]))


def _looked(seen: Look, size: int) -> Iterator[Finding]:
    """What the pixels alone show. size: the side of the network's input."""
    shorter, longer = np.minimum(seen.width, seen.height), np.maximum(seen.width, seen.height)
    blank = seen.contrast < BLANK
    dull = suspects.deviations(-np.log(np.maximum(seen.sharpness, 1e-3)))
    smallest = min(size / 2, SIDE)
    for image in range(len(blank)):
        if blank[image]:
            yield Finding("blank", image, "nearly one colour", 1 - float(seen.contrast[image]), skip=True)
        elif seen.brightness[image] < DARK:
            light = float(seen.brightness[image])
            yield Finding("dark", image, f"its mean brightness is {light:.0%} of white", 1 - light)
        elif seen.uniform[image] > EMPTY:
            share = float(seen.uniform[image])
            yield Finding("empty", image, f"{share:.0%} of its pixels have one shade", share)
        if dull[image] > suspects.FAR and not blank[image]:
            reason = f"blurred: {dull[image]:.1f} deviations less sharp than is usual in this data"
            yield Finding("blurred", image, reason, float(dull[image]))
        if shorter[image] < smallest:
            sides = f"{seen.width[image]:.0f} x {seen.height[image]:.0f}"
            reason = f"{sides} pixels, enlarged more than twice for a network that takes {size} x {size}"
            yield Finding("tiny", image, reason, 1 - float(shorter[image]) / size)
        if longer[image] > LONG * shorter[image]:
            ratio = float(longer[image] / shorter[image])
            yield Finding("long", image, f"{ratio:.1f} times as long as wide: most of it is cut off", ratio)


def _usual(kind: str, count: int, images: int) -> str:
    return f"{count:,} of {images:,} images are {kind}: too many to be mistakes, so they are not listed"


def _notes(setup: Setup) -> list[str]:
    """What the names of folders and the sizes of classes say."""
    classes, found = setup.dataset.classes, []
    if like := [name for name in classes if name.lower() in SPLIT_OF]:
        found.append(
            f"a class has the name of a split ({listed(like)}); if it is one, put a folder for each class into it"
        )
    counts = torch.bincount(torch.tensor([t for split in setup.dataset.splits.values() for t in split.targets]))
    if few := [name for name, count in zip(classes, counts.tolist(), strict=False) if count < FOLDS]:
        found.append(f"the labels of {len(few)} classes, e.g. {few[0]}, are not checked: fewer than {FOLDS} images")
    return found
