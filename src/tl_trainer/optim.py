"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn, optim

from tl_trainer.config.schema import OptimizerSection, ScheduleSection

Parameters = Iterable[nn.Parameter]

OPTIMIZERS: dict[str, Callable[[Parameters, OptimizerSection], optim.Optimizer]] = {
    "sgd": lambda parameters, section: optim.SGD(
        parameters,
        lr=section.lr,
        momentum=section.momentum,
        nesterov=section.nesterov,
        weight_decay=section.weight_decay,
    ),
    "adam": lambda parameters, section: optim.Adam(parameters, lr=section.lr, weight_decay=section.weight_decay),
    "adamw": lambda parameters, section: optim.AdamW(parameters, lr=section.lr, weight_decay=section.weight_decay),
}


def build_optimizer(parameters: Parameters, section: OptimizerSection) -> optim.Optimizer:
    """The optimizer for the parameters that train."""
    return OPTIMIZERS[section.name](parameters, section)


class Schedule:
    """The learning rate as a factor of its base value, set before each step.

    cosine: Loshchilov & Hutter, SGDR (ICLR 2017), without restarts. Warm-up rises linearly to the base rate over the
    first `warmup_epochs` and multiplies whatever the schedule says.
    """

    def __init__(self, optimizer: optim.Optimizer, section: ScheduleSection, epochs: int, steps_per_epoch: int) -> None:
        self.optimizer = optimizer
        self.section = section
        self.total_steps = epochs * steps_per_epoch
        self.warmup_steps = round(section.warmup_epochs * steps_per_epoch)
        self.steps_per_epoch = steps_per_epoch
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.plateau: dict[str, Any] = {"best": math.inf, "bad_epochs": 0, "factor": 1.0}

    def set_rate(self, step: int) -> float:
        """Set the rate for the step with this number, counted from 0 over all epochs; returns the first group's."""
        factor = FACTORS[self.section.name](self, step)
        if step < self.warmup_steps:
            factor *= (step + 1) / self.warmup_steps
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        return float(self.optimizer.param_groups[0]["lr"])

    def epoch_ended(self, val_loss: float) -> None:
        """Tell `plateau` the epoch's validation loss."""
        if val_loss < self.plateau["best"]:
            self.plateau.update(best=val_loss, bad_epochs=0)
            return
        self.plateau["bad_epochs"] += 1
        if self.plateau["bad_epochs"] > self.section.patience:
            self.plateau.update(bad_epochs=0, factor=self.plateau["factor"] * self.section.factor)


def _cosine(schedule: Schedule, step: int) -> float:
    length = max(1, schedule.total_steps - schedule.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * max(0, step - schedule.warmup_steps) / length))


def _step(schedule: Schedule, step: int) -> float:
    epoch = step // schedule.steps_per_epoch
    return float(schedule.section.factor ** (epoch // schedule.section.step_epochs))


FACTORS: dict[str, Callable[[Schedule, int], float]] = {
    "constant": lambda schedule, step: 1.0,
    "cosine": _cosine,
    "step": _step,
    "plateau": lambda schedule, step: float(schedule.plateau["factor"]),
}
