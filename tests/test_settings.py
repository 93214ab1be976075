"""Every wrong setting is named before an image is read, and a checkpoint keeps what it has decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import Run, last_json
from test_end_to_end import SMALL
from tl_trainer.assembly import restore, set_up
from tl_trainer.config.load import load
from tl_trainer.config.schema import Config, flat
from tl_trainer.errors import ConfigError, DataError
from tl_trainer.settings import FIXED, SETTABLE


def test_what_can_be_set_on_top_of_a_checkpoint(tl: Run, colours: Path) -> None:
    best = Path(last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))["checkpoint"])
    wrong: list[tuple[str, Any]] = [("model.tap", "pooled"), ("seed", 3), ("train.epochs", 9), ("output.dir", "x")]
    wrong.append(("data.value_range", 255.0))
    for key, value in wrong:
        with pytest.raises(
            ConfigError, match=rf"^the command line: {key}: is fixed by the checkpoint; keys that can be set"
        ):
            restore(best, [(key, value)])
    with pytest.raises(ConfigError, match="unknown key 'batchsize'; did you mean 'batch_size'"):
        restore(best, [("train.batchsize", 3)])
    for key, value in flat(Config().model_dump()):
        if key.startswith(SETTABLE) and key not in FIXED:
            restore(best, [(key, value)])


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            ["features", "head"],
            r"phases\[1\]\.trainable: head would freeze what the phase before has trained; train it",
        ),
        (
            ["head", "feature"],
            r"phases\[1\]\.trainable: unknown stage 'feature'; did you mean 'features'",
        ),
    ],
)
def test_a_phase_whose_stage_is_wrong_is_named(stages: list[str], said: str) -> None:
    phases = [{"trainable": stage} for stage in stages]
    with pytest.raises(ConfigError, match=said):
        set_up(load("demo", [("model", {"backbone": "alexnet", "weights": "none"}), ("train", {"phases": phases})]))


def test_a_soup_of_batch_norms_that_train_is_refused() -> None:
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "trainable": "conv5"}
    words: list[tuple[str, Any]] = [("model", model), ("train.soup", 2), ("train.epochs", 3), ("data.root", "nowhere")]
    with pytest.raises(ConfigError, match=r"train\.soup: the mean of weights does not fit the statistics"):
        set_up(load(None, words))
    with pytest.raises(DataError, match="nowhere"):
        set_up(load(None, [*words, ("train.freeze_batchnorm", True)]))


def test_cutmix_of_cached_features_is_refused() -> None:
    model = {"backbone": "alexnet", "weights": "none"}
    words = [("model", model), ("train", {"epochs": 1, "cutmix": 1.0}), ("data.root", "nowhere")]
    with pytest.raises(ConfigError, match=r"line: train\.cutmix: cuts rectangles out of images, and this trains on ca"):
        set_up(load(None, words))
    images: list[list[tuple[str, Any]]] = [
        [("features.cache", "off")], [("features.views", 1)], [("model.trainable", "all")],
    ]  # fmt: skip
    for more in images:
        with pytest.raises(DataError, match="nowhere"):
            set_up(load(None, [*words, *more]))


def test_every_wrong_setting_is_named_with_where_it_was_set() -> None:
    words = [("model.weights", "NOPE_V1"), ("model.tap", "nope"), ("transforms.train", ["RandomRotate"])]
    with pytest.raises(ConfigError) as raised:
        set_up(load("demo", [("model.backbone", "alexnet"), *words]))
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["the command line", "transforms.train[0]"],
        ["the command line", "model.weights"],
        ["the command line", "model.tap"],
    ]
