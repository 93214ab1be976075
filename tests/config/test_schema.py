"""The schema: descriptions, ranges, closed sets, keys that a name makes meaningless, JSON Schema, round trip."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tl_trainer.config.data import Source as SourceName
from tl_trainer.config.data import expand
from tl_trainer.config.load import load, to_json_schema, to_yaml
from tl_trainer.config.schema import Config
from tl_trainer.config.training import OptimizerName, OptimizerSection, Precision, ScheduleName, ScheduleSection
from tl_trainer.optim import FACTORS, OPTIMIZERS


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


FIELDS = dict(fields())
KEYS = """
    seed device
    data.source data.root data.download data.val_fraction data.group_pattern data.on_bad_image data.on_duplicates
    data.skip data.max_megapixels data.value_range data.workers
    data.csv.labels data.csv.images data.csv.image_column data.csv.label_column data.csv.split_column
    data.csv.group_column data.csv.suffix data.csv.label_separator data.csv.label_columns data.csv.multilabel_columns
    data.task
    data.webdataset.train data.webdataset.val data.webdataset.test data.webdataset.image data.webdataset.label
    data.webdataset.classes data.parquet.files data.parquet.image_column data.parquet.label_column
    data.parquet.split_column data.parquet.label_separator data.parquet.label_columns data.parquet.multilabel_columns
    transforms.size transforms.train transforms.eval
    model.backbone model.weights model.weights_from model.tap model.trainable model.extra
    model.head.hidden model.head.dropout model.head.normalise
    features.cache features.views features.dir features.limit_gb performance.compile
    train.search train.phases train.epochs train.batch_size train.precision
    train.optimizer.name train.optimizer.lr train.optimizer.weight_decay train.optimizer.momentum
    train.optimizer.nesterov train.optimizer.betas train.optimizer.decay train.optimizer.layer_decay
    train.optimizer.head_lr
    train.best train.stop.metric train.stop.patience train.stop.min_delta
    train.mixup train.cutmix train.sampler train.soup
    train.refit train.clip_norm train.accumulate train.freeze_batchnorm train.ema.decay
    train.teacher.checkpoint train.teacher.temperature train.teacher.alpha
    train.schedule.name train.schedule.warmup_epochs train.schedule.step_epochs train.schedule.patience
    train.schedule.factor
    train.loss.label_smoothing train.loss.class_weights train.loss.focal train.thresholds train.heads
    output.dir output.tensorboard output.report output.neighbours_mb
"""


def nested(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def test_the_keys_are_these() -> None:
    sections = {key.rpartition(".")[0] for key in FIELDS if "." in key}
    assert sorted(FIELDS.keys() - sections) == sorted(KEYS.split())


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_is_described_in_a_sentence(key: str) -> None:
    description = FIELDS[key].description
    assert description
    assert len(description) > 10 and "\n" not in description


def test_the_default_configuration_is_valid() -> None:
    assert Config.model_validate({}) == Config()


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"], ["gpu", "cuda:", "cuda:x", "cpu:0", ""]),
        ("data.source", ["demo", "torchvision:Food101"], ["Demo", "torchvision:", "torchvision:a.b", "torchvision"]),
        ("data.val_fraction", [0.001, 0.999], [0.0, 1.0]),
        ("data.group_pattern", [None, "(a)", "(?P<group>a)"], ["a", "(", 1]),
        ("data.csv.group_column", [None], ["patient"]),  # without source: csv
        ("data.workers", [0, 256, "auto"], [-1, 257, "all"]),
        ("data.csv.split_column", [None, "split"], [1]),
        ("transforms.train", ["default", "eval", [], ["Resize"]], ["none", [1], [["Resize"]]]),
        ("transforms.eval", ["default", []], ["eval", {}]),
        ("model.head.hidden", [[], [1, 256]], [[0], ["a"], 256]),
        ("model.head.dropout", [0.0, 0.99], [-0.1, 1.0]),
        ("train.epochs", [1], [0, True, "5", 1.0, None]),
        ("train.batch_size", [1], [0]),
        ("train.optimizer.lr", [1e-9, 1, 10.0], [0.0, -1e-3, float("inf"), float("nan"), "1e-3"]),
        ("train.optimizer.head_lr", [None, 0.1], [0.0, -1.0, "lr"]),
        ("train.optimizer.weight_decay", [0.0, 0.1], [-0.1, float("inf")]),
        ("train.optimizer.betas", [[0.0, 0.99]], [[0.9], [0.9, 1.0], [0.9, 0.9, 0.9], 0.9]),
        ("train.optimizer.layer_decay", [0.1, 1.0], [0.0, 1.01]),
        ("train.refit", [True, False], ["auto", 1]),
        ("train.best", ["top1", "loss", "balanced_accuracy", "macro_f1"], ["accuracy", None]),
        ("train.stop", [{}, {"metric": None}, {"metric": "loss", "patience": 1}], [{"patience": 2}, {"metric": "f1"}]),
        ("train.stop.patience", [], [0, 1.5]),
        ("train.stop.min_delta", [], [-0.1]),
        ("train.sampler", ["shuffled", "balanced"], ["weighted", None]),
        ("train.soup", [None, 2, 10], [0, 1, 11, 2.0]),
        ("train.mixup", [None, 0.2], [0.0, -1.0]),
        ("train.cutmix", [None, 1.0], [0.0, "yes"]),
        ("train.clip_norm", [None, 0.1], [0.0, -1.0]),
        ("train.accumulate", [1, 4], [0, 1.5]),
        ("train.schedule.warmup_epochs", [0.0, 2.5, 10.0], [-1.0, 10.5]),
        ("train.loss.label_smoothing", [0.0, 0.99], [-0.1, 1.0]),
        ("train.loss.class_weights", ["none", "balanced"], ["None", None]),
        ("train.precision", ["auto", "fp32", "bf16", "fp16"], ["fp64"]),
        ("output.tensorboard", [True, False], ["off", 0]),
        ("output.report", [True, False], ["off", 0]),
        ("output.dir", ["."], [1, None]),
        ("output.neighbours_mb", [0.5, 1000], [0, -1, "many"]),
    ],
)
def test_range(key: str, inside: list[object], outside: list[object]) -> None:
    for value in inside:
        Config.model_validate(nested(key, value))
    for value in outside:
        with pytest.raises(ValidationError):
            Config.model_validate(nested(key, value))


@pytest.mark.parametrize(
    ("section", "key", "names"),
    [
        (OptimizerSection, "momentum", {"sgd"}),
        (OptimizerSection, "nesterov", {"sgd"}),
        (OptimizerSection, "betas", {"adam", "adamw"}),
        (ScheduleSection, "step_epochs", {"step"}),
        (ScheduleSection, "patience", {"plateau"}),
        (ScheduleSection, "factor", {"step", "plateau"}),
    ],
)
def test_keys_that_the_name_makes_meaningless_are_refused_and_never_dumped(
    section: type[BaseModel], key: str, names: set[str]
) -> None:
    value = section.model_fields[key].default
    for name in get_args(section.model_fields["name"].annotation):
        if name in names:
            assert section.model_validate({"name": name, key: value}).model_dump()[key] == value
        else:
            with pytest.raises(ValidationError, match=f"{key} is only for .*, and name is {name}"):
                section.model_validate({"name": name, key: value})
            assert key not in section.model_validate({"name": name}).model_dump()


def test_nesterov_needs_momentum() -> None:
    OptimizerSection(name="sgd", nesterov=True)
    with pytest.raises(ValidationError, match="nesterov needs a momentum above 0"):
        OptimizerSection(name="sgd", nesterov=True, momentum=0.0)


def test_closed_sets_are_the_registries() -> None:
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)
    assert set(get_args(ScheduleName)) == set(FACTORS)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().seed = 1  # type: ignore[misc]


def test_json_schema_for_editors() -> None:
    schema = json.loads(to_json_schema({"backbone": ["alexnet"], "weights": ["none"], "transforms": ["Resize"]}))
    sections = {"Config": schema, **schema["$defs"]}

    def follow(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
        assert section["additionalProperties"] is False
        for name, entry in section["properties"].items():
            assert entry["description"] == FIELDS[prefix + name].description
            yield prefix + name
            for choice in [entry, *entry.get("anyOf", [])]:  # a name alone may stand for the optimizer
                if "$ref" in choice:
                    yield from follow(sections[choice["$ref"].removeprefix("#/$defs/")], f"{prefix}{name}.")

    assert set(follow(schema)) == FIELDS.keys()
    assert sections["ModelSection"]["properties"]["backbone"]["examples"] == ["alexnet"]
    assert sections["ModelSection"]["properties"]["weights"]["examples"] == ["none"]
    assert sections["TransformsSection"]["properties"]["train"]["examples"] == ["Resize"]
    assert sections["OptimizerSection"]["properties"]["name"]["enum"] == list(get_args(OptimizerName))
    assert sections["TrainSection"]["properties"]["precision"]["enum"] == list(get_args(Precision))
    assert sections["DataSection"]["properties"]["source"]["anyOf"][0]["enum"] == list(get_args(SourceName))


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


# PyYAML writes U+0085 as if it were a line break.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=20)
FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)
ARGUMENTS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
TRANSFORMS = st.lists(WORDS | st.dictionaries(WORDS, ARGUMENTS | st.lists(ARGUMENTS, max_size=3)), max_size=3)
CONFIGURATIONS = some(
    seed=st.integers(0, 2**63 - 1),
    data=some(
        source=st.sampled_from([*get_args(SourceName), "torchvision:Food101"]),
        root=WORDS,
        val_fraction=FRACTIONS,
        workers=st.just("auto") | st.integers(0, 256),
        csv=some(image_column=WORDS, split_column=st.none() | WORDS, suffix=WORDS),
    ),
    transforms=some(train=st.sampled_from(["default", "eval"]) | TRANSFORMS, eval=st.just("default") | TRANSFORMS),
    model=some(weights=WORDS, head=some(hidden=st.lists(st.integers(1, 4096), max_size=3), dropout=FRACTIONS)),
    train=some(
        epochs=st.integers(1),
        optimizer=some(name=st.sampled_from(get_args(OptimizerName)), lr=FRACTIONS)
        | st.fixed_dictionaries({"name": st.just("sgd"), "momentum": FRACTIONS, "nesterov": st.booleans()}),
        schedule=some(name=st.sampled_from(get_args(ScheduleName)), warmup_epochs=FRACTIONS),
    ),
    output=some(dir=WORDS, tensorboard=st.booleans(), report=st.booleans()),
)


@settings(max_examples=150, deadline=None)
@given(CONFIGURATIONS)
def test_what_to_yaml_writes_is_read_back_the_same(data: dict[str, Any]) -> None:
    config = Config.model_validate(data)
    Path("resolved.yaml").write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load("resolved.yaml").config == config


@pytest.mark.parametrize("word", ["1e5", "08", "010", "off", "no", "null", "~", "true", "1_000", "0x10", "12:30", ""])
def test_a_word_that_looks_like_something_else_stays_a_word(word: str) -> None:
    config = Config.model_validate({"data": {"root": word}})
    Path("resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load("resolved.yaml").config.data.root == word


def test_expand_knows_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setenv("USERPROFILE", "/somebody")
    assert expand("~/flowers") == Path("/somebody/flowers")
    assert expand("~no-such-user-here/flowers") == Path("~no-such-user-here/flowers")
    assert expand("flowers~") == Path("flowers~")
