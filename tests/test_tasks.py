"""What follows from a label: the drawn split, the loss, the figures and which are better, the rows, the pictures.

Figures are held against scikit-learn's, pictures against those of `plots`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional

from tl_trainer import metrics
from tl_trainer.config.training import Figure, LossSection
from tl_trainer.errors import DataError, RunError
from tl_trainer.metrics import CURVES, FEWEST, HIGHER, Figures, Prediction, Scores
from tl_trainer.plots import confusion_figure, png, reliability_figure
from tl_trainer.single_label import SingleLabel

CLASSES = ["ant", "bee", "a $name$ <b>"]
TASK = SingleLabel(CLASSES)
FIGURES = {"loss": 0.5, "top1": 0.75, "top5": 1.0, "n": 8}

# Six images: the second and the sixth are mistakes, the sixth the surer one.
SAID, TARGETS = [0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 2]
SCORES = Scores(
    functional.one_hot(torch.tensor(SAID), 3) * torch.linspace(0.5, 6, 6).unsqueeze(1), torch.tensor(TARGETS)
)


def noise(count: int, classes: int, seed: int = 0) -> Scores:
    """Logits (count, classes), right more often than not, with each class at least once among the targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    logits = torch.randn(count, classes, generator=generator)
    return Scores(logits + 1.5 * functional.one_hot(targets, classes), targets)


def named(count: int) -> SingleLabel:
    return SingleLabel([f"class {index}" for index in range(count)])


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, (1, 1, 1)), (0.25, (3, 1, 1)), (0.99, (11, 4, 1))])
def test_a_part_of_each_class_is_held_out_and_never_all_of_it(fraction: float, expected: tuple[int, ...]) -> None:
    targets = [0] * 12 + [1] * 5 + [2] * 2
    random.Random(1).shuffle(targets)
    held_out = TASK.hold_out(targets, fraction, 0)
    assert held_out <= set(range(len(targets)))
    counts = Counter(targets[index] for index in held_out)
    assert (counts[0], counts[1], counts[2]) == expected


def test_the_seed_alone_says_which_are_held_out() -> None:
    targets = [0, 1, 2] * 20
    assert TASK.hold_out(targets, 0.2, 7) == TASK.hold_out(targets, 0.2, 7)
    assert TASK.hold_out(targets, 0.2, 7) != TASK.hold_out(targets, 0.2, 8)


@pytest.mark.parametrize(
    ("targets", "listing"),
    [
        ([0, 0, 2, 2], "'bee' (none)"),
        ([0, 0, 1, 2, 2], "'bee' (2.jpg)"),
        ([0, 2, 2], "'ant' (0.jpg), 'bee' (none)"),
        ([1, 1], "'ant' (none), 'a $name$ <b>' (none)"),
    ],
)
def test_every_class_of_which_none_would_be_left_is_named_with_its_file(targets: list[int], listing: str) -> None:
    with pytest.raises(DataError) as caught:
        TASK.hold_out(targets, 0.2, 0, "{}.jpg".format)
    assert str(caught.value) == (
        f"a val split needs 2 images of each class or more, and there are too few of {listing}; add some, remove the "
        "class, or bring a val split"
    )


def test_of_many_classes_of_which_none_would_be_left_some_are_named() -> None:
    with pytest.raises(DataError, match=r"too few of 'class 0' \(0\), .*, 'class 4' \(4\) and 25 more; add"):
        named(30).hold_out(range(30), 0.2, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_the_loss_is_cross_entropy_as_configured(weights: Any, smoothing: float) -> None:
    """Written out: each class in proportion to its rarity, part of each target spread over all classes."""
    section = LossSection(class_weights=weights, label_smoothing=smoothing)
    found = TASK.criterion(section, TARGETS)(*SCORES)
    of_class = np.ones(3)
    if weights == "balanced":
        of_class = compute_class_weight("balanced", classes=np.arange(3), y=np.array(TARGETS))
    logs, shares = SCORES.logits.double().log_softmax(dim=1).numpy(), of_class[TARGETS]
    wanted = (1 - smoothing) * np.eye(3)[TARGETS] + smoothing / 3
    assert found.item() == pytest.approx(-(wanted * of_class * logs).sum() / shares.sum(), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 5, 6, 30])
def test_the_figures_are_scikit_learns(classes: int) -> None:
    scores = noise(120, classes)
    found, labels = named(classes).figures(scores), range(classes)
    shares = scores.logits.double().softmax(dim=1).numpy()
    assert list(found) == ["loss", "top1", "top5", "n"]
    assert found["n"] == 120
    assert found["loss"] == pytest.approx(log_loss(scores.targets, shares, labels=labels), rel=1e-6)
    assert found["top1"] == accuracy_score(scores.targets, scores.logits.argmax(dim=1))
    top5 = top_k_accuracy_score(scores.targets, shares, k=5, labels=labels) if classes > 5 else 1.0
    assert found["top5"] == top5
    assert 0 < found["top1"] < 1
    assert set(SingleLabel.columns) < found.keys()


def test_the_averages_of_classes_are_scikit_learns_and_only_there_when_asked_for() -> None:
    scores = noise(40, 6)
    predicted = scores.logits.argmax(dim=1)
    task = SingleLabel([*"abcdef"], "macro_f1", "balanced_accuracy")
    found = task.figures(scores)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(scores.targets, predicted), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(scores.targets, predicted, average="macro"), abs=1e-6)
    assert task.columns == ("loss", "top1", "top5", "macro_f1", "balanced_accuracy")
    assert f"macro F1 {found['macro_f1']:5.1%}" in task.in_words(found)
    assert SingleLabel([*"abcdef"], "loss", "top1").figures(scores).keys() == {"loss", "top1", "top5", "n"}
    task.check(found)
    for wrong in (None, 1.5, "0.5"):
        with pytest.raises(ValueError, match="validation error"):
            task.check({**found, "macro_f1": wrong})


def test_better_is_by_the_figure_that_is_named() -> None:
    task, lower = SingleLabel([*"abc"], "loss"), {**FIGURES, "loss": FIGURES["loss"] - 0.1, "top1": 0.1}
    assert task.better(lower, FIGURES)
    assert not task.better(FIGURES, lower)
    assert task.better(FIGURES, lower, by="top1")
    assert not TASK.better(lower, FIGURES)
    assert task.better(lower, FIGURES, least=0.05)
    assert not task.better(lower, FIGURES, least=0.11)
    assert not task.better({**FIGURES, "loss": math.nan}, FIGURES)
    tied = {**FIGURES, "loss": FIGURES["loss"] - 0.1}
    assert TASK.better(tied, FIGURES)
    assert not TASK.better(tied, FIGURES, least=0.01)


def test_the_figures_of_the_schema_have_a_direction() -> None:
    assert set(get_args(Figure)) == HIGHER.keys()


@pytest.mark.parametrize("count", [1, 2, 40])
def test_what_figures_gives_passes_the_check(count: int) -> None:
    TASK.check(TASK.figures(noise(count, 3)))
    TASK.check(TASK.figures(Scores(noise(count, 3).logits * 1e4, noise(count, 3).targets)))


@pytest.mark.parametrize(
    "forged",
    [
        {"loss": None}, {"loss": math.nan}, {"loss": math.inf}, {"loss": "0.5"}, {"loss": True}, {"loss": [0.5]},
        {"top1": -0.01}, {"top1": 1.01}, {"top1": math.nan}, {"top1": "0.75"}, {"top1": 10**400}, {"top1": False},
        {"top5": -1.0}, {"top5": 2.0}, {"top5": None}, {"top5": math.inf},
        {"n": 0}, {"n": -8}, {"n": 8.0}, {"n": True}, {"n": "8"}, {"n": None},
    ],
    ids=lambda forged: f"{next(iter(forged))}={str(*forged.values())[:8]}",
)  # fmt: skip
def test_forged_figures_are_refused(forged: dict[str, Any]) -> None:
    TASK.check(FIGURES)
    with pytest.raises(ValueError, match="validation error"):
        TASK.check({**FIGURES, **forged})


@pytest.mark.parametrize("name", FIGURES)
def test_a_missing_figure_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        TASK.check({key: value for key, value in FIGURES.items() if key != name})


@pytest.mark.parametrize("forged", [None, [], "loss", 0.5, {}, [("loss", 0.5)], torch.zeros(4)])
def test_what_are_no_figures_at_all_is_refused(forged: Any) -> None:
    with pytest.raises(ValueError, match="validation error"):
        TASK.check(forged)


@pytest.mark.parametrize(
    ("figures", "better"),
    [
        ({"loss": 0.5, "top1": 0.75, "top5": 1.0, "n": 8}, False),  # the same
        ({"loss": 0.4, "top1": 0.75, "top5": 0.9, "n": 8}, True),  # as many right, a lower loss
        ({"loss": 0.6, "top1": 0.75, "top5": 1.0, "n": 8}, False),
        ({"loss": 0.9, "top1": 0.875, "top5": 0.9, "n": 8}, True),  # more right, whatever the loss
        ({"loss": 0.1, "top1": 0.625, "top5": 1.0, "n": 8}, False),
        ({"loss": 0.5, "top1": 0.75, "top5": 0.9, "n": 9}, False),  # neither top-5 nor the number counts
        ({"loss": 0.5, "top1": 0.75, "top5": 1.0, "n": 7}, False),
    ],
)
def test_a_higher_top1_is_better_then_a_lower_loss(figures: Figures, better: bool) -> None:
    assert TASK.better(figures, FIGURES) == better


def test_the_last_that_was_better_is_the_best_of_all() -> None:
    """So however often a run is resumed, its best epoch is the first of the best."""
    choices = [{**FIGURES, "loss": loss, "top1": top1} for loss in (0.25, 0.5) for top1 in (0.5, 0.75)]
    for order in itertools.product(choices, repeat=4):
        best = order[0]
        for figures in order[1:]:
            best = figures if TASK.better(figures, best) else best
        assert best is max(order, key=lambda figures: (figures["top1"], -figures["loss"]))


def test_figures_in_words() -> None:
    task = SingleLabel("abcdef")
    assert task.in_words({"loss": 0.7, "top1": 0.25, "top5": 0.875, "n": 8}) == "top-1 25.0%  top-5 87.5%"
    assert task.in_words({**FIGURES, "top1": 0.0, "top5": 1.0}) == "top-1  0.0%  top-5 100.0%"
    assert SingleLabel("abcde").in_words({**FIGURES, "top1": 0.5, "top5": 1.0}) == "top-1 50.0%"


def test_too_few_images_have_no_temperature() -> None:
    assert TASK.calibration(noise(FEWEST - 1, 3)) is None
    scores = noise(FEWEST, 3)
    found = TASK.calibration(Scores(8 * scores.logits, scores.targets))
    assert found is not None
    assert found > 4


def test_predictions_are_the_best_classes_first() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.5]])
    shares = logits.double().softmax(dim=1)
    assert TASK.predictions(logits, None, 2) == [
        [Prediction(CLASSES[index], index, round(shares[row, index].item(), 6)) for index in order]
        for row, order in enumerate([(1, 2), (0, 2)])
    ]


@pytest.mark.parametrize(("count", "given"), [(1, 1), (3, 3), (5, 3)])
def test_no_more_predictions_than_classes(count: int, given: int) -> None:
    assert [len(row) for row in TASK.predictions(torch.zeros(4, 3), None, count)] == [given] * 4


def test_of_classes_that_tie_the_first_is_predicted_first() -> None:
    (row,) = TASK.predictions(torch.ones(1, 3), None, 3)
    assert [guess.index for guess in row] == [0, 1, 2]
    assert {guess.probability for guess in row} == {0.333333}


def test_no_image_has_no_prediction() -> None:
    assert TASK.predictions(torch.empty(0, 3), None, 5) == []


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_temperature_changes_the_shares_and_not_the_order(temperature: float) -> None:
    logits = noise(20, 3).logits
    plain, changed = TASK.predictions(logits, None, 3), TASK.predictions(logits, temperature, 3)
    expected = (logits.double() / temperature).softmax(dim=1)
    for index, (before, after) in enumerate(zip(plain, changed, strict=True)):
        assert [guess.index for guess in before] == [guess.index for guess in after]
        assert [guess.probability for guess in after] == pytest.approx(
            [expected[index, guess.index].item() for guess in after], abs=1e-6
        )
        assert before != after


def test_an_evaluation_is_measured_with_the_names_of_the_classes() -> None:
    found = TASK.measure(SCORES, 2.0, None)
    assert found == metrics.measure(SCORES, CLASSES, 2.0, None)
    assert [row["class"] for row in found["per_class"]] == CLASSES
    assert found["calibration"]["after"] is not None
    withheld = TASK.measure(SCORES, 2.0, "because")
    assert withheld["calibration"]["after"] is None
    assert withheld["undefined"]["calibration.after"] == "because"
    with pytest.raises(RunError, match="not finite"):
        TASK.measure(Scores(SCORES.logits * math.nan, SCORES.targets), None, None)


def test_a_label_in_words_is_its_class() -> None:
    assert [TASK.caption(target) for target in range(3)] == CLASSES


@pytest.mark.parametrize(("count", "expected"), [(9, {5: "ant", 1: "bee"}), (1, {5: "ant"}), (0, {})])
def test_the_surest_mistakes_come_first_with_what_they_were_taken_for(count: int, expected: dict[int, str]) -> None:
    assert list(TASK.mistakes(SCORES, count).items()) == list(expected.items())


def test_without_a_mistake_there_is_none() -> None:
    assert TASK.mistakes(Scores(torch.eye(3), torch.arange(3)), 9) == {}


def test_the_curves_are_the_f1_of_each_class() -> None:
    scores = noise(60, 3)
    said = scores.logits.argmax(dim=1)
    expected = dict(zip([f"f1/{name}" for name in CLASSES], f1_score(scores.targets, said, average=None), strict=True))
    assert TASK.curves(scores) == pytest.approx(expected, abs=1e-6)


def test_a_class_that_is_neither_there_nor_predicted_has_no_curve() -> None:
    logits = SCORES.logits.clone()
    logits[:, 1] = -1
    found = TASK.curves(Scores(logits, torch.tensor([0, 0, 0, 2, 2, 2])))
    assert set(found) == {"f1/ant", "f1/a $name$ <b>"}
    assert all(math.isfinite(value) for value in found.values())


def test_the_name_of_a_curve_is_printable() -> None:
    task = SingleLabel(["ant", "\x1b[2J", "caf\udce9"])
    assert list(task.curves(noise(9, 3))) == ["f1/ant", "f1/\\x1b[2J", "f1/caf\\udce9"]


def test_the_pictures_are_the_confusion_matrix_and_the_reliability() -> None:
    found = TASK.pictures(SCORES)
    assert isinstance(found, Iterator), "each is drawn before it is known whether it can be logged"
    matrix = metrics.confusion(SCORES, 3)
    assert matrix.among(torch.arange(3)).tolist() == confusion_matrix(TARGETS, SAID).tolist()
    expected = {
        "confusion_matrix": confusion_figure(matrix, CLASSES),
        "reliability": reliability_figure({"as trained": metrics.reliability(SCORES, None)}),
    }
    for (tag, figure), (wanted, drawn) in zip(found, expected.items(), strict=True):
        assert tag == wanted
        assert png(figure) == png(drawn)


def test_precision_and_recall_are_of_each_class_against_all_others() -> None:
    found = list(TASK.precision_recall(SCORES))
    shares = SCORES.logits.double().softmax(dim=1)
    assert [name for name, _, _ in found] == CLASSES
    for index, (_, labels, probabilities) in enumerate(found):
        assert labels.tolist() == [int(target == index) for target in TARGETS]
        torch.testing.assert_close(probabilities, shares[:, index])


@pytest.mark.parametrize(("classes", "there"), [(200, True), (201, False)])
def test_above_so_many_classes_there_are_no_curves_of_each(classes: int, there: bool) -> None:
    task, scores = named(classes), noise(2 * classes, classes)
    assert classes - (not there) == CURVES
    assert (len(task.curves(scores)), len(list(task.precision_recall(scores)))) == ((classes,) * 2 if there else (0, 0))


def test_the_loss_trains_on_the_device_of_its_logits() -> None:
    """Its weights are a buffer, so that they move with it."""
    criterion = TASK.criterion(LossSection(class_weights="balanced"), TARGETS)
    assert isinstance(criterion, nn.CrossEntropyLoss)
    assert [name for name, _ in criterion.named_buffers()] == ["weight"]


@pytest.mark.parametrize(("fraction", "least", "most"), [(0.01, 0.02, 0.12), (0.2, 0.12, 0.28), (0.9, 0.75, 0.97)])
def test_no_group_is_divided_by_a_drawn_split(fraction: float, least: float, most: float) -> None:
    rng = random.Random(0)
    groups = [f"patient {rng.randrange(30)}" for _ in range(300)]
    targets = [(int(group.split()[1]) + rng.randrange(2)) % 3 for group in groups]
    held_out = TASK.hold_out(targets, fraction, 5, groups=groups)
    of_val = {group for index, group in enumerate(groups) if index in held_out}
    assert of_val.isdisjoint(group for index, group in enumerate(groups) if index not in held_out)
    assert least <= len(held_out) / 300 <= most
    assert {targets[index] for index in held_out} == {targets[index] for index in {*range(300)} - held_out} == {0, 1, 2}
    assert TASK.hold_out(targets, fraction, 5, groups=groups) == held_out


def test_no_group_is_divided_by_folds() -> None:
    targets, groups = [index % 3 for index in range(120)], [str(index // 6) for index in range(120)]
    fold = TASK.folds(targets, 4, 1, groups)
    assert {len({of for of, group in zip(fold, groups, strict=True) if group == name}) for name in groups} == {1}
    expected = StratifiedGroupKFold(4, shuffle=True, random_state=1).split(targets, targets, groups)
    for number, (_, held_out) in enumerate(expected):
        assert [index for index, of in enumerate(fold) if of == number] == sorted(held_out)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("aabbcc", r"all images of 'ant' \(a\), 'bee' \(b\), 'a \$name\$ <b>' \(c\) are in one group, which cannot be"),
        (
            "ababab",
            "2 groups cannot be divided into 3 parts that leave every class something to learn from; take fewer",
        ),
    ],
)
def test_groups_that_cannot_be_divided(groups: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASK.folds([0, 0, 1, 1, 2, 2] * 2, 3, 0, groups * 2)


def test_copies_share_a_fold_and_join_their_groups() -> None:
    hashes = [bytes([number // 2]) for number in range(24)]
    fold = SingleLabel(["a", "b"]).folds([0, 1] * 12, 3, 0, (), hashes)
    assert fold[::2] == fold[1::2] and {*fold} == {0, 1, 2}
    groups = [str(number // 4) for number in range(24)]
    hashes = [bytes([number]) for number in range(24)]
    hashes[0] = hashes[7] = hashes[21]
    fold = SingleLabel(["a", "b"]).folds([0, 1] * 12, 3, 0, groups, hashes)
    assert len({*fold[:8], *fold[20:]}) == 1 and {*fold} == {0, 1, 2}
    with pytest.raises(DataError, match="too many images are copies"):
        SingleLabel(["a", "b"]).folds([0, 1] * 12, 3, 0, (), [b""] * 24)
