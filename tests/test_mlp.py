"""Heads with hidden layers that are trained at once, against each of them trained alone with torch's own pieces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tl_trainer import mlp
from tl_trainer.data.loaders import batch_order
from tl_trainer.mlp import Plan, Samples, Setting, Trained, train_heads

CLASSES, IMAGES, WIDTH, STEPS = 3, 46, 8, 5  # so many steps are an epoch
PLAN = Plan([6, 5], 10, 7)
SETTINGS = [
    Setting(0.01, 0.0, 0.25), Setting(0.03, 1.0, 0.0), Setting(0.003, 10.0, 0.25), Setting(0.02, 0.1, 0.0),
    Setting(0.02, 0.1, 0.25), Setting(0.01, 0.0, 0.0),
]  # fmt: skip


def samples(images: int, seed: int, views: int = 1) -> tuple[Samples, Tensor]:
    """Classes that overlap, in `views` views with noise of their own, with soft labels; and the targets of a view."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(images) % CLASSES
    middles = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    features = torch.cat([middles[targets] + torch.randn(images, WIDTH, generator=generator) for _ in range(views)])
    soft = torch.tensor([1.0, 2.0, 0.5]) * (functional.one_hot(targets, CLASSES) * 0.9 + 0.1 / CLASSES)
    return Samples(features, soft.repeat(views, 1), images), targets


def alone(train: Samples, setting: Setting, plan: Plan) -> Iterator[nn.Sequential]:
    """A plain head after each epoch of a plain loop with torch's AdamW and its loss; the masks are the seed's."""
    draw, masks = (torch.Generator().manual_seed(plan.seed) for _ in range(2))
    widths = [WIDTH, *plan.hidden, CLASSES]
    linear = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    for layer in linear:
        for parameter in (layer.weight, layer.bias):
            bound = layer.in_features**-0.5
            parameter.data = torch.rand(parameter.shape, generator=draw) * 2 * bound - bound
    optimizer = torch.optim.AdamW(
        [p for layer in linear for p in layer.parameters()], setting.rate, weight_decay=setting.decay
    )
    first, second, third = linear
    for epoch in itertools.count():
        view = epoch % 2 * train.images
        for indices in batch_order(np.arange(train.images), plan.batch_size, plan.seed, epoch, shuffle=True):
            values, soft = train.features[view:][indices], train.soft[indices]
            for number, layer in enumerate(linear):
                values = values.relu() if number else values
                if setting.dropout:
                    drawn = torch.rand(values.T.shape, generator=masks).T
                    values = values * (drawn >= setting.dropout) / (1 - setting.dropout)
                values = layer(values)
            loss = functional.cross_entropy(values, soft, reduction="sum") / soft.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


@pytest.fixture(scope="module")
def trained() -> tuple[Samples, Samples, Tensor, list[Trained]]:
    (train, _), (val, targets) = samples(IMAGES, 1, views=2), samples(30, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "STEPS", STEPS)
        return train, val, targets, train_heads(train, (val.features, targets), PLAN, SETTINGS)


def test_each_head_is_the_one_trained_alone(trained: tuple[Samples, Samples, Tensor, list[Trained]]) -> None:
    train, val, _, heads = trained
    assert [head.setting for head in heads] == SETTINGS
    assert len({head.epoch for head in heads}) > 1
    for head in heads:
        reference = next(itertools.islice(alone(train, head.setting, PLAN), head.epoch - 1, None))
        torch.testing.assert_close(head.logits, reference(val.features), atol=1e-4, rtol=0)
        values = val.features
        for number, (weight, bias) in enumerate(head.layers):
            values = (values.relu() if number else values) @ weight.T + bias
        torch.testing.assert_close(values, head.logits, atol=1e-4, rtol=0)


def test_the_epoch_is_the_best_until_it_was_left(trained: tuple[Samples, Samples, Tensor, list[Trained]]) -> None:
    train, val, targets, heads = trained
    best = min(heads, key=lambda head: functional.cross_entropy(head.logits, targets).item())
    heads_of = itertools.islice(alone(train, best.setting, PLAN), best.epoch + 2)
    losses = [functional.cross_entropy(head(val.features), targets).item() for head in heads_of]
    assert losses.index(min(losses)) + 1 == best.epoch


def test_the_better_half_of_all_goes_on_after_each_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, _), (val, targets) = samples(IMAGES, 1), samples(30, 2)
    monkeypatch.setattr(mlp, "STEPS", 1)
    monkeypatch.setattr(mlp, "PATIENCE", 100)
    monkeypatch.setattr(mlp, "ROUNDS", 5)
    going_on, batches, step = [], [], mlp._Heads.step

    def noted(self: mlp._Heads, *of_batch: Tensor) -> None:
        going_on.append((len(batches) // STEPS, len(self.numbers)))
        step(self, *of_batch)

    monkeypatch.setattr(mlp._Heads, "step", noted)
    train_heads(train, (val.features, targets), PLAN, [*SETTINGS, *SETTINGS[:2]], lambda: batches.append(None))
    by_epoch = [sum(count for epoch, count in going_on if epoch == number) for number in range(5)]
    assert [count // STEPS for count in by_epoch] == [8, 4, 2, 2, 1]


def test_nothing_is_left_to_chance_and_pause_is_asked_after_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "ROUNDS", 1)
    (train, _), (val, targets) = samples(IMAGES, 1), samples(30, 2)
    asked = []
    first, second = (
        train_heads(train, (val.features, targets), PLAN, SETTINGS, lambda: asked.append(torch.rand(1)))
        for _ in range(2)
    )
    assert all(
        torch.equal(*pair) for pair in zip(*([head.logits for head in heads] for heads in (first, second)), strict=True)
    )
    assert len(asked) == 2 * 5 * 11  # batches in the epochs of a round


def test_a_head_that_diverges_does_not_touch_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "STEPS", STEPS)
    monkeypatch.setattr(mlp, "ROUNDS", 4)
    (train, _), (val, targets) = samples(IMAGES, 1), samples(30, 2)
    heads = train_heads(train, (val.features, targets), PLAN, [Setting(1e30, 1e30, 0.25), SETTINGS[0]])
    assert heads[0].epoch == 0
    alone = train_heads(train, (val.features, targets), PLAN, SETTINGS[:1])[0]
    torch.testing.assert_close(heads[1].logits, alone.logits, atol=1e-4, rtol=0)
