"""Find a configuration, read YAML and overrides, and name every mistake at once with its file and line."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from tl_trainer.config import text
from tl_trainer.config.data import expand
from tl_trainer.config.mistakes import in_lines, key_path, parsed_key, problems, section_of
from tl_trainer.config.schema import Config
from tl_trainer.config.section import KeyPath
from tl_trainer.errors import ConfigError, InputError, SettingError
from tl_trainer.ground.wording import shown, unknown

MAX_BYTES = 100_000
COMMAND_LINE, UNNAMED = "the command line", "run"
BY_NAME = (("train", "optimizer"), ("train", "schedule"))  # sections for which their name may stand alone
COMPARED = ("backbone", "weights")  # keys of `model` that may be lists, whose entries are compared before a run begins

Override = tuple[str, Any]
Overrides = Iterable[Override]


@dataclass(frozen=True)
class Loaded:
    """A valid configuration, its name, and where each key was set ("demo.yaml:12", "the command line").

    lists: the one of COMPARED that is a list, if any, of which `config` has the first entry. probed: after the entries
    were compared, a row for each, as in result.json.
    """

    config: Config
    name: str
    origins: Mapping[KeyPath, str] = field(default_factory=dict)
    lists: Mapping[str, list[str]] = field(default_factory=dict)
    probed: Sequence[dict[str, Any]] = ()

    @property
    def each(self) -> list[Config]:
        """The configuration with each entry of the list in place of it; where there is none, as it is."""
        model = self.config.model
        models = [model.model_copy(update={key: entry}) for key, list_ in self.lists.items() for entry in list_]
        return [self.config.model_copy(update={"model": one}) for one in models or [model]]

    def taking(self, config: Config) -> Loaded:
        """With this configuration, which has one backbone."""
        return replace(self, config=config, lists={})

    def located(self, errors: Iterable[SettingError]) -> ConfigError:
        """The complaints of the rooms that only know a key, with the file and the line in front."""
        return ConfigError(in_lines(self.origins, [(parsed_key(error.key), error.message) for error in errors]))


def load(name: str | Mapping[str, Any] | None, overrides: Overrides = ()) -> Loaded:
    """The configuration called `name` (a path, else a bundled one; None: the defaults) with dotted-key overrides.

    A mapping is taken as it is; a folder of photographs or a CSV file means default.yaml on these. The config.yaml of a
    run has the name of the run, without its number.

    Raises ConfigError with one line per mistake: file:line, dotted path, what was given and what is allowed.
    """
    if name is None:
        return _validated({}, UNNAMED, {}, overrides)
    if isinstance(name, str) and name not in _bundled() and (settings := data_at(expand(name))):
        default = load("default.yaml", [*settings, *overrides])
        return replace(default, name=expand(name).resolve().stem or default.name)
    if isinstance(name, Mapping):
        return _validated(copy.deepcopy(dict(name)), UNNAMED, {(): "the configuration"}, overrides)
    path = find(name)
    data, lines = _read(path)
    of_run = path.name == "config.yaml" and (path.parent / "classes.txt").exists()
    name = re.sub(r"-\d+$", "", path.parent.resolve().name) if of_run else path.stem
    return _validated(data, name, {key: f"{path}:{line}" for key, line in lines.items()}, overrides)


def from_checkpoint(data: dict[str, Any], path: Path, overrides: Overrides = ()) -> Loaded:
    """The configuration that a checkpoint carries, with dotted-key overrides; ConfigError as in `load`."""
    return _validated(copy.deepcopy(data), path.parent.name, {(): str(path)}, overrides, lists=False)


def _validated(
    data: dict[str, Any], name: str, origins: dict[KeyPath, str], overrides: Overrides, *, lists: bool = True
) -> Loaded:
    """lists: whether one of COMPARED may be a list."""
    _fill_empty_sections(data, Config)
    for key, value in overrides:
        _set(data, key, value, origins)
    compared, wrong = _without_lists(data) if lists else ({}, [])
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        wrong += problems(error)
    if wrong:
        raise ConfigError(in_lines(origins, wrong))
    return Loaded(config, name, origins, compared)


def _without_lists(data: dict[str, Any]) -> tuple[dict[str, list[str]], list[tuple[KeyPath, str]]]:
    """Put the first entry in place of a list; the lists by their keys, and what is wrong with them."""
    model, wrong = data.get("model"), list[tuple[KeyPath, str]]()
    if not isinstance(model, dict):
        return {}, wrong
    lists = {key: model[key] for key in COMPARED if isinstance(model.get(key), list)}
    for key, entries in lists.items():
        first, *others = lists
        reason = _wrong_list(entries)
        if key in others:
            reason = f"is a list, and so is model.{first}; compare one of them at a time"
        if reason is None:
            model[key] = entries[0]
        else:
            wrong.append((("model", key), reason))
            del model[key]
    return lists, wrong


def _wrong_list(entries: list[Any]) -> str | None:
    if not all(isinstance(entry, str) for entry in entries):
        return f"should be a name, or a list of names to compare, not {shown(entries)}"
    if len(entries) < 2:
        return "is a list of names to compare, and has fewer than two; add one, or give a name without a list"
    twice = next((entry for number, entry in enumerate(entries) if entry in entries[:number]), None)
    return None if twice is None else f"names {shown(twice)} twice; leave one of them out"


def data_at(path: Path) -> list[Override]:
    """The settings for the data in a folder (images, shards), a CSV or a Parquet file; none for another path."""
    with contextlib.suppress(OSError):  # such as a name that is too long for the system: `find` says so
        if (path / "shards.csv").is_file():  # scripts/to_webdataset.py has packed it
            keys: list[Override] = [("data.source", "webdataset"), ("data.root", str(path))]
            splits = [split for split in ("val", "test") if any(path.glob(f"{split}-*.tar"))]
            keys += [(f"data.webdataset.{split}", f"{split}-*.tar") for split in splits]
            return [*keys, ("data.webdataset.classes", "classes.txt")]
        if path.is_dir():
            return [("data.source", "imagefolder"), ("data.root", str(path))]
        if path.suffix.lower() == ".csv" and path.is_file():
            return [("data.source", "csv"), ("data.root", str(path.parent)), ("data.csv.labels", path.name)]
        if path.suffix.lower() == ".parquet" and path.is_file():
            return [("data.source", "parquet"), ("data.root", str(path.parent)), ("data.parquet.files", path.name)]
    return []


def find(name: str) -> Path:
    """The file that `--config name` means: a path, else a bundled configuration with or without its ending."""
    path = expand(name)
    try:
        if path.is_file():
            return path
        exists = path.exists()
    except OSError as error:
        raise InputError(f"--config {name}: cannot be read: {error.strerror}") from error
    bundled = _bundled()
    if name in bundled:
        return bundled[name]
    if exists:
        raise InputError(f"--config {name} is not a file")
    names = {file.name for file in bundled.values()}
    raise InputError(f"--config {name}: no such file, and {unknown('bundled configuration', name, names)}")


def _bundled() -> dict[str, Path]:
    """The bundled configurations by their names, with and without the ending."""
    return {name: file for file in bundled_folder().glob("*.yaml") for name in (file.stem, file.name)}


def bundled_folder() -> Path:
    """The folder of the configurations that are installed with the package."""
    installed = Path(str(resources.files("tl_trainer"))) / "configs"
    # An editable install keeps the package in src/ and the configurations at the top of the repository.
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def parse_override(word: str, example: str = "train.epochs=5") -> tuple[str, Any]:
    """`train.epochs=5` as (key, value), the value read as YAML; InputError, with an example, for another form."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise InputError(f"{shown(word)} is not an override; write key=value, e.g. {example}")
    try:
        return key, text.read(value)[0]
    except text.Refused as refusal:
        raise InputError(f"{shown(word)}: the value is not valid YAML: {refusal.reason}") from None


def to_yaml(config: Config, lists: Mapping[str, list[str]] = MappingProxyType({})) -> str:
    """The resolved configuration as YAML, in the order of the schema; lists: as of `Loaded`."""
    dumped = config.model_dump()
    return text.write({**dumped, "model": {**dumped["model"], **lists}})


def to_json_schema(names: Mapping[str, list[str]]) -> str:
    """The JSON Schema for editors; `names` gives what `backbone`, `weights` and `transforms` know as examples."""
    schema = Config.model_json_schema()
    schema["title"] = "tl-trainer configuration"
    for key in ("backbone", "weights"):
        schema["$defs"]["ModelSection"]["properties"][key]["examples"] = names[key]
    schema["$defs"]["TransformsSection"]["properties"]["train"]["examples"] = names["transforms"]
    return json.dumps(schema, indent=2)


def _fill_empty_sections(data: dict[str, Any], section: type[BaseModel]) -> None:
    """A section whose lines are all commented out means its defaults, not null."""
    for name, field_ in section.model_fields.items():
        inner = section_of(field_.annotation)
        if name in data and inner is not None:
            data[name] = {} if data[name] is None else data[name]
            if isinstance(data[name], dict):
                _fill_empty_sections(data[name], inner)


def _set(data: dict[str, Any], key: str, value: Any, origins: dict[KeyPath, str]) -> None:
    path = tuple(key.split("."))
    for depth, part in enumerate(path[:-1], start=1):
        inner = data.get(part)
        if isinstance(inner, str) and path[:depth] in BY_NAME:
            data[part] = {"name": inner}
        elif not isinstance(inner, dict):
            if part in data and key_path(path[:depth])[1] is not None:
                return  # the file has no section where one belongs: a mistake that an override must not hide
            data[part] = {}
            origins[path[:depth]] = COMMAND_LINE
        data = data[part]
    data[path[-1]] = value
    for inside in [known for known in origins if known[: len(path)] == path]:
        del origins[inside]
    origins[path] = COMMAND_LINE


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes; is this a configuration?")
        data, found = text.read(raw.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except text.Refused as refusal:
        where = f"{path}:{refusal.line}" if refusal.line else str(path)
        raise ConfigError(f"{where}: {refusal.reason}") from None
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: the top level must be keys and values such as `seed: 0`")
    return data, found
