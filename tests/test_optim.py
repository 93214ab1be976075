"""Optimizers against torch's own built by hand, schedules against torch's schedulers, warm-up, and going on."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from tl_trainer.config.training import OptimizerName, OptimizerSection, ScheduleName, ScheduleSection
from tl_trainer.optim import (
    FACTORS,
    OPTIMIZERS,
    Average,
    Schedule,
    Soup,
    build_optimizer,
    in_place,
    parameter_groups,
)

LR = 0.02


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def trained(model: nn.Module, optimizer: optim.Optimizer) -> list[torch.Tensor]:
    """The parameters after a few steps."""
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("settings", "cls", "expected"),
    [
        ({"name": "sgd"}, optim.SGD, {"momentum": 0.9}),
        ({"name": "sgd", "momentum": 0.0}, optim.SGD, {}),
        ({"name": "sgd", "momentum": 0.5, "nesterov": True}, optim.SGD, {"momentum": 0.5, "nesterov": True}),
        ({"name": "sgd", "weight_decay": 0.1}, optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        ({"name": "adam"}, optim.Adam, {}),
        ({"name": "adam", "weight_decay": 0.1}, optim.Adam, {"weight_decay": 0.1}),
        ({"name": "adam", "betas": [0.5, 0.9]}, optim.Adam, {"betas": (0.5, 0.9)}),
        ({"name": "adamw", "betas": [0.5, 0.9]}, optim.AdamW, {"betas": (0.5, 0.9), "weight_decay": 0.0}),
        ({"name": "adamw"}, optim.AdamW, {"weight_decay": 0.0}),
        ({"name": "adamw", "weight_decay": 0.1}, optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_an_optimizer_is_torchs_own(
    settings: dict[str, Any], cls: Callable[..., optim.Optimizer], expected: dict[str, Any]
) -> None:
    model, other = network(), network()
    start = [parameter.clone() for parameter in model.parameters()]
    found = trained(model, build_optimizer(model.parameters(), OptimizerSection(lr=LR, **settings)))
    wanted = trained(other, cls(other.parameters(), lr=LR, **expected))
    for mine, theirs, before in zip(found, wanted, start, strict=True):
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, before)


def test_each_layer_has_its_rate_and_only_weights_decay(caplog: pytest.LogCaptureFixture) -> None:
    layers = [
        ("head", {"head.weight": nn.Parameter(torch.ones(3, 5)), "head.bias": nn.Parameter(torch.ones(3))}),
        ("norm", {"norm.weight": nn.Parameter(torch.ones(5))}),
        (
            "embed",
            {"pos_embed": nn.Parameter(torch.ones(1, 7, 5)), "conv.weight": nn.Parameter(torch.ones(5, 3, 2, 2))},
        ),
    ]
    section = OptimizerSection(name="adamw", lr=LR, weight_decay=0.3, decay="weights", layer_decay=0.5)
    with caplog.at_level("DEBUG", logger="tl_trainer.optim"):
        groups = parameter_groups(layers, section)
    names = {id(parameter): name for _, named in layers for name, parameter in named.items()}
    table = [([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"]) for group in groups]
    assert table == [
        (["head.weight"], LR, 0.3), (["head.bias"], LR, 0.0), (["norm.weight"], LR / 2, 0.0),
        (["conv.weight"], LR / 4, 0.3), (["pos_embed"], LR / 4, 0.0),
    ]  # fmt: skip
    assert [(line.split()[0], float(line.split()[2])) for line in caplog.messages] == [
        ("head", LR), ("head", LR), ("norm", LR / 2), ("embed", LR / 4), ("embed", LR / 4),
    ]  # fmt: skip
    optimizer = build_optimizer(groups, section)
    assert [group["lr"] for group in optimizer.param_groups] == [rate for _, rate, _ in table]
    apart = parameter_groups(layers, section.model_copy(update={"head_lr": 1.0}))
    assert [group["lr"] for group in apart] == [1.0, 1.0, LR / 2, LR / 4, LR / 4]
    decaying = parameter_groups(layers, OptimizerSection(name="adamw", lr=LR, weight_decay=0.3, layer_decay=0.5))
    assert [group["weight_decay"] for group in decaying] == [0.3] * 3


def test_an_average_is_the_formula() -> None:
    changing = {"weight": torch.zeros(3), "count": torch.tensor(0)}
    average, expected = Average(changing, 0.5), torch.zeros(3)
    for number in range(1, 30):
        changing["weight"].copy_(torch.randn(3))
        changing["count"] += 1
        average.update()
        keep = min(0.5, (1 + number) / (10 + number))
        expected = keep * expected + (1 - keep) * changing["weight"]
    torch.testing.assert_close(average.tensors["weight"], expected)
    assert average.tensors["count"] == 29
    now = changing["weight"].clone()
    with pytest.raises(KeyboardInterrupt), in_place(changing, average.tensors):
        assert torch.equal(changing["weight"], average.tensors["weight"])
        raise KeyboardInterrupt
    assert torch.equal(changing["weight"], now)


def test_a_soup_is_the_mean_of_the_best_epochs() -> None:
    soup, values = Soup(3), [0.3, 0.9, 0.5, 0.7, 0.5]
    weights = {"weight": torch.zeros(2), "count": torch.tensor(0)}
    for epoch, value in enumerate(values, 1):
        weights["weight"].fill_(epoch)
        weights["count"].fill_(epoch)
        soup.epoch_ended(epoch, {"top1": value}, weights, lambda figures, best: figures["top1"] > best["top1"])
    assert [epoch for epoch, _, _ in soup.kept] == [2, 4, 3]
    assert soup.mean()["weight"].tolist() == [3.0, 3.0]
    assert soup.mean()["count"] == 2

    again = Soup(3)
    again.restore(soup.kept, range(1, 6), weights)
    assert again.kept == soup.kept
    (number, figures, tensors), *others = soup.kept
    for wrong, said in [
        (
            (number, figures, {**tensors, "weight": torch.zeros(3)}),
            r"weight of a part of the mean is \(3,\), and \(2,\)",
        ),
        ((number, figures, {"weight": torch.zeros(2)}), r"count of a part of the mean is None, and \(\) is needed"),
        ((6, figures, tensors), "the weights kept for their mean are those of epochs .* of 5"),
        (others[0], "the weights kept for their mean are those of epochs .* of 5"),
    ]:
        with pytest.raises(ValueError, match=said):
            again.restore([wrong, *others], range(1, 6), weights)
    with pytest.raises(ValueError, match="the weights kept for their mean"):
        again.restore([], range(1, 6), weights)


def test_an_average_of_other_tensors_is_refused() -> None:
    average = Average({"weight": torch.ones(2)}, 0.5)
    with pytest.raises(ValueError, match=r"weight of the average is \(\), and \(2,\) is needed"):
        average.restore(1, {"weight": torch.tensor(3.0)})  # which copying would spread
    average.restore(4, {"weight": torch.tensor([3.0, 4.0])})
    assert (average.updates, average.tensors["weight"].tolist()) == (4, [3.0, 4.0])


def test_the_names_are_those_of_the_schema() -> None:
    assert OPTIMIZERS.keys() == set(typing.get_args(OptimizerName))
    assert FACTORS.keys() == set(typing.get_args(ScheduleName))


EPOCHS, STEPS = 6, 5
LOSSES = [0.9, 0.8, 0.85, 0.81, 0.84, 0.5, 0.6, 0.6, 0.55, 0.51, 0.5, 0.5]  # of the validation, after each epoch


def schedule(epochs: int = EPOCHS, **settings: Any) -> Schedule:
    optimizer = optim.SGD(network().parameters(), lr=LR)
    return Schedule(optimizer, ScheduleSection(**settings), epochs, STEPS)


def rates(of: Schedule, epochs: int = EPOCHS, start: int = 0) -> list[float]:
    """The rate of each step from epoch `start` on, as `fit` sets it; the best epoch is that of the lowest loss."""
    found = []
    for epoch in range(start, epochs):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            found.append(of.set_rate(step))
            assert of.optimizer.param_groups[0]["lr"] == found[-1]
        of.epoch_ended(epoch - min(range(epoch + 1), key=LOSSES.__getitem__))
    return found


def torchs_rates(scheduler: Any, steps: int, metrics: list[float] | None = None) -> list[float]:
    """The rates that one of torch's schedulers sets before each of its steps."""
    found = []
    for index in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(*([metrics[index]] if metrics else []))
    return found


def per_step(epoch_rates: list[float]) -> list[float]:
    return [rate for rate in epoch_rates for _ in range(STEPS)]


def test_constant() -> None:
    assert rates(schedule(name="constant")) == [LR] * EPOCHS * STEPS


def test_cosine_is_torchs() -> None:
    reference = lr_scheduler.CosineAnnealingLR(optim.SGD(network().parameters(), lr=LR), T_max=EPOCHS * STEPS)
    found = rates(schedule(name="cosine"))
    assert found == pytest.approx(torchs_rates(reference, EPOCHS * STEPS), rel=1e-9)
    assert found[0] == LR
    assert 0 < found[-1] < LR / 100


@pytest.mark.parametrize(("step_epochs", "factor"), [(1, 0.5), (2, 0.1), (4, 0.3), (10, 0.1)])
def test_step_is_torchs(step_epochs: int, factor: float) -> None:
    reference = lr_scheduler.StepLR(optim.SGD(network().parameters(), lr=LR), step_epochs, factor)
    found = rates(schedule(name="step", step_epochs=step_epochs, factor=factor))
    assert found == pytest.approx(per_step(torchs_rates(reference, EPOCHS)), rel=1e-9)


@pytest.mark.parametrize("patience", [0, 1, 2, 3])
def test_plateau_is_torchs_where_any_lower_loss_counts(patience: int) -> None:
    # torch's own default wants the loss to fall by 0.01 % before it counts: threshold=1e-4, threshold_mode="rel".
    reference = lr_scheduler.ReduceLROnPlateau(
        optim.SGD(network().parameters(), lr=LR), factor=0.5, patience=patience, threshold=0.0, eps=0.0
    )
    found = rates(schedule(12, name="plateau", patience=patience, factor=0.5), 12)
    assert found == pytest.approx(per_step(torchs_rates(reference, 12, LOSSES)), rel=1e-9)
    assert found[-1] < LR


@pytest.mark.parametrize("warmup", [1, 2, 0.6, 2.4])
def test_warm_up_rises_linearly_to_the_base_rate(warmup: float) -> None:
    found, length = rates(schedule(name="constant", warmup_epochs=warmup)), round(warmup * STEPS)
    assert found[:length] == pytest.approx([LR * (step + 1) / length for step in range(length)])
    assert found[length:] == [LR] * (EPOCHS * STEPS - length)


def test_cosine_falls_after_the_warm_up() -> None:
    found = rates(schedule(name="cosine", warmup_epochs=2))
    reference = lr_scheduler.CosineAnnealingLR(optim.SGD(network().parameters(), lr=LR), T_max=(EPOCHS - 2) * STEPS)
    assert found[: 2 * STEPS] == pytest.approx([LR * (step + 1) / 10 for step in range(10)])
    assert found[2 * STEPS :] == pytest.approx(torchs_rates(reference, (EPOCHS - 2) * STEPS))


def test_batches_of_one_update_have_one_rate() -> None:
    """Two and two and one in an epoch of five: the rates are those of an epoch of three."""
    optimizer = optim.SGD(network().parameters(), lr=LR)
    section = ScheduleSection(name="cosine", warmup_epochs=1)
    wanted, gathering = Schedule(optimizer, section, EPOCHS, 3), Schedule(optimizer, section, EPOCHS, STEPS, 2)
    found = rates(gathering)
    assert found == [wanted.set_rate(epoch * 3 + step) for epoch in range(EPOCHS) for step in (0, 0, 1, 1, 2)]


def test_a_run_that_is_all_warm_up() -> None:
    assert rates(schedule(2, name="cosine", warmup_epochs=2), 2)[-1] == LR


def test_all_parameter_groups_keep_their_ratio() -> None:
    first, second = network().children(), network().children()
    groups = [{"params": next(first).parameters(), "lr": 0.1}, {"params": next(second).parameters(), "lr": 0.001}]
    optimizer = optim.SGD(groups)
    Schedule(optimizer, ScheduleSection(name="step", step_epochs=1, factor=0.5), EPOCHS, STEPS).set_rate(2 * STEPS)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 4, 0.001 / 4])


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "constant", "warmup_epochs": 3.5},
        {"name": "cosine", "warmup_epochs": 1},
        {"name": "step", "step_epochs": 2},
        {"name": "plateau", "patience": 1},
    ],
)
@pytest.mark.parametrize("stopped_after", range(1, 12))
def test_going_on_gives_the_same_rates(settings: dict[str, Any], stopped_after: int) -> None:
    expected = rates(schedule(12, **settings), 12)
    before = schedule(12, **settings)
    rates(before, stopped_after)
    after = schedule(12, **settings)
    after.optimizer.load_state_dict(before.optimizer.state_dict())  # whose rate is that of the last step
    after.plateau = before.plateau
    assert rates(after, 12, stopped_after) == expected[stopped_after * STEPS :]
