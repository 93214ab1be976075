"""How far a run has come, and how that survives: last.pth, best.pth."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator
from torch import Tensor, optim

from tl_trainer import conformal
from tl_trainer.checkpoint import Calibration, Checkpoint, save
from tl_trainer.errors import RunError
from tl_trainer.ground import distributed
from tl_trainer.ground.files import keep_previous
from tl_trainer.ground.wording import shown
from tl_trainer.metrics import Figures, Scores
from tl_trainer.models.classifier import Classifier
from tl_trainer.optim import Average, Schedule, Soup, weights_of

log = logging.getLogger(__name__)

# An epoch on cached features takes milliseconds, a save with its fsync more. A run that is killed in between resumes
# from the last save and arrives at the same weights.
SECONDS_BETWEEN_SAVES = 5.0
REMEDY = "lower the rate with --lr or set train.schedule.warmup_epochs"


class EpochDone(NamedTuple):
    """An epoch that has ended, counted from 1: mean training loss, seconds and images without validation."""

    epoch: int
    train_loss: float
    seconds: float
    images: int
    improved: bool
    waited: int = 0  # epochs of the phase since its best one


class Wait(BaseModel):
    """The best figures of a phase so far by some comparison, and how many epochs have ended since."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    best: dict[str, int | float] | None = None
    epochs: NonNegativeInt = 0

    def epoch_ended(self, figures: Figures, better: Callable[[Figures, Figures], bool]) -> int:
        """Count an epoch; how many have ended since the best one, 0 where it is this."""
        if self.best is None or better(figures, self.best):
            self.best, self.epochs = figures, 0
        else:
            self.epochs += 1
        return self.epochs


class Progress(BaseModel):
    """Where a run stands; with the weights, the optimizer and the random state it is all that a resume needs."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    epoch: NonNegativeInt = 0  # epochs completed
    batch: NonNegativeInt = 0  # of the epoch under way: batches done, their summed loss, images and seconds
    loss: float = 0.0
    images: NonNegativeInt = 0
    seconds: float = 0.0
    gathered: NonNegativeInt = 0  # images whose gradients wait for the update that they are part of
    best_epoch: NonNegativeInt = 0
    best: dict[str, int | float] | None = None
    skipped: NonNegativeInt = 0  # epochs that `train.stop` has left out
    of_best: Wait = Field(default_factory=Wait)  # of this phase, by `train.best` and by `train.stop`
    of_stop: Wait = Field(default_factory=Wait)
    soup: list[NonNegativeInt] | None = None  # the epochs of whose weights best.pth is the mean
    # Of a head that was found: `model.head.normalise` as it was configured; the checkpoint's own says what was found.
    found: Literal["auto", "none", "l2"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Progress:
        if self.best_epoch > self.epoch or (self.epoch == 0) != (self.best is None):
            raise ValueError("the best epoch is none of those that were completed")
        if (self.batch == 0) != (self.images == 0):
            raise ValueError("batches without images")
        return self

    def batch_ended(self, loss: float, images: int, seconds: float) -> None:
        """Count a batch with this mean loss; `seconds` is what the epoch has taken so far."""
        self.batch += 1
        self.loss += loss * images
        self.images += images
        self.seconds = seconds

    def epoch_ended(self, figures: Figures, better: Callable[[Figures, Figures], bool]) -> EpochDone:
        """Count the epoch, and remember its figures where they are better than the best so far."""
        mean, images, seconds = self.loss / max(1, self.images), self.images, self.seconds
        self.epoch, self.batch, self.loss, self.images, self.seconds = self.epoch + 1, 0, 0.0, 0, 0.0
        improved = self.best is None or better(figures, self.best)
        if improved:
            self.best_epoch, self.best, self.soup = self.epoch, figures, None
        return EpochDone(self.epoch, mean, seconds, images, improved, self.of_best.epoch_ended(figures, better))

    def phase_begins(self) -> None:
        """Forget what the phase before has waited for."""
        self.of_best, self.of_stop = Wait(), Wait()

    def take_soup(self, epochs: list[int], figures: Figures) -> None:
        """Have the mean of the weights of these epochs, with its figures, be the best, as if of the last epoch."""
        self.best_epoch, self.best, self.soup = self.epoch, figures, epochs

    def head_found(self, normalise: Literal["auto", "none", "l2"], epochs: int, figures: Figures) -> None:
        """Count all epochs as done: the head was found without any."""
        self.found, self.epoch, self.best_epoch, self.best = normalise, epochs, epochs, figures

    @property
    def passed(self) -> int:
        """The epochs of the plan that lie behind the run, whether they were trained or left out."""
        return self.epoch + self.skipped

    @property
    def begun(self) -> bool:
        """Whether a head has been trained, if only for a batch."""
        return self.found is None and (self.epoch, self.batch) != (0, 0)


@dataclass
class State:
    """The objects that change while a run trains. begun: the epochs before this phase of it."""

    classifier: Classifier
    optimizer: optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    progress: Progress
    begun: int = 0
    average: Average | None = None
    soup: Soup | None = None

    def weights(self) -> dict[str, Tensor]:
        """The weights that the epoch's figures are of: those that train, or their average."""
        return self.average.tensors if self.average and self.average.better else self.classifier.trained_state()

    def resume_data(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        random_state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self._device)
        return {
            "progress": self.progress.model_dump(),
            "optimizer": self.optimizer.state_dict(),
            "gradients": [w.grad for w in weights_of(self.optimizer)] if self.progress.gathered else [],
            "plateau": {"factor": self.schedule.plateau},
            "scaler": self.scaler.state_dict(),
            **({"average": [self.average.updates, self.average.tensors]} if self.average else {}),
            **({"soup": [list(of) for of in self.soup.kept]} if self.soup else {}),
            "random": random_state,
        }

    def restore(self, trained: dict[str, Tensor], resume: dict[str, Any]) -> None:
        """The reverse of `resume_data`, bit for bit. Raises whatever torch raises for what does not fit.

        At the end of a phase only weights and progress are taken: another optimizer begins.
        """
        self.classifier.load_trained_state(trained)
        if self.average:
            self.average.restart()
        self.progress = Progress.model_validate(resume["progress"])
        if 0 < self.begun == self.progress.epoch and not self.progress.batch:
            self.progress.phase_begins()
            return
        self.optimizer.load_state_dict(resume["optimizer"])
        for weight, kept in self.optimizer.state.items():  # which torch would only find out in its first step
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != weight.shape:
                    raise ValueError(
                        f"the optimizer's {name} is {tuple(value.shape)}, its weight {tuple(weight.shape)}"
                    )
        factor = resume["plateau"]["factor"]
        if not isinstance(factor, float) or not 0 <= factor <= 1:
            raise ValueError(f"the schedule's factor is {shown(factor)}")
        self.schedule.plateau = factor
        self.scaler.load_state_dict(resume["scaler"])
        if self.average:
            self.average.restore(*resume["average"])
        if self.soup:
            epochs = range(self.begun + 1, self.progress.epoch + 1)
            self.soup.restore(resume["soup"], epochs, self.classifier.trained_state())
        if self.progress.gathered:
            for weight, gradient in zip(weights_of(self.optimizer), resume["gradients"], strict=True):
                weight.grad = None if gradient is None else gradient.to(weight.device)
        torch.set_rng_state(resume["random"]["cpu"])
        if "cuda" in resume["random"] and self._device.type == "cuda":
            torch.cuda.set_rng_state(resume["random"]["cuda"], self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.classifier.parameters()).device


class Saver:
    """Writes last.pth and best.pth into the run directory.

    template: what stays the same in every checkpoint. learned: what tells from others what the run learns from, such as
    its training images. calibrate: gives the temperature for best.pth, and the thresholds of several labels, from the
    validation scores.
    """

    def __init__(
        self,
        run_dir: Path,
        template: Checkpoint,
        state: State,
        learned: Mapping[str, str] = MappingProxyType({}),
        calibrate: Callable[[Scores], float | Calibration | None] = lambda _: None,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir = run_dir
        self.template = template
        self.state = state
        self.best: Checkpoint | None = None
        self.best_scores: Scores | None = None  # of the validation split; None where an earlier session had the best
        self._best_on_disk = False
        self.learned = learned
        self.calibrate = calibrate
        self.flush = flush  # for the logs: an epoch that last.pth counts is not logged again
        self._saved_at = time.monotonic()
        self._pause = SECONDS_BETWEEN_SAVES

    def save_if_due(self) -> None:
        """Save where the last time is long ago."""
        if time.monotonic() - self._saved_at > self._pause:
            self.save()

    def improved(self, scores: Scores, weights: dict[str, Tensor] | None = None) -> None:
        """Keep weights for best.pth, those of the epoch unless others are given, and the scores for its temperature."""
        progress = self.state.progress
        chosen = self.state.weights() if weights is None else weights
        trained = {key: value.detach().cpu().clone() for key, value in chosen.items()}
        self.best = replace(self.template, trained=trained, epoch=progress.epoch, metrics=progress.best)
        self.best_scores = scores
        self._best_on_disk = False

    def adopt(self, best: Checkpoint | None) -> None:
        """Take over the best.pth of the run that is resumed."""
        self.best = best
        self._best_on_disk = best is not None
        if best is not None and best.epoch > self.state.progress.epoch:
            log.info(
                "best.pth is from epoch %d and last.pth from an earlier one: the epochs in between are trained again",
                best.epoch,
            )
        self._go_by_best()

    def save(self) -> None:
        """Write best.pth where it changed, then last.pth, which counts on it.

        Raises RunError where the weights are no longer finite: the files of before are worth more.
        """
        started = time.monotonic()
        self._go_by_best()  # on every rank: they have to agree on what is the best
        if not distributed.is_first():
            return
        resume, progress = {**self.state.resume_data(), **self.learned}, self.state.progress
        trained = self.state.classifier.trained_state()
        if not all(value.isfinite().all() for value in trained.values()):
            where = f"epoch {progress.epoch}"
            if progress.batch:
                where = f"epoch {progress.epoch + 1}, batch {progress.batch}"
            raise RunError(f"the weights are not finite after {where}; {REMEDY}")
        if self.best is not None and not self._best_on_disk:
            save(self.best, self.run_dir / "best.pth")
            self._best_on_disk = True
        self.flush()
        last = replace(self.template, trained=trained, epoch=progress.epoch, metrics=progress.best, resume=resume)
        keep_previous(self.run_dir / "last.pth")
        save(last, self.run_dir / "last.pth")
        self._saved_at = time.monotonic()
        # A twentieth of the time at the most goes into saving, however large the weights are.
        self._pause = max(SECONDS_BETWEEN_SAVES, 20 * (self._saved_at - started))

    def _go_by_best(self) -> None:
        """Count on the epoch that best.pth is of, once it was reached: the weights of another one are lost."""
        best, progress = self.best, self.state.progress
        if best is not None and best.epoch != progress.best_epoch and best.epoch <= progress.epoch:
            log.warning("best.pth is of epoch %d, not %d, so that epoch is the best", best.epoch, progress.best_epoch)
            progress.best_epoch, progress.best = best.epoch, best.metrics

    def finish(self) -> None:
        """Save, with what calibrates best.pth in it, and with the backbone, so that the one file is enough."""
        if self.best is not None and self.best.frozen is None:
            best = replace(self.best, frozen=self.state.classifier.frozen_state())
            self.best = best if self.best_scores is None else self._calibrated(best, self.best_scores)
            self._best_on_disk = False
        self.save()

    def calibrate_best(self, scores: Scores) -> None:
        """Write what calibrates it into a best.pth that lacks it, as one does that an earlier, killed session wrote."""
        assert self.best is not None
        if self.best.conformal is None and self.best.thresholds is None and self.best_scores is None:
            self.best = self._calibrated(self.best, scores)
            save(self.best, self.run_dir / "best.pth")

    def _calibrated(self, best: Checkpoint, scores: Scores) -> Checkpoint:
        """With the temperature for these validation scores, and what prediction sets or several labels go by."""
        found = self.calibrate(scores)
        temperature, thresholds = found if isinstance(found, Calibration) else (found, None)
        sets = conformal.label_scores(scores, temperature)
        return replace(best, temperature=temperature, conformal=sets, thresholds=thresholds)
