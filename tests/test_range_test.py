"""The learning-rate range test: its rates, its end, what it suggests, and that it leaves nothing but its curve."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import Run
from test_run import WORDS, phased
from test_tracking import events, points
from tiny import STEPS, TinyBatches, tiny_state
from tl_trainer import range_test
from tl_trainer.assembly import Parts
from tl_trainer.config.schema import Config
from tl_trainer.loop import Training
from tl_trainer.range_test import FEWEST, Point, curve, find_rate, suggested, words
from tl_trainer.saver import State


def training(losses: Callable[[int], float]) -> tuple[Training, list[list[float]]]:
    """The tiny classifier with two groups of rates, each step of which has such a loss; and the rates of every step."""
    state: State = tiny_state(3, 1, {"name": "sgd", "lr": 0.5}, {"name": "constant"})
    state.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    seen: list[list[float]] = []

    class Steps:
        def __call__(self, batch: Any) -> float:
            seen.append([group["lr"] for group in state.optimizer.param_groups])
            return losses(len(seen) - 1)

    feed: Any = type("Feed", (), {"batches": TinyBatches()})
    step: Any = Steps()
    found: Any = type("Training", (), {"state": state, "feed": feed, "step": step, "device": torch.device("cpu")})
    return found, seen


def test_the_rates_rise_exponentially_and_keep_their_ratio() -> None:
    of, seen = training(lambda number: 1.0)
    points = curve(of, 0.5)
    wanted = [1e-7 * 1e8 ** (number / (FEWEST - 1)) for number in range(FEWEST)]
    assert [point.rate for point in points] == pytest.approx(wanted)
    assert [rate for rates in seen for rate in rates] == pytest.approx([r * s for r in wanted for s in (1.0, 0.2)])
    passed = of.state.progress.epoch, of.state.progress.batch  # by which batches are mixed and gradients gathered
    assert passed == (FEWEST // STEPS - 1, STEPS)


def test_it_ends_where_the_mean_loss_is_four_times_the_lowest() -> None:
    losses = [1.0, 0.5, 30.0, 1.0]
    points = curve(training(losses.__getitem__)[0], 0.5)
    means, mean = [], 0.0
    for number, loss in enumerate(losses):
        mean = 0.9 * mean + 0.1 * loss
        means.append(mean / (1 - 0.9 ** (number + 1)))
    assert [point.mean for point in points] == pytest.approx(means[:3])
    assert means[2] > 4 * means[1]
    assert len(curve(training([1.0, math.nan, 1.0, 1.0].__getitem__)[0], 0.5)) == 1


def test_the_decade_over_which_the_mean_loss_falls_most_begins_with_the_suggestion() -> None:
    means = [2.0, 1.9, 1.8, 1.2, 0.6, 0.5, 0.45, 0.4]  # a head that knows its images by heart diverges nowhere
    points = [Point(1.234e-4 * 10 ** (number / 2), 9.0, mean) for number, mean in enumerate(means)]
    assert suggested(points) == 1.2e-3
    assert suggested(points[:1]) is None
    assert suggested(points[:2]) is None
    assert suggested([point._replace(mean=1 + point.rate) for point in points]) is None


def test_the_words_set_the_rate_of_the_last_phase() -> None:
    optimizer = {"lr": 2e-4, "head_lr": 1e-3}
    assert words(Config.model_validate({"train": {"epochs": 2}}), 3e-3) == "train.optimizer.lr=0.003"
    both = Config.model_validate({"train": {"epochs": 2, "optimizer": optimizer}})
    assert words(both, 1e-3) == "train.optimizer.lr=0.001 train.optimizer.head_lr=0.005"
    own = {"epochs": 2, "phases": [{"trainable": "all", "optimizer": optimizer}]}
    expected = "lr: 0.001, head_lr: 0.005 in the optimizer of the last phase"
    assert words(Config.model_validate({"train": own}), 1e-3) == expected


def test_the_command_writes_its_curve_and_no_run(tl: Run, colours: Path) -> None:
    more = [f"{key}={json.dumps(value)}" for key, value in {**dict(WORDS), "output.tensorboard": True}.items()]
    done = tl("train", "--data-dir", colours, "--find-lr", *more)
    assert done.returncode == 0, done.stderr
    first, curve_line, suggestion, *_ = done.stdout.splitlines()
    assert first.startswith(f"{FEWEST} batches at rising learning rates, ")
    assert [path.name for path in Path("runs").iterdir()] == ["run-lr-1"]
    logged, *names = sorted(path.name for path in Path("runs/run-lr-1").iterdir())
    assert logged.startswith("events.out.tfevents.")
    assert names == ["rates.csv", "rates.png"]
    assert curve_line == "curve: runs/run-lr-1/rates.png"
    with Path("runs/run-lr-1/rates.csv").open(newline="") as file:
        rows = [Point(*map(float, row.values())) for row in csv.DictReader(file)]
    rate, reader = suggested(rows), events(Path("runs/run-lr-1"))
    for tag, column in (("rates/rate", "rate"), ("rates/loss", "loss"), ("rates/mean_loss", "mean")):
        assert points(reader, tag) == pytest.approx(dict(enumerate(getattr(row, column) for row in rows)))
    [picture] = reader.Images("rates")
    assert picture.encoded_image_string == Path("runs/run-lr-1/rates.png").read_bytes()
    assert suggestion == (
        f"suggested: train.optimizer.lr={rate:g}" if rate else "no rate made the loss fall, so none is suggested; look "
        "at the curve"
    )  # fmt: skip
    refused = tl("train", "--data-dir", colours, "--find-lr", "--dry-run", *more)
    assert "--find-lr trains no run; leave out --resume and --dry-run" in refused.stderr
    found = tl("train", "--data-dir", colours, "--find-lr", *more, "train={}")
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1)
    assert "here the head is found, without a learning rate; set train.epochs to train it" in found.stderr


def test_of_phases_the_last_is_tested_from_the_head_that_was_found(
    colours: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heads: list[torch.Tensor] = []
    take_head = Parts.take_head

    def taking(parts: Parts, layers: Any, *, unit: bool) -> None:
        take_head(parts, layers, unit=unit)
        heads.append(layers[-1][0])

    def of_last(training: Training, lr: float) -> list[Point]:
        classifier = training.state.classifier
        assert (classifier.trainable, lr) == ("stage4.2", 1e-3)
        assert torch.equal(classifier.head[-1].weight, heads[0])  # type: ignore[index]
        return [Point(1e-3, 2.0, 2.0)]

    monkeypatch.setattr(Parts, "take_head", taking)
    monkeypatch.setattr(range_test, "curve", of_last)
    caplog.set_level("INFO", logger="tl_trainer.range_test")
    assert find_rate(phased(colours, "found"))["words"] is None
    assert "the test is for the last phase; 1 before it train first in a run, and are left out here" in caplog.messages
