"""Prediction sets: against the sum written out, and how often they hold the label of images drawn from a known law."""

from __future__ import annotations

import pytest
import torch

from tl_trainer import conformal
from tl_trainer.conformal import FREE, PENALTY, label_scores, sets, threshold
from tl_trainer.errors import InputError
from tl_trainer.metrics import Scores


def drawn(images: int, classes: int, sureness: float) -> Scores:
    """Logits, and labels with the probabilities of `sureness` times these: 1 is calibrated, less is too sure."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, classes, generator=generator)
    return Scores(logits, torch.multinomial((sureness * logits).softmax(dim=1), 1, generator=generator)[:, 0])


def test_scores_and_sets_are_the_sum_written_out() -> None:
    scores = drawn(40, 9, 0.5)
    expected = []
    for row, target in zip((scores.logits.double() / 1.5).softmax(dim=1).tolist(), scores.targets, strict=True):
        ahead = [share for share in row if share > row[target]]
        expected.append(sum(ahead) + PENALTY * max(0, len(ahead) + 1 - FREE))
    kept = label_scores(scores, 1.5)
    assert kept is not None
    assert kept.tolist() == pytest.approx(sorted(expected))
    most = threshold(kept, 0.8)
    assert sum(score <= most + 1e-12 for score in expected) == 33  # the (40 + 1) * 0.8 th, rounded up
    found = sets(scores.logits, 1.5, most)
    inside = [int(target) in one for target, one in zip(scores.targets, found, strict=True)]
    assert inside == [score <= most + 1e-12 for score in expected]
    measured = conformal.measure(scores, 1.5, most)
    assert measured == {"coverage": 33 / 40, "mean_set_size": sum(map(len, found)) / 40}


@pytest.mark.parametrize("sureness", [1, 0.4])
def test_sets_from_one_half_hold_the_labels_of_the_other_as_often_as_promised(sureness: float) -> None:
    scores, shares, generator = drawn(1000, 8, sureness), [], torch.Generator().manual_seed(1)
    assert (scores.logits.argmax(dim=1) == scores.targets).double().mean() < 0.8
    for _ in range(100):
        halves = [
            Scores(*(part[half] for part in scores)) for half in torch.randperm(1000, generator=generator).chunk(2)
        ]
        most = threshold(label_scores(halves[0], None), 0.9)
        shares.append(conformal.measure(halves[1], None, most)["coverage"])
    assert sum(shares) / 100 == pytest.approx(0.9, abs=0.015)


def test_a_set_is_never_empty_and_holds_the_first_class() -> None:
    logits = torch.tensor([[9.0, 0, 0], [1, 1.1, 1]])
    most = threshold(label_scores(Scores(logits.repeat(20, 1), torch.tensor([0, 1] * 20)), None), 0.9)
    assert sets(logits, None, most) == [[0], [1]]


@pytest.mark.parametrize("coverage", [0.0, 1.0, 1.5, -1.0, float("nan")])
def test_what_is_no_share_is_refused(coverage: float) -> None:
    with pytest.raises(InputError, match=r"^--coverage \S+: give a share between 0 and 1, such as 0\.9$"):
        threshold(torch.zeros(99, dtype=torch.float64), coverage)


@pytest.mark.parametrize(("coverage", "needed"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1), (0.7, 3)])
def test_so_few_validation_images_promise_nothing(coverage: float, needed: int) -> None:
    scores = torch.arange(needed, dtype=torch.float64)
    assert threshold(scores, coverage) == needed - 1
    with pytest.raises(InputError, match=rf" needs {needed} validation images or more, and the run had {needed - 1}; "):
        threshold(scores[1:], coverage)


def test_what_a_checkpoint_lacks_is_said_with_the_remedy() -> None:
    with pytest.raises(
        InputError, match=r"its run has not ended \(go on with tl-train --resume\), or .* \(train again\)"
    ):
        threshold(None, 0.9)
    assert label_scores(Scores(torch.zeros(3, 2), torch.zeros(3, 2)), None) is None
