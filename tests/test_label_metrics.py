"""Every figure of several labels against scikit-learn, with unknown entries, absent labels and images without any."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score, f1_score, log_loss, precision_recall_fscore_support

from tl_trainer import label_metrics as lm
from tl_trainer.checkpoint import Calibration
from tl_trainer.errors import RunError
from tl_trainer.metrics import FEWEST, Scores

CLOSE = {"abs": 1e-6}


@st.composite
def drawn(draw: Any) -> Scores:
    """Logits with ties, and labels of which some are unknown, some absent and some everywhere."""
    images, labels = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    logits = rng.choice([-3.5, -1.0, -0.25, 0.0, 0.5, 2.0, rng.normal()], (images, labels))
    targets = (rng.random((images, labels)) < rng.choice([0.0, 0.2, 0.6, 1.0], labels)).astype(int)
    targets[rng.random((images, labels)) < draw(st.sampled_from([0.0, 0.3]))] = -1
    return Scores(torch.tensor(logits).float(), torch.tensor(targets))


@settings(deadline=None, max_examples=20)
@given(drawn())
def test_figures_are_those_of_scikit_learn(scores: Scores) -> None:
    logits, targets = (column.numpy() for column in scores)
    there = targets >= 0
    found = lm.measure(scores, [f"l{at}" for at in range(targets.shape[1])], None, "no temperature")
    rows, precisions, f1s = found["per_class"], [], []
    for at, row in enumerate(rows):
        had, said = targets[there[:, at], at], logits[there[:, at], at] >= 0
        if not len(had):
            assert (row["ap"], row["recall"], row["f1"], row["ece"]) == (None, None, None, None)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            precision, recall, f1, _ = precision_recall_fscore_support(had, said, average="binary", zero_division=0)
            ap = average_precision_score(had, logits[there[:, at], at])
        assert row["support"] == had.sum()
        assert (row["precision"] or 0, row["recall"] or 0, row["f1"] or 0) == pytest.approx(
            (precision, recall, f1), **CLOSE
        )
        if had.any():
            assert row["ap"] == pytest.approx(ap, **CLOSE)
            precisions.append(ap)
        else:
            assert row["ap"] is row["recall"] is None
        if had.any() or said.any():
            f1s.append(f1)
    assert found["map"] == pytest.approx(np.mean(precisions) if precisions else 0, **CLOSE)
    assert found["macro_f1"] == pytest.approx(np.mean(f1s) if f1s else 0, **CLOSE)
    had, said = targets[there], logits[there] >= 0
    if len(had):
        micro = f1_score(had, said, zero_division=0)
        assert found["micro_f1"] == pytest.approx(micro, **CLOSE)
        expected = log_loss(had, 1 / (1 + np.exp(-logits[there].astype(float))), labels=[0, 1])
        assert found["loss"] == pytest.approx(expected, **CLOSE)
    some = there.any(axis=1)
    right = ((logits >= 0) == (targets == 1)) | ~there
    assert found["subset_accuracy"] == pytest.approx(right.all(axis=1)[some].mean() if some.any() else 0, **CLOSE)


def noise(images: int, labels: int = 3, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, labels, generator=generator)
    targets = (torch.rand(images, labels, generator=generator) < (logits / 2).sigmoid()).long()
    targets[::7, 0] = -1
    return Scores(logits, targets)


def test_the_temperature_minimises_the_smoothed_loss() -> None:
    scores = noise(300)
    n, there = len(scores.targets), scores.targets >= 0
    wanted = (scores.targets[there] == 1).double() * (1 - 2 / (n + 2)) + 1 / (n + 2)

    def loss(log_temperature: float) -> float:
        shares = (scores.logits[there].double() / math.exp(log_temperature)).sigmoid()
        return -(wanted * shares.log() + (1 - wanted) * (1 - shares).log()).mean().item()

    expected = math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x)
    assert lm.fit_temperature(scores) == pytest.approx(expected, rel=1e-4)
    assert lm.fit_temperature(noise(FEWEST - 1)) is None


@settings(deadline=None, max_examples=12)
@given(drawn())
def test_no_threshold_has_a_better_f1_on_the_same_images(scores: Scores) -> None:
    shares = lm.probabilities(scores.logits, None).numpy()
    for at, threshold in enumerate(lm.fit_thresholds(scores, None, "f1")):
        there = (scores.targets[:, at] >= 0).numpy()
        had, found = scores.targets[there, at].numpy() == 1, shares[there, at]
        if not had.any():
            assert threshold == 0.5
            continue
        every = [f1_score(had, found >= cut, zero_division=0) for cut in {*found.tolist()}]
        assert f1_score(had, found >= threshold, zero_division=0) == pytest.approx(max(every))


def test_a_precision_that_is_asked_for_is_kept_with_the_highest_recall() -> None:
    shares = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2])
    scores = Scores(
        shares.logit()[:, None].repeat(1, 3), torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]])
    )
    assert lm.fit_thresholds(scores, None, "precision>=0.9") == pytest.approx([0.75, 1.0, 0.85])
    assert lm.fit_thresholds(scores, None, "precision>=0.75") == pytest.approx([0.4, 1.0, 0.85])
    assert lm.fit_thresholds(scores, None, 0.3) == [0.3] * 3


def test_thresholds_and_temperature_make_the_figures_of_an_evaluation() -> None:
    scores = noise(200)
    temperature = lm.fit_temperature(scores)
    found = lm.measure(scores, ["a", "b", "c"], Calibration(temperature, [0.2, 0.5, 0.9]), None)
    said = lm.probabilities(scores.logits, temperature).numpy() >= [0.2, 0.5, 0.9]
    there = scores.targets[:, 0].numpy() >= 0
    assert found["per_class"][0]["f1"] == pytest.approx(f1_score(scores.targets[there, 0], said[there, 0]), **CLOSE)
    assert found["per_class"][2]["predicted"] == said[:, 2].sum()
    assert found["calibration"]["after"]["nll"] <= found["calibration"]["before"]["nll"]
    assert found["labels_per_image"]["predicted"] == pytest.approx(said.sum() / 200)


def test_pairs_are_a_label_that_was_missed_and_one_that_was_predicted_in_vain() -> None:
    targets = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, -1]])
    scores = Scores(torch.tensor([[-1.0, 2, -1], [-1, 2, -1], [-1, -1, 2]]), targets)
    found = lm.measure(scores, ["a", "b", "c"], None, "")["most_confused"]
    assert found == [{"label": "a", "predicted": "b", "count": 2}]
    assert lm.co_occurrence(torch.tensor([[1, 1, 0], [1, 0, -1]])).tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_what_is_not_finite_is_no_figure() -> None:
    with pytest.raises(RunError, match="not finite"):
        lm.measure(Scores(torch.tensor([[math.nan]]), torch.tensor([[1]])), ["a"], None, None)
