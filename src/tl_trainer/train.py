"""fit: the one loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn, optim

from tl_trainer.data.loaders import Batch
from tl_trainer.errors import RunError
from tl_trainer.metrics import Figures
from tl_trainer.models.classifier import Classifier
from tl_trainer.optim import Schedule
from tl_trainer.tracking import Tracker, bar


class Batches(Protocol):
    """Training batches, whether of images or of cached features."""

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, device: torch.device, start: int = 0) -> Iterator[Batch]: ...


class Saver(Protocol):
    """Who writes last.pth and best.pth, and who knows that a signal wants the run to end."""

    def improved(self, figures: Figures) -> None: ...
    def tick(self) -> None: ...
    def stop_if_asked(self) -> None: ...


@dataclass
class Progress:
    """How far a run has come; together with weights, optimizer and random state it is all that a resume needs."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done of the epoch that is under way, their summed loss, images and seconds
    loss: float = 0.0
    images: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best: dict[str, Any] | None = None

    def better(self, figures: Figures) -> bool:
        """Whether these validation figures beat the best: higher top-1, and among equals the lower loss."""
        return self.best is None or (figures.top1, -figures.loss) > (self.best["top1"], -self.best["loss"])

    def epoch_ended(self, figures: Figures) -> None:
        """Count the epoch, and keep its figures where they are the best."""
        self.epoch, self.batch, self.loss, self.images, self.seconds = self.epoch + 1, 0, 0.0, 0, 0.0
        if self.better(figures):
            self.best_epoch, self.best = self.epoch, asdict(figures)


@dataclass
class Training:
    """What `fit` works with. `forward` takes a batch's inputs, images or features, to logits."""

    classifier: Classifier
    forward: Callable[[Tensor], Tensor]
    batches: Batches
    validate: Callable[[], Figures]
    criterion: nn.Module
    optimizer: optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    device: torch.device
    epochs: int


def fit(training: Training, progress: Progress, tracker: Tracker, saver: Saver) -> None:
    """Train from where `progress` stands to the last epoch, validating after each.

    Raises RunError as soon as a loss is not finite, and what `saver.stop_if_asked` raises after a signal.
    """
    t, steps = training, len(training.batches)
    while progress.epoch < t.epochs:
        epoch, description = progress.epoch, f"epoch {progress.epoch + 1}/{t.epochs}"
        t.classifier.train()
        started = time.perf_counter() - progress.seconds
        lr = t.schedule.set_rate(epoch * steps)
        for batch in bar(t.batches.epoch(epoch, t.device, progress.batch), description, steps, start=progress.batch):
            lr = t.schedule.set_rate(epoch * steps + progress.batch)
            loss = t.criterion(t.forward(batch.inputs), batch.targets)
            value = loss.item()
            if not torch.isfinite(loss):
                raise RunError(f"the loss is {value} in {description}, batch {progress.batch + 1}/{steps}; lower the "
                               "learning rate (--lr), add schedule.warmup_epochs, or use --debug")  # fmt: skip
            t.optimizer.zero_grad(set_to_none=True)
            t.scaler.scale(loss).backward()
            t.scaler.step(t.optimizer)
            t.scaler.update()
            progress.batch += 1
            progress.loss += value * len(batch.targets)
            progress.images += len(batch.targets)
            progress.seconds = time.perf_counter() - started
            saver.stop_if_asked()
        saver.tick()
        figures = t.validate()
        saver.stop_if_asked()
        t.schedule.epoch_ended(figures.loss)
        mean_loss, images, seconds = progress.loss / progress.images, progress.images, progress.seconds
        if progress.better(figures):
            saver.improved(figures)
        progress.epoch_ended(figures)
        tracker.epoch(progress.epoch, t.epochs, mean_loss, figures, lr, seconds, images)
        saver.tick()
