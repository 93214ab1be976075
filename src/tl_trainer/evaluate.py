"""The only evaluation pass, for tl-train's epochs and for tl-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tl_trainer.data.loaders import Batch
from tl_trainer.ground import distributed
from tl_trainer.metrics import Scores


def evaluate(
    forward: Callable[[Tensor], Tensor], batches: Iterable[Batch], after_batch: Callable[[], None] = lambda: None
) -> Scores:
    """The scores of `forward` (inputs -> logits, in eval mode) over all batches; AssertionError where none."""
    parts = [*_passed(forward, batches, after_batch)]
    assert parts, "no batch to evaluate"
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def evaluate_together(
    forward: Callable[[Tensor], Tensor], own: Iterable[Batch], count: int, after_batch: Callable[[], None]
) -> Scores:
    """The scores over `count` batches, on every rank, of which `own` are those from this one's number on, each
    world()-th.

    Logits are gathered, not sums of figures: the temperature and prediction sets need each image's, and so all figures
    are bit for bit those of one process. All ranks call `after_batch` equally often, for it may wait for the others.
    """
    world, parts = distributed.world(), [*_passed(forward, own, after_batch)]
    for _ in range(-(-count // world) - len(parts)):
        after_batch()
    of_rank = distributed.gathered(parts)
    ordered = [of_rank[number % world][number // world] for number in range(count)]
    return Scores(*(torch.cat(column) for column in zip(*ordered, strict=True)))


def _passed(
    forward: Callable[[Tensor], Tensor], batches: Iterable[Batch], after_batch: Callable[[], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets of each batch."""
    for batch in batches:
        with torch.inference_mode():
            passed = forward(batch.inputs).float().cpu(), batch.targets.cpu()
        yield passed
        after_batch()
