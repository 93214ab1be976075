"""Training on cached features through the commands: the same losses as without the cache, the same weights from a warm
one, and nothing computed twice, also after a kill."""

from __future__ import annotations

import csv
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import COLOURS, Run, last_json
from stress import tools
from tl_trainer import checkpoint

SMALL = (
    "--json",
    "model.backbone=shufflenet_v2_x0_5",
    "model.weights=none",
    "model.tap=maxpool",
    "data.workers=0",
    "transforms.train=eval",
    "transforms.eval=[{Resize: [32, 32]}]",
    "train.batch_size=7",
    "train.optimizer.lr=0.01",
    "output.tensorboard=false",
    "output.report=false",
)
RANDOM = "transforms.train=[{RandomResizedCrop: 32}, {ColorJitter: {brightness: 0.3}}]"
CASES: dict[str, tuple[str, ...]] = {
    "head": (),
    "head with dropout": ("model.head.dropout=0.4", "model.head.hidden=[16]"),
    "last stage": ("model.tap=penultimate", "model.trainable=conv5", "model.head.dropout=0.3"),
    "a tap of its own": ("model.tap=stage2", "model.trainable=stage2.3", "train.optimizer.name=sgd"),
}


@pytest.fixture(autouse=True)
def _one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether auto is bf16 must not depend on the machine that runs the tests."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An ImageFolder of three colours under noise, so that there is something to learn: 24 train, 12 val images."""
    draw_split(tmp_path / "pictures" / "train", 8, seed=1)
    draw_split(tmp_path / "pictures" / "val", 4, seed=2)
    return tmp_path / "pictures"


def draw_split(folder: Path, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = np.array(colour) / 3 + random.uniform(0, 170, (36, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{seed}-{index:02}.jpg")


def train(tl: Run, pictures: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The summary and what was said on stderr."""
    result = tl("train", "--data-dir", pictures, *SMALL, *words)
    return last_json(result), result.stderr


def losses(result: dict[str, Any]) -> torch.Tensor:
    with Path(result["run_dir"], "metrics.csv").open(newline="") as file:
        return torch.tensor([[float(row["train_loss"]), float(row["val_loss"])] for row in csv.DictReader(file)])


def weights(result: dict[str, Any], name: str = "best.pth") -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(result["run_dir"], name)).trained


def computed(stderr: str) -> dict[str, int]:
    """Per split, how many rows the run said it computed."""
    found = re.findall(r"features of (\w+): (\d+) computed, \d+ cached", stderr)
    return {split: int(count) for split, count in found}


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_cache_changes_no_loss(tl: Run, pictures: Path, case: str, precision: str, tolerance: float) -> None:
    words = (*CASES[case], f"train.precision={precision}", "train.epochs=3")
    cached, said = train(tl, pictures, *words)
    plain, said_plain = train(tl, pictures, *words, "features.cache=off")
    assert computed(said) == {"train": 24, "val": 12}
    assert computed(said_plain) == {}
    assert losses(cached).shape == (3, 2)
    assert losses(cached)[0, 0] != losses(cached)[2, 0]
    torch.testing.assert_close(losses(cached), losses(plain), rtol=0, atol=tolerance)
    assert cached["val"]["top1"] == plain["val"]["top1"] or precision == "bf16"


def test_the_cache_changes_no_loss_of_a_phase_that_trains_the_last_block(tl: Run, pictures: Path) -> None:
    phases = "train.phases=[{trainable: head, epochs: 1}, {trainable: stage4.3, epochs: 2}]"
    # Adam, and BatchNorm over batches of one pixel each, would make large what differs in the last digit.
    steady = ("train.optimizer.name=sgd", "train.optimizer.lr=1", "train.freeze_batchnorm=true")
    words = ("model.tap=penultimate", "train.precision=fp32", *steady, phases)
    cached, said = train(tl, pictures, *words)
    plain, said_plain = train(tl, pictures, *words, "features.cache=off")
    assert said.count("features of train: 24 computed") == 2 and computed(said_plain) == {}
    assert losses(cached).shape == (3, 2) and losses(cached)[1, 0] != losses(cached)[2, 0]
    torch.testing.assert_close(losses(cached), losses(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["head with dropout", "last stage"])
@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_a_warm_run_repeats_the_cold_one_bit_for_bit(tl: Run, pictures: Path, case: str, precision: str) -> None:
    words = (*CASES[case], f"train.precision={precision}", "train.epochs=3")
    cold, said = train(tl, pictures, *words)
    warm, said_warm = train(tl, pictures, *words)
    assert computed(said) == {"train": 24, "val": 12}
    assert computed(said_warm) == {"train": 0, "val": 0}
    assert torch.equal(losses(warm), losses(cold))
    assert warm["val"] == cold["val"]
    for name in ("best.pth", "last.pth"):
        assert_identical(weights(warm, name), weights(cold, name))


@pytest.mark.parametrize("case", ["head", "last stage"])
def test_views_of_a_random_transform(tl: Run, pictures: Path, case: str) -> None:
    words = (*CASES[case], RANDOM, "features.views=3", "train.epochs=4")
    cold, said = train(tl, pictures, *words)
    warm, said_warm = train(tl, pictures, *words)
    assert computed(said) == {"train": 3 * 24, "val": 12}
    assert computed(said_warm) == {"train": 0, "val": 0}
    assert torch.equal(losses(warm), losses(cold))
    assert_identical(weights(warm), weights(cold))
    longer, said_longer = train(tl, pictures, *words[:-1], "train.epochs=7")
    assert computed(said_longer) == {"train": 0, "val": 0}
    assert torch.equal(losses(longer)[:4], losses(cold))


def test_without_a_word_each_epoch_has_its_view_and_another_run_computes_nothing(tl: Run, pictures: Path) -> None:
    cold, said = train(tl, pictures, RANDOM, "train.epochs=3")
    assert computed(said) == {"train": 3 * 24, "val": 12}
    warm, said_warm = train(tl, pictures, RANDOM, "train.epochs=3")
    assert computed(said_warm) == {"train": 0, "val": 0}
    assert_identical(weights(warm), weights(cold))
    for text in (said, said_warm):
        assert "features.views: auto keeps 3 random views of each training image" in text


def test_a_longer_resumed_run_is_the_longer_run_bit_for_bit(tl: Run, pictures: Path) -> None:
    """Ten views are kept at most, so the eleventh epoch takes the first again."""
    words = (RANDOM, "model.head.dropout=0.3")
    whole, _ = train(tl, pictures, *words, "train.epochs=12")
    shorter, _ = train(tl, pictures, *words, "train.epochs=4", "features.dir=another")
    resumed = tl("train", "--resume", shorter["run_dir"], "--json", "train.epochs=12")
    assert torch.equal(losses(last_json(resumed)), losses(whole))
    assert_identical(weights(shorter, "last.pth"), weights(whole, "last.pth"))
    assert computed(resumed.stderr) == {"train": 6 * 24, "val": 0}


def test_without_views_a_random_transform_is_drawn_anew_each_epoch(tl: Run, pictures: Path) -> None:
    _, said = train(tl, pictures, RANDOM, "train.epochs=1", "features.views=1")
    assert computed(said) == {"val": 12}
    assert "features.views is 1 and transforms.train random: every epoch computes the frozen stages again" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["features.views=2"], "transforms.train has nothing random, so all views are the same; set it to auto"),
        ([RANDOM, "features.views=2", "model.trainable=all"], "model.trainable is all, so there are no frozen"),
    ],
)
def test_views_that_could_not_be_used_are_refused(tl: Run, pictures: Path, words: list[str], reason: str) -> None:
    result = tl("train", "--data-dir", pictures, *SMALL, *words)
    assert result.returncode == 2
    assert f"the command line: features.views: {reason}" in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert not list(Path("runs").iterdir())


@pytest.mark.parametrize("case", ["head", "last stage"])
def test_evaluating_computes_nothing_again(tl: Run, pictures: Path, case: str) -> None:
    draw_split(pictures / "test", 3, seed=3)
    result, said = train(tl, pictures, *CASES[case], "train.epochs=2")
    assert computed(said) == {"train": 24, "val": 12, "test": 9}
    evaluated = tl("eval", "--checkpoint", result["checkpoint"], "--split", "val", "--json")
    assert last_json(evaluated).items() >= {"split": "val", **result["val"]}.items()
    assert "features of val: 0 computed, 12 cached" in evaluated.stderr
    evaluated = tl("eval", "--checkpoint", result["checkpoint"], "--json")
    assert last_json(evaluated).items() >= {"split": "test", **result["test"]}.items()
    assert "features of test: 0 computed, 9 cached" in evaluated.stderr


def test_only_what_changed_is_computed(tl: Run, pictures: Path) -> None:
    train(tl, pictures, "train.epochs=1")
    draw_split(pictures / "train", 2, seed=4)
    for path in (pictures / "val").rglob("*.jpg"):
        path.touch()
    _, said = train(tl, pictures, "train.epochs=1")
    assert computed(said) == {"train": 6, "val": 0}
    path = pictures / "val" / "red" / "2-00.jpg"
    path.write_bytes(path.read_bytes() + b"!")
    _, said = train(tl, pictures, "train.epochs=1", "train.batch_size=5", "seed=3", "model.head.dropout=0.1")
    assert computed(said) == {"train": 30, "val": 12}  # another seed is another random backbone
    _, said = train(tl, pictures, "train.epochs=1", "train.batch_size=5", "model.head.dropout=0.1")
    assert computed(said) == {"train": 0, "val": 1}


def test_a_damaged_cache_is_reported_and_gives_the_same_result(tl: Run, pictures: Path) -> None:
    cold, _ = train(tl, pictures, "train.epochs=2")
    segments = list(Path("cache").rglob("*.rows"))
    assert len(segments) == 2  # one of train, one of val
    for path in segments:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:-100])
    again, said = train(tl, pictures, "train.epochs=2")
    assert computed(said) == {"train": 2, "val": 2}
    assert said.count("warning: ") == 4
    assert "computed again" in said
    assert_identical(weights(again), weights(cold))
    _, said = train(tl, pictures, "train.epochs=2")
    assert computed(said) == {"train": 0, "val": 0}
    assert "warning" not in said


def test_a_cache_that_would_be_too_large_is_refused(tl: Run, pictures: Path) -> None:
    result = tl("train", "--data-dir", pictures, *SMALL, "features.limit_gb=0.0001")
    assert result.returncode == 2
    assert "more than features.limit_gb (0.0001)" in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert train(tl, pictures, "features.limit_gb=0.0001", "features.cache=off", "train.epochs=1")[0]["epochs"] == 1


def test_a_run_that_is_killed_while_it_extracts_is_gone_on_with(tl: Run, tmp_path: Path) -> None:
    draw_split(tmp_path / "many", 40, seed=5)
    words = ["--data-dir", "many", *SMALL, "train.epochs=1", "train.precision=fp32"]
    child = tools.command("train", *words, logs=tmp_path / "logs", cache=tmp_path / "cache")
    while not (records := list(Path("cache").rglob("*.keys"))) or not records[0].stat().st_size:
        assert not child.poll(), child.said()
        time.sleep(0.01)
    child.end_group()
    assert child.wait() == -signal.SIGKILL
    written = tools.rows_in(Path("cache"))
    result = tl("train", *words)
    done = last_json(result)
    assert sum(computed(result.stderr).values()) == 120 - written
    undisturbed = last_json(tl("train", *words, "features.dir=another"))
    assert_identical(weights(done), weights(undisturbed))
