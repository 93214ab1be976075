"""What is wrong with a configuration, in words: where each key was set, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tl_trainer.config.data import LOADED
from tl_trainer.config.schema import Config
from tl_trainer.config.section import KeyPath
from tl_trainer.config.training import THRESHOLDS
from tl_trainer.ground.wording import shown, unknown

MAX_PROBLEMS = 30  # that are named

# What pydantic's errors ask for, in our words.
_PHRASES = {
    "model_type": "keys and values", "dict_type": "keys and values", "list_type": "a list", "string_type": "text",
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more", "less_than": "less than {lt:g}", "less_than_equal": "{le:g} or less",
}  # fmt: skip
_PATTERNS = {
    LOADED: "torchvision:<Class>",
    THRESHOLDS: "f1, or precision>= and a share of 1, such as precision>=0.9",
}


def problems(error: ValidationError) -> list[tuple[KeyPath, str]]:
    """pydantic's errors as (key, sentence); the branches of a union are one sentence."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for item in error.errors():
        by_path.setdefault(key_path(item["loc"])[0], []).append(item)
    inner = {path[:depth] for path in by_path for depth in range(len(path))}
    paths = [path for path in by_path if path not in inner]
    found = [(path, _sentence(by_path[path])) for path in paths[:MAX_PROBLEMS]]
    if more := paths[MAX_PROBLEMS:]:
        found.append((more[0], f"wrong as well, as are {len(more) - 1} more"))
    return found


def _sentence(items: list[ErrorDetails]) -> str:
    first, given = items[0], items[0]["input"]
    if first["type"] == "extra_forbidden":
        path, section = key_path(first["loc"])
        assert section is not None
        elsewhere = ", ".join(key for key in _dotted_keys(Config) if key.endswith(f".{path[-1]}"))
        return unknown("key", path[-1], section.model_fields) + (f"; there is {elsewhere}" if elsewhere else "")
    if first["type"] == "missing":
        return "has no value; give one"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ") + ("" if isinstance(given, dict) else f", not {shown(given)}")
    allowed = [choice for item in items for choice in _choices(item)]
    if isinstance(given, str) and any(item["type"] == "literal_error" for item in items):
        return unknown("value", given, allowed)
    wanted = f"should be {', or '.join(allowed)}"
    return f"has no value and {wanted}" if given is None else f"{wanted}, not {shown(given)}"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The annotation where it is a section. Python 3.10 takes list[int] for a class, which issubclass refuses."""
    is_class = isinstance(annotation, type) and get_origin(annotation) is None
    return annotation if is_class and issubclass(annotation, BaseModel) else None


def _dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field_ in section.model_fields.items():
        yield prefix + name
        if inner := section_of(field_.annotation):
            yield from _dotted_keys(inner, f"{prefix}{name}.")


def _choices(item: ErrorDetails) -> list[str]:
    """What would have been right instead, in words."""
    if item["type"] == "literal_error":
        return re.findall(r"'([^']+)'", item["ctx"]["expected"])
    if item["type"] == "string_pattern_mismatch":
        return [_PATTERNS[item["ctx"]["pattern"]]]
    phrase = _PHRASES.get(item["type"], item["msg"].removeprefix("Input should ").removeprefix("be "))
    return [phrase.format(**item.get("ctx", {}))]


def key_path(location: tuple[str | int, ...]) -> tuple[KeyPath, type[BaseModel] | None]:
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
            section = section_of(known.annotation) or section_of(*get_args(known.annotation)[:1] or (None,))
    return tuple(path), section


def parsed_key(key: str) -> KeyPath:
    """`train.phases[1].epochs` as the path of the key."""
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", key))


def in_lines(origins: Mapping[KeyPath, str], found: Iterable[tuple[KeyPath, str]]) -> str:
    """One line per problem: where the key was set and its dotted path, where they are known, and what is wrong."""
    rows = []
    for path, message in found:
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in origins), None)
        where = origins[known] if known is not None else "the defaults" if path else ""  # keys that do not go together
        dotted = ".".join(str(part) for part in path).replace(".[", "[")
        dotted = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", dotted)
        rows.append(": ".join(filter(None, (where, dotted, message))))
    return "\n".join(rows)
