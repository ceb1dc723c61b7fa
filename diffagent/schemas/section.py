"""Base class of the sections of a run's configuration: frozen, bounded, checked for text."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

#: Characters that no path, file or terminal holds as text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def _check_characters(value: Any) -> None:
    if isinstance(value, str) and (match := _CONTROL.search(value)):
        raise ValueError(f"holds the character {match[0]!r}; leave it out")
    if isinstance(value, list | tuple | dict):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_characters(part)


class Section(BaseModel):
    """A frozen part of a configuration that refuses unknown keys and control characters."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse control characters and lone surrogates; nested sections check their own."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            _check_characters(value)
        return value
