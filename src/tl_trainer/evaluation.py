"""A checkpoint on a split: its scores, and the figures that may be told of them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from tl_trainer import conformal
from tl_trainer.assembly import Parts, memory_of, with_val
from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.data import DataSection, expand
from tl_trainer.data.dataset import Dataset, Split, name_hashes
from tl_trainer.data.duplicates import across, unrepeated
from tl_trainer.data.overview import name_absent
from tl_trainer.data.sources import open_dataset
from tl_trainer.data.transforms import tta_pipelines
from tl_trainer.data.verify import remembered, verified
from tl_trainer.errors import DataError, InputError
from tl_trainer.ground.wording import listed, printable
from tl_trainer.metrics import Scores
from tl_trainer.multitask import MultiTask
from tl_trainer.plots import png
from tl_trainer.tasks import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a checkpoint on a split.

    what: the split's name. data: where its images are. tta: the test-time augmentation, if any.
    duplicates: what is said of exact copies. coverage: that of the sets that are measured, if any.
    """

    what: str
    data: str
    split: Split
    scores: Scores
    checkpoint: Checkpoint
    task: Task
    tta: str | None = None
    duplicates: Sequence[str] = ()
    coverage: float | None = None

    @cached_property
    def measured(self) -> dict[str, Any]:
        """All figures as plain data."""
        origin = {"split": self.what, "data": self.data, "tta": self.tta}
        measured = {**origin, **self.task.measure(self.scores, self.checkpoint.calibration, self.withheld)}
        return measured if self.coverage is None else {**measured, "sets": self._sets(self.coverage)}

    def _sets(self, coverage: float) -> dict[str, float]:
        """How often sets of classes hold the label, and how large they are."""
        saved = self.checkpoint
        found = conformal.measure(self.scores, saved.calibration, conformal.threshold(saved.conformal, coverage))
        return {"asked": coverage, **found}

    @cached_property
    def withheld(self) -> str | None:
        """Why the figures with the temperature are not told; None where they are."""
        shared = len(set(self.split.contents) & set(self.checkpoint.val_images))
        if self.checkpoint.temperature is None:
            why = "it is a last.pth, its run has not ended, or its validation images were too few"
            return f"this checkpoint has no temperature: {why}"
        if shared:
            return f"the temperature was fitted on {shared} of these images, so its effect must be measured on others"
        if self.what == "train":
            return "the network was trained on these images, so its probabilities are surer here than on others"
        return None

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """The pictures of the figures: PNG files by name."""
        calibration = self.checkpoint.calibration if self.withheld is None else None
        return {name: png(figure) for name, figure in self.task.pictures(self.scores, calibration)}

    @property
    def headline(self) -> dict[str, Any]:
        """The figures without those that take a row per class."""
        return {key: value for key, value in self.measured.items() if key != "per_class"}


def evaluate_checkpoint(
    parts: Parts,
    what: str | None = None,
    tta: str | None = None,
    *,
    ignore_extra: bool = False,
    coverage: float | None = None,
) -> Evaluation:
    """The evaluation of a restored classifier on a split of the configured dataset.

    what: the split; None takes test where there is one, else val, and all of a folder without splits, unless the run
    drew its val split from it. tta: as `data.transforms.tta_pipelines`. ignore_extra: whether images of other classes
    than the checkpoint's are left out, instead of being an error. Classes that the split lacks are named. coverage: how
    often sets of classes are to hold the label.
    """
    saved, config = parts.saved, parts.config
    assert saved is not None
    if coverage is not None:
        require_one_label(parts.task)
        conformal.threshold(saved.conformal, coverage)  # which may refuse, before any image is read
        if tta is not None:
            raise InputError(f"--coverage was calibrated without --tta; leave --tta {tta} out")
    pipelines = tta_pipelines(saved.preprocessing, tta)
    dataset = open_dataset(config.data, saved.classes, parts.decoding, "any" if ignore_extra else "fewer")
    what = what or _default_split(dataset, saved.val_split)
    if what in ("train", "val") and saved.val_split is not None:
        dataset = with_val(config, dataset, parts.task, saved)
    if what != "val" or saved.val_split is None:  # of a val split that was drawn only what was used is evaluated
        _say_what_was_left_out(config.data, saved)
    _leave_out_unwritable_cache(parts)
    if not (split := dataset.split(what)):
        raise DataError(
            f"{dataset.where}: nothing to evaluate: no image of the checkpoint's classes ({listed(saved.classes)})"
        )
    memory = memory_of(config)
    split = verified(split, what, config.data, memory)
    kept, duplicates = unrepeated({what: split}, config.data)
    split = kept[what]
    if what != "train" and "train" in dataset.splits and (train := remembered(dataset.splits["train"], memory)):
        learned = [sentence for sentence, _, _ in across({"train": train, what: split})]
        duplicates = [*duplicates, *learned]
        for sentence in learned:
            log.warning("%s; the network was trained on these, so the figures are too good", sentence)
    place = dataset.where if what == "all" else f"the {what} split of {dataset.where}"
    name_absent(saved.classes, split, place, parts.task.of_absent)
    names = [f"{what} (view {number} of {len(pipelines)})" if tta else what for number, _ in enumerate(pipelines, 1)]
    feeds = ((parts.feeds.evaluation(split, name, view), name) for name, view in zip(names, pipelines, strict=True))
    views: Sequence[Scores] = [parts.scores(feed, name) for feed, name in feeds]
    _say_what_was_seen(parts, split, coverage)
    scores = Scores(parts.task.averaged([view.logits for view in views]), views[0].targets)
    return Evaluation(what, dataset.where, split, scores, saved, parts.task, tta, duplicates, coverage)


def _say_what_was_seen(parts: Parts, split: Split, coverage: float | None) -> None:
    """Say which figures are too good, since something was fitted on images of the split."""
    saved, config = parts.saved, parts.config
    assert saved is not None
    seen = len(set(split.contents) & set(saved.val_images))
    if not seen:
        return
    on = "these images" if seen == len(split) else f"{seen} of these images"
    if config.train.refit:
        log.warning(
            "the head was solved on %s too (train.refit), so the figures are too good; what it gives on images it has "
            "not seen is in the run's result.json, or evaluate it on a test split",
            on,
        )
    if coverage is not None:
        log.warning(
            "the sets were calibrated on %s, so they keep the promise there; measure coverage on a test split or with "
            "--data-dir",
            on,
        )
    tasks = [head.task for head in parts.task.heads] if isinstance(parts.task, MultiTask) else [parts.task]
    if any(task.kind == "multilabel" for task in tasks):
        log.warning(
            "the thresholds were chosen on %s, so precision, recall and F1 are slightly too good; mean average "
            "precision takes no threshold",
            on,
        )


def require_one_label(task: Task) -> None:
    """Raise InputError for sets of classes, one of which is right, where an image may have several labels."""
    if task.kind != "single":
        raise InputError(
            "--coverage makes sets of classes of which one is right, and here an image may have several; leave it out: "
            "the labels of an image are those above their threshold"
        )


def _say_what_was_left_out(data: DataSection, saved: Checkpoint) -> None:
    """Say that training left images out of this data, and how again; a checkpoint's word opens no file."""
    trained = saved.config.get("data") or {}
    skip, root = trained.get("skip"), trained.get("root")
    if skip is not None and data.skip is None and isinstance(root, str) and expand(root) == expand(data.root):
        log.warning(
            "training left some images of this data out, and this evaluation does not; should they be in this split, "
            "leave them out too: data.skip=%s",
            printable(shlex.quote(str(skip))),
        )


def _default_split(dataset: Dataset, drawn: Tensor | None) -> str:
    if "test" in dataset.splits or "all" not in dataset.splits:
        return "test" if "test" in dataset.splits else "val"
    return "val" if drawn is not None and {*drawn.tolist()} <= {*name_hashes(dataset.splits["all"].names)} else "all"


def _leave_out_unwritable_cache(parts: Parts) -> None:
    if parts.feeds.extractor is not None:
        try:
            parts.feeds.extractor.make_folder()
        except InputError as error:
            log.warning("%s; going on without the cache", error)
            parts.feeds.extractor = None
