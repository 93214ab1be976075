"""What is said of the heads that were compared."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from tl_trainer.candidates import LINEAR, MEANS, NEIGHBOURS, RIDGE, UNIT, Found, Row

BEST = Row(LINEAR, "raw", 0.01, 0.25, 0.9)
ROWS = [
    BEST,
    *(Row(LINEAR, "standardised", 10**-power, 0.3 + 0.01 * power, 0.8) for power in (1.25, 3.25, 5.25, 4.0, 2.0)),
    Row(LINEAR, "raw", 1e3, 0.1, 0.99, "did not converge"),
    *(Row(NEIGHBOURS, UNIT, count, None, 0.8 + count / 1000) for count in (1, 50)),
    Row(MEANS, UNIT, 0, None, 0.88),
    *(Row(RIDGE, "standardised", strength, None, 0.7) for strength in (10.0, 1.0)),
]
FOUND = Found(ROWS, BEST, [], "100 images and folds", 100, 5)
MLP = Row("MLP 256", "standardised", 0.01, 0.2, 0.95, "", 3e-4, 0.25, 7)


def test_the_lines_show_the_one_taken_those_alike_and_the_best_of_each_other_method() -> None:
    lines = FOUND.lines()
    assert len(lines) == 9
    assert lines[0].endswith("log loss  top-1 (val + folds)")
    assert [line[0] for line in lines[1:]] == [">", *" " * 7]
    assert "raw, L2 0.01" in lines[1]
    assert [sum(method in line for line in lines) for method in (LINEAR, MEANS, NEIGHBOURS, RIDGE)] == [5, 1, 1, 1]
    assert any("length 1, k 50" in line and line.endswith("85.0%") for line in lines)
    assert not any("99.0%" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_an_mlp_says_how_it_was_trained_and_shows_the_linear_one_beside_it() -> None:
    lines = replace(FOUND, rows=[MLP, *ROWS], best=MLP, folds=0).lines()
    assert "MLP 256              lr 0.0003 decay 0.01 dropout 0.25" in lines[1]
    assert lines[0].endswith("top-1 (val)")
    assert sum(LINEAR in line for line in lines) == 1
    assert max(map(len, lines)) <= 80


def test_every_candidate_is_a_row_of_the_csv_file() -> None:
    rows = list(csv.DictReader(replace(FOUND, rows=[MLP, *ROWS]).table().splitlines()))
    assert len(rows) == len(ROWS) + 1
    assert {key: rows[0][key] for key in ("rate", "dropout", "epochs")} == {
        "rate": "0.0003", "dropout": "0.25", "epochs": "7",
    }  # fmt: skip
    assert [row["note"] for row in rows if row["note"]] == ["did not converge"]
    assert rows[-1]["loss"] == ""


@pytest.mark.parametrize(("top1", "said"), [(0.92, False), (0.929, False), (0.94, True)])
def test_a_simpler_method_that_is_better_by_more_than_a_standard_error_is_named(top1: float, said: bool) -> None:
    remark = replace(FOUND, rows=[*ROWS, Row(NEIGHBOURS, UNIT, 5, None, top1)]).remark()  # the error is 3 points
    assert (remark is not None) == said
    if remark:
        assert "nearest neighbours (length 1, k 5) does better: top-1 94.0% against 90.0%" in remark
        assert remark.endswith("(3.0%); try model.head.hidden=[256]")


def test_a_linear_head_that_beats_an_mlp_is_named() -> None:
    best = replace(MLP, top1=0.5)
    remark = replace(FOUND, rows=[best, *ROWS[:-4]], best=best).remark()
    assert remark is not None
    assert remark.endswith("leave out model.head.hidden")
