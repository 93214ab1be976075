"""What of a run reaches the disk, in which order, and that it comes back bit for bit.

A best.pth is restored the way tl-eval and tl-predict do it: from the one file, with nothing cached and no network.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import ShuffleNet_V2_X0_5_Weights

from tiny import SCORES, Clock, TinyBatches, tiny_classifier, tiny_state, tiny_template
from tl_trainer import saver as saver_module
from tl_trainer.assembly import restore
from tl_trainer.checkpoint import load
from tl_trainer.config.schema import Config, ModelSection
from tl_trainer.errors import CheckpointError, InputError, Interrupted, RunError
from tl_trainer.ground.files import previous
from tl_trainer.ground.signals import StopRequest
from tl_trainer.metrics import Figures, Scores
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.heads import build_head
from tl_trainer.models.weights import state_hash
from tl_trainer.optim import Average, Schedule
from tl_trainer.run import _pause
from tl_trainer.saver import EpochDone, Progress, Saver, State, Wait
from tl_trainer.single_label import SingleLabel

ADAM, SGD = {"name": "adam", "lr": 0.01}, {"name": "sgd", "lr": 0.01}
PLATEAU = {"name": "plateau", "patience": 0}
NAME, WEIGHTS = "shufflenet_v2_x0_5", ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
FIGURES = {"loss": 0.5, "top1": 0.75, "top5": 1.0, "n": 8}
BETTER = SingleLabel(["a", "b", "c"]).better


def make_state(seed: int = 0, optimizer: dict[str, Any] = ADAM, trainable: str = "all") -> State:
    return tiny_state(seed, 5, optimizer, PLATEAU, trainable)


def make_saver(run_dir: Path, state: State) -> Saver:
    return Saver(run_dir, tiny_template(), state)


def steps(state: State, count: int) -> None:
    state.classifier.train()
    for batch in list(TinyBatches().epoch(0, torch.device("cpu")))[:count]:
        state.optimizer.zero_grad()
        functional.cross_entropy(state.classifier(batch.inputs), batch.targets).backward()
        state.optimizer.step()
        state.progress.batch_ended(0.5, len(batch.targets), 1.0)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_average_that_is_better_is_what_is_kept(tmp_path: Path) -> None:
    state = tiny_state(3, 2, {}, {})
    state.average = Average(state.classifier.trained_state(), 0.9)
    saver = Saver(tmp_path, tiny_template(), state)
    for value in state.classifier.trained_state().values():
        value += 1
    for better in (False, True):
        state.average.better = better
        saver.improved(SCORES)
        assert saver.best is not None
        kept = state.average.tensors if better else state.classifier.trained_state()
        assert all(torch.equal(value, saver.best.trained[key]) for key, value in kept.items())


@pytest.mark.parametrize(
    ("figures", "better"),
    [
        ({"loss": 0.5, "top1": 0.75, "top5": 1.0, "n": 8}, False),  # the same
        ({"loss": 0.4, "top1": 0.75, "top5": 0.9, "n": 8}, True),  # as many right, a lower loss
        ({"loss": 0.6, "top1": 0.75, "top5": 1.0, "n": 8}, False),
        ({"loss": 0.9, "top1": 0.875, "top5": 0.9, "n": 8}, True),  # more right, whatever the loss
        ({"loss": 0.1, "top1": 0.625, "top5": 1.0, "n": 8}, False),
    ],
)
def test_the_best_epoch_has_the_highest_top1_then_the_lowest_loss(figures: Figures, better: bool) -> None:
    progress = Progress()
    assert progress.epoch_ended(FIGURES, BETTER).improved
    assert progress.epoch_ended(figures, BETTER).improved == better
    assert progress.epoch == 2
    assert progress.best_epoch == (2 if better else 1)
    assert progress.best == (figures if better else FIGURES)


def test_an_epoch_that_ended_leaves_nothing_of_its_batches() -> None:
    before = {"epoch": 3, "best_epoch": 1, "best": {**FIGURES, "top1": 0.5}}
    progress = Progress(**before, batch=4, loss=2.5, images=11, seconds=1.5)
    assert progress.epoch_ended(FIGURES, BETTER) == EpochDone(4, 2.5 / 11, 1.5, 11, True)
    assert progress == Progress(epoch=4, best_epoch=4, best=FIGURES, of_best=Wait(best=FIGURES))


@pytest.mark.parametrize(
    "forged",
    [
        {"epoch": -1}, {"epoch": 1.0}, {"epoch": True}, {"batch": -2}, {"images": "many"}, {"loss": math.nan},
        {"seconds": math.inf}, {"best_epoch": 3}, {"best": None}, {"epoch": 0}, {"batch": 1}, {"images": 5},
        {"another": 1}, {"best": {"loss": None}}, {"best": [1]},
        {"epoch": None}, {"epoch": "2"}, {"batch": 1.0, "images": 5}, {"batch": 1, "images": -5}, {"loss": "0"},
        {"loss": None}, {"loss": True}, {"loss": -math.inf}, {"seconds": math.nan}, {"seconds": "1"},
        {"best_epoch": -1}, {"best_epoch": True}, {"best": {**FIGURES, "loss": math.nan}},
        {"best": {**FIGURES, "loss": math.inf}}, {"best": {**FIGURES, "loss": True}},
        {"best": {**FIGURES, "loss": "0.5"}}, {"best": {1: 0.5}},
    ],
)  # fmt: skip
def test_forged_progress_is_refused(forged: dict[str, Any]) -> None:
    plain = Progress(epoch=2, best_epoch=1, best=FIGURES).model_dump()
    assert Progress.model_validate(plain).model_dump() == plain
    with pytest.raises(ValueError, match="validation error"):
        Progress.model_validate({**plain, **forged})


@pytest.mark.parametrize("forged", [None, [], "progress", 3, {"best": FIGURES}, [("epoch", 2)]])
def test_what_is_no_progress_at_all_is_refused(forged: Any) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Progress.model_validate(forged)


def test_the_mean_loss_of_an_epoch_is_over_images() -> None:
    progress = Progress()
    for batch, (loss, images) in enumerate([(1.0, 6), (3.0, 6), (2.0, 1)], start=1):
        progress.batch_ended(loss, images, batch / 2)
        assert Progress.model_validate(progress.model_dump()) == progress, "no resume after this batch"
    assert (progress.batch, progress.images, progress.seconds) == (3, 13, 1.5)
    assert progress.epoch_ended(FIGURES, BETTER) == EpochDone(1, 26 / 13, 1.5, 13, True)


@pytest.mark.parametrize("optimizer", [ADAM, SGD])
def test_a_resume_restores_everything_bit_for_bit(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    before = make_state(0, optimizer)
    for waited in (0, 1, 0):
        before.schedule.epoch_ended(waited)
    before.progress.epoch_ended(FIGURES, BETTER)
    before.progress.of_stop.epoch_ended(FIGURES, BETTER)
    steps(before, 3)
    before.progress.loss, before.progress.seconds = 0.1 + 0.2, math.pi
    make_saver(tmp_path, before).save()
    optimizer_state = copy.deepcopy(before.optimizer.state_dict())
    draws = torch.rand(5)

    after = make_state(1, optimizer)
    torch.rand(17)
    last = load(tmp_path / "last.pth")
    assert last.resume is not None
    after.restore(last.trained, last.resume)
    assert torch.equal(torch.rand(5), draws)
    assert same(after.classifier.state_dict(), before.classifier.state_dict())
    assert after.progress == before.progress
    assert after.schedule.plateau == before.schedule.plateau == 0.1
    found = after.optimizer.state_dict()
    assert found["param_groups"] == optimizer_state["param_groups"]
    assert found["state"].keys() == optimizer_state["state"].keys() != set()
    assert all(same(found["state"][index], values) for index, values in optimizer_state["state"].items())


def test_the_random_state_of_a_gpu_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    place, state, found = torch.device("cuda:1"), make_state(), []
    monkeypatch.setattr(State, "_device", place)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([7, device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: found.append((value.tolist(), device)))
    state.restore(state.classifier.trained_state(), state.resume_data())
    assert found == [([7, 1], place)]


def test_a_loss_scale_is_kept(tmp_path: Path) -> None:
    before, after = make_state(), make_state()
    before.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    after.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before.scaler.scale(torch.zeros(1))
    make_saver(tmp_path, before).save()
    last = load(tmp_path / "last.pth")
    assert last.resume is not None
    after.restore(last.trained, last.resume)
    assert after.scaler.get_scale() == 1024.0


def test_best_pth_has_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    state = make_state()
    saver = make_saver(tmp_path, state)
    steps(state, 2)
    state.progress.epoch_ended(FIGURES, BETTER)
    saver.improved(SCORES)
    best = copied(state.classifier.state_dict())
    steps(state, 2)
    saver.save()
    found, last = load(tmp_path / "best.pth"), load(tmp_path / "last.pth")
    assert same(found.trained, best)
    assert same(last.trained, state.classifier.state_dict())
    assert not same(last.trained, best)
    assert (found.epoch, found.metrics, found.resume) == (1, FIGURES, None)
    assert (last.epoch, last.metrics) == (1, FIGURES)


def test_both_files_carry_what_the_run_has_in_common(tmp_path: Path) -> None:
    state = make_state()
    saver = make_saver(tmp_path, state)
    state.progress.epoch_ended(FIGURES, BETTER)
    saver.improved(SCORES)
    saver.finish()
    for name in ("best.pth", "last.pth"):
        found = replace(
            load(tmp_path / name),
            **{"trained": {}, "frozen": None, "epoch": 0, "metrics": None, "conformal": None, "resume": None},
        )
        assert found == tiny_template()


@pytest.mark.parametrize(("blocked", "written"), [("last.pth", ["best.pth"]), ("best.pth", [])])
def test_best_is_written_before_last_which_counts_on_it(tmp_path: Path, blocked: str, written: list[str]) -> None:
    state = make_state()
    saver = make_saver(tmp_path, state)
    state.progress.epoch_ended(FIGURES, BETTER)
    saver.improved(SCORES)
    (tmp_path / blocked).mkdir()
    with pytest.raises(RunError, match=f"cannot write .*{blocked}"):
        saver.save()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == written


def test_the_logs_are_flushed_before_last_which_counts_on_them(tmp_path: Path) -> None:
    there: list[bool] = []
    state = make_state()
    flush = lambda: there.append((tmp_path / "last.pth").exists())  # noqa: E731
    Saver(tmp_path, tiny_template(), state, flush=flush).save()
    assert there == [False]


def test_the_backbone_is_written_once_at_the_end(tmp_path: Path) -> None:
    state = make_state(trainable="2")
    saver = make_saver(tmp_path, state)
    state.progress.epoch_ended(FIGURES, BETTER)
    saver.improved(SCORES)
    saver.save()
    assert load(tmp_path / "best.pth").frozen is None
    saver.finish()
    best, last = load(tmp_path / "best.pth"), load(tmp_path / "last.pth")
    assert best.frozen is not None
    assert same({**best.frozen, **best.trained}, state.classifier.state_dict())
    assert {key.split(".")[2] for key in best.frozen} == {"0", "1"}
    assert last.frozen is None


def test_the_temperature_is_fitted_once_at_the_end(tmp_path: Path) -> None:
    asked: list[Scores] = []

    def calibrate(scores: Scores) -> float:
        asked.append(scores)
        return 1.5

    state = make_state()
    saver = Saver(tmp_path, tiny_template(), state, calibrate=calibrate)
    state.progress.epoch_ended(FIGURES, BETTER)
    saver.improved(SCORES)
    saver.save()
    assert load(tmp_path / "best.pth").temperature is None
    saver.finish()
    assert load(tmp_path / "best.pth").temperature == 1.5
    saver.finish()
    assert asked == [SCORES]


@pytest.mark.parametrize("temperature", [1.5, None])
def test_the_calibration_that_a_killed_run_lacks_is_made_up(tmp_path: Path, temperature: float | None) -> None:
    state = make_state()
    killed = make_saver(tmp_path, state)
    state.progress.epoch_ended(FIGURES, BETTER)
    killed.improved(SCORES)
    killed.save()
    resumed = Saver(tmp_path, tiny_template(), state, calibrate=lambda _: temperature)
    resumed.adopt(load(tmp_path / "best.pth"))
    resumed.finish()
    assert load(tmp_path / "best.pth").conformal is None  # no scores: an earlier session had them
    resumed.calibrate_best(SCORES)
    best = load(tmp_path / "best.pth")
    assert best.temperature == temperature
    assert best.conformal is not None
    assert len(best.conformal) == len(SCORES.targets)
    (tmp_path / "best.pth").unlink()
    resumed.calibrate_best(SCORES)
    assert not (tmp_path / "best.pth").exists()


def test_a_best_pth_that_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    state = make_state()
    saver = make_saver(tmp_path, state)
    state.progress.epoch_ended(FIGURES, BETTER)
    saver.improved(SCORES)
    saver.finish()
    resumed = make_saver(tmp_path, state)
    resumed.adopt(load(tmp_path / "best.pth"))
    (tmp_path / "best.pth").unlink()
    saver.save()
    resumed.finish()
    assert not (tmp_path / "best.pth").exists()
    resumed.improved(SCORES)
    resumed.finish()
    assert load(tmp_path / "best.pth").frozen == {}


WORSE = {**FIGURES, "top1": 0.5}


def test_a_best_pth_that_is_newer_than_last_pth_counts_once_its_epoch_was_trained_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where last.pth is damaged and the one before it is taken, on a GPU that does not compute the same again."""
    caplog.set_level(logging.INFO)
    state = make_state()
    saver = make_saver(tmp_path, state)
    state.progress.epoch_ended(WORSE, BETTER)
    saver.adopt(replace(tiny_template(), epoch=3, metrics=FIGURES))
    saver.save()
    assert caplog.messages == [
        "best.pth is from epoch 3 and last.pth from an earlier one: the epochs in between are trained again"
    ]
    for _ in range(2):
        assert load(tmp_path / "last.pth").metrics == WORSE
        assert not state.progress.epoch_ended(WORSE, BETTER).improved
    saver.save()
    assert (state.progress.best_epoch, state.progress.best) == (3, FIGURES)
    assert load(tmp_path / "last.pth").metrics == FIGURES
    assert caplog.messages[1:] == ["best.pth is of epoch 3, not 1, so that epoch is the best"]


def test_a_best_pth_that_is_older_than_last_pth_says_counts_at_once(tmp_path: Path) -> None:
    state = make_state()
    for figures in (WORSE, FIGURES):
        state.progress.epoch_ended(figures, BETTER)
    make_saver(tmp_path, state).adopt(replace(tiny_template(), epoch=1, metrics=WORSE))
    assert (state.progress.best_epoch, state.progress.best) == (1, WORSE)


def test_a_run_without_an_epoch_has_no_best(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, make_state())
    saver.adopt(None)
    saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_it_saves_only_where_the_last_time_is_long_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(saver_module, "time", clock)
    saver = make_saver(tmp_path, make_state())
    clock.now = 4.0
    saver.save_if_due()
    assert not (tmp_path / "last.pth").exists()
    clock.now = 6.0
    saver.save_if_due()
    assert (tmp_path / "last.pth").exists()


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(), []

    def slow_save(*_: object) -> None:
        times.append(clock.now)
        clock.now += 3.0

    monkeypatch.setattr(saver_module, "time", clock)
    monkeypatch.setattr(saver_module, "save", slow_save)
    saver = make_saver(tmp_path, make_state())
    for _ in range(200):
        clock.now += 1.0
        saver.save_if_due()
    assert times == [6.0, 70.0, 134.0, 198.0]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_everything_is_saved(tmp_path: Path, number: int, exit_code: int) -> None:
    state = make_state(trainable="2")
    saver = make_saver(tmp_path, state)
    state.progress.epoch_ended(FIGURES, BETTER)
    saver.improved(SCORES)
    steps(state, 2)
    stop = StopRequest()
    _pause(stop, saver)
    assert not (tmp_path / "last.pth").exists()
    stop.signal = number
    with pytest.raises(Interrupted, match=f"--resume {tmp_path}") as caught:
        _pause(stop, saver)
    assert caught.value.exit_code == exit_code
    assert load(tmp_path / "best.pth").frozen
    assert same(load(tmp_path / "last.pth").trained, state.classifier.trained_state())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("batch", [0, 3])
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, value: float, batch: int) -> None:
    state = make_state()
    saver = make_saver(tmp_path, state)
    state.progress.epoch_ended(FIGURES, BETTER)
    saver.improved(SCORES)
    saver.save()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    last_layer = state.classifier.head[-1]
    assert isinstance(last_layer, nn.Linear)
    last_layer.bias.data[1] = value
    state.progress.batch = batch
    saver.improved(SCORES)
    with pytest.raises(RunError, match=rf"not finite after epoch {'2, batch 3' if batch else '1'};.* --lr"):
        saver.finish()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def noise(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return torchvision.models.get_model(NAME, weights=None).state_dict()  # type: ignore[no-any-return]


def cache_weights(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put weights where torch caches them; their URL leads nowhere."""
    buffer = io.BytesIO()
    torch.save(noise(seed), buffer)
    name = f"model-{hashlib.sha256(buffer.getvalue()).hexdigest()[:10]}.pth"
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(buffer.getvalue())
    monkeypatch.setattr(WEIGHTS.value, "url", f"http://127.0.0.1:9/{name}")


@pytest.fixture(params=["head", "conv5"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saver:
    """A run on a pretrained backbone with one epoch behind it, and another state of the weights since."""
    cache_weights(tmp_path, 1, monkeypatch)
    model = ModelSection(backbone=NAME, weights="IMAGENET1K_V1", trainable=request.param)
    classifier = Classifier(
        build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "penultimate", 0),
        build_head(1024, [], 3, 0.0),
        request.param,
    )
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.1)
    schedule = Schedule(optimizer, Config().train.schedule, 5, 4)
    state = State(classifier, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), Progress())
    template = replace(
        tiny_template(),
        features=1024,
        config=Config(device="cpu", model=model).model_dump(),
        backbone={
            "name": NAME,
            "weights": "IMAGENET1K_V1",
            "tap": "penultimate",
            "sha256": state_hash(classifier.frozen_state()),
        },
    )
    (tmp_path / "run").mkdir()
    saver = Saver(tmp_path / "run", template, state)
    for _ in range(2):
        functional.cross_entropy(classifier.train()(torch.rand(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        if saver.best is None:
            state.progress.epoch_ended(FIGURES, BETTER)
            saver.improved(SCORES)
    return saver


def assert_is_the_best(saver: Saver) -> None:
    restored = restore(saver.run_dir / "best.pth")
    assert saver.best is not None
    expected = saver.state.classifier
    expected.load_trained_state(saver.best.trained)
    found = restored.network.classifier
    assert same(found.state_dict(), expected.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found(images), expected.eval()(images))
    assert not found.training
    assert restored.saved is not None
    assert restored.task.classes == ["a", "b", "c"]
    assert restored.saved.metrics == FIGURES


def test_a_finished_best_pth_needs_no_network_and_no_cache(pretrained: Saver, tmp_path: Path) -> None:
    pretrained.finish()
    shutil.rmtree(tmp_path / "torch")
    assert_is_the_best(pretrained)


def test_a_best_pth_from_between_epochs_takes_the_backbone_from_the_cache(pretrained: Saver, tmp_path: Path) -> None:
    pretrained.save()
    assert_is_the_best(pretrained)
    shutil.rmtree(tmp_path / "torch")
    with pytest.raises(InputError, match="cannot be downloaded"):
        restore(pretrained.run_dir / "best.pth")


def test_a_best_pth_from_between_epochs_refuses_other_weights(
    pretrained: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained.save()
    cache_weights(tmp_path, 2, monkeypatch)
    with pytest.raises(CheckpointError, match="not those it was trained with"):
        restore(pretrained.run_dir / "best.pth")


def test_tiny_classifiers_of_two_seeds_differ() -> None:
    """Otherwise the tests of a resume would show nothing."""
    torch.manual_seed(0)
    first = tiny_classifier().state_dict()
    torch.manual_seed(1)
    assert not same(tiny_classifier().state_dict(), first)


def test_the_last_pth_of_before_is_kept(tmp_path: Path) -> None:
    state = make_state()
    saver = make_saver(tmp_path, state)
    saver.save()
    first = (tmp_path / "last.pth").read_bytes()
    assert not previous(tmp_path / "last.pth").exists()
    steps(state, 1)
    saver.save()
    assert previous(tmp_path / "last.pth").read_bytes() == first
    assert (tmp_path / "last.pth").read_bytes() != first
    steps(state, 1)
    saver.save()
    assert previous(tmp_path / "last.pth").read_bytes() != first


def test_without_hard_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    saver = make_saver(tmp_path, make_state())
    saver.save()
    first = (tmp_path / "last.pth").read_bytes()
    saver.save()
    assert previous(tmp_path / "last.pth").read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 2
