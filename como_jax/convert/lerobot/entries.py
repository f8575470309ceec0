"""Reads the lists of a LeRobot dataset's metadata: a damaged entry costs that entry, and is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.convert.sources import check_file
from como_jax.errors import ConversionError, one_line

_MAX_NAMED = 20
_TINY, _HUGE = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


class EntryError(Exception):
    """An entry cannot be used; the message gives the reason."""


class Entry(NamedTuple):
    """One entry of a list: its values, and where it stands, such as `line 3`."""

    values: Mapping[str, Any]
    place: str

    def number(self, key: str) -> int:
        """Returns a value that must be a whole number of 0 or more, such as an index; EntryError if it is not."""
        value = whole(self.values.get(key))
        if value is None or value < 0:
            raise EntryError(f"{key} must be a whole number, got {self.values.get(key)!r}")
        return value


class EntryList:
    """The entries of one file, in JSON lines or Parquet.

    Attributes:
      path: relative to the dataset.
      faults: what is damaged, in the order of the file.
    """

    def __init__(self, root: epath.Path, path: str):
        self.path, self.faults = path, list[str]()
        self._root = root

    def __iter__(self) -> Iterator[Entry]:
        """Yields the entries that can be read, and notes the others.

        Raises:
          ConversionError: nothing of the file can be read.
        """
        path = self._root / self.path
        try:
            check_file(path)
            yield from self._rows(path) if self.path.endswith(".parquet") else self._lines(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConversionError(f"{path} cannot be read: {one_line(error).rstrip('.')}") from error

    def note(self, place: str, reason: object) -> None:
        """Notes that an entry, or a part of it, was left out."""
        self.faults.append(f"{place} ({one_line(reason) if isinstance(reason, Exception) else reason})")

    def warnings(self) -> list[str]:
        """Returns what was left out, as one message."""
        if not self.faults:
            return []
        more = len(self.faults) - _MAX_NAMED
        named = "; ".join(self.faults[:_MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
        return [f"{self.path}: damaged entries were left out: {named}"]

    def _lines(self, path: epath.Path) -> Iterator[Entry]:
        # Only line feeds end a line of JSON; texts may contain other line separators.
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                values = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(values, dict):
                    raise ValueError("expected a JSON object")
            except ValueError as error:
                self.note(place, error)
                continue
            yield Entry(values, place)

    def _rows(self, path: epath.Path) -> Iterator[Entry]:
        """Yields the rows of a small table, without the columns of statistics."""
        with path.open("rb") as file, pq.ParquetFile(file) as table:
            columns = [name for name in table.schema_arrow.names if not name.startswith("stats/")]
            first = 0
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                try:
                    part = table.read_row_group(group, columns, use_threads=False)
                except (OSError, ValueError, pa.ArrowException) as error:
                    if table.num_row_groups == 1:
                        raise
                    self.note(f"rows {first} to {first + num_rows - 1}", error)
                else:
                    yield from self._group(part, first)
                first += num_rows

    def _group(self, table: pa.Table, first: int) -> Iterator[Entry]:
        columns = {name: self._values(name, table[name], first) for name in dict.fromkeys(table.column_names)}
        for row in range(table.num_rows):
            yield Entry({name: values[row] for name, values in columns.items()}, f"row {first + row}")

    def _values(self, name: str, column: pa.ChunkedArray, first: int) -> list[Any]:
        try:
            return column.to_pylist()
        except ValueError:
            pass
        # Some value, such as a text that is not UTF-8, cannot be read: the others can.
        values = []
        for row, scalar in enumerate(column, first):
            try:
                values.append(scalar.as_py())
            except ValueError as error:
                self.note(f"row {row}", f"{name}: {one_line(error)}")
                values.append(None)
        return values


def parse_json(text: str) -> Any:
    """Parses a JSON text.

    Raises:
      ValueError: the text is not JSON, is nested too deeply, or contains surrogates, which are not characters.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # Surrogates, such as "\\ud800", cannot be written as UTF-8.
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def whole(value: Any) -> int | None:
    """Returns a whole number, even if it is stored as a float; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def finite_float(value: Any) -> float | None:
    """Returns a number in the range of float32; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value == 0 or _TINY <= abs(value) <= _HUGE else None
