"""The figures: what their axes, cells and curves say at few and at many classes, and that any class name can be drawn.

A warning is an error here, so a picture that is drawn at all was drawn without one.
"""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tl_trainer.metrics import Confusion, Scores, reliability
from tl_trainer.plots import (
    LONGEST_NAME,
    NUMBERED,
    WHOLE,
    WORST,
    confusion_figure,
    epochs_figure,
    forecast_figure,
    png,
    reliability_figure,
)

AWKWARD = {
    "math": r"$\frac{$ $a_b$", "unclosed": "5$", "markup": "<b>x & y", "CJK": "日本語の花", "emoji": "🐝🦋",
    "right to left": "שלום עליכם", "escape": "\x1b[31m\0", "direction": "\u202egpj", "lines": "a\nb\r\tc",
    "bytes": "caf\udce9", "blank": " ", "long": "x" * 100, "wide": "花" * 100,
}  # fmt: skip


def counts(number: int) -> list[list[int]]:
    """A confusion matrix in which no two cells of a row are alike, and the last class has no image."""
    return [[row * column + column for column in range(number)] for row in range(number - 1)] + [[0] * number]


def sparse(matrix: list[list[int]]) -> Confusion:
    counts = torch.tensor(matrix)
    rows, columns = counts.nonzero(as_tuple=True)
    return Confusion(rows, columns, counts[rows, columns], len(matrix))


def labels(figure: Figure) -> tuple[list[str], list[str]]:
    """What stands along the first axes, across and down."""
    axes = figure.axes[0]
    return [tick.get_text() for tick in axes.get_xticklabels()], [tick.get_text() for tick in axes.get_yticklabels()]


def drawn(figure: Figure) -> Image.Image:
    """The figure's PNG, decoded whole."""
    with Image.open(io.BytesIO(png(figure))) as picture:
        assert picture.format == "PNG"
        return picture.convert("RGB")


@pytest.mark.parametrize("name", AWKWARD.values(), ids=AWKWARD.keys())
def test_any_class_name_can_be_drawn(name: str) -> None:
    figure = confusion_figure(sparse([[1, 2], [0, 3]]), [name, "bee"])
    assert len(drawn(figure).getcolors(1 << 20)) > 10
    across, down = labels(figure)
    assert across == down
    assert across[1] == "bee"
    assert len(across[0]) <= LONGEST_NAME
    assert across[0].isprintable()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (r"$a_b$", r"$a_b$"),
        ("a\nb\x1b", r"a\nb\x1b"),
        ("caf\udce9", r"caf\udce9"),
        ("x" * LONGEST_NAME, "x" * LONGEST_NAME),
        ("abcdefghijklmnopqrstuvwxy", "abcdefghijklmno…rstuvwxy"),
    ],
)
def test_a_name_is_shown_on_one_short_line_and_as_it_is_written(name: str, shown: str) -> None:
    figure = confusion_figure(sparse([[1, 2], [0, 3]]), [name, "bee"])
    assert labels(figure) == ([shown, "bee"], [shown, "bee"])
    ticks = [*figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels()]
    assert not any(tick.get_parse_math() for tick in ticks)


@pytest.mark.parametrize(
    ("names", "turned"),
    [
        (["ant", "bee"], 0),
        (["ant", "bee", "moth"], 0),
        (["great willowherb", "mountain pansy"], 90),
        (["ant"] * 10, 90),
    ],
    ids=str,
)
def test_names_below_the_columns_do_not_run_into_each_other(names: list[str], turned: int) -> None:
    figure = confusion_figure(sparse(counts(len(names))), names)
    png(figure)  # draws, and so places
    ticks = figure.axes[0].get_xticklabels()
    assert {tick.get_rotation() for tick in ticks} == {turned}
    boxes = [tick.get_window_extent() for tick in ticks]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("number", [2, 10, NUMBERED, NUMBERED + 1, 102, WHOLE])
def test_what_a_confusion_matrix_tells_depends_on_the_number_of_classes(number: int) -> None:
    matrix, names = counts(number), [f"sort {index:03}" for index in range(number)]
    figure = confusion_figure(sparse(matrix), names)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "label")
    assert labels(figure) == (names, names)
    assert list(axes.get_xticks()) == list(axes.get_yticks()) == list(range(number))
    written = {(round(y), round(x)): text.get_text() for text in axes.texts for x, y in [text.get_position()]}
    cells = {(row, column): str(matrix[row][column]) for row in range(number) for column in range(number)}
    assert written == (cells if number <= NUMBERED else {})
    (image,) = axes.images
    totals = np.array(matrix).sum(axis=1, keepdims=True)
    assert (totals[:-1] > 0).all()
    np.testing.assert_allclose(image.get_array()[:-1], (np.array(matrix) / np.maximum(totals, 1))[:-1])
    assert not image.get_array()[-1].any(), "a class without images has no share"


@pytest.mark.parametrize("number", [WHOLE + 1, 20_000])
def test_of_many_classes_those_with_the_most_mistakes_are_shown(number: int) -> None:
    """Every third of the last 150 is taken for the next class, once in four times; no class would fit in a matrix."""
    targets = torch.arange(number - 150, number).repeat(4)
    predicted = targets + ((targets % 3 == 0) & (torch.arange(600) < 150))
    predicted[predicted == number] = 0
    cells, times = torch.unique(targets * number + predicted, return_counts=True)
    figure = confusion_figure(
        Confusion(cells // number, cells % number, times, number), [f"sort {index}" for index in range(number)]
    )
    wrong = set(targets[targets != predicted].tolist()) | set(predicted[targets != predicted].tolist())
    names = labels(figure)[0]
    assert len(names) == WORST
    assert {int(name.removeprefix("sort ")) for name in names} <= wrong
    assert figure.axes[0].get_title() == f"the 50 of {number:,} classes with the most mistakes"
    (image,) = figure.axes[0].images
    assert sorted({*image.get_array().flatten().tolist()}) == [0, 0.25, 0.75, 1]


@pytest.mark.parametrize("number", [2, 10, 102])
def test_a_confusion_matrix_is_as_large_as_its_classes_need(number: int) -> None:
    names = [f"sort {index:03}" for index in range(number)]
    width, height = drawn(confusion_figure(sparse(counts(number)), names)).size
    assert min(width, height) > max(300, min(10 * number, 2500))
    assert max(width, height) < 4000


def test_a_number_can_be_read_on_its_cell() -> None:
    texts = confusion_figure(sparse([[9, 1], [4, 6]]), ["ant", "bee"]).axes[0].texts
    assert [(text.get_text(), text.get_color()) for text in texts] == [
        ("9", "white"), ("1", "black"), ("4", "black"), ("6", "white"),
    ]  # fmt: skip


@pytest.mark.parametrize("names", [["as trained"], ["as trained", "with temperature"]], ids=len)
def test_a_reliability_diagram_has_a_curve_for_each_and_the_images_of_the_last(names: list[str]) -> None:
    scores = Scores(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)
    curves = {name: reliability(scores, 1.0 + index) for index, name in enumerate(names)}
    figure = reliability_figure(curves)
    upper, lower = figure.axes
    diagonal, *lines = upper.lines
    assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert [line.get_label() for line in lines] == names
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["confidence = accuracy", *names]
    for line, curve in zip(lines, curves.values(), strict=True):
        filled = curve.images > 0
        assert 2 < filled.sum() < len(filled)
        assert torch.equal(torch.tensor(line.get_xdata()), curve.confidence[filled])
        assert torch.equal(torch.tensor(line.get_ydata()), curve.accuracy[filled])
    assert [bar.get_height() for bar in lower.patches] == list(curves.values())[-1].images.tolist()
    middles = [bar.get_x() + bar.get_width() / 2 for bar in lower.patches]
    assert middles == pytest.approx([(index + 0.5) / len(middles) for index in range(len(middles))])
    assert min(drawn(figure).size) > 400


def test_a_forecast_shows_what_was_measured_the_law_and_its_interval() -> None:
    figure = forecast_figure({60: [0.7, 0.72], 120: [0.8, 0.8]}, [(60, 0.71), (120, 0.8), (240, 0.85)], (0.82, 0.9))
    law, dots, interval = figure.axes[0].lines
    assert list(law.get_xdata()) == [60, 120, 240]
    assert list(law.get_ydata()) == pytest.approx([71, 80, 85])
    assert list(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == [(60, 70), (60, 72), (120, 80), (120, 80)]
    assert list(interval.get_xdata()) == [240, 240]
    assert list(interval.get_ydata()) == pytest.approx([82, 90])
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["60", "120", "240"]
    assert min(drawn(figure).size) > 300


@pytest.mark.parametrize("count", [1, 12])
def test_the_epochs_are_drawn_and_the_best_is_marked(count: int) -> None:
    rows = [
        {"epoch": n + 1.0, "train_loss": 1 / (n + 1), "val_loss": 2 / (n + 1), "val_top1": n / 20} for n in range(count)
    ]
    left, right = epochs_figure(rows, count).axes
    train, val, best = left.lines
    assert list(train.get_ydata()) == [row["train_loss"] for row in rows]
    assert list(val.get_ydata()) == [row["val_loss"] for row in rows]
    assert list(best.get_xdata()) == [count, count]
    assert list(right.lines[0].get_ydata()) == pytest.approx([100 * row["val_top1"] for row in rows])
    assert right.get_ylabel() == "top-1 in %"
