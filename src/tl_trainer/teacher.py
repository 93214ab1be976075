"""A teacher: a checkpoint whose logits a network learns from beside the labels.

Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015. The teacher sees each training image once,
as in evaluation: in its own preprocessing and without augmentation, whatever the student sees of the image.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import kl_div

from tl_trainer.assembly import Setup, restore
from tl_trainer.config.data import expand
from tl_trainer.config.schema import flat
from tl_trainer.runs import best_of

log = logging.getLogger(__name__)

# What the teacher computes with as the run does, and not as it was trained.
AS_THE_RUN = (
    "device", "data.max_megapixels", "data.workers", "features.cache", "features.dir", "features.limit_gb",
    "train.batch_size", "train.precision",
)  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """What the teacher says of the training images.

    logits: (images, classes) in the order of the split and of the student's classes, on the student's device.
    """

    logits: Tensor
    temperature: float
    alpha: float

    def __call__(self, hard: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
        """The loss of a batch: hard is that of its labels, logits (N, classes) are the student's, indices (N,) tell
        which images they are of."""
        said = self.logits[indices.to(self.logits.device)]
        student, teacher = ((given / self.temperature).log_softmax(dim=1) for given in (logits, said))
        soft = kl_div(student, teacher, reduction="batchmean", log_target=True)
        return self.alpha * self.temperature**2 * soft + (1 - self.alpha) * hard


def teacher_of(setup: Setup) -> Teacher | None:
    """The teacher of a run, whose frozen features are kept like all others; None where there is none."""
    config, split = setup.parts.config, setup.dataset.split("train")
    section = config.train.teacher
    if section.checkpoint is None:
        return None
    path = best_of(expand(section.checkpoint))
    parts = restore(path, [(key, value) for key, value in flat(config.model_dump()) if key in AS_THE_RUN])
    if smoothing := parts.config.train.loss.label_smoothing:  # Müller et al., When Does Label Smoothing Help?, 2019
        what = "%s learned with train.loss.label_smoothing: %g, which makes a worse teacher; train it with 0 to teach"
        log.warning(what, path, smoothing)
    parts.thaw("head")  # it learns nothing any more, so all of its backbone is frozen
    seen = replace(split, images=split.images.decoded(parts.decoding))
    feed = parts.feeds.evaluation(seen, "train for the teacher", parts.pipeline)
    try:
        logits = parts.scores(feed, "teacher").logits
    finally:
        feed.batches.close()
    columns = [parts.task.classes.index(name) for name in setup.parts.task.classes]
    logits = logits[:, columns].to(setup.parts.network.device)
    return Teacher(logits, section.temperature, section.alpha)
