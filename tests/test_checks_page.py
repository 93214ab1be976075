"""What a check writes, from findings made by hand: nothing found, too many for the page, names that are no text."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browser import browser, rendered
from tl_trainer import checks_page
from tl_trainer.checks import Checked, Finding
from tl_trainer.checks_page import COLUMNS, KINDS, summary, write_check
from tl_trainer.data.dataset import Pictures, Split
from tl_trainer.suspects import Confused

ODD = "<b>\udcff&\n.jpg"


class Named(Pictures):
    """Pictures of which the first has an odd name."""

    def name(self, index: int) -> str:
        return ODD if index == 0 else f"{index}.jpg"


def checked(*findings: Finding, **more: Any) -> Checked:
    images = Named([(Image.new("RGB", (300, 200), "red"), 0)] * 40)
    found: dict[str, Any] = {
        "where": "photos", "backbone": "tiny", "classes": ["<i>a", "b"],
        "splits": {"train": Split(images, [0, 1] * 15, range(30)), "val": Split(images, [0, 1] * 5, range(30, 40))},
        "findings": [*findings], "confused": [], "wrong_labels": 0, "unreadable": {}, "notes": [], **more,
    }  # fmt: skip
    return Checked(**found)


def written(found: Checked) -> tuple[dict[str, Any], str]:
    Path("out").mkdir(exist_ok=True)
    result = write_check(Path("out"), found, "photos", "tl-train photos")
    return result, Path("out/check.html").read_text(encoding="utf-8")


def rows(name: str) -> list[dict[str, str]]:
    with Path("out", name).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_nothing_found() -> None:
    result, page = written(checked())
    assert (result["counts"], result["train_without"], rows("findings.csv"), rows("skip.csv")) == ({}, None, [], [])
    assert "Nothing was found" in page and "--apply" not in page
    assert summary(result).splitlines() == [
        "40 images in 2 classes: nothing was found", "page: out/check.html", "rows: out/findings.csv"
    ]  # fmt: skip


def test_an_image_with_two_faults_has_two_rows_and_is_left_out_once() -> None:
    faults = (Finding("blank", 5, "one", 0.9, skip=True), Finding("copy", 5, "two", 0.123456, 31, skip=True))
    result, _ = written(checked(*faults, Finding("dark", 6, "three", 0.5)))
    assert [tuple(row.values()) for row in rows("findings.csv")] == [
        ("5.jpg", "train", "b", "copy", "two", "0.1235", "31.jpg", "val", "b"),
        ("5.jpg", "train", "b", "blank", "one", "0.9", "", "", ""),
        ("6.jpg", "train", "<i>a", "dark", "three", "0.5", "", "", ""),
    ]
    assert [row["path"] for row in rows("skip.csv")] == ["5.jpg"]
    assert [*rows("skip.csv")[0]] == [*COLUMNS]
    assert result["train_without"] == f"tl-train photos --apply {Path('out/skip.csv')}"
    assert summary(result).splitlines()[-2:] == [
        "To train without the row of skip.csv:", f"  {result['train_without']}"
    ]  # fmt: skip


def test_the_page_has_the_first_of_many_and_says_how_many_more_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_page, "SHOWN", 24)
    result, page = written(checked(*(Finding("dark", image, "too dark", 1 - image / 100) for image in range(30))))
    assert result["counts"] == {"dark": 30}
    assert page.count("<figure>") == 24
    assert "6 more are in findings.csv" in page
    assert len(rows("findings.csv")) == 30


def test_no_label_that_may_be_wrong_is_no_word() -> None:
    result, page = written(checked(Finding("label", 3, "looks like b", 0.6, 4)))
    assert "       1  labels to look at" in summary(result).splitlines()
    assert "Confident learning" not in page


def test_every_kind_has_its_words_and_the_estimate_stands_beside_the_labels() -> None:
    found = [Finding(kind, image, "why", 1.0) for image, kind in enumerate(KINDS) if kind != "unreadable"]
    more = {"wrong_labels": 3, "unreadable": {"val": {"gone.jpg": "gone.jpg: empty file"}}}
    result, page = written(checked(*found, confused=[Confused(0, 1, 4, 40)], notes=["look here"], **more))
    assert [*result["counts"]] == [*KINDS]
    for title, meaning in KINDS.values():
        assert f"<h2>{title.capitalize()}: 1</h2>" in page
        assert meaning in page
    assert "estimates that 3 labels are wrong" in page and "gone.jpg: empty file" in page
    said = summary(result).splitlines()
    assert "       1  labels to look at (about 3 may be wrong)" in said and "look here" in said
    assert result["confused"] == [{"classes": ["<i>a", "b"], "confused": 4, "images": 40}]


@browser
def test_names_are_shown_as_text_and_nothing_comes_from_a_network(tmp_path: Path) -> None:
    _, page = written(checked(Finding("copy", 0, f"like {ODD}", 1.0, 30, skip=True)))
    assert rows("skip.csv")[0]["path"] == ODD
    assert "<b>\\" not in page and "<i>a" not in page and "://" not in page
    script = "<script>document.title = [...document.images].filter(i => i.naturalWidth == 224).length</script>"
    Path("out/check.html").write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    assert rendered(Path("out/check.html").absolute().as_uri(), tmp_path / "profile") == "2"
