"""What a run advises: each rule where it holds and where it does not, and the lines that the command prints."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, draw_split
from test_end_to_end import SMALL
from tl_trainer.advice import MOST, RULES, Facts, advise

pytestmark = pytest.mark.usefixtures("without_pictures")

FINE = Facts(
    again="tl-train --config c", resume="tl-train --resume r", classes=["ants", "bees"], counts=[100, 110],
    support=[200, 220], recalls=[0.9, 0.9], val={"loss": 0.3, "top1": 0.9, "top5": 1.0, "n": 420}, baseline=0.52,
    train=0.97,
)  # fmt: skip


def val(top1: float, images: int = 420) -> dict[str, float]:
    return {"loss": 0.3, "top1": top1, "top5": 1.0, "n": images}


def test_a_run_without_findings_gets_no_advice() -> None:
    assert advise(FINE) == []


CASES: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "near_baseline": (
        {"val": val(0.55)}, "val top-1 is 55.0%, and always saying the most frequent class gives 52.0%",
        "tl-train --config c 'model={backbone: convnext_tiny}'", {"val": val(0.6)},
    ),
    "not_searched": (
        {"searchable": True, "losses": (0.3,) * 10, "best_epoch": 4}, "the head was trained for 10 epochs",
        "tl-train --config c train.search=auto", {"losses": (0.3,) * 10, "best_epoch": 4},
    ),
    "memorised": (
        {"train": 0.996, "val": val(0.862), "losses": (0.5, 0.6), "best_epoch": 1},
        "train top-1 is 99.6%, val top-1 86.2%: the head has memorised the training images",
        "tl-train --config c transforms.train=default", {"train": 0.95, "val": val(0.84)},
    ),
    "imbalanced": (
        {"counts": [12, 340], "recalls": [0.25, 0.95]},
        "ants has 12 training images, the largest class 340; recall of ants on val is 25.0%",
        "tl-train --config c train.loss.class_weights=balanced", {"counts": [12, 340], "recalls": [0.8, 0.95]},
    ),
    "improving": (
        {"losses": (0.5, 0.4, 0.3), "best_epoch": 3},
        "epoch 3, the last, is the best; its val loss is 0.3000, before it 0.4000",
        "tl-train --resume r --epochs 6", {"losses": (0.5, 0.3, 0.299), "best_epoch": 3},
    ),
    "few_validation_images": (
        {"val": val(0.9, 30), "val_fraction": 0.2}, "30 val images: the 95% interval of top-1 is 74.4% to 96.5%",
        "tl-train --config c data.val_fraction=0.4", {"val": val(0.9, 200)},
    ),
}  # fmt: skip


def test_every_rule_has_its_case() -> None:
    assert [rule.__name__ for rule in RULES] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_where_it_holds_and_is_silent_where_it_does_not(name: str) -> None:
    holds, evidence, remedy, silent = CASES[name]
    [advice] = advise(replace(FINE, **holds))
    assert advice.evidence.startswith(evidence)
    assert advice.remedy == remedy
    assert advise(replace(FINE, **silent)) == []


def test_what_was_done_already_is_not_advised_again() -> None:
    imbalance = {"counts": [12, 340], "recalls": [0.25, 0.95]}
    assert advise(replace(FINE, **imbalance, balanced=True)) == []
    [advice] = advise(replace(FINE, train=1.0, val=val(0.8), augmented=True, losses=(0.5, 0.6)))
    assert "transforms" not in advice.remedy
    [advice] = advise(replace(FINE, val=val(0.9, 30), val_fraction=None))
    assert advice.remedy == "add images to val, or move some of train there"


def test_a_head_that_was_found_gets_another_backbone_and_folds() -> None:
    """On 600 photographs of clothing, ten random views took 20 times as long and were right 3 points less often."""
    [advice] = advise(replace(FINE, train=1.0, val=val(0.8)))
    assert advice.remedy == "tl-train --config c 'model={backbone: convnext_tiny}'"
    few = replace(FINE, val=val(0.9, 30), val_fraction=0.2, foldable=True, counts=[20, 6], support=[5, 2])
    [advice] = advise(few)
    assert advice.remedy == "tl-train --config c --folds 8"
    assert advise(replace(few, counts=[90, 90], support=[20, 20]))[0].remedy == "tl-train --config c --folds 10"
    for other in ({"counts": [20, 0]}, {"foldable": False}):
        assert advise(replace(few, **other))[0].remedy == "tl-train --config c data.val_fraction=0.4"


def test_phases_say_themselves_how_long_they_train() -> None:
    assert advise(replace(FINE, losses=(0.5, 0.4, 0.3), best_epoch=3, phased=True)) == []
    [advice] = advise(replace(FINE, val=val(0.55), phased=True))
    assert advice.remedy == "tl-train --config c 'model={backbone: convnext_tiny}' 'train.phases=[]'"


def test_perfect_runs_are_left_alone() -> None:
    assert advise(replace(FINE, val=val(1.0), train=1.0, baseline=0.99, searchable=True)) == []


def test_at_most_three_lines_are_given() -> None:
    merged: dict[str, Any] = {key: value for holds, *_ in CASES.values() for key, value in holds.items()}
    assert len(advise(replace(FINE, **merged))) == MOST


@pytest.mark.parametrize("clipped", [False, True])
def test_the_command_prints_its_advice_and_keeps_it(tl: Run, tmp_path: Path, clipped: bool) -> None:
    close = {"one": (120, 120, 120), "two": (126, 126, 126), "three": (132, 130, 128)}
    for index, split in enumerate(("train", "val")):
        draw_split(tmp_path / "data" / split, 6, size=40 + index, classes=close)
    words = ("train.epochs=1", "train.optimizer.lr=0.0001", "output.report=true")
    done = tl("train", tmp_path / "data", *SMALL, *words, *["train.clip_norm=1.0"] * clipped)
    assert done.returncode == 0, done.stderr
    [run_dir] = Path("runs").iterdir()
    result = json.loads((run_dir / "result.json").read_text())
    assert 0 < len(result["advice"]) <= MOST
    assert {"evidence", "try"} == set(result["advice"][0])
    printed = " ".join(done.stdout.split())
    page = " ".join(Path(result["report"]).read_text().split())
    assert "What next" in page
    for advice in result["advice"]:
        assert f"{advice['evidence']} try: {advice['try']}" in printed
        assert html.escape(advice["try"]).replace("&#x27;", "&#39;") in page
    assert f"train: top-1 {result['train']['top1']:.1%}" in printed
    found = [advice["try"] for advice in result["advice"] if "train.search" in advice["try"]]
    if clipped:  # which a search refuses
        assert not found
        return
    [again] = found
    assert again == f"tl-train --config {run_dir}/config.yaml train.search=auto"
    assert tl(*again.removeprefix("tl-").split(), "--dry-run").returncode == 0
