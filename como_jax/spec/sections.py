"""Between a dataclass of settings and a section of a config, which holds its fields by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def default_fields(settings: type) -> dict[str, Any]:
    """The fields of a dataclass that have a default, by name; fields of a nested dataclass as a nested dictionary."""
    values = {field.name: field.default for field in dataclasses.fields(settings)}
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
        if value is not dataclasses.MISSING
    }


def fields_of(settings: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries of a section that are fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(settings)}
    return {name: value for name, value in section.items() if name in names}
