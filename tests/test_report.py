"""The report: every file it writes, at 3 and at 102 classes and on degenerate splits; the page, in a real browser."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browser import CHROMIUM, browser, rendered
from conftest import COLOURS, Run, draw_split, last_json
from test_end_to_end import SMALL
from tl_trainer import outcome, report
from tl_trainer.errors import RunError

pytestmark = pytest.mark.usefixtures("without_pictures")

FILES = {
    "confusion_matrix.csv",
    "confusion_matrix.png",
    "metrics.json",
    "per_class.csv",
    "predictions.csv",
    "reliability.png",
    "report.html",
}
MANY = {f"sort {index:03}": (40 + 2 * index, 255 - 2 * index, (37 * index) % 256) for index in range(102)}


BARELY = ("train.epochs=1", "train.optimizer.lr=0.0001")  # so that there are mistakes


def trained(tl: Run, data: Path, *more: str) -> dict[str, Any]:
    return last_json(tl("train", "--data-dir", data, "--epochs", 3, "--json", *SMALL, *more))


def evaluated(tl: Run, *more: object) -> dict[str, Any]:
    arguments = ["--checkpoint", "runs/run-1/best.pth", "--report", "report", "--json"]
    return last_json(tl("eval", *arguments, *more))


def draw_splits(folder: Path, count: int, classes: dict[str, tuple[int, int, int]]) -> None:
    """train, val and test, with no image in two of them."""
    for index, split in enumerate(("train", "val", "test")):
        draw_split(folder / split, count, size=40 + index, classes=classes)


def size(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def in_browser(page: Path, script: str, folder: Path, width: int = 1200) -> dict[str, Any]:
    """What `script`, run in the page when everything has loaded, puts into the object `found`."""
    wait = f"addEventListener('load', () => {{ const found = {{}}; {script}; document.title = JSON.stringify(found) }})"
    copy = folder / "page.html"
    copy.write_text(page.read_text(encoding="utf-8") + f"<script>{wait}</script>", encoding="utf-8")
    found: dict[str, Any] = json.loads(rendered(copy.as_uri(), folder / "profile", f"--window-size={width},900"))
    return found


def test_tl_train_writes_a_report_on_its_best_checkpoint(tl: Run, colours: Path) -> None:
    result = trained(tl, colours, "output.report=true")
    page = Path(result["report"])
    assert page == Path("runs/run-1/report/report.html")
    assert {path.name for path in page.parent.iterdir()} == FILES | {"epochs.png"}
    text = page.read_text()
    assert (
        f"The weights are those of epoch {result['best_epoch']}, the best by top-1, then loss on the validation images."
        in text
    )
    assert re.search(r"<tr><td>blue</td>\s*<td>8</td><td>4</td></tr>", text)
    assert re.search(r"<tr><td>all 3 classes</td>\s*<td>24</td><td>12</td></tr>", text)
    assert "Image sizes in pixels: 40 x 40 (smallest), 42 x 41 (median), 47 x 40 (largest)." in text
    assert "always saying blue would be right for 33.3% of the val images" in text
    assert "The probabilities on this page are those of the network as trained" in text
    found = json.loads((page.parent / "metrics.json").read_text())
    assert {key: found[key] for key in result["val"]} == result["val"]
    assert found["split"] == "val"
    assert found["calibration"]["after"] is None
    assert "has no temperature" in found["undefined"]["calibration.after"]


def test_the_report_of_tl_eval_is_that_of_tl_train(tl: Run, colours: Path) -> None:
    draw_split(colours / "test", 3)
    trained(tl, colours, "output.report=true")
    result = evaluated(tl)
    assert result["split"] == "test"
    assert result["report"] == "report/report.html"
    for name in FILES - {"report.html"}:
        assert (Path("report") / name).read_bytes() == (Path("runs/run-1/report") / name).read_bytes(), name


def test_mistakes_have_the_training_images_that_are_like_them(tl: Run, colours: Path) -> None:
    Image.new("RGB", (77, 77), COLOURS["red"]).save(colours / "val" / "blue" / "red.jpg")  # a mistake
    page = Path(trained(tl, colours, "output.report=true")["report"])
    lines = r"<span class=\"soft\">[01]\.\d\d (blue|green|red): train/\1/\d\d\.jpg</span>"
    mistakes = page.read_text().count("<figcaption>labelled")
    assert mistakes > 0
    assert len(re.findall(lines, page.read_text())) == 3 * mistakes
    evaluated(tl)  # where the features are not kept yet, nothing is computed for it
    assert not re.findall(lines, Path("report/report.html").read_text())
    tl("predict", colours / "val" / "red" / "00.jpg", "--neighbours", 1)
    evaluated(tl)
    assert len(re.findall(lines, Path("report/report.html").read_text())) == 3 * mistakes


def test_without_a_report_there_is_none(tl: Run, colours: Path) -> None:
    assert trained(tl, colours)["report"] is None
    assert not Path("runs/run-1/report").exists()


def test_every_file_says_the_same(tl: Run, colours: Path) -> None:
    draw_split(colours / "test", 6)
    trained(tl, colours, *BARELY)
    result = evaluated(tl)
    found = json.loads(Path("report/metrics.json").read_text())
    assert {key: found[key] for key in result if key != "report"} == {k: v for k, v in result.items() if k != "report"}
    rows, per_class = table(Path("report/predictions.csv")), table(Path("report/per_class.csv"))
    assert len(rows) == found["n"] == 18
    assert sum(row["label"] == row["predicted"] for row in rows) / 18 == found["top1"]
    assert [row["class"] for row in per_class] == ["blue", "green", "red"]
    matrix = [[0] * 3 for _ in range(3)]
    for row in rows:
        matrix[sorted(COLOURS).index(row["label"])][sorted(COLOURS).index(row["predicted"])] += 1
        assert float(row["probability"]) >= float(row["probability_2"]) >= float(row["probability_3"])
        assert sum(float(row[key]) for key in ("probability", "probability_2", "probability_3")) == pytest.approx(
            1, abs=3e-6
        )
    with Path("report/confusion_matrix.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["label", *sorted(COLOURS)],
            *([name, *map(str, row)] for name, row in zip(sorted(COLOURS), matrix, strict=True)),
        ]
    assert [int(row["support"]) for row in per_class] == [sum(row) for row in matrix]
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)


def test_the_probabilities_are_those_of_tl_predict(tl: Run, colours: Path) -> None:
    draw_split(colours / "test", 2)
    trained(tl, colours)
    evaluated(tl)
    rows = table(Path("report/predictions.csv"))
    done = tl("predict", colours / "test", "--checkpoint", "runs/run-1/best.pth", "--format", "jsonl")
    predicted = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"].endswith(found["path"]) for row, found in zip(predicted, rows, strict=True)] == [True] * 6
    for row, found in zip(predicted, rows, strict=True):
        first = row["predictions"][0]
        assert first["label"] == found["predicted"]
        assert first["probability"] == pytest.approx(float(found["probability"]), abs=2e-3)


def test_an_over_confident_head_is_calibrated_and_ranks_as_before(tl: Run, tmp_path: Path) -> None:
    noisy = {"one": (120, 120, 120), "two": (126, 126, 126)}
    draw_splits(tmp_path / "noisy", 30, noisy)
    trained(tl, tmp_path / "noisy", "train.epochs=30", "train.optimizer.lr=0.5")
    result = evaluated(tl)
    before, after = result["calibration"]["before"], result["calibration"]["after"]
    assert result["calibration"]["temperature"] > 1
    assert after["ece"] < before["ece"]
    rows = table(Path("report/predictions.csv"))
    assert sum(row["label"] == row["predicted"] for row in rows) / len(rows) == result["top1"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_split_of_one_class_or_one_image_has_null_figures_with_a_reason(tl: Run, tmp_path: Path, count: int) -> None:
    rows = [(f"{split}/{name}/{index:02}.jpg", name, split) for split in ("train", "val") for name in COLOURS
            for index in range(4)]  # fmt: skip
    rows += [(f"test/red/{index:02}.jpg", "red", "test") for index in range(count)]
    for split in ("train", "val", "test"):
        draw_split(tmp_path / "data" / split, 4)
    lines = ["id,label,split", *(",".join(row) for row in rows)]
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    trained(tl, tmp_path / "data", "data.source=csv", "data.csv.split_column=split")
    result = evaluated(tl)
    assert (result["split"], result["n"]) == ("test", count)
    found = json.loads(Path("report/metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [row["recall"] is None for row in found["per_class"]] == [True, True, False]
    assert {"per_class blue recall", "per_class green recall"} <= set(found["undefined"])
    page = Path("report/report.html").read_text()
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]+", "", page), re.IGNORECASE)


def test_names_cannot_become_markup_or_move_the_cursor(tl: Run, tmp_path: Path) -> None:
    nasty = {"<b>x<i>": (200, 30, 30), "$a_b$ & co": (30, 200, 30), "esc\x1b[31m\u202e": (30, 30, 200)}
    draw_splits(tmp_path / "data", 3, nasty)
    trained(tl, tmp_path / "data", *BARELY)
    evaluated(tl)
    page = Path("report/report.html").read_text(encoding="utf-8")
    assert "<b>x" not in page
    assert "&lt;b&gt;x&lt;i&gt;" in page
    for character in ("\x1b", "\u202e"):
        assert character not in page
    shown = tl("predict", tmp_path / "data" / "test", "--checkpoint", "runs/run-1/best.pth").stdout
    assert "\x1b" not in shown
    assert "esc\\x1b[31m\\u202e" in shown


def test_explain_writes_a_picture_per_image(tl: Run, colours: Path) -> None:
    trained(tl, colours)
    (colours / "val" / "blue" / "bad.jpg").write_bytes(b"no")
    done = tl("predict", colours / "val" / "blue", "--checkpoint", "runs/run-1/best.pth", "--explain", "why")
    assert done.returncode == 1
    assert sorted(path.name for path in Path("why").iterdir()) == [f"{i + 1:05}-{i:02}-blue.png" for i in range(4)]
    assert size("why/00001-00-blue.png") == (2 * 64 + 6, 64)


def test_a_report_that_cannot_be_written_is_refused_first(tl: Run, colours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trained(tl, colours)
    done = tl("eval", "--checkpoint", "runs/run-1/best.pth", "--report", "file/report")
    assert done.returncode == 2
    assert "choose another folder with --report" in done.stderr


def test_tl_eval_prints_what_matters(tl: Run, colours: Path) -> None:
    trained(tl, colours)
    done = tl("eval", "--checkpoint", "runs/run-1/best.pth", "--report", "report")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"val: top-1 [\d.]+% \([\d.]+% to [\d.]+%\)  loss [\d.]+  \(12 images\)", lines[0])
    assert re.fullmatch(
        r"balanced accuracy [\d.]+%  macro F1 [\d.]+%  calibration error [\d.]+% \(as trained\)", lines[1]
    )
    assert lines[2:] == ["report: report/report.html"]
    assert all(len(line) <= 80 for line in lines)


def test_102_classes_are_written_whole(tl: Run, tmp_path: Path) -> None:
    draw_splits(tmp_path / "many", 2, MANY)
    trained(tl, tmp_path / "many", "train.epochs=2")
    result = evaluated(tl)
    assert result["n"] == 204
    assert result["top1"] < 1, "the pictures are too easy to show a mistake"
    assert {path.name for path in Path("report").iterdir()} == FILES
    assert len(table(Path("report/per_class.csv"))) == 102
    assert "probability_5" in table(Path("report/predictions.csv"))[0]
    assert min(size("report/confusion_matrix.png")) > 1500
    if CHROMIUM:
        found = in_browser(Path("report/report.html"), PROBE, tmp_path)
        assert found["rows"] == 102
        assert found["broken"] == found["fetched"] == []
        assert found["top5"] == f"{100 * result['top5']:.1f}%"


def test_above_so_many_classes_each_count_has_a_row(tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tl, colours, *BARELY)
    evaluated(tl)
    square = table(Path("report/confusion_matrix.csv"))
    monkeypatch.setattr(report, "SQUARE", 2)
    evaluated(tl)
    rows = table(Path("report/confusion_matrix.csv"))
    assert rows == [
        {"label": row["label"], "predicted": name, "count": row[name]}
        for row in square
        for name in sorted(COLOURS)
        if row[name] != "0"
    ]


PROBE = """
found.top1 = document.getElementById("top1").textContent;
found.top5 = document.getElementById("top5")?.textContent;
found.ece = document.getElementById("ece").textContent;
const names = () => [...document.querySelectorAll("#classes tbody tr")].map(row => row.cells[0].textContent);
const recalls = () => [...document.querySelectorAll("#classes tbody tr")].map(row => +row.cells[2].dataset.value);
const press = column => document.querySelectorAll("#classes th button")[column].click();
found.rows = names().length;
press(2); found.up = recalls();
press(2); found.down = recalls();
press(0); press(0); found.names = names();
found.images = document.images.length;
found.broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt);
found.fetched = performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:"));
found.overflow = document.documentElement.scrollWidth - innerWidth;
"""


@browser
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_works_in_a_browser(tl: Run, tmp_path: Path, width: int) -> None:
    close = {"one": (120, 120, 120), "two": (126, 126, 126), "three": (132, 130, 128)}
    draw_splits(tmp_path / "data", 10, close)
    trained(tl, tmp_path / "data", *BARELY)
    result = evaluated(tl)
    found = in_browser(Path("report/report.html"), PROBE, tmp_path, width)
    assert found["top1"] == f"{100 * result['top1']:.1f}%"
    assert found["ece"] == f"{100 * result['calibration']['after']['ece']:.1f}%"
    assert found["up"] == sorted(found["up"])
    assert found["down"] == found["up"][::-1]
    assert found["names"] == ["two", "three", "one"]
    assert found["images"] > 4, "no mistake was shown"
    assert found["broken"] == found["fetched"] == []
    assert found["overflow"] <= 0


@browser
def test_the_page_of_photographs_works_in_a_browser(tl: Run, photos: Path, tmp_path: Path) -> None:
    trained(tl, photos, "model.tap=maxpool", "transforms.eval=[{Resize: 72}, {CenterCrop: 64}]")
    result = evaluated(tl)
    assert {path.name for path in Path("report").iterdir()} == FILES
    found = in_browser(Path("report/report.html"), PROBE, tmp_path)
    assert found["top1"] == f"{100 * result['top1']:.1f}%"
    assert found["images"] > 10
    assert found["broken"] == found["fetched"] == []


def test_a_report_that_fails_does_not_take_the_run_with_it(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RunError("cannot write report.html: the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(outcome, "write_report", fail)
        done = tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL, "output.report=true")
    assert done.returncode == 0
    assert json.loads(done.stdout)["report"] is None
    assert "the disk is full" in done.stderr
    assert "--resume runs/run-1 makes what is missing, such as the report" in done.stderr
    again = last_json(tl("train", "--resume", "runs/run-1", "--json"))
    assert again["report"] == "runs/run-1/report/report.html"
