"""fit: the one loop, and the step that turns a batch into an update."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn, optim

from tl_trainer.config.training import StopSection
from tl_trainer.data.dataset import Split
from tl_trainer.data.loaders import Batch, seed_of
from tl_trainer.data.transforms import seeded
from tl_trainer.errors import RunError
from tl_trainer.feeds import Feed, Forward
from tl_trainer.ground import distributed
from tl_trainer.ground.progress import bar
from tl_trainer.ground.wording import listed
from tl_trainer.metrics import Figures, Scores
from tl_trainer.models.synced import counting
from tl_trainer.optim import Average, weights_of
from tl_trainer.saver import REMEDY, EpochDone, Saver, State
from tl_trainer.tasks import Task
from tl_trainer.tracking import Tracker

log = logging.getLogger(__name__)

# Times the loss of guessing: a healthy run may be above the first while it falls, but does not end above the second.
ABSURD, HOPELESS = 20, 100
NAMED = 3  # images of a batch whose loss is not finite


@dataclass(frozen=True)
class Gather:
    """Says when gradients become an update: after every `accumulate` batches, and at the end of an epoch."""

    state: State
    batches: int  # of an epoch
    accumulate: int

    def __call__(self, images: int) -> int | None:
        """Count the images of a batch; how many the update is of, None where more batches come first."""
        progress = self.state.progress
        progress.gathered += images
        done = progress.batch + 1
        if done % self.accumulate and done < self.batches:
            return None
        gathered, progress.gathered = progress.gathered, 0
        return gathered


# (the loss of a batch's labels, its logits (N, classes), its images (N,)) -> the loss
Teach = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mix:
    """Mixes the images of a batch: mixup (Zhang et al., ICLR 2018), CutMix (Yun et al., ICCV 2019).

    What is drawn follows from the seed, the epoch and the batch alone; ways: torchvision's transforms, of which each
    batch draws one.
    """

    ways: Sequence[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]
    state: State
    seed: int

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The inputs, each a mean of two, and the targets (N, classes), each with the sum 1."""
        progress, inputs = self.state.progress, batch.inputs
        images = inputs if inputs.ndim == 4 else inputs.reshape(len(inputs), -1, 1, 1)  # features are no images
        with seeded(~seed_of(self.seed, progress.epoch, progress.batch)):  # no image has a negative seed
            mixed, targets = self.ways[int(torch.randint(len(self.ways), ()))](images, batch.targets)
        return mixed.reshape(inputs.shape), targets


@dataclass(frozen=True)
class Divided:
    """Makes the losses of the parts of a batch, one for each rank, those of the whole batch.

    targets: of the split, on the processor. What is drawn, as by dropout, follows from seed, epoch, batch and rank.
    """

    targets: Tensor
    state: State
    seed: int

    @contextlib.contextmanager
    def drawing(self, batch: Batch) -> Iterator[None]:
        """Within the block the ranks draw different numbers, and BatchNorm counts no stand-in."""
        progress = self.state.progress
        seed = seed_of(seed_of(self.seed, progress.epoch, progress.batch) % 2**31, distributed.rank(), 0) % 2**63
        if batch.inputs.is_cuda:
            torch.cuda.manual_seed(seed)
        with seeded(seed), counting(batch.share > 0):
            yield

    def levelled(self, loss: Tensor, criterion: nn.Module, batch: Batch) -> Tensor:
        """The part's loss, made so that the sum of all parts is the loss of the whole batch.

        A loss with weights of the classes divides by the weights of its images, not by their number.
        """
        parts = batch.indices, torch.tensor(batch.whole)
        own, whole = (weight_of(criterion, self.targets[rows]) / len(rows) for rows in parts)
        return loss * (own / whole) * batch.share

    def total(self, loss: float) -> float:
        """The loss of the whole batch from that of each part."""
        return float(distributed.summed(torch.tensor(loss, dtype=torch.float64)))


def weight_of(criterion: nn.Module, targets: Tensor) -> float:
    """What the mean of a loss divides by: the weights of the labels, or how many there are."""
    weights = criterion.weight
    return float(weights.cpu()[targets].sum()) if isinstance(weights, Tensor) else float(len(targets))


@dataclass(frozen=True)
class Step:
    """A batch -> an update of the weights.

    What else a step may do is a line or a small function here; the loop knows none of it. clip_norm: as
    `train.clip_norm`. gather: None where every batch is an update. average, mix, teach: None where there is no average,
    no mixing and no teacher, divided where one process has whole batches.
    """

    forward: Forward
    criterion: nn.Module
    optimizer: optim.Optimizer
    scaler: torch.amp.GradScaler
    clip_norm: float | None = None
    gather: Gather | None = None
    average: Average | None = None
    mix: Mix | None = None
    teach: Teach | None = None
    divided: Divided | None = None

    def __call__(self, batch: Batch) -> float:
        """The batch's mean loss before the update. One that is not finite updates nothing, except on CUDA.

        There the update is launched before the loss is known, so that the GPU does not wait for the processor.
        """
        with contextlib.nullcontext() if self.divided is None else self.divided.drawing(batch):
            loss = self.loss(batch)
        if loss.device.type == "cuda":
            value = _underway(loss)
            self._learn(loss, batch.images)
            return self._whole(value())
        found = self._whole(loss.item())
        if math.isfinite(found):
            self._learn(loss, batch.images)
        return found

    def _whole(self, loss: float) -> float:
        """The loss of the whole batch."""
        return loss if self.divided is None else self.divided.total(loss)

    def _learn(self, loss: Tensor, images: int) -> None:
        """Add the gradient of the batch's mean loss, and update the weights unless more batches are to come first."""
        loss = self.scaler.scale(loss if self.gather is None else loss * images)
        if self.divided is not None:
            loss = loss * distributed.world()  # DistributedDataParallel takes the mean of what is to be summed
        loss.backward()  # type: ignore[no-untyped-call]
        if self.gather is None:
            self._update(1)
        elif (gathered := self.gather(images)) is not None:
            self._update(gathered)

    def _update(self, gathered: int) -> None:
        """Update the weights with the gradients divided by `gathered`."""
        if gathered != 1 or self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            weights = weights_of(self.optimizer)
            for weight in weights if gathered != 1 else ():
                if weight.grad is not None:
                    weight.grad /= gathered
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(weights, self.clip_norm)
        scale = 0.0 if self.average is None else self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None and self.scaler.get_scale() >= scale:  # else fp16 overflowed: no step
            self.average.update()

    def loss(self, batch: Batch) -> Tensor:
        """The batch's mean loss, a scalar with its graph."""
        inputs, targets = (batch.inputs, batch.targets) if self.mix is None else self.mix(batch)
        logits = self.forward(inputs)
        loss: Tensor = self.criterion(logits, targets)
        if self.divided is not None:  # and there is no teacher
            return self.divided.levelled(loss, self.criterion, batch)
        return loss if self.teach is None else self.teach(loss, logits, batch.indices)


def _underway(loss: Tensor) -> Callable[[], float]:
    """Begin to copy the loss from the GPU; the call waits for this copy alone, not for what was launched since."""
    here = torch.empty((), dtype=loss.dtype, pin_memory=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    here.copy_(loss.detach(), non_blocking=True)
    arrived.record(torch.cuda.current_stream(loss.device))

    def value() -> float:
        arrived.synchronize()
        return here.item()

    return value


@dataclass(frozen=True)
class Training:
    """What `fit` works with. `validate` gives the scores of the validation split.

    `until` is the last epoch of this phase, `epochs` of the run; `stop` may end the phase before. `pause` is called
    after every batch of training and validation: a run may save there, or be ended by an exception.
    """

    task: Task
    state: State
    feed: Feed
    step: Step
    validate: Callable[[Callable[[], None]], Scores]
    pause: Callable[[], None]
    device: torch.device
    until: int
    epochs: int
    stop: StopSection = field(default_factory=StopSection)


def fit(training: Training, tracker: Tracker, saver: Saver) -> None:
    """Train from where the state stands to the end of its phase, validating after each epoch.

    Raises RunError as soon as a loss is not finite, or absurd without falling, and whatever `pause` raises.
    """
    before = math.inf
    state, progress, steps = training.state, training.state.progress, len(training.feed.batches)
    while progress.epoch < training.until:
        name = f"epoch {progress.epoch + 1}/{training.epochs}"
        first_step = (progress.epoch - state.begun) * steps
        started = time.perf_counter() - progress.seconds
        lr = state.schedule.set_rate(first_step + max(0, progress.batch - 1))
        state.classifier.train()
        batches = training.feed.batches.epoch(progress.epoch, training.device, progress.batch)
        for batch in bar(batches, name, steps, start=progress.batch):
            lr = state.schedule.set_rate(first_step + progress.batch)
            loss = training.step(batch)
            if not math.isfinite(loss):
                images = _names(training.feed.split, batch)
                raise RunError(f"the loss is {loss} in {name}, batch {progress.batch + 1}/{steps} ({images}); {REMEDY}")
            progress.batch_ended(loss, batch.images, time.perf_counter() - started)
            training.pause()
        scores = training.validate(training.pause)
        val = training.task.figures(scores)
        if not math.isfinite(val["loss"]):
            raise RunError(f"the validation loss is {val['loss']} after {name}; lower the rate with --lr")
        done = progress.epoch_ended(val, training.task.better)
        state.schedule.epoch_ended(done.waited)
        tracker.epoch(done, val, lr)
        if state.soup is not None:
            state.soup.epoch_ended(progress.epoch, val, state.weights(), training.task.better)
        stops = _stops(training, val)
        before = _loss_of(training, done, val["loss"], before)
        if done.improved:
            saver.improved(scores)
            tracker.improved(progress.epoch, scores)
        if stops:
            break
    saver.finish()


def _stops(training: Training, val: Figures) -> bool:
    """Count an epoch with these figures; whether `train.stop` ends the phase with it, which is said."""
    stop, progress = training.stop, training.state.progress
    if stop.metric is None:
        return False
    better = partial(training.task.better, by=stop.metric, least=stop.min_delta)
    waited, left = progress.of_stop.epoch_ended(val, better), training.until - progress.epoch
    if waited < stop.patience or not left:
        return False
    progress.skipped += left
    log.info("stopped after epoch %d: %s was no better for %d epochs (train.stop)", progress.epoch, stop.metric, waited)
    return True


def _loss_of(training: Training, done: EpochDone, val_loss: float, before: float) -> float:
    """The lower of the epoch's two losses; RunError where it is absurd and not below that of the epoch before, or of
    the last epoch hopeless.

    Only the validation loss of a network that overfits grows so large, only the training loss of one that settles in
    its first epoch.
    """
    loss, guessing = min(done.train_loss, val_loss), training.task.guessing_loss
    ended = training.state.progress.passed == training.epochs and loss > HOPELESS * guessing
    if ended or (loss > ABSURD * guessing and loss >= before):
        raise RunError(
            f"after epoch {done.epoch}/{training.epochs} the training loss is {done.train_loss:,.4g} and the "
            f"validation loss {val_loss:,.4g}, where guessing gives {guessing:.2g}; {REMEDY}"
        )
    return loss


def _names(split: Split, batch: Batch) -> str:
    """Some of a batch's images, for the person who has to look for the bad one."""
    return listed([split.name(index) for index in batch.whole or batch.indices.tolist()], NAMED)
