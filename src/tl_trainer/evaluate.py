"""The only evaluation pass, for tl-train's epochs and for tl-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tl_trainer.data.loaders import Batch
from tl_trainer.metrics import Scores


def evaluate(
    forward: Callable[[Tensor], Tensor], batches: Iterable[Batch], after_batch: Callable[[], None] = lambda: None
) -> Scores:
    """The scores of `forward` (inputs -> logits, in eval mode) over all batches; AssertionError where none."""
    parts = []
    for batch in batches:
        with torch.inference_mode():
            parts.append((forward(batch.inputs).float().cpu(), batch.targets.cpu()))
        after_batch()
    assert parts, "no batch to evaluate"
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))
