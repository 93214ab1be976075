"""Classes and splits: what every source becomes, and the rules that hold for all of them.

The class list is fixed by the training split (lexicographic folder order, as torchvision's ImageFolder) and enforced on
every other one: a missing or an extra class is an error that names it, never a shifted index. An evaluation may go
without some classes of its checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, overload

from PIL import Image

from tl_trainer.data import images
from tl_trainer.data.images import STANDARD, Decoding
from tl_trainer.errors import DataError, ImageError
from tl_trainer.ground import distributed
from tl_trainer.ground.digests import Digests, Numbers
from tl_trainer.ground.wording import listed, printable

# A file that was written this recently may be written again within the resolution of its time stamp.
SETTLED_SECONDS = 2.0

# Each split and the names that its folder or its value in a CSV column may have, in any case.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}

# How the classes of a dataset may differ from a given list: not at all; some may be absent; others may be there too,
# whose images are left out.
Fit = Literal["exact", "fewer", "any"]


class Stamp(NamedTuple):
    """What changes whenever a file does, or the settings it is read with, which stand behind its path.

    Size in bytes, times of modification and change in ns.
    """

    path: bytes
    size: int
    modified: int
    changed: int

    @property
    def settled(self) -> bool:
        """Whether the file was last written so long ago that another change would show in the times."""
        return self.modified < time.time_ns() - int(SETTLED_SECONDS * 1e9)


def stamp_of(path: str | Path, *within: bytes) -> Stamp | None:
    """The stamp of a file, or of what is `within` it; None where it is not there. A name may be no text: bytes."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # gone, or a NUL in the path: `load` says so
        return None
    absolute = os.fsencode(os.path.join(os.getcwd(), path))  # noqa: PTH109, PTH118
    return Stamp(b"\0".join([absolute, *filter(None, within)]), found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Images(Protocol):
    """Where images are. No other room asks which kind it has: another one is these methods."""

    @property
    def decoding(self) -> Decoding:
        """How they are decoded, and which are too large."""

    def __len__(self) -> int:
        """How many there are."""

    def name(self, index: int) -> str:
        """What predictions and split.csv call the image."""

    def load(self, index: int, expected: bytes = b"", *, draft: int = 0) -> tuple[Image.Image, bytes]:
        """The image as upright RGB, and the SHA-256 of its content.

        expected: the hash that it must have, if given. draft: every byte is read, but the picture may be smaller, with
        sides of at least so many pixels; 1 is enough to find a damaged file. Raises ImageError, naming the image,
        where it cannot be read or is another.
        """

    def content(self, index: int) -> bytes:
        """The bytes of its file, as they are; of a picture that has none a PNG file's. ImageError as in `load`."""

    def stamp(self, index: int) -> Stamp | None:
        """What tells without reading the image that it is still the same; None where nothing does."""

    def decoded(self, decoding: Decoding) -> Images:
        """The same images, decoded so."""


@dataclass(frozen=True)
class Files:
    """Images that are files, called `names`. A path may be text: there may be millions, and few are opened at once."""

    paths: Sequence[str | Path]
    names: Sequence[str]
    decoding: Decoding = STANDARD

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """As given."""
        return self.names[index]

    def load(self, index: int, expected: bytes = b"", *, draft: int = 0) -> tuple[Image.Image, bytes]:
        """Read the file once, hash its bytes, decode them."""
        return from_content(self.content(index), Path(self.paths[index]), self.decoding, expected, draft)

    def content(self, index: int) -> bytes:
        """The file's bytes."""
        return images.read(Path(self.paths[index]))

    def stamp(self, index: int) -> Stamp | None:
        """None for a file that is not there."""
        return stamp_of(self.paths[index], self.decoding.settings)

    def decoded(self, decoding: Decoding) -> Files:
        """The same files."""
        return replace(self, decoding=decoding)


@dataclass(frozen=True)
class Below(Sequence[Path]):
    """The paths of names below a folder, made when they are asked for: a million of them take long, and much memory."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self.folder / name for name in self.names[index]]
        return self.folder / self.names[index]


@dataclass(frozen=True)
class Pictures:
    """A dataset of (picture, label) that holds its pictures in memory, as torchvision's CIFAR10; named by number."""

    dataset: Any
    decoding: Decoding = STANDARD

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """The index as text."""
        return str(index)

    def load(self, index: int, expected: bytes = b"", *, draft: int = 0) -> tuple[Image.Image, bytes]:
        """The picture and the hash of its size and pixels."""
        picture = images.to_rgb(self.dataset[index][0], self.decoding.value_range)
        self.decoding.check(picture.size, f"picture {index}")
        digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
        _require(expected in (b"", digest), f"picture {index}")
        return picture, digest

    def content(self, index: int) -> bytes:
        """The picture as a PNG file, which loses nothing."""
        file = io.BytesIO()
        self.dataset[index][0].save(file, "PNG")
        return file.getvalue()

    def stamp(self, index: int) -> Stamp | None:
        """None: it is in memory, and hashing it is cheap."""
        return None

    def decoded(self, decoding: Decoding) -> Pictures:
        """The same pictures."""
        return replace(self, decoding=decoding)


@dataclass(frozen=True)
class Split:
    """Images and their labels; `rows` says which of `images` each one is.

    `targets`: the index of each image's class; where an image may have several labels, as `data.label_texts` has them.
    `hashes` are the SHA-256 of their contents, once `data.verify` has read them: from then on only these are opened.
    `sizes` are then their widths and heights in pixels, as stored in the files.
    `groups`: which images belong together, such as those of a patient; empty where each is its own.
    """

    images: Images
    targets: Sequence[Any]
    rows: Sequence[int]
    hashes: Sequence[bytes] = ()
    groups: Sequence[str] = ()
    sizes: Sequence[tuple[int, int]] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def names(self) -> list[str]:
        """What its images are called, in order."""
        return [*self.each_name()]

    def each_name(self) -> Iterator[str]:
        """The same, one after the other: a million of them take much memory."""
        return map(self.images.name, self.rows)

    def name(self, index: int) -> str:
        """What the image is called."""
        return self.images.name(self.rows[index])

    def open(self, index: int, *, draft: int = 0) -> Image.Image:
        """The image as upright RGB. ImageError, naming it, where it cannot be read or is not the verified one.

        draft: for a thumbnail of so many pixels, a picture that is at least as large and sooner there.
        """
        return self.images.load(self.rows[index], self.hashes[index] if self.hashes else b"", draft=draft)[0]

    @property
    def different(self) -> int:
        """How many different contents its images have."""
        return len(Digests.of(self.hashes).first())

    def subset(self, indices: Sequence[int] | Numbers) -> Split:
        """The images at `indices`, in that order."""
        hashes = _taken(self.hashes, indices) if self.hashes else ()
        groups = [self.groups[i] for i in indices] if self.groups else ()
        sizes = [self.sizes[i] for i in indices] if self.sizes else ()
        return Split(self.images, _taken(self.targets, indices), _taken(self.rows, indices), hashes, groups, sizes)

    def joined(self, other: Split) -> Split:
        """These images and those of another split of the same source, in the order in which that has them."""
        both = Split(
            self.images,
            [*self.targets, *other.targets],
            [*self.rows, *other.rows],
            [*self.hashes, *other.hashes],
            [*self.groups, *other.groups],
            [*self.sizes, *other.sizes],
        )
        return both.subset(sorted(range(len(both)), key=both.rows.__getitem__))

    def sample(self, number: int) -> Split:
        """At most `number` images, spread evenly over the split, which is ordered by class."""
        number = min(number, len(self))
        return self.subset([index * len(self) // number for index in range(number)])

    @property
    def contents(self) -> list[str]:
        """What tells its images from others: 64 bits of each one's hash, in hexadecimal."""
        return [digest.hex()[:16] for digest in self.hashes]


@dataclass(frozen=True)
class Dataset:
    """The class names in index order and the splits that exist, of train, val, test (or only `all`)."""

    classes: list[str]
    splits: dict[str, Split]
    where: str

    def split(self, name: str) -> Split:
        """The split called `name`; DataError, listing those there are, where it is missing."""
        if name not in self.splits:
            raise DataError(f"{self.where} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]


def _taken(values: Sequence[Any], indices: Sequence[int] | Numbers) -> Sequence[Any]:
    """The values at `indices`; a column stays one, in which no value takes more bytes than it has."""
    if isinstance(values, Digests):
        return values.take(indices)
    taken = (values[index] for index in indices)
    return array("q", taken) if isinstance(values, (array, range)) else list(taken)


def with_validation(
    dataset: Dataset, draw: Callable[[Split], set[int]], drawn: Collection[int] | None = None
) -> Dataset:
    """The dataset with a val split, taken from train (or `all`) where it has none of its own.

    draw: gives the indices of a split that are held out. drawn: the `name_hashes` of a split drawn before, by the
    run that is resumed or evaluated, which is taken instead of a new draw.
    """
    if "val" in dataset.splits or ("train" not in dataset.splits and "all" not in dataset.splits):
        return dataset
    splits = dict(dataset.splits)
    source = splits.pop("all") if "all" in splits else splits["train"]
    if drawn is None:
        held_out = draw(source)
    else:
        position = {hashed: index for index, hashed in enumerate(name_hashes(source.names))}
        if missing := sum(hashed not in position for hashed in drawn):
            raise DataError(
                f"{dataset.where}: {missing} of {len(drawn)} images of the run's val split are gone or have another "
                "name; put them back as the split.csv of the run names them"
            )
        held_out = {position[hashed] for hashed in drawn}
    splits["train"] = source.subset([i for i in range(len(source)) if i not in held_out])
    splits["val"] = source.subset(sorted(held_out))
    return Dataset(dataset.classes, {name: splits[name] for name in SPLIT_NAMES if name in splits}, dataset.where)


def require_same(dataset: Dataset) -> Dataset:
    """The dataset; DataError, naming the first difference, where ranks have found other classes, images or labels."""
    if distributed.world() == 1:
        return dataset

    def lines() -> Iterator[str]:
        yield from (f"the class {name!r}" for name in dataset.classes)
        for name, split in dataset.splits.items():
            groups = (
                (f" in the group {printable(group)}" for group in split.groups)
                if split.groups
                else repeat("", len(split))
            )
            rows = zip(split.each_name(), split.targets, groups, strict=True)
            yield from (f"the {name} image {printable(image)} of class {label}{group}" for image, label, group in rows)

    digest = hashlib.sha256()
    for line in lines():
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    found = distributed.gathered(digest.digest())
    if len({*found}) == 1:
        return dataset
    other = next(rank for rank, of in enumerate(found) if of != found[0])
    pairs = zip_longest(*(distributed.gathered([*lines()])[rank] for rank in (0, other)), fillvalue="nothing more")
    names = distributed.gathered(distributed.name())
    first, second = next((here, there) for here, there in pairs if here != there)
    raise DataError(
        f"{dataset.where} is not the same for all ranks: {names[0]} has {first} where {names[other]} has {second}; "
        "give all hosts the same files"
    )


def name_hashes(names: Iterable[str]) -> list[int]:
    """What tells names from others in a checkpoint: 64 bits of each one's SHA-256, as a signed number."""
    digests = (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names)
    return [int.from_bytes(digest[:8], "little", signed=True) for digest in digests]


def from_content(
    data: bytes, place: object, decoding: Decoding, expected: bytes, draft: int
) -> tuple[Image.Image, bytes]:
    """What `Images.load` gives of an image in the bytes of a file; errors call it `place`."""
    digest = hashlib.sha256(data).digest()
    _require(expected in (b"", digest), str(place))
    return images.decode(data, place, decoding, draft=draft), digest


def _require(same: bool, place: str) -> None:
    """Raise ImageError for an image that is not the one that was verified: a run must not learn from it."""
    if not same:
        raise ImageError(f"{printable(place)}: has changed since it was read first; put it back, or start again")


def enforce_classes(
    expected: Sequence[str], found: Iterable[str], where: object, fixed_by: str, fit: Fit = "exact"
) -> None:
    """Raise DataError naming the classes that are missing from or extra in `found`, where `fit` does not allow it."""
    found = set(found)
    missing, extra = [name for name in expected if name not in found], sorted(found.difference(expected))
    faults = []
    if missing and fit == "exact":
        faults.append(f"has no class {listed([*map(repr, missing)])}")
    if extra and fit != "any":
        faults.append(f"has the unknown {'class' if len(extra) == 1 else 'classes'} {listed([*map(repr, extra)])}")
    if faults:
        remedy = "add, rename or remove what differs"
        if fit == "fewer":
            remedy = "rename what differs, or leave the images of unknown classes out with --ignore-extra"
        raise DataError(
            f"{where} {' and '.join(faults)}; the {len(expected)} classes are those of {fixed_by}: {remedy}"
        )


def fingerprint(split: Split) -> str:
    """The SHA-256 of a verified split's names, labels and contents in order: what a batch holds."""
    digest = hashlib.sha256()
    for name, target, content in zip(split.each_name(), split.targets, split.hashes, strict=True):
        digest.update(f"{name}\0{target}\n".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()
