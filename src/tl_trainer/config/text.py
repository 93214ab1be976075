"""YAML text -> plain data with the line of every key, and back; what is no plain data is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from tl_trainer.config.section import KeyPath
from tl_trainer.ground.wording import shown

MAX_DEPTH, MAX_NODES = 32, 2_000
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels; check its brackets and indentation"


def read(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """The document, and the line on which each of its keys stands. Raises Refused."""
    reader = _Reader()
    return reader.read(text), reader.lines


def write(data: dict[str, Any]) -> str:
    """YAML in the order of `data`, which `read` reads as the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class Refused(Exception):
    """Why a text is no configuration, and on which line; 0 where that is not known."""

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
            raise Refused(TOO_DEEP, line)
        if self._nodes > MAX_NODES:
            raise Refused(f"more than {MAX_NODES:,} values; is this a configuration?", line)
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

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._nodes = 0

    def read(self, text: str) -> Any:
        try:
            node = yaml.compose(text, Loader=_Scalars)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            reason = str(error.problem or error.context)
            hint = "; check the indentation" if "not allowed" in reason else ""
            hint = "; indent with spaces" if "\\t" in reason else hint
            raise Refused(reason + hint, mark.line + 1 if mark else 0) from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" is a ValueError
            raise Refused(str(error).splitlines()[0]) from None
        return None if node is None else self._convert(node, ())

    def _convert(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self._nodes += 1
        if len(path) > MAX_DEPTH:
            raise Refused(TOO_DEEP, line)
        if self._nodes > MAX_NODES:
            raise Refused(f"more than {MAX_NODES:,} values after expanding its aliases", line)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._convert(item, (*path, index)) for index, item in enumerate(node.value)]
        kind = node.tag.removeprefix(_TAG)
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            raise Refused(f"the tag {node.tag} is not allowed; write a plain value", line)
        pattern, convert = _SCALARS[kind]
        try:
            if not re.fullmatch(pattern, node.value):  # a tag such as !!int on another kind of value
                raise ValueError("another kind of value")
            return convert(node.value)
        except ValueError:
            raise Refused(f"{shown(node.value)} is not a valid {kind}", line) from None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            inside = (*path, key)
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.removeprefix(_TAG) not in _SCALARS:
                raise Refused("a key must be a word", line)
            if key in mapping:
                first = self.lines[inside]
                raise Refused(f"duplicate key {shown(key)}, first given on line {first}; keep one", line)
            self.lines[inside] = line
            mapping[key] = self._convert(value_node, inside)
        return mapping
