"""The one room that knows what to do about copies: images with the same content in two splits, or under two labels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from tl_trainer.config.data import DataSection
from tl_trainer.data.dataset import Split
from tl_trainer.data.label_texts import classes_in, differ
from tl_trainer.errors import DataError
from tl_trainer.ground.wording import printable

log = logging.getLogger(__name__)

REMEDY = "remove the wrong ones, or set data.on_duplicates: drop"


def unrepeated(splits: dict[str, Split], data: DataSection) -> tuple[dict[str, Split], list[str]]:
    """The verified splits as `data.on_duplicates` wants them, and what is to be said of copies, a sentence for each.

    `drop` leaves out of train what is also in val or test, and of every split what is in it under two labels, all of
    it, since nobody knows which label is right. Copies under one label in one split are no mistake. Raises DataError
    for copies where they are an error, and where dropping them would leave no image of a class to learn from.
    """
    found = [*across(splits), *_contradictory(splits)]
    told = [sentence for sentence, _, _ in found]
    if not told:
        return splits, []
    if data.on_duplicates == "error":
        raise DataError("\n".join([*told, REMEDY]))
    if data.on_duplicates == "warn":
        log.warning("%s\n%s", "\n".join(told), REMEDY)
        return splits, told
    kept = {}
    for name, split in splits.items():
        copies = set().union(*(indices for _, where, indices in found if where == name))
        kept[name] = split.subset([index for index in range(len(split)) if index not in copies]) if copies else split
        if copies:
            told.append(f"{len(copies)} of {len(split)} {name} images were left out (data.on_duplicates: drop)")
        lost = classes_in(split.targets) - classes_in(kept[name].targets) if copies else set()
        if lost and (name == "train" or not kept[name]):
            raise DataError("\n".join([*told, f"without copies, no {name} image of {len(lost)} classes would be left"]))
    log.warning("%s", "\n".join(told))
    return kept, told


def across(splits: dict[str, Split]) -> Iterator[tuple[str, str, list[int]]]:
    """For two splits with copies: a sentence, from which `drop` takes them (only train), and which images they are."""
    for (name, split), (other, second) in combinations(splits.items(), 2):
        place = {digest: index for index, digest in enumerate(second.hashes)}
        copies = [index for index, digest in enumerate(split.hashes) if digest in place]
        if copies:
            labelled = [i for i in copies if differ(split.targets[i], second.targets[place[split.hashes[i]]])]
            index = (labelled or copies)[0]
            yield (
                f"{len(copies)} of {len(split)} {name} images are in {other} too"
                f"{f', {len(labelled)} of them under another label' if labelled else ''}, e.g. "
                f"{printable(split.name(index))} is {printable(second.name(place[split.hashes[index]]))}",
                name if name == "train" else "",
                copies,
            )


def _contradictory(splits: dict[str, Split]) -> Iterator[tuple[str, str, list[int]]]:
    """For each split with one content under two labels: a sentence, its name, and which images they are."""
    for name, split in splits.items():
        label: dict[bytes, Any] = {}
        pairs = zip(split.hashes, split.targets, strict=True)
        mixed = {digest for digest, target in pairs if differ(label.setdefault(digest, target), target)}
        copies = [index for index, digest in enumerate(split.hashes) if digest in mixed] if mixed else []
        if copies:
            example = [index for index in copies if split.hashes[index] == split.hashes[copies[0]]]
            second = next(index for index in example if differ(split.targets[index], split.targets[copies[0]]))
            yield (
                f"{len(copies)} of {len(split)} {name} images have a copy under another label, e.g. "
                f"{printable(split.name(copies[0]))} and {printable(split.name(second))}",
                name,
                copies,
            )
