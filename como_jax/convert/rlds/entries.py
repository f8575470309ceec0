"""Tables of what is known about RLDS datasets: cameras, actions, states, language, control rate.

`open_x.toml` beside this file holds those of Open X-Embodiment; a user's own table has the same format.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from como_jax.convert.selection import nearest
from como_jax.errors import ConversionError

OPEN_X = epath.Path(__file__).parent / "open_x.toml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known about one dataset; None if the table does not say.

    Attributes:
      cameras: observation keys, the main camera first.
      action: step keys, joined in this order; empty for none.
      action_meaning: what the joined numbers are, in words: absolute or relative, units, sign of the gripper.
      state: step keys, joined in this order; empty for none.
      language: step key of the instruction, or '' for none.
      control_rate: steps per second (Hz).
      source: addresses of the documentation.
      notes: what a user should also know.
    """

    cameras: tuple[str, ...] | None = None
    action: tuple[str, ...] | None = None
    action_meaning: str | None = None
    state: tuple[str, ...] | None = None
    language: str | None = None
    control_rate: float | None = None
    source: tuple[str, ...] | None = None
    notes: str | None = None


def _is_keys(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(key, str) and key for key in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


_KEYS, _TEXT, _RATE = (
    (_is_keys, "a list of strings"),
    (_is_text, "a string"),
    (_is_rate, "a positive number of steps per second (Hz)"),
)
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "cameras": _KEYS,
    "action": _KEYS,
    "action_meaning": _TEXT,
    "state": _KEYS,
    "language": _TEXT,
    "control_rate": _RATE,
    "source": _KEYS,
    "notes": _TEXT,
}


def read_table(path: epath.PathLike) -> dict[str, Entry]:
    """Reads all entries of a table, by the names of their datasets.

    Raises:
      ConversionError: the file is missing or not TOML, or an entry has unknown fields or wrong values.
    """
    try:
        table = tomllib.loads(epath.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"cannot read the table {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not a TOML table: {error}") from error
    return {name: _entry(f"{path}, entry {name!r}", fields) for name, fields in table.items()}


def find_entry(table: Mapping[str, Entry], path: epath.PathLike, name: str) -> Entry:
    """Returns an entry of the table in `path` by its name; raises ConversionError if there is none."""
    if name not in table:
        raise ConversionError(f"{path} has no entry {name!r}{nearest(name, table)}")
    return table[name]


def _entry(where: str, fields: Any) -> Entry:
    if not isinstance(fields, dict):
        raise ConversionError(f"{where} is not a section; write [NAME] above its fields")
    for field, value in fields.items():
        if field not in _KINDS:
            raise ConversionError(f"{where}: unknown field {field!r}{nearest(field, _KINDS)}")
        is_right, expected = _KINDS[field]
        if not is_right(value):
            raise ConversionError(f"{where}: {field} must be {expected}, got {value!r}")
    return Entry(**{field: tuple(value) if isinstance(value, list) else value for field, value in fields.items()})
