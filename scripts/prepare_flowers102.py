#!/usr/bin/env python3
"""The original Oxford Flowers 102 files -> an ImageFolder with the official splits in train/, valid/ and test/.

SOURCE is a folder with 102flowers.tgz, imagelabels.mat and setid.mat as they are at
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ and DESTINATION a folder that does not exist yet or is empty.

A class folder is the class number in three digits, 001 to 102. Class lists are in lexicographic order, which for
numbers of equal length is their own (unpadded, 10 would come before 2): folder number n has index n - 1, as in
torchvision's Flowers102. The files hold no flower names, and one, "pink-yellow dahlia?", is no folder on Windows.
"""

import argparse
import gzip
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from shlex import quote

try:
    from scipy.io import loadmat
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"prepare_flowers102.py: {error.name} is not installed; run this with the Python that has tl-trainer")

ARCHIVE, LABELS, SETS = "102flowers.tgz", "imagelabels.mat", "setid.mat"
SPLITS = {"train": "trnid", "valid": "valid", "test": "tstid"}  # the split's folder and its name in setid.mat
CLASSES = 102
MEMBER = re.compile(r"(?:\./)?jpg/image_(\d{5})\.jpg")


class WrongInput(Exception):
    """The source or the destination is not what it should be."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help=f"a folder with {ARCHIVE}, {LABELS} and {SETS}")
    parser.add_argument("destination", metavar="DESTINATION", help="the folder to create")
    args = parser.parse_args(argv)
    try:
        counts = prepare(args.source, Path(args.destination).resolve())
    except (WrongInput, OSError, KeyboardInterrupt) as error:
        print(f"prepare_flowers102.py: {str(error) or 'interrupted'}", file=sys.stderr)
        return 2 if isinstance(error, WrongInput) else 1 if isinstance(error, OSError) else 130
    print(f"{args.destination}: {', '.join(f'{count} {split}' for split, count in counts.items())} images")
    print(f"now run: tl-train --config flowers102.yaml data.source=imagefolder --data-dir {quote(args.destination)}")
    return 0


def prepare(source: Path, destination: Path) -> Counter[str]:
    """Write the ImageFolder, wholly or not at all; the number of images of each split."""
    if missing := [name for name in (ARCHIVE, LABELS, SETS) if not (source / name).is_file()]:
        raise WrongInput(f"{source}: no {', '.join(missing)}; it must hold {ARCHIVE}, {LABELS} and {SETS}")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise WrongInput(f"{destination}: exists and is not an empty folder; remove it or choose another")
    folders = plan(source)
    draft = destination.with_name(f".{destination.name}-{os.getpid()}.tmp")
    try:
        extract(source / ARCHIVE, folders, draft)
        if destination.exists():
            destination.rmdir()  # Windows renames onto nothing that is there, be it empty
        draft.rename(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Counter(folder.split("/")[0] for folder in folders.values())


def plan(source: Path) -> dict[int, str]:
    """The folder of each image number, such as {6734: "train/001"}."""
    labels, folders = numbers(source / LABELS, "labels"), dict[int, str]()
    for split, name in SPLITS.items():
        for image in numbers(source / SETS, name):
            if not 1 <= image <= len(labels) or image in folders:
                raise WrongInput(f"{source / SETS}: image {image} of {name} is listed twice or not in {LABELS}")
            if not 1 <= (label := labels[image - 1]) <= CLASSES:
                raise WrongInput(f"{source / LABELS}: image {image} has label {label}, not 1 to {CLASSES}")
            folders[image] = f"{split}/{label:03}"
    return folders


def numbers(path: Path, name: str) -> list[int]:
    """A variable of a MATLAB file as whole numbers."""
    try:
        return [int(value) for value in loadmat(path)[name].ravel()]
    except Exception as error:  # scipy raises anything on broken bytes, from TypeError to zlib.error
        raise WrongInput(f"{path}: damaged, or not a MATLAB file with the numbers {name!r}") from error


def extract(archive: Path, folders: dict[int, str], draft: Path) -> None:
    """Write the listed images below `draft`, whatever paths, links and other things are in the archive."""
    for folder in sorted(set(folders.values())):
        (draft / folder).mkdir(parents=True)
    left, ignored = dict(folders), list[str]()
    try:
        with tarfile.open(archive, "r:gz") as tar, tqdm(total=len(left), unit="img", leave=False, disable=None) as bar:
            for member in tar:
                image = MEMBER.fullmatch(member.name)
                if image and member.isreg() and int(image[1]) in left and (data := tar.extractfile(member)):
                    with (draft / left.pop(int(image[1])) / f"image_{image[1]}.jpg").open("xb") as file:
                        shutil.copyfileobj(data, file)
                    bar.update()
                elif not member.isdir():
                    ignored.append(member.name)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise WrongInput(f"{archive}: damaged archive ({error}); download it again") from error
    if left:
        raise WrongInput(f"{archive}: {len(left)} images are not in it, e.g. jpg/image_{min(left):05}.jpg")
    if ignored:
        print(f"ignored {len(ignored)} other thing(s) in {archive}, e.g. {ignored[0]!r}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
