"""WebDataset shards -> classes and splits: tar archives whose members 0001.jpg and 0001.cls make a sample.

The headers of a shard are read once, by the standard library's tarfile, and where each image lies is kept in the user's
cache. An image is then a place in a file, opened by seeking: in any order, as often as needed, as a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from tl_trainer.config.data import SKIP_BAD, DataSection, WebDatasetSection, expand
from tl_trainer.data.dataset import SPLIT_NAMES, Dataset, Fit, Stamp, from_content, stamp_of
from tl_trainer.data.images import STANDARD, Decoding
from tl_trainer.data.listing import LONGEST_LABEL, ClassNames, Listing, is_label
from tl_trainer.data.patterns import files_of, short_names
from tl_trainer.data.tar import Member, members
from tl_trainer.errors import DataError, RunError
from tl_trainer.ground.files import cache_folder, write_atomically
from tl_trainer.ground.progress import bar
from tl_trainer.ground.wording import listed, printable, shown, unknown

log = logging.getLogger(__name__)

VERSION = 2  # of what is kept of a shard
LONGEST_JSON = 1 << 20  # bytes
_PARTS = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # of a member's name: the sample's key, the ending


class Index(NamedTuple):
    """Where the samples of a shard are, and the byte from which on it cannot be read (-1: it is whole)."""

    samples: np.ndarray  # offset, size, member, label
    cut: int


class Shard(NamedTuple):
    """A shard: its file, and what its images' names begin with."""

    path: Path
    name: str
    samples: np.ndarray

    def member(self, number: int) -> Member:
        """The image of a sample."""
        sample = self.samples[number]
        return Member(self.path, _text(sample["member"]), int(sample["offset"]), int(sample["size"]))


@dataclass(frozen=True)
class Members:
    """Images that are members of shards. `ends`: how many images there are up to each shard's end."""

    shards: Sequence[Shard]
    ends: Sequence[int]
    decoding: Decoding = STANDARD

    def __len__(self) -> int:
        return self.ends[-1]

    def at(self, index: int) -> tuple[Shard, Member]:
        """The shard of an image, and its member."""
        number = bisect_right(self.ends, index)
        shard = self.shards[number]
        return shard, shard.member(index - (self.ends[number - 1] if number else 0))

    def name(self, index: int) -> str:
        """The shard's name and the member's."""
        shard, member = self.at(index)
        return f"{shard.name}/{member.name}"

    def load(self, index: int, expected: bytes = b"", *, draft: int = 0) -> tuple[Image.Image, bytes]:
        """Read the member's bytes once, hash and decode them."""
        _, member = self.at(index)
        return from_content(member.content(), member, self.decoding, expected, draft)

    def content(self, index: int) -> bytes:
        """The member's bytes."""
        return self.at(index)[1].content()

    def stamp(self, index: int) -> Stamp | None:
        """That of the shard, behind its path the member's."""
        shard, member = self.at(index)
        return stamp_of(shard.path, member.name.encode("utf-8", "surrogateescape"), self.decoding.settings)

    def decoded(self, decoding: Decoding) -> Members:
        """The same members."""
        return replace(self, decoding=decoding)


def open_webdataset(data: DataSection, classes: list[str] | None, fit: Fit = "exact") -> Dataset:
    """The dataset in the shards that `data.webdataset` names; a val split of its own only where that names one.

    classes: a checkpoint's, which it must have as `fit` says. Raises DataError, naming the shard.
    """
    section, root = data.webdataset, expand(data.root)
    patterns = {split: getattr(section, split) for split in SPLIT_NAMES if getattr(section, split) is not None}
    paths = {split: files_of(pattern, root, data.download) for split, pattern in patterns.items()}
    _warn_of_others(paths)
    flat = [path for of_split in paths.values() for path in of_split]
    found = [index(path, section) for path in bar(flat, "reading shard headers", len(flat), unit="shard")]
    _judge_cut({path: of_shard for path, of_shard in zip(flat, found, strict=True) if of_shard.cut >= 0}, flat, data)
    shards = [
        Shard(*of_shard) for of_shard in zip(flat, short_names(flat), (samples for samples, _ in found), strict=True)
    ]
    sizes = [len(shard.samples) for shard in shards]
    of = np.repeat([number for number, of_split in enumerate(paths.values()) for _ in of_split], sizes)
    splits = {split: np.flatnonzero(of == number) for number, split in enumerate(paths)}
    for split, rows in splits.items():
        if not rows.size:
            raise DataError(f"{paths[split][0]}: no samples in the {split} shards; correct data.webdataset.{split}")
    members = Members(shards, list(accumulate(sizes)))
    texts, labels = np.unique(np.concatenate([shard.samples["label"] for shard in shards]), return_inverse=True)
    names, where = (
        [*map(_text, texts)],
        f"{listed([section.train] if isinstance(section.train, str) else section.train)}",
    )
    listing = Listing(members, names, labels, splits, where, lambda row: printable(str(members.at(row)[1])))
    known = None if section.classes is None else ClassNames(_lines(root / section.classes), str(root / section.classes))
    remedy = "data.webdataset.classes takes a file of names"
    return listing.named(known, remedy, classes, fit)


def _lines(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: cannot be read: {reason}; set data.webdataset.classes to a file of names") from error
    first: dict[str, int] = {}
    for line, name in enumerate(names, start=1):
        if not name or first.setdefault(name, line) != line:
            fault = f"{name!r} is in line {first[name]} too" if name else "no class name in this line"
            raise DataError(f"{path}:{line}: {fault}; write a name on each line")
    return names


def _judge_cut(cut: dict[Path, Index], shards: list[Path], data: DataSection) -> None:
    """Name the shards that are cut; DataError where bad images are not skipped."""
    if not cut:
        return
    of = f"{len(cut)} of {len(shards)} shards are not whole"
    listing = "\n".join(
        f"{path}: cannot be read from byte {end:,} on; {len(samples):,} samples before it are complete"
        for path, (samples, end) in list(cut.items())[:2]
    )
    if not data.skips_bad:
        raise DataError(f"{of}; fetch or write them again, or take their complete samples with {SKIP_BAD}\n{listing}")
    log.warning("%s, and only their complete samples are used, e.g.\n%s", of, listing)


def index(path: Path, section: WebDatasetSection) -> Index:
    """Where the samples of a shard are: as kept in the cache where the shard is still the same, else from its headers.

    Raises DataError for a sample without image or label.
    """
    stamp = stamp_of(path)
    if stamp is None:
        raise DataError(f"{path}: no such file")
    asked = repr((VERSION, stamp.path, section.image, section.label)).encode()
    kept = cache_folder() / "shards" / f"{hashlib.sha256(asked).hexdigest()[:32]}.npz"
    now = np.array(stamp[1:], np.int64)
    try:
        with np.load(kept) as found:
            if np.array_equal(found["stamp"], now):
                return Index(found["samples"], int(found["cut"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s); the headers of %s are read again", kept, error, path)
    read = _read(path, section)
    if stamp_of(path) == stamp and stamp.settled:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, lambda file: np.savez(file, stamp=now, samples=read.samples, cut=np.int64(read.cut)))
        except (OSError, RunError) as error:
            log.warning("%s; the headers of %s are read again next time", error, path)
    return read


def _read(path: Path, section: WebDatasetSection) -> Index:
    """The index of a shard by its headers, and the members that hold labels."""
    ending, _, field = section.label.partition(":")
    rows: list[tuple[int, int, bytes, bytes]] = []
    cut = -1
    with path.open("rb") as file:

        def parts() -> Iterator[tuple[str, str, Member]]:
            nonlocal cut
            for member in members(file, path):
                if member.size < 0:
                    cut = member.offset
                elif match := _PARTS.fullmatch(member.name):
                    yield match[1], match[2].lower(), member

        for key, group in groupby(parts(), itemgetter(0)):
            endings = [(name, member) for _, name, member in group]
            sample = dict(endings)
            if len(sample) < len(endings):
                raise _twice(path, next(member.name for name, member in endings if sample[name] is not member))
            image = next((sample[one] for one in section.image.lower().split(";") if one in sample), None)
            if image is None or ending not in sample:
                if cut >= 0:  # this is the last sample, and what it lacks is missing
                    break
                lacks = "image" if image is None else "label"
                raise DataError(
                    f"{path}: the sample {printable(key)} has {listed([*sample])}, and none is its {lacks}; set "
                    f"data.webdataset.{lacks}, which is {getattr(section, lacks)}"
                )
            rows.append((image.offset, image.size, _bytes(image.name), _bytes(_label(sample[ending], file, field))))
    member, label = max((len(row[2]) for row in rows), default=1), max((len(row[3]) for row in rows), default=1)
    samples = np.array(rows, [("offset", "<i8"), ("size", "<i8"), ("member", f"S{member}"), ("label", f"S{label}")])
    names, times = np.unique(samples["member"], return_counts=True)
    if len(names) < len(samples):
        raise _twice(path, _text(names[times.argmax()]))
    return Index(samples, cut)


def _twice(path: Path, name: str) -> DataError:
    return DataError(f"{path}: {printable(name)} is in it twice; write the shard again with a key for each sample")


def _label(member: Member, file: IO[bytes], field: str) -> str:
    """The label in a member: its text, or of JSON a field. Raises DataError, naming the member, where it is none."""
    place, most = printable(str(member)), LONGEST_JSON if field else LONGEST_LABEL
    file.seek(member.offset)
    content = file.read(min(member.size, most + 1))
    try:
        text = content.decode("utf-8").strip()
        record = json.loads(text) if field else {"": text}
    except ValueError as error:
        raise DataError(f"{place}: not {'JSON' if field else 'text'} in UTF-8: {error}") from error
    if not isinstance(record, dict) or field not in record:
        raise DataError(f"{place}: {unknown('field', field, record if isinstance(record, dict) else [])}")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise DataError(f"{place}: {shown(value)} in {field} is no label; it must be a name or a whole number")
    label = str(value).strip()
    if not is_label(label):
        raise DataError(f"{place}: {shown(label)} is no label; it must be a name or a whole number, on one line")
    return label


def _warn_of_others(paths: dict[str, list[Path]]) -> None:
    """Name shards beside those of train that no pattern names: perhaps they are a val split."""
    used = {path for of_split in paths.values() for path in of_split}
    folders = {path.parent for path in used if not path.is_relative_to(cache_folder())}
    beside = sorted({str(other) for folder in folders for other in folder.glob("*.tar")} - {*map(str, used)})
    if beside:
        log.warning("%d shards are not used, e.g. %s; data.webdataset.train, val and test name shards", len(beside),
                    beside[0])  # fmt: skip


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
