"""Find a configuration, read YAML and overrides, and name every mistake at once with its file and line."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tl_trainer.config.schema import Config, expand
from tl_trainer.errors import ConfigError, InputError, SettingError
from tl_trainer.ground.wording import shown, unknown

MAX_BYTES, MAX_DEPTH, MAX_NODES = 100_000, 32, 2_000
MAX_PROBLEMS = 30  # that are named
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels; check its brackets and indentation"
COMMAND_LINE, UNNAMED = "the command line", "run"
BY_NAME = (("train", "optimizer"), ("train", "schedule"))  # sections for which their name may stand alone

KeyPath = tuple[str | int, ...]
Override = tuple[str, Any]
Overrides = Iterable[Override]


@dataclass(frozen=True)
class Loaded:
    """A valid configuration, its name, and where each key was set ("demo.yaml:12", "the command line")."""

    config: Config
    name: str
    origins: Mapping[KeyPath, str] = field(default_factory=dict)

    def located(self, errors: Iterable[SettingError]) -> ConfigError:
        """The complaints of the rooms that only know a key, with the file and the line in front."""
        return ConfigError(_lines(self.origins, [(_parse_key(error.key), error.message) for error in errors]))


def load(name: str | Mapping[str, Any] | None, overrides: Overrides = ()) -> Loaded:
    """The configuration called `name` (a path, else a bundled one; None: the defaults) with dotted-key overrides.

    A mapping is taken as it is; a folder of photographs or a CSV file means default.yaml on these.

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
    return _validated(data, path.stem, {key: f"{path}:{line}" for key, line in lines.items()}, overrides)


def from_checkpoint(data: dict[str, Any], path: Path, overrides: Overrides = ()) -> Loaded:
    """The configuration that a checkpoint carries, with dotted-key overrides; ConfigError as in `load`."""
    return _validated(copy.deepcopy(data), path.parent.name, {(): str(path)}, overrides)


def _validated(data: dict[str, Any], name: str, origins: dict[KeyPath, str], overrides: Overrides) -> Loaded:
    _fill_empty_sections(data, Config)
    for key, value in overrides:
        _set(data, key, value, origins)
    try:
        return Loaded(Config.model_validate(data), name, origins)
    except ValidationError as error:
        raise ConfigError(_lines(origins, _problems(error))) from None


def data_at(path: Path) -> list[Override]:
    """The settings for the data in a folder or a CSV file; none for another path."""
    with contextlib.suppress(OSError):  # such as a name that is too long for the system: `find` says so
        if path.is_dir():
            return [("data.source", "imagefolder"), ("data.root", str(path))]
        if path.suffix.lower() == ".csv" and path.is_file():
            return [("data.source", "csv"), ("data.root", str(path.parent)), ("data.csv.labels", path.name)]
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
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise InputError(f"{shown(word)} is not an override; write key=value, e.g. {example}")
    try:
        return key, _Reader(text).read()
    except _Refused as refusal:
        raise InputError(f"{shown(word)}: the value is not valid YAML: {refusal.reason}") from None


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_json_schema(names: Mapping[str, list[str]]) -> str:
    """The JSON Schema for editors; `names` gives what `backbone`, `weights` and `transforms` know as examples."""
    schema = Config.model_json_schema()
    schema["title"] = "tl-trainer configuration"
    for key in ("backbone", "weights"):
        schema["$defs"]["ModelSection"]["properties"][key]["examples"] = names[key]
    schema["$defs"]["TransformsSection"]["properties"]["train"]["examples"] = names["transforms"]
    return json.dumps(schema, indent=2)


# What pydantic's errors ask for, in our words; the only pattern is that of data.source.
_PHRASES = {
    "model_type": "keys and values", "dict_type": "keys and values", "list_type": "a list", "string_type": "text",
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "string_pattern_mismatch": "torchvision:<Class>", "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more", "less_than": "less than {lt:g}", "less_than_equal": "{le:g} or less",
}  # fmt: skip


class _Refused(Exception):
    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


class _Dumper(yaml.SafeDumper):
    """Quotes the words that YAML 1.1 or _Scalars would read as something else."""


class _Scalars(yaml.SafeLoader):
    """YAML 1.2's core schema: `1e-3` is a number, `off` and `no` are words, 010 is ten."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own way to say it)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse here what nests or goes on too long: reading it to its end could take seconds."""
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        self._nodes += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(TOO_DEEP, line)
        if self._nodes > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES:,} values; is this a configuration?", line)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("too large")
    return number


_SCALARS: dict[str, tuple[str, Any]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", _finite),
    "str": (r"(?s:.*)", str),
}
_TAG = "tag:yaml.org,2002:"
for _name, (_pattern, _) in _SCALARS.items():
    if _name != "str":
        for _class in (_Scalars, _Dumper):
            _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), None)


class _Reader:
    """One YAML document -> plain data, refusing tags, duplicate keys and documents that explode."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines: dict[KeyPath, int] = {}
        self._nodes = 0

    def read(self) -> Any:
        try:
            node = yaml.compose(self.text, Loader=_Scalars)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            reason = str(error.problem or error.context)
            hint = "; check the indentation" if "not allowed" in reason else ""
            hint = "; indent with spaces" if "\\t" in reason else hint
            raise _Refused(reason + hint, mark.line + 1 if mark else 0) from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" is a ValueError
            raise _Refused(str(error).splitlines()[0]) from None
        return None if node is None else self._convert(node, ())

    def _convert(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self._nodes += 1
        if len(path) > MAX_DEPTH:
            raise _Refused(TOO_DEEP, line)
        if self._nodes > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES:,} values after expanding its aliases", line)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._convert(item, (*path, index)) for index, item in enumerate(node.value)]
        kind = node.tag.removeprefix(_TAG)
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            raise _Refused(f"the tag {node.tag} is not allowed; write a plain value", line)
        pattern, convert = _SCALARS[kind]
        try:
            if not re.fullmatch(pattern, node.value):  # a tag such as !!int on another kind of value
                raise ValueError("another kind of value")
            return convert(node.value)
        except ValueError:
            raise _Refused(f"{shown(node.value)} is not a valid {kind}", line) from None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            inside = (*path, key)
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.removeprefix(_TAG) not in _SCALARS:
                raise _Refused("a key must be a word", line)
            if key in mapping:
                first = self.lines[inside]
                raise _Refused(f"duplicate key {shown(key)}, first given on line {first}; keep one", line)
            self.lines[inside] = line
            mapping[key] = self._convert(value_node, inside)
        return mapping


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes; is this a configuration?")
        reader = _Reader(raw.decode("utf-8"))
        data = reader.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except _Refused as refusal:
        where = f"{path}:{refusal.line}" if refusal.line else str(path)
        raise ConfigError(f"{where}: {refusal.reason}") from None
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: the top level must be keys and values such as `seed: 0`")
    return data, reader.lines


def _fill_empty_sections(data: dict[str, Any], section: type[BaseModel]) -> None:
    """A section whose lines are all commented out means its defaults, not null."""
    for name, field_ in section.model_fields.items():
        inner = _section(field_.annotation)
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
            if part in data and _key_path(path[:depth])[1] is not None:
                return  # the file has no section where one belongs: a mistake that an override must not hide
            data[part] = {}
            origins[path[:depth]] = COMMAND_LINE
        data = data[part]
    data[path[-1]] = value
    for inside in [known for known in origins if known[: len(path)] == path]:
        del origins[inside]
    origins[path] = COMMAND_LINE


def _problems(error: ValidationError) -> list[tuple[KeyPath, str]]:
    """pydantic's errors as (key, sentence); the branches of a union are one sentence."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for item in error.errors():
        by_path.setdefault(_key_path(item["loc"])[0], []).append(item)
    inner = {path[:depth] for path in by_path for depth in range(len(path))}
    paths = [path for path in by_path if path not in inner]
    found = [(path, _sentence(by_path[path])) for path in paths[:MAX_PROBLEMS]]
    if more := paths[MAX_PROBLEMS:]:
        found.append((more[0], f"wrong as well, as are {len(more) - 1} more"))
    return found


def _sentence(items: list[ErrorDetails]) -> str:
    first, given = items[0], items[0]["input"]
    if first["type"] == "extra_forbidden":
        path, section = _key_path(first["loc"])
        assert section is not None
        elsewhere = ", ".join(key for key in _dotted_keys(Config) if key.endswith(f".{path[-1]}"))
        return unknown("key", path[-1], section.model_fields) + (f"; there is {elsewhere}" if elsewhere else "")
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ") + ("" if isinstance(given, dict) else f", not {shown(given)}")
    allowed = [choice for item in items for choice in _choices(item)]
    if isinstance(given, str) and any(item["type"] == "literal_error" for item in items):
        return unknown("value", given, allowed)
    wanted = f"should be {', or '.join(allowed)}"
    return f"has no value and {wanted}" if given is None else f"{wanted}, not {shown(given)}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The annotation where it is a section. Python 3.10 takes list[int] for a class, which issubclass refuses."""
    is_class = isinstance(annotation, type) and get_origin(annotation) is None
    return annotation if is_class and issubclass(annotation, BaseModel) else None


def _dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field_ in section.model_fields.items():
        yield prefix + name
        if inner := _section(field_.annotation):
            yield from _dotted_keys(inner, f"{prefix}{name}.")


def _choices(item: ErrorDetails) -> list[str]:
    """What would have been right instead, in words."""
    if item["type"] == "literal_error":
        return re.findall(r"'([^']+)'", item["ctx"]["expected"])
    phrase = _PHRASES.get(item["type"], item["msg"].removeprefix("Input should ").removeprefix("be "))
    return [phrase.format(**item.get("ctx", {}))]


def _key_path(location: tuple[str | int, ...]) -> tuple[KeyPath, type[BaseModel] | None]:
    """pydantic's location without the names of union branches, and the section the last key was looked for in."""
    path: list[str | int] = []
    section: type[BaseModel] | None = Config
    for part in location:
        if isinstance(part, int):  # of a list, whose items may be sections
            path.append(part)
        elif section is not None:
            path.append(part)
            known = section.model_fields.get(part)
            if known is None:
                return tuple(path), section
            section = _section(known.annotation) or _section(*get_args(known.annotation)[:1] or (None,))
    return tuple(path), section


def _parse_key(key: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", key))


def _lines(origins: Mapping[KeyPath, str], problems: Iterable[tuple[KeyPath, str]]) -> str:
    """One line per problem: where the key was set, its dotted path, and what is wrong with it."""
    rows = []
    for path, message in problems:
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in origins), None)
        where = origins[known] if known is not None else "the defaults"
        dotted = ".".join(str(part) for part in path).replace(".[", "[")
        dotted = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", dotted)
        rows.append(f"{where}: {dotted}: {message}")
    return "\n".join(rows)
