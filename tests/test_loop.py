"""fit: what an epoch does, and that a run which is stopped or killed anywhere arrives at the same bytes.

The network is tiny, all of it trains, and its head has dropout, so that weights, BatchNorm statistics, the optimizer,
the schedule and the random state must all come back for a resumed run to give the same weights.
"""

from __future__ import annotations

import csv
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tiny import IMAGES, STEPS, Clock, TinyBatches, tiny_state, tiny_template
from tl_trainer import saver as saver_module
from tl_trainer.checkpoint import load
from tl_trainer.data.dataset import Files, Split
from tl_trainer.errors import Interrupted, RunError
from tl_trainer.evaluate import evaluate
from tl_trainer.feeds import Feed
from tl_trainer.ground.signals import StopRequest
from tl_trainer.loop import Step, Training, fit
from tl_trainer.metrics import Scores
from tl_trainer.run import _pause
from tl_trainer.saver import Saver, State
from tl_trainer.tasks import SingleLabel
from tl_trainer.tracking import Tracker

EPOCHS = 3
EVENTS = EPOCHS * (STEPS + 1)  # the forward pass of each training batch, and each validation
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adam-cosine": ({"name": "adam", "lr": 0.02}, {"name": "cosine", "warmup_epochs": 1.5}),
    "sgd-plateau": ({"name": "sgd", "lr": 0.8}, {"name": "plateau", "patience": 0, "factor": 0.5}),
    "adamw-step": ({"name": "adamw", "lr": 0.02, "weight_decay": 0.1}, {"name": "step", "step_epochs": 1}),
}


class Killed(BaseException):
    """Stands for a process that is killed, which saves nothing."""


@dataclass
class Run:
    """A run of the tiny classifier in a folder; `at` says what happens at which event, counted from 1.

    An hour passes on its clock with each event.
    """

    folder: Path
    recipe: str = "adam-cosine"
    at: dict[int, Callable[[StopRequest], None]] = field(default_factory=dict)
    epochs: int = EPOCHS
    criterion: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    clock: Clock = field(default_factory=Clock)
    events: int = 0

    def train(self) -> State:
        """Begin, or go on where last.pth is."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / "last.pth"
        last = load(path) if path.exists() else None
        state = tiny_state(7 if last else 3, self.epochs, *RECIPES[self.recipe])  # a resume must not need the seed
        stop = StopRequest()
        saver, task = Saver(self.folder, tiny_template(), state), SingleLabel(["a", "b", "c"])
        tracker = Tracker(self.folder, task, self.epochs, tensorboard=False, done=last.epoch if last else 0)
        if last:
            assert last.resume is not None
            state.restore(last.trained, last.resume)
            best = self.folder / "best.pth"
            saver.adopt(load(best) if best.exists() else None)

        def event() -> None:
            self.events += 1
            self.clock.now += 3600
            self.at.get(self.events, lambda _: None)(stop)

        def forward(inputs: Tensor) -> Tensor:
            event()
            logits: Tensor = state.classifier(inputs)
            return logits

        def validate(after_batch: Callable[[], None]) -> Scores:
            event()
            state.classifier.eval()
            device = torch.device("cpu")
            return evaluate(state.classifier, TinyBatches(2, shuffle=False).epoch(0, device), after_batch)

        names = [f"{index}.jpg" for index in range(IMAGES)]
        split = Split(Files([Path(name) for name in names], names), [0] * IMAGES, range(IMAGES))
        step = Step(forward, _Criterion(self.criterion), state.optimizer, state.scaler)
        pause, device = partial(_pause, stop, saver), torch.device("cpu")
        feed = Feed(split, TinyBatches(), forward, forward)
        fit(Training(task, state, feed, step, validate, pause, device, self.epochs), tracker, saver)
        return state


class _Criterion(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.function(logits, targets)


def terminate(stop: StopRequest) -> None:
    stop.signal = signal.SIGTERM


def kill(stop: StopRequest) -> None:
    raise Killed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which to save; with that of a run, everything is saved at every event."""
    clock = Clock()
    monkeypatch.setattr(saver_module, "time", clock)
    return clock


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the one column that is a time."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() != set()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def assert_same_run(found: Path, expected: Path) -> None:
    """The same weights to the bit in best.pth and last.pth, the same figures, the same rows."""
    assert rows(found) == rows(expected)
    for name in ("best.pth", "last.pth"):
        one, other = load(found / name), load(expected / name)
        assert_same_weights(one.trained, other.trained)
        assert (one.epoch, one.metrics, one.frozen) == (other.epoch, other.metrics, other.frozen)


@pytest.fixture(params=RECIPES)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """An uninterrupted run of each recipe."""
    run = Run(tmp_path / "whole", request.param)
    run.train()
    return run


def test_a_run_learns_and_logs_every_epoch(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", epochs=8)
    state = run.train()
    losses = [float(row["val_loss"]) for row in rows(run.folder)]
    assert [row["epoch"] for row in rows(run.folder)] == [str(epoch) for epoch in range(1, 9)]
    assert losses[-1] < 0.8 * losses[0]
    assert run.events == 8 * (STEPS + 1)
    assert state.progress.epoch == 8
    last = load(run.folder / "last.pth")
    assert_same_weights(last.trained, state.classifier.state_dict())
    assert last.epoch == 8


def test_best_pth_is_the_best_row(whole: Run) -> None:
    best = load(whole.folder / "best.pth")
    assert best.metrics is not None
    ranked = max(rows(whole.folder), key=lambda row: (float(row["val_top1"]), -float(row["val_loss"])))
    assert best.epoch == int(ranked["epoch"])
    assert best.metrics["top1"] == float(ranked["val_top1"])
    assert best.metrics["loss"] == float(ranked["val_loss"])


def test_two_runs_are_the_same_to_the_bit(whole: Run, tmp_path: Path) -> None:
    Run(tmp_path / "again", whole.recipe).train()
    assert_same_run(tmp_path / "again", whole.folder)


def test_the_loop_is_a_plain_loop_written_out(tmp_path: Path) -> None:
    """Against the textbook: the rate, the steps, the mean loss over images and the rate of the last step are logged."""
    run = Run(tmp_path / "run")
    trained = run.train().classifier.state_dict()
    state = tiny_state(3, EPOCHS, *RECIPES["adam-cosine"])
    classifier, optimizer = state.classifier.train(), torch.optim.Adam(state.classifier.parameters(), lr=0.02)
    for epoch in range(EPOCHS):
        total = 0.0
        for step, batch in enumerate(TinyBatches().epoch(epoch, torch.device("cpu")), start=epoch * STEPS):
            warm, length = min(1.0, (step + 1) / 6), EPOCHS * STEPS - 6
            rate = 0.02 * warm * 0.5 * (1 + math.cos(math.pi * max(0, step - 6) / length))
            optimizer.param_groups[0]["lr"] = rate
            loss = functional.cross_entropy(classifier(batch.inputs), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch.targets)
        assert float(rows(run.folder)[epoch]["train_loss"]) == pytest.approx(total / IMAGES, rel=1e-6)
        assert float(rows(run.folder)[epoch]["lr"]) == pytest.approx(rate)
    for key, value in classifier.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=1e-5, atol=1e-6)


def test_plateau_cuts_the_rate_after_an_epoch_that_was_worse(tmp_path: Path) -> None:
    Run(tmp_path / "run", "sgd-plateau").train()
    first, second, third = rows(tmp_path / "run")
    assert float(second["val_loss"]) > float(first["val_loss"])
    assert [row["lr"] for row in (first, second, third)] == ["0.8", "0.8", "0.4"]


@pytest.mark.parametrize("event", range(1, EVENTS + 1))
def test_a_run_that_is_stopped_anywhere_arrives_at_the_same(whole: Run, tmp_path: Path, event: int) -> None:
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted) as caught:
        Run(folder, whole.recipe, {event: terminate}).train()
    assert caught.value.exit_code == 143
    assert load(folder / "last.pth").epoch == (event - 1) // (STEPS + 1)
    Run(folder, whole.recipe).train()
    assert_same_run(folder, whole.folder)


def test_a_run_that_is_stopped_again_and_again_arrives_at_the_same(whole: Run, tmp_path: Path) -> None:
    folder, stops = tmp_path / "stopped", 0
    for _ in range(EVENTS + 1):  # each goes at least one event further
        try:
            Run(folder, whole.recipe, {2: terminate}).train()
            break
        except Interrupted:
            stops += 1
    assert EVENTS // 2 <= stops <= EVENTS
    assert_same_run(folder, whole.folder)


@pytest.mark.parametrize("event", range(2, EVENTS + 1))
def test_a_run_that_is_killed_anywhere_arrives_at_the_same(
    whole: Run, tmp_path: Path, event: int, clock: Clock
) -> None:
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        Run(folder, whole.recipe, {event: kill}, clock=clock).train()
    assert load(folder / "last.pth").epoch == (event - 2) // (STEPS + 1)
    Run(folder, whole.recipe).train()
    assert_same_run(folder, whole.folder)


def test_a_run_that_is_killed_before_any_write_arrives_at_the_same(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Also between best.pth and last.pth, which are then from different moments."""
    real, writes = saver_module.save, 0

    def counting(*arguments: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == fatal:
            raise Killed
        real(*arguments)

    monkeypatch.setattr(saver_module, "save", counting)
    kills = 0
    for fatal in range(1, 100):
        writes, folder = 0, tmp_path / f"killed-{fatal}"
        try:
            Run(folder, whole.recipe, clock=clock).train()
        except Killed:
            kills += 1
            Run(folder, whole.recipe).train()
        assert_same_run(folder, whole.folder)
        if writes < fatal:
            break
    assert kills >= EVENTS  # a last.pth per event and a best.pth per improvement


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("event", "where"), [(1, "epoch 1/3, batch 1/4"), (8, "epoch 2/3, batch 3/4")])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_batch(
    tmp_path: Path, value: float, event: int, where: str, clock: Clock
) -> None:
    run = Run(tmp_path / "run", clock=clock)
    run.criterion = lambda logits, targets: logits.sum() * value if run.events == event else logits.square().mean()
    with pytest.raises(
        RunError, match=rf"the loss is -?(nan|inf) in {where} \(\d+\.jpg, \d+\.jpg, \d+\.jpg and 3 more\);.* --lr"
    ) as caught:
        run.train()
    assert caught.value.exit_code == 1
    assert_finite(run.folder, written=event > 1)


def exploding(run: Run, event: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy whose gradient, but not its value, is infinite at an event."""

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits, targets)
        if run.events == event:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    return criterion


@pytest.mark.parametrize("often", [True, False])
@pytest.mark.parametrize("event", [event for event in range(1, EVENTS + 1) if event % (STEPS + 1)])
def test_weights_that_explode_at_any_batch_are_never_written(
    tmp_path: Path, event: int, often: bool, clock: Clock
) -> None:
    run = Run(tmp_path / "run", clock=clock if often else Clock())
    run.criterion = exploding(run, event)
    with pytest.raises(RunError, match=r"(loss is nan (in|after)|not finite after) epoch \d"):
        run.train()
    assert_finite(run.folder, written=often and event > 1)


def assert_finite(folder: Path, *, written: bool) -> None:
    paths = sorted(folder.glob("*.pth"))
    assert bool(paths) == written
    for path in paths:
        saved = load(path)
        assert all(value.isfinite().all() for value in saved.trained.values()), path
        assert saved.metrics is None or math.isfinite(saved.metrics["loss"])
        if saved.resume:
            states = saved.resume["optimizer"]["state"].values()
            assert all(value.isfinite().all() for state in states for value in state.values())
