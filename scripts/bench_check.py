#!/usr/bin/env python3
"""What tl-check finds of faults that are planted into photographs, and how long it takes, at first and again.

    scripts/bench_check.py DIR... [--seed 0] [key=value...]

Of each folder with train and val a copy is made and spoilt: 5% of all labels are flipped, and 3% of the validation
images' number are copied from train to val at another size and quality, another 2% mirrored as well. `found` are those
that findings.csv names as copies, with the right other one; `alarms` are the images it calls copies that were not
planted, each of which is printed, since photographs may have copies of their own; `flips` are those among the label
suspects, which are at most a tenth of the images.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from bench_report import report

COPIES = {"copy", "copy across splits", "two labels"}
COLUMNS = ("data", "images", "copies", "found", "mirrored", "found", "alarms", "flips", "found", "first s", "again s")
COMMAND = [sys.executable, "-c", "import sys; from tl_trainer.cli.check import main; sys.exit(main())"]


class Planted(NamedTuple):
    """Names below the data's folder: (original, copy) pairs, the same of mirrored ones, and images of another class."""

    copies: list[tuple[str, str]]
    mirrored: list[tuple[str, str]]
    flips: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args([word for word in sys.argv[1:] if "=" not in word])
    words = [word for word in sys.argv[1:] if "=" in word]
    rows, result = [], {}
    for folder in args.folders:
        with tempfile.TemporaryDirectory() as work:
            figures = measured(folder, Path(work), args.seed, words)
        rows.append([folder.name, *figures.values()])
        result[folder.name] = figures
    report(COLUMNS, rows, {"seed": args.seed, "settings": words, **result})


def measured(folder: Path, work: Path, seed: int, words: list[str]) -> dict[str, Any]:
    """Plant, check twice, compare."""
    planted = plant(folder, work / "data", seed)
    output = [f"output.dir={work / 'runs'}", f"features.dir={work / 'features'}"]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        done = subprocess.run(
            [*COMMAND, str(work / "data"), "--json", *output, *words], check=True, capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - started)
    found = json.loads(done.stdout)
    with Path(found["findings"]).open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    pairs = [tuple(sorted((row["path"], row["other_path"]))) for row in table if row["kind"] in COPIES]
    known = {tuple(sorted(pair)) for pair in [*planted.copies, *planted.mirrored]}
    alarms = [pair for pair in pairs if pair not in known]
    for first, second in alarms:
        print(f"not planted: {first} {second}")
    suspects = {row["path"] for row in table if row["kind"] == "label"}
    return {
        "images": sum(found["images"].values()),
        "copies": len(planted.copies),
        "copies_found": sum(tuple(sorted(pair)) in pairs for pair in planted.copies),
        "mirrored": len(planted.mirrored),
        "mirrored_found": sum(tuple(sorted(pair)) in pairs for pair in planted.mirrored),
        "alarms": len(alarms),
        "flips": len(planted.flips),
        "flips_found": sum(name in suspects for name in planted.flips),
        "first_seconds": round(seconds[0], 1),
        "again_seconds": round(seconds[1], 1),
    }


def plant(source: Path, data: Path, seed: int) -> Planted:
    """A spoilt copy of `source` in `data`."""
    shutil.copytree(source, data)
    rng = random.Random(seed)
    images = {split: sorted((data / split).glob("*/*.jpg")) for split in ("train", "val")}
    classes = sorted(path.name for path in (data / "train").iterdir() if path.is_dir())
    number = len(images["val"])
    chosen = rng.sample(images["train"], round(0.03 * number) + round(0.02 * number))
    pairs = []
    for index, path in enumerate(chosen):
        mirror = index >= round(0.03 * number)
        copy = data / "val" / path.parent.name / f"planted{index}.jpg"
        spoil(path, rng, mirror=mirror).save(copy, quality=rng.randint(40, 80))
        pairs.append((path.relative_to(data).as_posix(), copy.relative_to(data).as_posix()))
    others = [path for paths in images.values() for path in paths if path not in chosen]
    flips = []
    for index, path in enumerate(rng.sample(others, round(0.05 * sum(map(len, images.values()))))):
        label = rng.choice([name for name in classes if name != path.parent.name])
        flipped = path.parents[1] / label / f"flipped{index}{path.suffix}"
        path.rename(flipped)
        flips.append(flipped.relative_to(data).as_posix())
    straight = round(0.03 * number)
    return Planted(pairs[:straight], pairs[straight:], flips)


def spoil(path: Path, rng: random.Random, *, mirror: bool) -> Image.Image:
    """The picture at 40 to 90% of its size."""
    factor = rng.uniform(0.4, 0.9)
    with Image.open(path) as picture:
        size = round(picture.width * factor), round(picture.height * factor)
        small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else small


if __name__ == "__main__":
    main()
