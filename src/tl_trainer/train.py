"""fit: the one loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tl_trainer.data.dataset import Split
from tl_trainer.data.loaders import Batch
from tl_trainer.errors import RunError, printable
from tl_trainer.metrics import Scores, figures
from tl_trainer.network import Feed
from tl_trainer.saver import Saver, State
from tl_trainer.tracking import Tracker, bar

NAMED = 3  # images of a batch whose loss is not finite


@dataclass
class Training:
    """What `fit` works with. `feed.forward` takes the inputs of `feed.batches`, images or features, to logits;
    `validate` calls what it is given after every batch, so that a long validation can be stopped too.
    """

    state: State
    feed: Feed
    validate: Callable[[Callable[[], None]], Scores]
    criterion: nn.Module
    device: torch.device
    epochs: int


def fit(training: Training, tracker: Tracker, saver: Saver) -> None:
    """Train from where the state stands to the last epoch, validating after each.

    Raises RunError as soon as a loss is not finite, and Interrupted after a signal, when everything is saved.
    """
    state, progress, steps = training.state, training.state.progress, len(training.feed.batches)
    while progress.epoch < training.epochs:
        name = f"epoch {progress.epoch + 1}/{training.epochs}"
        first_step = progress.epoch * steps
        started = time.perf_counter() - progress.seconds
        lr = state.schedule.set_rate(first_step + max(0, progress.batch - 1))
        state.classifier.train()
        batches = training.feed.batches.epoch(progress.epoch, training.device, progress.batch)
        for batch in bar(batches, name, steps, start=progress.batch):
            lr = state.schedule.set_rate(first_step + progress.batch)
            loss = training.criterion(training.feed.forward(batch.inputs), batch.targets)
            value = loss.item()
            if not math.isfinite(value):
                raise RunError(
                    f"the loss is {value} in {name}, batch {progress.batch + 1}/{steps} "
                    f"({_names(training.feed.split, batch)}); "
                    "lower the rate with --lr or set train.schedule.warmup_epochs"
                )
            state.optimizer.zero_grad(set_to_none=True)
            state.scaler.scale(loss).backward()
            state.scaler.step(state.optimizer)
            state.scaler.update()
            progress.batch += 1
            progress.loss += value * len(batch.targets)
            progress.images += len(batch.targets)
            progress.seconds = time.perf_counter() - started
            saver.tick()
        scores = training.validate(saver.tick)
        val = figures(scores)
        if not math.isfinite(val.loss):
            raise RunError(f"the validation loss is {val.loss} after {name}; lower the rate with --lr")
        state.schedule.epoch_ended(val.loss)
        loss_mean, images, seconds = progress.loss / progress.images, progress.images, progress.seconds
        improved = progress.epoch_ended(val)
        tracker.epoch(progress.epoch, training.epochs, loss_mean, val, lr, seconds, images)
        if improved:
            saver.improved(scores)
            tracker.improved(progress.epoch, scores)
    saver.finish()


def _names(split: Split, batch: Batch) -> str:
    """Some of a batch's images, for the person who has to look for the bad one."""
    shown = [printable(split.names[index]) for index in batch.indices[:NAMED].tolist()]
    more = len(batch.indices) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
