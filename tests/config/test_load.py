"""Reading a configuration: which file, what YAML may say, every mistake at once with its place, overrides."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_trainer.config.load import (
    MAX_BYTES,
    bundled_folder,
    find,
    from_checkpoint,
    load,
    parse_override,
)
from tl_trainer.config.mistakes import MAX_PROBLEMS
from tl_trainer.config.schema import Config
from tl_trainer.config.text import MAX_DEPTH
from tl_trainer.errors import ConfigError, InputError, SettingError, TrainerError

TOP = "data, device, features, model, output, performance, seed, train, transforms"


def write(content: str | bytes) -> str:
    path = Path("c.yaml")
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(path)


def complaint(content: str | bytes, *overrides: tuple[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(content), overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", ["demo.yaml", "demo"])
def test_a_bundled_configuration_is_found_from_any_folder(name: str) -> None:
    assert find(name) == bundled_folder() / "demo.yaml"


def test_a_file_goes_before_a_bundled_configuration_of_the_same_name() -> None:
    Path("demo.yaml").write_text("seed: 7")
    loaded = load("demo.yaml")
    assert (loaded.config.seed, loaded.name) == (7, "demo")


def test_a_folder_does_not_hide_a_bundled_configuration() -> None:
    Path("demo").mkdir()
    assert load("demo").config.data.source == "demo"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flowers.yaml", "no such file, and unknown .*; did you mean 'flowers102.yaml'"),
        ("nothing-like-it", r"\(valid: cifar10-vgg16.yaml, cifar100.yaml, convnext.yaml, csv.yaml, default.yaml, demo"),
        ("/dev/null", "is not a file"),
        ("~no-such-user-here/c.yaml", "no such file"),
        ("x" * 5000, "cannot be read|no such file"),
    ],
)
def test_a_wrong_name_is_an_input_error(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(name)


def test_no_file_is_the_defaults() -> None:
    loaded = load(None)
    assert (loaded.config, loaded.name) == (Config(), "run")


# What YAML may say


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2", -2),
        ("010", 10),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        (".inf", ".inf"),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
    ],
)
def test_a_value_is_read_as_yaml_1_2(text: str, value: object) -> None:
    key, read = parse_override(f"key={text}")
    assert key == "key"
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("content", ["", "\n", "# only a comment\n", "---\n", "null"])
def test_an_empty_file_is_the_defaults(content: str) -> None:
    assert load(write(content)).config == Config()


def test_windows_files_are_read() -> None:
    assert load(write(b"\xef\xbb\xbfseed: 3\r\ndevice: cpu\r\n")).config.device == "cpu"


def test_an_alias_may_be_used() -> None:
    config = load(write("transforms:\n  train: &same [RandomHorizontalFlip]\n  eval: *same")).config
    assert config.transforms.eval == ["RandomHorizontalFlip"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 0\n\nseed: 1", "c.yaml:3: duplicate key 'seed', first given on line 1; keep one"),
        ("train:\n  epochs: 1\n\n  epochs: 2", "c.yaml:4: duplicate key 'epochs', first given on line 2; keep one"),
        ("seed: 0\nSeed: {a: 1, a: 1}", "c.yaml:2: duplicate key 'a', first given on line 2; keep one"),
        ("? [a]\n: 1", "c.yaml:1: a key must be a word"),
        ("seed: 1\n!custom device: cpu", "c.yaml:2: a key must be a word"),
        ("seed: !custom 5", "c.yaml:1: the tag !custom is not allowed; write a plain value"),
        ("seed: !custom [5]", "c.yaml:1: the tag !custom is not allowed; write a plain value"),
        ("seed: !!set {5}", "c.yaml:1: the tag tag:yaml.org,2002:set is not allowed; write a plain value"),
        ("output: {tensorboard: !!bool yes}", "c.yaml:1: 'yes' is not a valid bool"),
        ("seed: !!int 1_0", "c.yaml:1: '1_0' is not a valid int"),
        ("train: {optimizer: {lr: 1e999}}", "c.yaml:1: '1e999' is not a valid float"),
        ("seed: 1\n---\nseed: 2", "c.yaml:2: but found another document"),
        ("device: 'cpu\n", "c.yaml:2: found unexpected end of stream"),
        ("\tseed: 1", "c.yaml:1: found character '\\t' that cannot start any token; indent with spaces"),
        ("seed: 0\nmodel: [", "c.yaml:2: expected the node content, but found '<stream end>'"),
        ("seed: *nowhere", "c.yaml:1: found undefined alias 'nowhere'"),
        ("a\0: 1", "c.yaml: unacceptable character #x0000: special characters are not allowed"),
        ("- seed: 0", "c.yaml:1: the top level must be keys and values such as `seed: 0`"),
        ("just words", "c.yaml:1: the top level must be keys and values such as `seed: 0`"),
        (b"device: caf\xe9", "c.yaml: not UTF-8 text (byte 11)"),
        ("seed: 0\n".encode("utf-16"), "c.yaml: not UTF-8 text (byte 0)"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(content: str | bytes, message: str) -> None:
    assert complaint(content) == message


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:pathlib.Path.touch [proof]",
        "!!python/object/new:pathlib.Path [proof]",
        "!!python/name:os.system",
        "!!python/tuple [1]",
    ],
)
def test_python_tags_are_refused(value: str) -> None:
    tag = value.split()[0].removeprefix("!!")
    message = f"the tag tag:yaml.org,2002:{tag} is not allowed; write a plain value"
    assert complaint(f"device: cpu\nseed: {value}") == f"c.yaml:2: {message}"
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        parse_override(f"seed={value}")
    assert not Path("proof").exists()


def test_an_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert complaint("\n".join(lines)) == "c.yaml:1: more than 2,000 values after expanding its aliases"


@pytest.mark.parametrize("content", ["a: &a [*a]", "a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "[" * 20_000])
def test_deep_nesting_is_refused(content: str) -> None:
    message = f"nested deeper than {MAX_DEPTH} levels; check its brackets and indentation"
    assert complaint(content) == f"c.yaml:1: {message}"


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("seed: 1\ndata: " + "[" * 49_000 + "]" * 49_000, 2, "nested deeper"),
        ("seed: 1\n\ndata:\n  " + "- " * 45_000 + "x", 4, "nested deeper"),
        ("seed: 1\n" + "? " * 45_000, 2, "nested deeper"),
        ("\n".join(" " * depth + "k:" for depth in range(400)), 33, "nested deeper"),
        ("seed: [" + "0," * 40_000 + "]", 1, "more than 2,000 values; is this a configuration?"),
    ],
)
def test_what_nests_or_goes_on_too_long_is_refused_where_it_does(
    monkeypatch: pytest.MonkeyPatch, content: str, line: int, reason: str
) -> None:
    """PyYAML takes seconds for some documents, so they are not read to their end."""
    fetch, fetched = yaml.SafeLoader.fetch_more_tokens, []
    monkeypatch.setattr(yaml.SafeLoader, "fetch_more_tokens", lambda self: (fetched.append(1), fetch(self))[1])
    assert complaint(content).startswith(f"c.yaml:{line}: {reason}")
    assert len(fetched) < 5_000 if "values" in reason else len(fetched) < 1_500


def test_deep_nesting_is_allowed_up_to_the_limit() -> None:
    depth = MAX_DEPTH - 4  # transforms.train[0].Resize
    value = "[" * depth + "]" * depth
    assert load(write(f"transforms: {{train: [{{Resize: {value}}}]}}")).config.transforms.train != "default"


def test_the_size_has_a_limit() -> None:
    fits = "seed: 3 #" + "x" * (MAX_BYTES - 9)
    assert load(write(fits)).config.seed == 3
    assert complaint(fits + "x") == "c.yaml: larger than 100,000 bytes; is this a configuration?"


@pytest.mark.parametrize("content", ['device: "\\UFFFFFFFF"', "%YAML 1." + "9" * 5000 + "\n---\nseed: 0"])
def test_what_makes_pyyaml_itself_fail_is_a_config_error(content: str) -> None:
    assert complaint(content).startswith("c.yaml: ")


FRAGMENTS = st.sampled_from([
    *":\n\t[]{},'\"\\#~0é\ufeff\x85", ": ", "  ", "- ", "? ", "| \n", "> ", "---\n", "...\n", "%TAG", "&a ", "*a",
    "!x ", "!!int ", "<<", "1e-3", "true", "seed", "train", "epochs",
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=30).map("".join) | st.text())
def test_any_text_is_a_configuration_or_a_trainer_error(text: str) -> None:
    with contextlib.suppress(TrainerError):
        assert isinstance(load(write(text.encode("utf-8", "surrogatepass"))).config, Config)
    with contextlib.suppress(TrainerError):
        assert parse_override(f"key={text}")[0] == "key"
    with contextlib.suppress(TrainerError):
        assert text.startswith(parse_override(text)[0])


@settings(max_examples=150, deadline=None)
@given(st.binary())
def test_any_bytes_are_a_configuration_or_a_trainer_error(content: bytes) -> None:
    with contextlib.suppress(TrainerError):
        assert isinstance(load(write(content)).config, Config)


# Every mistake with its place


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 0\nepochs: 3", f"c.yaml:2: epochs: unknown key 'epochs' (valid: {TOP}); there is train.epochs"),
        ("Seed: 0", f"c.yaml:1: Seed: unknown key 'Seed'; did you mean 'seed'? (valid: {TOP})"),
        (
            "train:\n  # the comment counts as a line\n  optimizer: {name: sgd, momntum: 0.9}",
            "c.yaml:3: train.optimizer.momntum: unknown key 'momntum'; did you mean 'momentum'? "
            "(valid: betas, decay, head_lr, layer_decay, lr, momentum, name, nesterov, weight_decay)",
        ),
        ("seed: '0'", "c.yaml:1: seed: should be a whole number, not '0'"),
        ("train:\n  epochs: 1e1", "c.yaml:2: train.epochs: should be a whole number, not 10.0"),
        ("device: 010", "c.yaml:1: device: should be text, not 10"),
        ("output: {tensorboard: off}", "c.yaml:1: output.tensorboard: should be true or false, not 'off'"),
        ("data: 5", "c.yaml:1: data: should be keys and values, not 5"),
        ("train:\n  epochs: 0", "c.yaml:2: train.epochs: should be 1 or more, not 0"),
        ("data: {val_fraction: 1}", "c.yaml:1: data.val_fraction: should be less than 1, not 1"),
        ("device: gpu", "c.yaml:1: device: use auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
        (
            "train:\n  optimizer:\n    name: adm",
            "c.yaml:3: train.optimizer.name: unknown value 'adm'; did you mean 'adam' or 'adamw'? "
            "(valid: adam, adamw, sgd)",
        ),
        (
            "train: {thresholds: precision>=2}",
            "c.yaml:1: train.thresholds: should be a number, or f1, or precision>= and a share of 1, such as "
            "precision>=0.9, not 'precision>=2'",
        ),
        (
            "data: {source: imagefoldr}",
            "c.yaml:1: data.source: unknown value 'imagefoldr'; did you mean 'imagefolder'? "
            "(valid: cifar10, cifar100, csv, demo, flowers102, imagefolder, parquet, torchvision:<Class>, webdataset)",
        ),
        (
            "transforms:\n  train: defualt",
            "c.yaml:2: transforms.train: unknown value 'defualt'; did you mean 'default'? "
            "(valid: a list, default, eval)",
        ),
        ("data: {workers: -1}", "c.yaml:1: data.workers: should be auto, or 0 or more, not -1"),
        (
            "transforms:\n  train:\n    - Resize\n    - 5",
            "c.yaml:4: transforms.train[1]: should be text, or keys and values, not 5",
        ),
        (
            "model:\n  head:\n    hidden: [256,\n             0]",
            "c.yaml:4: model.head.hidden[1]: should be 1 or more, not 0",
        ),
        (
            "train:\n  optimizer: {name: adam, momentum: 0.9}",
            "c.yaml:2: train.optimizer: momentum is only for sgd, and name is adam",
        ),
        (
            "train:\n  schedule: {name: cosine, factor: 0.5}",
            "c.yaml:2: train.schedule: factor is only for step and plateau, and name is cosine",
        ),
        (
            "train:\n  epochs: 2\n  schedule: {warmup_epochs: 2.5}",
            "c.yaml:1: train: schedule.warmup_epochs is 2.5, more than epochs (2)",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_is_allowed(content: str, message: str) -> None:
    assert complaint(content) == message


def test_all_mistakes_are_named_at_once() -> None:
    text = complaint(
        "sed: 1\ndevice: gpu\ntrain:\n  epochs: 0\n  batch_size: many\n  optimizer: {name: adm, lr: -1}\n",
        ("output.dirr", "x"),
        ("data.workers", -1),
    )
    assert [line.split(": ")[:2] for line in text.splitlines()] == [
        ["c.yaml:2", "device"],
        ["the command line", "data.workers"],
        ["c.yaml:4", "train.epochs"],
        ["c.yaml:5", "train.batch_size"],
        ["c.yaml:6", "train.optimizer.name"],
        ["c.yaml:6", "train.optimizer.lr"],
        ["the command line", "output.dirr"],
        ["c.yaml:1", "sed"],
    ]


def test_of_many_mistakes_the_first_are_named() -> None:
    Path("c.yaml").write_text("".join(f"k{number}: 1\n" for number in range(900)))
    with pytest.raises(ConfigError) as caught:
        load("c.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == f"c.yaml:{MAX_PROBLEMS + 1}: k{MAX_PROBLEMS}: wrong as well, as are {899 - MAX_PROBLEMS} more"


def test_a_long_value_is_not_quoted_whole() -> None:
    long = "x" * 20_000
    assert len(complaint(f"a: &a {long}\nseed: [{'*a, ' * 3000}]")) < 1500
    assert len(complaint(f"train: {{precision: {long}}}")) < 500
    assert len(complaint(f"seed: {'9' * 5000}")) < 500


def test_what_only_a_key_is_known_for_is_located() -> None:
    content = "transforms:\n  train:\n    - Resize\n    - Resise: {size: 3}\nmodel: {backbone: rasnet}"
    loaded = load(write(content), [("transforms.eval", ["Resise"])])
    problems = [("transforms.train[1]", "a"), ("model.backbone", "b"), ("transforms.eval[0]", "c"), ("model.tap", "d")]
    assert str(loaded.located(SettingError(key, message) for key, message in problems)).splitlines() == [
        "c.yaml:4: transforms.train[1]: a",
        "c.yaml:5: model.backbone: b",
        "the command line: transforms.eval[0]: c",
        "c.yaml:5: model.tap: d",
    ]
    assert str(load(None).located([SettingError("model.tap", "d")])) == "the defaults: model.tap: d"


# Overrides


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults() -> None:
    config = load(write("train: {epochs: 3, batch_size: 7}"), [("train.epochs", 4), ("train.epochs", 5)]).config
    assert (config.train.epochs, config.train.batch_size, config.seed) == (5, 7, Config().seed)


@pytest.mark.parametrize("name", [None, "c.yaml"])
def test_an_override_makes_the_sections_it_needs(name: str | None) -> None:
    write("seed: 1\ntrain:\n")
    config = load(name, [("train.optimizer.lr", 0.5), ("train.optimizer.name", "sgd")]).config
    assert (config.train.optimizer.lr, config.train.optimizer.name) == (0.5, "sgd")


def test_a_section_with_nothing_in_it_means_its_defaults() -> None:
    assert load(write("seed: 1\ndata:\ntrain:\n  optimizer:\n")).config == Config(seed=1)


def test_an_override_does_not_hide_a_mistake_in_the_file() -> None:
    assert "c.yaml:1: train: should be keys and values, not 5" in complaint("train: 5", ("train.epochs", 3))


def test_an_override_may_replace_a_section() -> None:
    config = load(write("train: {epochs: 3, batch_size: 7}"), [("train", {"epochs": 4})]).config
    assert (config.train.epochs, config.train.batch_size) == (4, Config().train.batch_size)


def test_a_wrong_override_is_located_on_the_command_line() -> None:
    overrides = [("train.epochs", 0), ("train.optimizer", {"lr": -1}), ("epochs", 1), ("seed.x", 1)]
    assert complaint("seed: 1\ntrain: {epochs: 5, optimizer: {lr: 1}}", *overrides).splitlines() == [
        "the command line: seed: should be a whole number, not {'x': 1}",
        "the command line: train.epochs: should be 1 or more, not 0",
        "the command line: train.optimizer.lr: should be more than 0, not -1",
        f"the command line: epochs: unknown key 'epochs' (valid: {TOP}); there is train.epochs",
    ]


def test_origins_say_where_each_key_was_set() -> None:
    origins = load(write("seed: 1\ntrain:\n  epochs: 5\n  batch_size: 2"), [("train.epochs", 6)]).origins
    assert origins["seed",] == "c.yaml:1"
    assert origins["train", "batch_size"] == "c.yaml:4"
    assert origins["train", "epochs"] == "the command line"
    assert ("device",) not in origins


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("train.epochs=5", "train.epochs", 5),
        ("data.root=a=b", "data.root", "a=b"),
        ("data.csv.split_column=", "data.csv.split_column", None),
        (
            "transforms.train=[{Resize: 256}, {CenterCrop: [224, 200]}, RandomHorizontalFlip]",
            "transforms.train",
            [{"Resize": 256}, {"CenterCrop": [224, 200]}, "RandomHorizontalFlip"],
        ),
    ],
)
def test_an_override_is_a_key_and_a_yaml_value(word: str, key: str, value: object) -> None:
    assert parse_override(word) == (key, value)


@pytest.mark.parametrize("word", ["photos", "=5", "1st=5", "train epochs=5", "--epochs=5", ".a=5", ""])
def test_a_word_that_is_no_override_is_refused(word: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_override(word)
    assert str(caught.value) == f"{word!r} is not an override; write key=value, e.g. train.epochs=5"


@pytest.mark.parametrize("word", ["a=[", "a={b: 1, b: 2}", "a=b: c: d", "a=1\n---\n2", "a=" + "[" * 40])
def test_an_override_with_a_broken_value_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="the value is not valid YAML: "):
        parse_override(word)


def test_a_checkpoints_configuration_is_checked_the_same_way() -> None:
    data = Config().model_dump()
    path = Path("runs/flowers-1/last.pth")
    loaded = from_checkpoint(data, path, [("train.epochs", 99)])
    assert (loaded.config.train.epochs, loaded.name) == (99, "flowers-1")
    assert data == Config().model_dump()
    with pytest.raises(ConfigError) as caught:
        from_checkpoint({"seed": -1}, path)
    assert str(caught.value) == f"{path}: seed: should be 0 or more, not -1"


def test_a_folder_or_a_csv_file_means_the_default_configuration_on_it(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "dogs.csv").write_text("id,label\n")
    folder, table = load(f"{tmp_path}/photos/"), load(str(tmp_path / "dogs.csv"), [("data.csv.label_column", "breed")])
    assert (folder.name, folder.config.data.source, folder.config.data.root) == (
        "photos", "imagefolder", str(tmp_path / "photos"),
    )  # fmt: skip
    assert (table.name, table.config.data.source, table.config.data.root) == ("dogs", "csv", str(tmp_path))
    assert (table.config.data.csv.labels, table.config.data.csv.label_column) == ("dogs.csv", "breed")
    assert folder.config.model == load("default.yaml").config.model == Config().model
    assert folder.config.train == load("default.yaml").config.train
    with pytest.raises(ConfigError, match=r"the command line: train\.epochs"):
        load(f"{tmp_path}/photos/", [("train.epochs", 0)])


def test_a_folder_of_shards_and_a_table_mean_themselves(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    for name in ("packed/shards.csv", "packed/train-0.tar", "packed/val-0.tar", "birds.parquet"):
        (tmp_path / name).touch()
    data = load(str(tmp_path / "packed")).config.data
    assert (data.source, data.root, data.webdataset.classes) == ("webdataset", str(tmp_path / "packed"), "classes.txt")
    assert (data.webdataset.train, data.webdataset.val, data.webdataset.test) == ("train-*.tar", "val-*.tar", None)
    data = load(str(tmp_path / "birds.parquet")).config.data
    assert (data.source, data.root, data.parquet.files) == ("parquet", str(tmp_path), "birds.parquet")


@pytest.mark.parametrize("source", ["file", "mapping", "words"])
def test_a_name_alone_stands_for_the_optimizer_and_the_schedule(tmp_path: Path, source: str) -> None:
    short = {"train": {"optimizer": "sgd", "schedule": "cosine"}}
    more = [("train.optimizer.lr", 0.5), ("train.schedule.warmup_epochs", 2)]
    if source == "words":
        config = load(None, [("train.optimizer", "sgd"), ("train.schedule", "cosine"), *more]).config
    else:
        (tmp_path / "c.yaml").write_text("train: {optimizer: sgd, schedule: cosine}")
        config = load(str(tmp_path / "c.yaml") if source == "file" else short, more).config
    assert (config.train.optimizer.name, config.train.optimizer.lr) == ("sgd", 0.5)
    assert (config.train.schedule.name, config.train.schedule.warmup_epochs) == ("cosine", 2)
    assert config.train.search == "off"
    assert short == {"train": {"optimizer": "sgd", "schedule": "cosine"}}


def test_a_wrong_name_alone_is_refused_with_the_right_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [parse_override("train.schedule=cosin"), parse_override("train.optimizer=5")])
    assert str(caught.value).splitlines() == [
        "the command line: train.optimizer: should be keys and values, not 5",
        "the command line: train.schedule.name: unknown value 'cosin'; did you mean 'cosine'? (valid: constant, "
        "cosine, plateau, step)",
    ]


@pytest.mark.parametrize("word", ["data.csv.suffix=", "data.csv.suffix=null", "data.csv.suffix=''"])
def test_an_empty_suffix_is_none(word: str) -> None:
    assert load(None, [("data.csv.suffix", ".jpg"), parse_override(word)]).config.data.csv.suffix == ""


def test_a_key_without_a_value_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"model\.backbone: has no value and should be text$"):
        load(None, [parse_override("model.backbone=")])


def test_the_configuration_of_a_run_has_the_name_of_the_run(tmp_path: Path) -> None:
    """So that `tl-train --config runs/photos-2/config.yaml` becomes photos-3."""
    folder = tmp_path / "photos-2"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    assert load(str(folder / "config.yaml")).name == "config"
    (folder / "classes.txt").write_text("ants\nbees\n")
    assert load(str(folder / "config.yaml")).name == "photos"
