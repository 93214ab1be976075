"""What a label is, and all that follows from it: the loss, the figures, which of two results is better, the rows.

`SingleLabel`, `MultiLabel` and `MultiTask` have the same methods, and `Task` is their union. The loop, the batches, the
saving and the commands know nothing of labels.
"""

from __future__ import annotations

from collections.abc import Sequence

from tl_trainer.config.training import TrainSection
from tl_trainer.multilabel import MultiLabel
from tl_trainer.multitask import MultiTask, multitask
from tl_trainer.single_label import SingleLabel

Task = SingleLabel | MultiLabel | MultiTask


def prediction_columns(count: int) -> list[str]:
    """The header of a table of images with so many classes each, as tl-predict and the report write it."""
    more = [f"{name}_{rank}" for rank in range(2, count + 1) for name in ("class", "probability")]
    return ["path", "label", "predicted", "probability", *more, "error"]


def task_of(kind: str, section: TrainSection, classes: Sequence[str]) -> Task:
    """The task of a run with these classes; kind: as `data.task`."""
    if kind == "multitask":
        return multitask(section, classes)
    if kind == "multilabel":
        return MultiLabel(classes, section.best, section.stop.metric, section.thresholds)
    return SingleLabel(classes, section.best, section.stop.metric)
