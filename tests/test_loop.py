"""fit: what an epoch does, and that a run which is stopped or killed anywhere arrives at the same bytes.

The network is tiny, all of it trains, and its head has dropout, so that weights, BatchNorm statistics, the optimizer,
the schedule and the random state must all come back for a resumed run to give the same weights.
"""

from __future__ import annotations

import copy
import csv
import itertools
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from tiny import BATCH_SIZE, IMAGES, STEPS, Clock, FakeDevice, TinyBatches, tiny_state, tiny_template
from tl_trainer import optim
from tl_trainer import saver as saver_module
from tl_trainer.checkpoint import load
from tl_trainer.config.training import FIGURES_OF, OptimizerSection, StopSection
from tl_trainer.data.dataset import Files, Split
from tl_trainer.data.loaders import Batch
from tl_trainer.errors import Interrupted, RunError
from tl_trainer.evaluate import evaluate
from tl_trainer.feeds import Feed
from tl_trainer.ground.signals import StopRequest
from tl_trainer.loop import Gather, Mix, Step, Training, fit
from tl_trainer.metrics import Figures, Scores
from tl_trainer.optim import Average, Soup
from tl_trainer.run import _pause
from tl_trainer.saver import Saver, State
from tl_trainer.single_label import SingleLabel
from tl_trainer.tracking import Tracker

EPOCHS = 3
EVENTS = EPOCHS * (STEPS + 1)  # the forward pass of each training batch, and each validation
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adam-cosine": ({"name": "adam", "lr": 0.02}, {"name": "cosine", "warmup_epochs": 1.5}),
    "sgd-plateau": ({"name": "sgd", "lr": 0.8}, {"name": "plateau", "patience": 0, "factor": 0.5}),
    "adamw-step": ({"name": "adamw", "lr": 0.02, "weight_decay": 0.1}, {"name": "step", "step_epochs": 1}),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw-step": {"clip_norm": 0.5, "accumulate": 3}
}  # updates of 3 batches and of 1


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
    task: SingleLabel = field(default_factory=lambda: SingleLabel(["a", "b", "c"]))
    clock: Clock = field(default_factory=Clock)
    stop: StopSection = field(default_factory=StopSection)
    events: int = 0

    def train(self) -> State:
        """Begin, or go on where last.pth is."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / "last.pth"
        last = load(path) if path.exists() else None
        state = tiny_state(7 if last else 3, self.epochs, *RECIPES[self.recipe])  # a resume must not need the seed
        if self.recipe == "sgd-plateau":
            state.average = Average(state.classifier.trained_state(), 0.9)
        if self.recipe == "adam-cosine":
            state.soup = Soup(2)
        stop = StopRequest()
        saver = Saver(self.folder, tiny_template(), state)
        tracker = Tracker(self.folder, self.task, self.epochs, tensorboard=False, done=last.epoch if last else 0)
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
        step = make_step(state, self.criterion, state.scaler, forward, **OPTIONS.get(self.recipe, {}))
        mix = Mix([v2.MixUp(alpha=0.4, num_classes=3), v2.CutMix(alpha=1.0, num_classes=3)], state, 0)
        step = replace(step, average=state.average, mix=mix if self.recipe == "adamw-step" else None)
        pause, device = partial(_pause, stop, saver), torch.device("cpu")
        feed = Feed(split, TinyBatches(), forward, forward)
        until = self.epochs - state.progress.skipped
        training = Training(self.task, state, feed, step, validate, pause, device, until, self.epochs, self.stop)
        fit(training, tracker, saver)
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
        if one.resume and "average" in one.resume:
            assert_same_weights(one.resume["average"][1], (other.resume or {})["average"][1])
        if one.resume and "soup" in one.resume:
            soups = [(resume or {})["soup"] for resume in (one.resume, other.resume)]
            for (*left, tensors), (*right, others) in zip(*soups, strict=True):
                assert left == right
                assert_same_weights(tensors, others)
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


class LowestLoss(SingleLabel):
    """Another idea of the best epoch, and one figure that it shows."""

    columns = ("loss",)

    def better(self, figures: Figures, best: Figures) -> bool:
        return figures["loss"] < best["loss"]

    def in_words(self, figures: Figures) -> str:
        return "no other"


@pytest.mark.parametrize("worst_first", [False, True])
def test_the_task_says_which_epoch_is_the_best_and_what_is_logged(
    tmp_path: Path, worst_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = LowestLoss(["a", "b", "c"])
    if worst_first:
        monkeypatch.setattr(LowestLoss, "better", lambda self, figures, best: figures["loss"] > best["loss"])
    run = Run(tmp_path / "run", "sgd-plateau", epochs=4, task=task)
    run.train()
    assert list(rows(run.folder)[0]) == ["epoch", "train_loss", "val_loss", "lr"]
    losses = [float(row["val_loss"]) for row in rows(run.folder)]
    wanted = max(losses) if worst_first else min(losses)
    best = load(run.folder / "best.pth")
    assert best.metrics is not None
    assert (best.epoch, best.metrics["loss"]) == (losses.index(wanted) + 1, wanted)


def test_plateau_cuts_the_rate_after_an_epoch_that_was_worse(tmp_path: Path) -> None:
    Run(tmp_path / "run", "sgd-plateau", task=SingleLabel(["a", "b", "c"], best="loss")).train()
    first, second, third = rows(tmp_path / "run")
    assert float(second["val_loss"]) > float(first["val_loss"])
    assert [row["lr"] for row in (first, second, third)] == ["0.8", "0.8", "0.4"]


@pytest.mark.parametrize("metric", FIGURES_OF["single"])
def test_a_phase_ends_early_where_a_figure_stands_still(
    tmp_path: Path, metric: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """At the epoch that the figures of the whole run say; and with more epochs it goes on."""
    task, least = SingleLabel(["a", "b", "c"], stop=metric), 0.02
    Run(tmp_path / "whole", epochs=30, task=task).train()
    sign = -1 if metric == "loss" else 1
    values = [sign * float(row[f"val_{metric}"]) for row in rows(tmp_path / "whole")]
    best = last = 0
    for epoch, value in enumerate(values):
        best = epoch if value > values[best] + least else best
        if epoch - best == 2:
            last = epoch + 1
            break
    assert 2 < last < 30
    stop, folder = StopSection(metric=metric, patience=2, min_delta=least), tmp_path / "run"
    caplog.set_level("INFO", logger="tl_trainer")
    with pytest.raises(Interrupted):
        Run(folder, epochs=30, task=task, stop=stop, at={last * (STEPS + 1) - 2: terminate}).train()
    progress = Run(folder, epochs=30, task=task, stop=stop).train().progress
    assert (progress.epoch, progress.passed) == (last, 30)
    assert rows(folder) == rows(tmp_path / "whole")[:last]
    assert f"stopped after epoch {last}: {metric} was no better for 2 epochs (train.stop)" in caplog.messages
    assert Run(folder, epochs=30, task=task, stop=stop).train().progress == progress


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
    """Also between best.pth and last.pth, which are of different moments then. The recipes take turns at the writes."""
    real, writes = saver_module.save, 0

    def counting(*arguments: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == fatal:
            raise Killed
        real(*arguments)

    monkeypatch.setattr(saver_module, "save", counting)
    kills = 0
    for fatal in range(1 + list(RECIPES).index(whole.recipe), 100, len(RECIPES)):
        writes, folder = 0, tmp_path / f"killed-{fatal}"
        try:
            Run(folder, whole.recipe, clock=clock).train()
        except Killed:
            kills += 1
            Run(folder, whole.recipe).train()
        assert_same_run(folder, whole.folder)
        if writes < fatal:
            break
    assert kills >= EVENTS // len(RECIPES)  # a last.pth per event and a best.pth per improvement


def make_step(
    state: State,
    criterion: Callable[[Tensor, Tensor], Tensor],
    scaler: torch.amp.GradScaler,
    forward: Callable[[Tensor], Tensor] | None = None,
    *,
    clip_norm: float | None = None,
    accumulate: int = 1,
) -> Step:
    gather = Gather(state, STEPS, accumulate) if accumulate > 1 else None
    forward = forward or state.classifier.train()
    return Step(forward, _Criterion(criterion), state.optimizer, scaler, clip_norm, gather)


def first_batch() -> Batch:
    return next(TinyBatches().epoch(0, torch.device("cpu")))


def copied(step: Step, state: State) -> Any:
    """All that a step may change but BatchNorm's statistics, which the forward pass moves."""
    weights = {name: (value, value.grad) for name, value in state.classifier.named_parameters()}
    return copy.deepcopy((weights, state.optimizer.state_dict(), step.scaler.state_dict()))


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def mix(state: State, *ways: Any, seed: int = 0) -> Mix:
    return Mix([way(alpha=0.7, num_classes=3) for way in ways], state, seed)


@pytest.mark.parametrize("way", [v2.MixUp, v2.CutMix])
def test_mixed_images_are_parts_of_two_and_so_are_their_targets(way: Any) -> None:
    state, batch = tiny_state(3, EPOCHS, *RECIPES["adam-cosine"]), first_batch()
    before = torch.get_rng_state()
    inputs, targets = mix(state, way)(batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(BATCH_SIZE))
    row = int((batch.targets != batch.targets.roll(1)).nonzero()[0])
    weight = targets[row, batch.targets[row]].item()
    assert 0 < weight < 1
    other = batch.inputs.roll(1, 0)
    if way is v2.MixUp:
        torch.testing.assert_close(inputs, weight * batch.inputs + (1 - weight) * other)
    else:
        own = (inputs == batch.inputs).flatten(1).float().mean(dim=1)
        torch.testing.assert_close(own, torch.full((BATCH_SIZE,), weight))
        assert ((inputs == batch.inputs) | (inputs == other)).all()


def test_a_mixture_depends_on_seed_epoch_and_batch_alone() -> None:
    state, batch = tiny_state(3, EPOCHS, *RECIPES["adam-cosine"]), first_batch()
    seen = []
    for epoch, number, seed in itertools.product(range(2), repeat=3):
        state.progress.epoch, state.progress.batch = epoch, number
        mixing = mix(state, v2.MixUp, v2.CutMix, seed=seed)
        seen.append(mixing(batch)[0])
        torch.rand(3)
        assert torch.equal(mixing(batch)[0], seen[-1])
    assert len({tuple(inputs.flatten().tolist()) for inputs in seen}) == 8


def test_a_step_learns_the_mixture() -> None:
    """Features are mixed as images are, and the loss is that of the mixed targets."""
    state, inputs = tiny_state(3, EPOCHS, *RECIPES["adam-cosine"]), torch.randn(4, 3)
    batch = Batch(inputs, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    step = make_step(state, functional.cross_entropy, torch.amp.GradScaler("cpu", enabled=False), lambda x: x)
    mixed, targets = (mixing := mix(state, v2.MixUp))(batch)
    assert mixed.shape == inputs.shape
    expected = -(targets * mixed.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(replace(step, mix=mixing).loss(batch), expected)
    assert step.loss(batch) != expected


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_gives_the_loss_before_its_update(scaled: bool) -> None:
    state, scaler = tiny_state(3, EPOCHS, *RECIPES["adam-cosine"]), torch.amp.GradScaler("cpu", enabled=scaled)
    for module in state.classifier.head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that a second pass gives the same
    step, losses = make_step(state, functional.cross_entropy, scaler), []
    for _ in range(5):
        losses.append(step.loss(first_batch()).item())
        assert step(first_batch()) == pytest.approx(losses[-1], rel=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_are_those_of_the_scaled_loss() -> None:
    """Else small ones would vanish in fp16; the scaler takes the scale back out before the update."""
    found = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1024.0)):
        state = tiny_state(3, EPOCHS, *RECIPES["sgd-plateau"])
        weight = state.classifier.head[-1].weight
        weight.register_hook(found.append)
        torch.manual_seed(0)  # of the dropout
        make_step(state, functional.cross_entropy, scaler)(first_batch())
        found.append(weight.detach().clone())
    plain, after_plain, scaled, after_scaled = found
    assert torch.equal(scaled, 1024 * plain)
    assert torch.equal(after_scaled, after_plain)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("limit", [0.01, 0.3, 1e6])
def test_clipping_bounds_the_norm_of_all_gradients_and_keeps_their_direction(limit: float, scaled: bool) -> None:
    moves = []
    for clip_norm in (None, limit):
        state = tiny_state(3, EPOCHS, {"name": "sgd", "lr": 1.0, "momentum": 0.0}, {})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        before = nn.utils.parameters_to_vector(state.classifier.parameters()).detach()
        torch.manual_seed(0)  # of the dropout
        make_step(state, functional.cross_entropy, scaler, clip_norm=clip_norm)(first_batch())
        moves.append(nn.utils.parameters_to_vector(state.classifier.parameters()).detach() - before)
    free, clipped = moves
    wanted = free * min(1.0, limit / free.norm().item())
    torch.testing.assert_close(clipped, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", [{"name": "sgd", "lr": 0.5}, {"name": "adamw", "lr": 0.01}])
@pytest.mark.parametrize(("parts", "accumulate"), [([8, 8, 8, 8], 4), ([8, 8, 8, 5], 4), ([12, 12, 12, 4], 3)])
def test_accumulated_batches_are_one_large_batch(optimizer: dict[str, Any], parts: list[int], accumulate: int) -> None:
    """Also where the last batch is smaller, and where the last group has fewer batches; without BatchNorm."""
    batch = Batch(torch.randn(sum(parts), 6), torch.arange(sum(parts)) % 3, torch.arange(sum(parts)))
    pieces = [Batch(*columns) for columns in zip(*(column.split(parts) for column in batch[:3]), strict=True)]
    groups = [pieces[first : first + accumulate] for first in range(0, len(pieces), accumulate)]
    found = []
    for gathers in (True, False):
        torch.manual_seed(0)
        state = tiny_state(3, EPOCHS, optimizer, {})
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        updates = optim.build_optimizer(network.parameters(), OptimizerSection(**optimizer))
        gather = Gather(state, len(pieces), accumulate) if gathers else None
        step = Step(network, nn.CrossEntropyLoss(), updates, state.scaler, gather=gather)
        whole = [Batch(*map(torch.cat, list(zip(*group, strict=True))[:3])) for group in groups]
        for each in pieces if gathers else whole:
            step(each)
            state.progress.batch_ended(0.0, len(each.targets), 0.0)
        found.append(nn.utils.parameters_to_vector(network.parameters()).detach())
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_the_loss_of_a_batch_updates_nothing() -> None:
    state = tiny_state(3, EPOCHS, *RECIPES["adam-cosine"])
    step = make_step(state, functional.cross_entropy, state.scaler)
    before = copied(step, state)
    assert step.loss(first_batch()).requires_grad
    assert same(copied(step, state), before)


class OnGpu(Tensor):
    """A loss that says that it is on a GPU."""

    device = property(lambda _: torch.device("cuda:1"))


def test_on_a_gpu_the_update_is_launched_before_the_loss_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []

    class Event:
        def record(self, stream: object) -> None:
            happened.append(f"copied on {stream}")

        def synchronize(self) -> None:
            happened.append("waited")

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits, targets)
        loss.register_hook(lambda _: happened.append("backward"))
        return loss.as_subclass(OnGpu)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"a stream of {device}")
    expected, found = (tiny_state(3, EPOCHS, *RECIPES["sgd-plateau"]) for _ in range(2))
    torch.manual_seed(0)  # of the dropout
    loss = make_step(expected, functional.cross_entropy, expected.scaler)(first_batch())
    torch.manual_seed(0)
    with FakeDevice():
        assert make_step(found, criterion, found.scaler)(first_batch()) == loss
    assert happened == ["copied on a stream of cuda:1", "backward", "waited"]
    assert same(found.classifier.state_dict(), expected.classifier.state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_loss_that_is_not_finite_updates_nothing(value: float, scaled: bool, steps: int) -> None:
    """Neither weights nor the optimizer's state nor the loss scale, and the gradients are those of the step before."""
    state, scaler = tiny_state(3, EPOCHS, *RECIPES["adam-cosine"]), torch.amp.GradScaler("cpu", enabled=scaled)
    good = make_step(state, functional.cross_entropy, scaler)
    for _ in range(steps):
        assert math.isfinite(good(first_batch()))
    before = copied(good, state)
    bad = make_step(state, lambda logits, targets: functional.cross_entropy(logits, targets) * 0 + value, scaler)
    assert str(bad(first_batch())) == str(value)
    assert same(copied(bad, state), before)
    good(first_batch())
    assert not same(copied(good, state), before), "nothing is ever updated, so the test shows nothing"


def test_a_gradient_that_is_not_finite_lowers_the_loss_scale_and_updates_nothing() -> None:
    """As fp16 needs it; the loss is finite, and training goes on."""
    state, scaler = tiny_state(3, EPOCHS, *RECIPES["adam-cosine"]), torch.amp.GradScaler("cpu", init_scale=1024.0)

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits, targets)
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    before = copy.deepcopy(dict(state.classifier.named_parameters()))
    assert math.isfinite(make_step(state, criterion, scaler)(first_batch()))
    assert same(dict(state.classifier.named_parameters()), before)
    assert state.optimizer.state_dict()["state"] == {}
    assert scaler.get_scale() == 512.0
    make_step(state, functional.cross_entropy, scaler)(first_batch())
    assert not same(dict(state.classifier.named_parameters()), before)


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
