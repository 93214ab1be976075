"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from tl_trainer.config.training import OptimizerSection, ScheduleSection

log = logging.getLogger(__name__)

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]

# What `decay: weights` spares beside vectors: the position embeddings and extra tokens of vision transformers.
SPARED = ("pos_embed", "relative_position", "cls_token", "class_token", "reg_token")

OPTIMIZERS: dict[str, Callable[[Parameters, OptimizerSection], optim.Optimizer]] = {
    "sgd": lambda parameters, section: optim.SGD(
        parameters,
        lr=section.lr,
        momentum=section.momentum,
        nesterov=section.nesterov,
        weight_decay=section.weight_decay,
    ),
    "adam": lambda parameters, section: optim.Adam(
        parameters, lr=section.lr, betas=_betas(section), weight_decay=section.weight_decay
    ),
    "adamw": lambda parameters, section: optim.AdamW(
        parameters, lr=section.lr, betas=_betas(section), weight_decay=section.weight_decay
    ),
}


def build_optimizer(parameters: Parameters, section: OptimizerSection) -> optim.Optimizer:
    """The optimizer for the parameters that train, or for their groups."""
    return OPTIMIZERS[section.name](parameters, section)


def parameter_groups(
    layers: Sequence[tuple[str, Mapping[str, nn.Parameter]]], section: OptimizerSection
) -> list[dict[str, Any]]:
    """Parameter groups, each with its rate and weight decay, and with -v a table of them.

    layers: the parameters by layer and name, the head's first; the rate of layer i is lr * layer_decay**i (Clark et
    al., ELECTRA, 2020), the head's `head_lr` where that is set. With `decay: weights`, vectors and SPARED have no
    weight decay.
    """
    groups = []
    for depth, (layer, parameters) in enumerate(layers):
        kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in parameters.items():
            spared = parameter.ndim < 2 or any(word in name for word in SPARED)
            kinds[section.decay == "all" or not spared].append(parameter)
        rate = section.lr * section.layer_decay**depth if depth or section.head_lr is None else section.head_lr
        for decays, members in kinds.items():
            if members:
                decay = section.weight_decay if decays else 0.0
                groups.append({"params": members, "lr": rate, "weight_decay": decay})
                log.debug("  %-24s  lr %-8.3g  weight decay %-6.3g  %d tensors", layer, rate, decay, len(members))
    return groups


def weights_of(optimizer: optim.Optimizer) -> list[nn.Parameter]:
    """The weights that it updates, in its order."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


class Average:
    """The exponential moving average of tensors that change (Polyak & Juditsky, 1992); `better` is for its user.

    After n updates an update keeps min(decay, (1 + n) / (10 + n)) of it, so that the beginning is soon forgotten.
    Tensors of integers, such as counts of batches, are those of the last update.
    """

    def __init__(self, changing: Mapping[str, Tensor], decay: float) -> None:
        self.changing, self.decay, self.better = changing, decay, False
        self.restart()

    def restart(self) -> None:
        """Begin anew with the tensors as they are."""
        self.updates = 0
        self.tensors = {key: value.detach().clone() for key, value in self.changing.items()}

    @torch.no_grad()
    def restore(self, updates: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on with a saved average. Raises ValueError where it is not one of such tensors."""
        _require_like(tensors, self.tensors, "the average")
        self.updates = updates
        for key, value in self.tensors.items():
            value.copy_(tensors[key])

    @torch.no_grad()
    def update(self) -> None:
        """Take in the tensors as they are now."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, average in self.tensors.items():
            if average.is_floating_point():
                average.lerp_(self.changing[key], 1 - keep)
            else:
                average.copy_(self.changing[key])


class Soup:
    """The weights of the best epochs of a phase, for their mean (Wortsman et al., Model soups, ICML 2022).

    kept: at most `size` epochs, the best first, each as its number, its figures and its tensors.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: list[tuple[int, dict[str, float], dict[str, Tensor]]] = []

    def epoch_ended(
        self, epoch: int, figures: dict[str, float], tensors: Mapping[str, Tensor], better: Callable[..., bool]
    ) -> None:
        """Take in an epoch where it is one of the best."""
        place = sum(not better(figures, of) for _, of, _ in self.kept)
        if place < self.size:
            copies = {key: value.detach().cpu().clone() for key, value in tensors.items()}
            self.kept.insert(place, (epoch, figures, copies))
            del self.kept[self.size :]

    def restore(
        self, kept: Sequence[tuple[int, dict[str, float], dict[str, Tensor]]], epochs: range, like: Mapping[str, Tensor]
    ) -> None:
        """Go on with what was saved after these epochs. Raises ValueError where it is not of them, or unlike these."""
        numbers = {epoch for epoch, _, _ in kept}
        if len(kept) != min(self.size, len(epochs)) or len(numbers) < len(kept) or not numbers <= {*epochs}:
            raise ValueError(f"the weights kept for their mean are those of epochs {[*numbers]} of {len(epochs)}")
        for _, _, tensors in kept:
            _require_like(tensors, like, "a part of the mean")
        self.kept = [(epoch, figures, tensors) for epoch, figures, tensors in kept]

    def mean(self) -> dict[str, Tensor]:
        """The mean of the weights; tensors of integers are those of the best epoch."""
        first, *others = [tensors for _, _, tensors in self.kept]
        return {
            key: torch.stack([value, *(tensors[key] for tensors in others)]).mean(dim=0)
            if value.is_floating_point()
            else value
            for key, value in first.items()
        }


def _require_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError for other names or shapes, which copying would only find out later, or never."""
    shapes, wanted = ({key: tuple(value.shape) for key, value in of.items()} for of in (tensors, like))
    for key in wanted.keys() | shapes.keys():
        if shapes.get(key) != wanted.get(key):
            raise ValueError(f"{key} of {what} is {shapes.get(key)}, and {wanted.get(key)} is needed")


@contextlib.contextmanager
def in_place(changing: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block `tensors` are the values of those that change."""
    kept = {key: value.detach().clone() for key, value in changing.items()}
    _put(tensors, changing)
    try:
        yield
    finally:
        _put(kept, changing)


@torch.no_grad()
def _put(tensors: Mapping[str, Tensor], changing: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        changing[key].copy_(value)


def _betas(section: OptimizerSection) -> tuple[float, float]:
    first, second = section.betas
    return first, second


class Schedule:
    """The learning rate as a factor of its base value, set before each step.

    cosine: Loshchilov & Hutter, SGDR (ICLR 2017), without restarts. Warm-up rises linearly to the base rate over the
    first `warmup_epochs` and multiplies whatever the schedule says. accumulate: the batches of a step.
    """

    def __init__(
        self, optimizer: optim.Optimizer, section: ScheduleSection, epochs: int, batches: int, accumulate: int = 1
    ) -> None:
        self.optimizer = optimizer
        self.section = section
        self.epochs = epochs
        self.batches, self.accumulate = batches, accumulate  # of an epoch, of a step
        self.steps_per_epoch = -(-batches // accumulate)
        self.total_steps = epochs * self.steps_per_epoch
        self.warmup_steps = round(section.warmup_epochs * self.steps_per_epoch)
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.plateau = 1.0  # the factor that it has come to

    def set_rate(self, batch: int) -> float:
        """Set the rate for the batch with this number, counted from 0 over all epochs; returns the first group's."""
        epoch, batch = divmod(batch, self.batches)
        step = epoch * self.steps_per_epoch + batch // self.accumulate
        factor = FACTORS[self.section.name](self, step)
        if step < self.warmup_steps:
            factor *= (step + 1) / self.warmup_steps
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        return float(self.optimizer.param_groups[0]["lr"])

    def epoch_ended(self, waited: int) -> None:
        """Tell `plateau` how many epochs of the phase have ended since its best one."""
        if waited and waited % (self.section.patience + 1) == 0:
            self.plateau *= self.section.factor


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
    "plateau": lambda schedule, step: schedule.plateau,
}
