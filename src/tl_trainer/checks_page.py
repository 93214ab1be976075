"""What a check found, as a page to look at, rows as CSV, and JSON."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tl_trainer.checks import Checked, Finding
from tl_trainer.ground.files import csv_text, write_text
from tl_trainer.ground.wording import printable
from tl_trainer.report import SIDE, template, thumbnail
from tl_trainer.suspects import Confused

SHOWN = 60  # findings of a kind that the page has pictures of
PAIRS = 8  # of classes
COLUMNS = (
    "path", "split", "label", "kind", "reason", "score", "other_path", "other_split", "other_label"
)  # fmt: skip
UNREADABLE = "unreadable"
# Each kind in the order of the page: what it is called, and what it means and asks for.
KINDS = {
    UNREADABLE: (
        "cannot be read",
        "Replace or remove these files. Until then skip.csv leaves them out.",
    ),
    "copy across splits": (
        "the same picture in two splits",
        "A network recognises the copy of a picture that it was trained on, so the figures on that split are too good. "
        "skip.csv leaves out the one in train; of a copy in val and test, the one in val.",
    ),
    "two labels": (
        "the same picture under two labels",
        "One of the labels is wrong, or both: keep the right one. Until then skip.csv leaves out both.",
    ),
    "copy": (
        "copies within a split",
        "They count twice. skip.csv keeps the first of them.",
    ),
    "label": (
        "labels to look at",
        "On the left is the image, on the right the nearest image of the class that it looks like. The least likely "
        "label comes first. Move an image with a wrong label to its class. None of these is in skip.csv: many are only "
        "difficult, and figures without the difficult images would be too good. To leave one out all the same, copy "
        "its row from findings.csv to skip.csv.",
    ),
    "outlier": (
        "unlike the rest of their class",
        "Does the image belong to its class? On the right is the nearest other image of that class. Not in skip.csv.",
    ),
    "blank": ("nearly one colour", "Nothing can be seen in them. skip.csv leaves them out."),
    "empty": (
        "mostly one shade",
        "Is it a placeholder that says only that an image was not found? Not in skip.csv: to leave it out, copy its "
        "row from findings.csv.",
    ),
    "dark": ("very dark", "Can you tell what they show? Not in skip.csv."),
    "blurred": ("blurred", "Far less sharp than the other images. Not in skip.csv."),
    "tiny": ("tiny", "The network sees them enlarged. Bring larger ones where there are any. Not in skip.csv."),
    "long": ("very long", "A crop to a square shows little of them: cut out what matters. Not in skip.csv."),
}


def write_check(
    folder: Path, checked: Checked, name: str, command: str, before: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Write check.html, findings.csv, skip.csv and check.json into `folder`, which is there; what check.json holds.

    command: the tl-train command for the same data. before: path and split of what the check itself left out, which
    skip.csv leaves out too. Raises RunError where a file cannot be written, ImageError where an image is gone.
    """
    rows, left_out = _rows(checked), _rows(checked, skip=True)
    left_out += [[path, split, "", "left out before", *[""] * (len(COLUMNS) - 4)] for path, split in before]
    counts = Counter(row[COLUMNS.index("kind")] for row in rows)
    result: dict[str, Any] = {
        "page": str(folder / "check.html"),
        "findings": str(folder / "findings.csv"),
        "skip": str(folder / "skip.csv"),
        "data": checked.where,
        "backbone": checked.backbone,
        "classes": len(checked.classes),
        "images": {split: len(images) for split, images in checked.splits.items()},
        "counts": {kind: counts[kind] for kind in KINDS if counts[kind]},
        "wrong_labels": checked.wrong_labels,
        "confused": [_pair(pair, checked) for pair in checked.confused[:PAIRS]],
        "notes": checked.notes,
        "skipped": len(left_out),
        "train_without": f"{command} --apply {shlex.quote(str(folder / 'skip.csv'))}" if left_out else None,
    }
    named = {"findings.csv": csv_text(COLUMNS, rows), "skip.csv": csv_text(COLUMNS, left_out)}
    page = template("check.html").render(
        name=name, result=result, kinds=KINDS, shown=SHOWN, examples=_examples(checked), unreadable=checked.unreadable
    )
    for file, text in {**named, "check.html": page, "check.json": json.dumps(result, indent=1) + "\n"}.items():
        write_text(folder / file, text)
    return result


def _rows(checked: Checked, *, skip: bool = False) -> list[list[Any]]:
    """The rows of findings.csv, kind by kind; of skip.csv, where each image has one row."""
    places, found = checked.places, []
    for split, bad in checked.unreadable.items():
        found += [[image, split, "", UNREADABLE, reason, 1, "", "", ""] for image, reason in bad.items()]
    named: set[int] = set()
    for finding in sorted(checked.findings, key=lambda finding: [*KINDS].index(finding.kind)):
        if not skip or (finding.skip and finding.image not in named):
            named.add(finding.image)
            other = ("", "", "") if finding.other is None else _named(checked, *places[finding.other])
            image = _named(checked, *places[finding.image])
            found.append([*image, finding.kind, finding.reason, round(finding.score, 4), *other])
    return found


def _named(checked: Checked, split: str, index: int) -> tuple[str, str, str]:
    images = checked.splits[split]
    return images.name(index), split, checked.classes[images.targets[index]]


def _pair(pair: Confused, checked: Checked) -> dict[str, Any]:
    names = {"classes": [checked.classes[pair.first], checked.classes[pair.second]]}
    return {**names, "confused": pair.mistaken, "images": pair.images}


def _examples(checked: Checked) -> dict[str, list[dict[str, Any]]]:
    """Of each kind the first findings, each with its picture and that of the image it is compared with."""
    places, examples = checked.places, {}

    @cache
    def shown(image: int) -> dict[str, str]:
        split, index = places[image]
        name, _, label = _named(checked, split, index)
        picture = thumbnail(checked.splits[split].open(index, draft=SIDE))
        return {"picture": picture, "path": printable(name), "split": split, "label": printable(label)}

    def example(finding: Finding) -> dict[str, Any]:
        other = None if finding.other is None else shown(finding.other)
        return {"image": shown(finding.image), "other": other, "reason": printable(finding.reason)}

    def first(kind: str) -> Iterator[Finding]:
        yield from [finding for finding in checked.findings if finding.kind == kind][:SHOWN]

    for kind in KINDS:
        examples[kind] = [example(finding) for finding in first(kind)]
    return examples


def summary(result: dict[str, Any]) -> str:
    """What a check found, for a terminal."""
    images = sum(result["images"].values())
    found = "" if result["counts"] else " nothing was found"
    lines = [f"{images:,} images in {result['classes']} classes:{found}"]
    more = {"label": f" (about {result['wrong_labels']:,} may be wrong)"} if result["wrong_labels"] else {}
    lines += [f"  {count:6,}  {KINDS[kind][0]}{more.get(kind, '')}" for kind, count in result["counts"].items()]
    lines += [printable(note) for note in result["notes"]]
    lines.append(f"page: {result['page']}\nrows: {result['findings']}")
    if result["train_without"]:
        rows = "row" if result["skipped"] == 1 else f"{result['skipped']:,} rows"
        lines.append(f"To train without the {rows} of skip.csv:\n  {result['train_without']}")
    return "\n".join(lines)
