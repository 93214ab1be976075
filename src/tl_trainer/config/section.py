"""What the sections of the configuration have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

KeyPath = tuple[str | int, ...]  # of a key in the configuration; a number is a place in a list


class Section(BaseModel):
    """A part of the configuration: unknown keys and values of another type are refused, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class NamedSection(Section):
    """A section whose `name` decides which of its keys mean anything; the others are refused, and never dumped."""

    only_for: ClassVar[dict[str, tuple[str, ...]]] = {}
    name: str

    @model_validator(mode="after")
    def _refuse_meaningless(self) -> NamedSection:
        for key, names in self.only_for.items():
            if key in self.model_fields_set and self.name not in names:
                raise ValueError(f"{key} is only for {' and '.join(names)}, and name is {self.name}")
        return self

    @model_serializer(mode="wrap")
    def _without_meaningless(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if self.name in self.only_for.get(key, (self.name,))}
