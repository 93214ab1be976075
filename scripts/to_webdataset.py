#!/usr/bin/env python3
"""Pack images and labels into WebDataset shards: a folder, a CSV file or a configuration -> tar archives.

    scripts/to_webdataset.py SOURCE OUT [--shard-mb 500] [key=value ...]

SOURCE is what tl-train takes; OUT a folder that does not exist yet or is empty. The bytes of an image stay as they are
(pictures that are in no file, such as CIFAR's, become PNG). Each split gets shards of about so many megabytes, a sample
being PATH.jpg and PATH.cls, the class's number. PATH is the image's own; a dot in its last part is written %2E, since
what follows the first dot is the ending. shards.csv lists name, samples, bytes and SHA-256 of each shard, classes.txt
the class names. OUT is there when all of it is.
"""

import argparse
import io
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from PIL import Image

from tl_trainer.config.load import load, parse_override
from tl_trainer.data.dataset import Dataset, Split
from tl_trainer.data.images import ENDINGS
from tl_trainer.data.patterns import CHECKSUMS
from tl_trainer.data.sources import open_dataset
from tl_trainer.errors import DataError, InputError, TrainerError
from tl_trainer.ground.files import content_hash, csv_text, write_text
from tl_trainer.ground.progress import bar, bars

CLASSES = "classes.txt"
HEADER = ("name", "samples", "bytes", "sha256")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a folder, a CSV file, or a configuration")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to create")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration")
    parser.add_argument("--shard-mb", type=float, default=500.0, metavar="MB", help="size of a shard (default 500)")
    args = parser.parse_args(argv)
    try:
        data = load(args.source, [parse_override(word) for word in args.overrides]).config.data
        with bars(True):
            dataset = open_dataset(data)
            rows = pack(dataset, args.out.resolve(), args.shard_mb * 1e6)
    except (TrainerError, OSError, KeyboardInterrupt) as error:
        print(f"to_webdataset.py: {str(error) or 'interrupted'}", file=sys.stderr)
        return error.exit_code if isinstance(error, TrainerError) else 1 if isinstance(error, OSError) else 130
    print(f"{args.out}: {sum(row[1] for row in rows):,} samples in {len(rows)} shards")
    print(f"now run: tl-train {quote(str(args.out))}")
    return 0


def pack(dataset: Dataset, out: Path, most: float) -> list[tuple[str, int, int, str]]:
    """Write the folder, wholly or not at all; the rows of shards.csv. most: bytes of a shard, once it has a sample."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; remove it or choose another")
    if odd := [name for name in dataset.classes if name != name.strip() or "\n" in name]:
        raise DataError(f"the class {odd[0]!r} cannot be a line of {CLASSES}; rename it")
    draft = out.with_name(f".{out.name}-{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        rows = [row for name, split in dataset.splits.items() for row in pack_split(split, called(name), draft, most)]
        write_text(draft / CLASSES, "".join(f"{name}\n" for name in dataset.classes))
        write_text(draft / CHECKSUMS, csv_text(HEADER, rows))
        if out.exists():
            out.rmdir()  # Windows renames onto nothing that is there, be it empty
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return rows


def called(split: str) -> str:
    return "train" if split == "all" else split


def pack_split(split: Split, name: str, folder: Path, most: float) -> Iterator[tuple[str, int, int, str]]:
    """Write the shards of a split; the row of each."""
    remaining = iter(bar(samples(split), f"packing {name}", len(split), unit="img"))
    sample, number = next(remaining, None), 0
    while sample is not None:
        path, count = folder / f"{name}-{number:06}.tar", 0
        with path.open("xb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            while sample is not None and (not count or tar.offset + sum(map(len, sample.values())) <= most):
                for member, content in sample.items():
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                sample, count = next(remaining, None), count + 1
        yield path.name, count, path.stat().st_size, content_hash(path)
        number += 1


def samples(split: Split) -> Iterator[dict[str, bytes]]:
    """The two members of each sample."""
    used: set[str] = set()
    for index, row in enumerate(split.rows):
        name, content = split.name(index), split.images.content(row)
        ending = Path(name).suffix.lower()
        stem = name[: -len(ending)] if ending in ENDINGS else name
        key = key_of(stem)
        if key in used:  # a.jpg beside a.png
            key = key_of(name)
        while key in used:
            key += "+"
        used.add(key)
        ending = ending[1:] if ending in ENDINGS else format_of(content, name)
        yield {f"{key}.{ending}": content, f"{key}.cls": str(split.targets[index]).encode()}


def key_of(name: str) -> str:
    """The path as a key: without a dot in its last part, and leading nowhere else."""
    *folders, last = name.replace("%", "%25").lstrip("/").split("/")
    folders = [folder.replace(".", "%2E") if folder in ("", ".", "..") else folder for folder in folders]
    return "/".join([*folders, last.replace(".", "%2E")])


def format_of(content: bytes, name: str) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return str(image.format).lower()
    except OSError as error:
        raise DataError(f"{name}: neither its ending nor its content is that of an image") from error


if __name__ == "__main__":
    sys.exit(main())
