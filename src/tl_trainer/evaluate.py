"""The only evaluation pass, for tl-train's epochs and for tl-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tl_trainer.data.loaders import Batch
from tl_trainer.metrics import Accuracy, Figures


def evaluate(forward: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Figures:
    """The figures of `forward` (inputs -> logits, in eval mode) over all batches."""
    accuracy = Accuracy()
    with torch.inference_mode():
        for batch in batches:
            accuracy.update(forward(batch.inputs), batch.targets)
    return accuracy.compute()
