"""The only evaluation pass, for tl-train's epochs and for tl-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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


def averaged(views: Sequence[Tensor]) -> Tensor:
    """The logits of several views of the same images, each (N, classes), as those of their mean probability."""
    if len(views) == 1:
        return views[0]
    # On the CPU, since an Apple GPU has no float64.
    return torch.stack([view.cpu().double().log_softmax(dim=1) for view in views]).logsumexp(dim=0).float()
