"""Heads with hidden layers, many at once: the same features and the same batches, each with its own settings.

The first layer of all heads of one dropout is one matrix product, as they share its inputs; the others are batched
ones. All heads begin with the same weights, and those of one dropout share its masks, so that they differ in nothing
but their settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from tl_trainer.candidates import Layers
from tl_trainer.data.loaders import batch_order
from tl_trainer.ground.progress import bar
from tl_trainer.label_metrics import image_losses

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DECAYS = (1e-2, 0.1, 1.0, 10.0)
DROPOUTS = (0.0, 0.25, 0.5)
STEPS = 50  # fewest in a round: an epoch, or several where these are short
ROUNDS = 30  # at most
PATIENCE = 3  # rounds without a lower log loss on the validation images, after which a head is trained no further
ROWS_AT_ONCE = 2048  # when heads are judged


class Setting(NamedTuple):
    """What tells one head from another: learning rate and weight decay of its AdamW, dropout before each Linear."""

    rate: float
    decay: float
    dropout: float


class Trained(NamedTuple):
    """A head at its best epoch: the logits of the validation images (M, C), and its layers; epoch 0 if it diverged."""

    setting: Setting
    epoch: int
    logits: Tensor
    layers: Layers


class Samples(NamedTuple):
    """Features (N, D) and the weights of their classes (N, C) or (N, C, 2), all views of the images in turn."""

    features: Tensor
    soft: Tensor
    images: int  # in a view; an epoch goes through one view

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, in the order in which the loop of epochs would take them."""
        first = self.images * (epoch % (len(self.features) // self.images))
        for indices in batch_order(np.arange(self.images), batch_size, seed, epoch, shuffle=True):
            rows = torch.from_numpy(indices).to(self.features.device) + first
            yield self.features[rows], self.soft[rows]


class Plan(NamedTuple):
    """What the heads have in common: widths of the hidden layers, batches, seed."""

    hidden: Sequence[int]
    batch_size: int
    seed: int


def train_heads(
    train: Samples,
    val: tuple[Tensor, Tensor],
    plan: Plan,
    settings: Sequence[Setting],
    pause: Callable[[], None] = lambda: None,
) -> list[Trained]:
    """Train a head for each setting, until its log loss on `val` no longer falls; each as it was at its best epoch.

    After 1, 2, 4, ... rounds only the better half goes on (successive halving; Jamieson & Talwalkar, 2016).

    val: features (M, D) and targets (M,). pause: called after every batch; it may end the training by an exception.
    """
    widths = [train.features.shape[1], *plan.hidden, train.soft.shape[1]]
    numbers: dict[float, list[int]] = {}
    for number, setting in enumerate(settings):
        numbers.setdefault(setting.dropout, []).append(number)
    groups = [
        _Heads(widths, of, [settings[number] for number in of], plan.seed, train.features) for of in numbers.values()
    ]
    best: dict[int, tuple[float, Trained]] = {}
    span = -(-STEPS * plan.batch_size // train.images)  # epochs of a round
    halvings = {span << power for power in range(ROUNDS.bit_length())}
    for epoch in bar(range(1, ROUNDS * span + 1), f"{len(settings)} heads at once", unit="epoch"):
        for inputs, soft in train.batches(plan.batch_size, plan.seed, epoch - 1):
            for heads in groups:
                heads.step(inputs, soft)
            pause()
        going_on = []
        for heads in groups:
            logits = torch.cat([heads.logits(part) for part in torch.split(val[0], ROWS_AT_ONCE)], dim=2)
            for row, (number, of_head) in enumerate(zip(heads.numbers, logits.transpose(1, 2), strict=True)):
                loss = _log_loss(of_head, val[1])
                if number not in best:
                    best[number] = float("inf"), Trained(settings[number], 0, of_head, heads.layers(row))
                if loss < best[number][0]:
                    best[number] = loss, Trained(settings[number], epoch, of_head.clone(), heads.layers(row))
                if epoch - best[number][1].epoch < PATIENCE * span:
                    going_on.append(number)
        if epoch in halvings:
            there = [number for heads in groups for number in heads.numbers]
            better = sorted(there, key=lambda number: best[number][0])[: (len(there) + 1) // 2]
            going_on = [number for number in going_on if number in better]
        for heads in groups:
            heads.keep(going_on)
        groups = [heads for heads in groups if heads.numbers]
        if not groups:
            break
    return [best[number][1] for number in range(len(settings))]


def _log_loss(logits: Tensor, targets: Tensor) -> float:
    """The mean over the images, of several labels over those that are known."""
    if targets.ndim == 2:
        return image_losses(logits, targets).mean().item()
    return functional.cross_entropy(logits.double(), targets).item()


class _Heads:
    """K heads of one dropout, whose weights (K, out, in) and biases (K, out) are stacked; AdamW knows them one by one.

    numbers: what the heads are called.
    """

    def __init__(
        self, widths: Sequence[int], numbers: Sequence[int], settings: Sequence[Setting], seed: int, like: Tensor
    ) -> None:
        draw, self.masks = (torch.Generator().manual_seed(seed) for _ in range(2))
        self.numbers, self.dropout = [*numbers], settings[0].dropout
        self.stacks: list[Tensor] = []
        for wide, narrow in itertools.pairwise(widths):  # torch's own first weights of a Linear
            for shape in ((narrow, wide), (narrow,)):
                drawn = (torch.rand(shape, generator=draw) * 2 - 1) / wide**0.5
                self.stacks.append(drawn.to(like).repeat(len(settings), *[1] * len(shape)).requires_grad_())
        groups = [
            {
                "params": [nn.Parameter(stack.detach()[number]) for stack in self.stacks],
                "lr": setting.rate,
                "weight_decay": setting.decay,
            }
            for number, setting in enumerate(settings)
        ]  # of views: AdamW writes into the stacks
        self.optimizer = optim.AdamW(groups, fused=True)

    def step(self, inputs: Tensor, soft: Tensor) -> None:
        """One update of every head by its mean cross-entropy on a batch (n, D), (n, C); of each class for (n, C, 2)."""
        outputs = self._forward(inputs, self._dropped)
        if soft.ndim == 3:  # each class by itself
            without, having = soft.permute(2, 1, 0)
            losses = without * functional.softplus(outputs) + having * functional.softplus(-outputs)
            loss = losses.sum() / soft.sum().clamp(min=1e-6)
        else:
            loss = -(soft.T * outputs.log_softmax(dim=1)).sum() / soft.sum()
        slopes = torch.autograd.grad(loss, self.stacks)
        for row, group in enumerate(self.optimizer.param_groups):
            for parameter, slope in zip(group["params"], slopes, strict=True):
                parameter.grad = slope[row]
        self.optimizer.step()

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """(n, D) -> (K, C, n)"""
        return self._forward(inputs, lambda values: values)

    def _dropped(self, values: Tensor) -> Tensor:
        """Dropout of (..., width, n) with one mask (width, n), drawn on the processor: the same on every device."""
        if not self.dropout:
            return values
        kept = torch.rand(values.shape[-2:], generator=self.masks) >= self.dropout
        return values * (kept / (1 - self.dropout)).to(values)

    def _forward(self, inputs: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        (weight, bias), *others = zip(self.stacks[::2], self.stacks[1::2], strict=True)
        products: Tensor = weight.flatten(0, 1) @ drop(inputs.T)
        outputs = products.view(*bias.shape, -1) + bias[..., None]
        for weight, bias in others:
            outputs = torch.baddbmm(bias[..., None], weight, drop(outputs.relu()))
        return outputs

    def layers(self, row: int) -> Layers:
        """A copy of the head in that row."""
        copies = [stack.detach()[row].clone() for stack in self.stacks]
        return list(zip(copies[::2], copies[1::2], strict=True))

    def keep(self, numbers: Collection[int]) -> None:
        """Go on with these heads alone."""
        rows = [row for row, number in enumerate(self.numbers) if number in numbers]
        if len(rows) == len(self.numbers):
            return
        self.numbers = [self.numbers[row] for row in rows]
        self.stacks = [stack.detach()[rows].requires_grad_() for stack in self.stacks]
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [groups[row] for row in rows]
        for row, group in enumerate(self.optimizer.param_groups):
            for parameter, stack in zip(group["params"], self.stacks, strict=True):
                parameter.data = stack.detach()[row]
