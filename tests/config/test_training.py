"""The section `train`: phases take what they leave out from it, and say what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tl_trainer.config.load import load, to_yaml
from tl_trainer.config.schema import Config
from tl_trainer.errors import ConfigError


def config(train: dict[str, Any], **sections: Any) -> Config:
    return load({"train": train, **sections}).config


def test_a_phase_takes_from_train_what_it_leaves_out() -> None:
    found = config({
        "epochs": 8, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.5}, "schedule": {"warmup_epochs": 2},
        "phases": [
            {"trainable": "head", "search": "auto"},
            {"trainable": "layer4", "optimizer": {"lr": 0.2}, "epochs": 3},
            {"trainable": "all", "optimizer": {"name": "adam"}, "schedule": {"name": "cosine"}},
        ],
    })  # fmt: skip
    search, stage, whole = found.phases
    assert (search.epochs, search.augment) == (1, False)
    assert (stage.epochs, stage.augment, stage.search) == (3, True, "off")
    assert (stage.optimizer.name, stage.optimizer.lr, stage.optimizer.momentum) == ("sgd", 0.2, 0.5)
    assert (whole.epochs, whole.optimizer.name, whole.optimizer.lr) == (8, "adam", 0.1)
    assert (whole.schedule.name, whole.schedule.warmup_epochs) == ("cosine", 2)
    assert (found.train.epochs, found.train.search, found.model.trainable) == (12, "off", "all")


def test_stages_that_train_start_from_a_head_that_was_found() -> None:
    found = config({"batch_size": 7}, model={"trainable": "layer4"})
    assert [(p.trainable, p.search, p.epochs) for p in found.phases] == [("head", "auto", 1), ("layer4", "off", 10)]
    assert found.train.epochs == 11
    for train in ({"epochs": 10}, {"search": "off"}):
        [phase] = config(train, model={"trainable": "layer4"}).phases
        assert (phase.trainable, phase.search, phase.epochs) == ("layer4", "off", 10)
    assert config({}).train.phases == []
    assert [phase.search for phase in config({}).phases] == ["auto"]


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"epochs": 3, "phases": [{"trainable": "head"}, {"trainable": "all", "optimizer": {"name": "adamw"}}]},
        {"optimizer": {"name": "sgd"}, "phases": [{"trainable": "head", "search": "auto"}, {"trainable": "layer4"}]},
    ],
)
def test_the_resolved_file_is_the_same_configuration(train: dict[str, Any]) -> None:
    for model in ({}, {"trainable": "layer4"}) if not train else ({},):
        found = config(train, model=model)
        Path("resolved.yaml").write_text(to_yaml(found))
        assert load("resolved.yaml").config == found


HEAD, ALL = {"trainable": "head", "search": "auto"}, {"trainable": "all"}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"phases": [{**ALL, "epochs": 0}]}, "train.phases[0].epochs: should be 1 or more, not 0"),
        ({"phases": [HEAD, {}]}, "train: phases[1] has no trainable; set it to head, a"),
        ({"phases": [HEAD, {**ALL, "optimizer": {"rate": 1}}]}, "train.phases[1].optimizer.rate: unknown key 'rate'"),
        ({"phases": [{**ALL, "search": "auto"}]}, "phases[0]: search finds a head, and trainable is all; set it to"),
        ({"phases": [{"trainable": "head"}, HEAD]}, "train: search is for the first phase: the others go on with"),
        (
            {"epochs": 2, "sampler": "balanced", "loss": {"class_weights": "balanced"}},
            "train: sampler and loss.class_weights are both balanced, which corrects twice; keep one of them",
        ),
        ({"epochs": 3, "soup": 4}, "train: soup is 4, and there are 3 epochs to average; lower soup"),
        ({"phases": [{**ALL, "epochs": 3}], "soup": 4}, "soup is 4, and the last phase has 3 epochs to average; lower"),
        ({"phases": [ALL], "search": "auto"}, "train: search is for a run without phases; set it in the first phase"),
        ({"phases": [HEAD, {**ALL, "epochs": 3}], "epochs": 9}, "train: epochs is 9, and its phases have 4; set them"),
        (
            {"phases": [{**ALL, "epochs": 1, "schedule": {"warmup_epochs": 2}}]},
            "phases[0]: schedule.warmup_epochs is 2, more than epochs (1)",
        ),
    ],
)
def test_phases_that_cannot_be(train: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(train)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("best", "loss"), ("stop", {"metric": "loss"}), ("sampler", "balanced"), ("mixup", 0.2), ("cutmix", 0.2),
        ("soup", 2), ("clip_norm", 0.2), ("accumulate", 2), ("ema", {"decay": 0.9}), ("teacher", {"checkpoint": "x"}),
    ],
)  # fmt: skip
def test_what_only_epochs_can_do_is_refused_where_the_head_is_found(key: str, value: Any) -> None:
    for train in ({"search": "auto"}, {"phases": [HEAD]}):
        with pytest.raises(ConfigError, match=f"train: {key} is for training by epochs, and search finds the head"):
            config({**train, key: value})
    assert config({key: value}).train.search == "off"
    assert config({"phases": [HEAD, ALL], key: value}).phases[0].search == "auto"


def test_the_last_phase_is_what_trains() -> None:
    with pytest.raises(ConfigError, match=r"model\.trainable is head, and the last of train\.phases trains all; leave"):
        config({"phases": [HEAD, ALL]}, model={"trainable": "head"})
