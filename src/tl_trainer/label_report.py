"""What a report shows of images with several labels, or heads: predictions.csv, mistakes, what comes together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tl_trainer.data.dataset import Split
from tl_trainer.ground.files import csv_text
from tl_trainer.ground.wording import printable
from tl_trainer.label_metrics import co_occurrence
from tl_trainer.metrics import Prediction, Scores
from tl_trainer.multilabel import NO_LABEL, MultiLabel
from tl_trainer.multitask import MultiTask
from tl_trainer.tasks import prediction_columns

MOST = 5  # labels in a row of predictions.csv, the most probable ones


class LabelPredictions:
    """The labels of each image and their probabilities, and which images have a wrong one, surest first."""

    def __init__(self, split: Split, task: MultiLabel | MultiTask, scores: Scores, calibration: Any) -> None:
        self.split, self.task, self.scores = split, task, scores
        self.page = "labels.html" if isinstance(task, MultiLabel) else "heads.html"
        self.said = task.said(scores.logits, calibration)
        self.most_probable = task.most_probable(scores.logits, calibration, MOST)
        self.wrong = [index for index in task.wrong(scores, calibration) if self._differences(index)]

    def _differences(self, index: int) -> list[int]:
        """The labels that are wrong, those that were missed first."""
        said, target = {one.index for one in self.said[index]}, self.split.targets[index]
        missed = [label for label, value in enumerate(target) if value == 1 and label not in said]
        return missed + [label for label in sorted(said) if target[label] == 0]

    def shown_for(self, index: int) -> int:
        """The label whose evidence a picture of the image shows: one that was predicted in vain, else the first."""
        in_vain = [one.index for one in self.said[index] if self.split.targets[index][one.index] == 0]
        return (in_vain or [self.most_probable[index][0].index])[0]

    def of_pair(self, label: int, predicted: int) -> Iterator[int]:
        """The images for which a label was missed and another one predicted in vain."""
        for index in self.wrong:
            if {label, predicted} <= {*self._differences(index)} and self.split.targets[index][label] == 1:
                yield index

    def tables(self) -> dict[str, str]:
        """CSV files by name: a row per image, and how many images have two labels."""
        names, classes = self.columns(), self.task.classes
        counts = co_occurrence(self.scores.targets).tolist()
        together = ([name, *row] for name, row in zip(classes, counts, strict=True))
        return {
            "predictions.csv": csv_text(names, self.rows()),
            "co_occurrence.csv": csv_text(["label", *classes], together),
        }

    def columns(self) -> list[str]:
        """The header of predictions.csv, as that of tl-predict --format csv."""
        return [*prediction_columns(min(MOST, len(self.task.classes))), "labels"]

    def rows(self) -> Iterator[list[Any]]:
        """The rows of predictions.csv, in the split's order; labels are lists, since a name may have commas."""
        classes = self.task.classes
        for index, (name, target) in enumerate(zip(self.split.names, self.split.targets, strict=True)):
            there = [label for label, value in zip(classes, target, strict=True) if value == 1]
            guesses = [cell for one in self.most_probable[index] for cell in (one.label, one.probability)]
            yield [name, _listed(there), *guesses, "", _listed([one.label for one in self.said[index]])]

    def caption(self, index: int) -> dict[str, str]:
        """What is written below an example."""
        said: Sequence[Prediction] = self.said[index]
        predicted = ", ".join(one.label for one in said) or NO_LABEL
        return {
            "path": printable(self.split.name(index)),
            "label": printable(self.task.caption(self.split.targets[index])),
            "predicted": printable(predicted),
            "probability": ", ".join(f"{one.probability:.1%}" for one in said or self.most_probable[index][:1]),
        }


def _listed(names: list[str]) -> str:
    return json.dumps(names, ensure_ascii=False)
