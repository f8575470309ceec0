"""Files of instructions that lie beside recordings: JSON, JSON Lines, CSV, TSV, Parquet, and one text a recording.

Every reader here yields entries one by one. An entry that cannot be understood is an entry too, with the reason, so
that it costs nothing but itself.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from etils import epath

from como_jax.data.parquet import read_parquet
from como_jax.errors import one_line

TABLE_SUFFIXES = (".csv", ".tsv")
LINES_SUFFIXES = (".jsonl", ".ndjson")
SIDECAR_SUFFIXES = (".json", *LINES_SUFFIXES, *TABLE_SUFFIXES)
# Read where their names say that they hold labels; recordings of robots come as such files too.
NAMED_SUFFIXES = (".parquet", ".txt")
LABEL_NAME = re.compile(r"label|caption|instruct|annot|prompt|language|metadata|narration", re.IGNORECASE)
FILE_COLUMNS = (
    *("file_name", "filename", "file", "path", "video", "video_path", "video_name", "video_file", "video_id"),
    *("clip", "clip_id", "name", "uid", "id"),
)
TEXT_COLUMNS = (
    *("instruction", "language_instruction", "instructions", "language", "text", "caption", "captions", "label"),
    *("task", "prompt", "description", "narration", "annotation", "sentence"),
)
READ_ERRORS = (OSError, ValueError, csv.Error, RecursionError, pa.ArrowException)
# Columns of annotations of actions within long videos, such as those of EPIC-KITCHENS.
_PART = re.compile(r"(start|stop|begin|end|onset|offset)(_?(frame|time|timestamp|seconds|sec|s))?|timestamps?|segment")
# What programs write for a value that is missing.
_NOTHING = ("nan", "null", "none", "n/a", "<na>")
_DELIMITERS = (",", ";", "\t", "|")
# A quoted text may hold line breaks. A quote that is never closed must not take the rest of the file with it.
_MAX_LINES = 20
_MAX_SHOWN = 40
_STRING = r'"(?:[^"\\\n]|\\.)*"'
_PAIR = re.compile(rf"({_STRING})\s*:\s*({_STRING}|\[[^][]*\]|\{{[^{{}}]*\}}|[^\s,}}]*)")
_OBJECT = re.compile(r"\{[^{}]*\}")


class Entry(NamedTuple):
    """One entry of a file.

    Attributes:
      name: what it calls the recording.
      texts: its instructions; empty if the entry cannot be used.
      fault: why it cannot be used, or what was made of it.
      is_part: whether it has a start or an end, and so may be about a part of the recording.
    """

    name: str
    texts: tuple[str, ...]
    fault: str = ""
    is_part: bool = False


class LabelFile(NamedTuple):
    """How the labels of a file are to be read.

    Attributes:
      columns: fields that may hold the text, the likeliest first.
      is_recording: whether a text names a recording; tells a table without a header, and a file about one recording.
    """

    columns: tuple[str, ...]
    is_recording: Callable[[str], bool]

    def read(self, path: epath.Path) -> list[Entry]:
        """Reads the entries of a file.

        Raises:
          READ_ERRORS: the file cannot be read, or holds something else.
        """
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return self._rows(read_parquet(path).to_pylist())
        text = _decoded(path.read_bytes())
        if suffix == ".txt":
            return [_entry(path.stem, text)]
        if suffix in TABLE_SUFFIXES:
            return list(self._table(text))
        return self._rows(_lines(text)) if suffix in LINES_SUFFIXES else self._json(path.stem, text)

    def _rows(self, rows: Iterable[Any]) -> list[Entry]:
        """Returns the entries of rows with named fields; raises ValueError if none has the fields that are needed."""
        rows = [_lowered(row) for row in rows]
        if not self._is_table(rows):
            raise ValueError(self._expected())
        column = self._name_field(rows)
        return [self._row(row, f"entry {number}", column) for number, row in enumerate(rows, 1)]

    def _row(self, row: Any, place: str, column: str) -> Entry:
        """Returns the entry of a row whose recording is named in `column`; `place` names rows without a name."""
        if not isinstance(row, Mapping):
            return Entry(place, (), str(row) if isinstance(row, ValueError) else f"{_shown(row)} is no object")
        name, field = _name(row, column), self._text_field(row)
        if not name or field is None:
            return Entry(name or place, (), f"it has no field for {'a text' if name else 'a file name'}")
        is_part = any(_PART.fullmatch(key) for key in row)
        return _entry(name, row[field])._replace(is_part=is_part)

    def _name_field(self, rows: Sequence[Any]) -> str:
        """Returns the column of some rows that names recordings, or else the first that could."""
        rows = [row for row in rows if isinstance(row, Mapping)]
        present = [column for column in FILE_COLUMNS if any(_name(row, column) for row in rows)]
        return next(
            (each for each in present if any(self.is_recording(_name(row, each)) for row in rows)),
            present[0] if present else FILE_COLUMNS[0],
        )

    def _text_field(self, row: Mapping[str, Any]) -> str | None:
        return next((column for column in self.columns if column in row), None)

    def _expected(self) -> str:
        return f"expected a field {' or '.join(FILE_COLUMNS)} and a field {' or '.join(self.columns)}"

    def _json(self, stem: str, text: str) -> list[Entry]:
        """An object by name, a list of objects, an object around such a list, or the object of one recording."""
        damage = []
        try:
            content = json.loads(text, object_pairs_hook=_Pairs)
        except ValueError as error:
            content = _salvaged(text)
            damage = [Entry("the file", (), f"it is damaged: {one_line(error)}")]
            if not content:
                raise
        if isinstance(content, list):
            return self._rows(content) + damage
        if not isinstance(content, _Pairs):
            raise ValueError("expected an object or a list")
        fields = _lowered(content)
        if self.is_recording(stem) and (field := self._text_field(fields)) is not None:
            return [_entry(stem, fields[field])]
        tables = [
            value for value in content.values() if isinstance(value, list) and self._is_table(map(_lowered, value))
        ]
        if tables:
            return [entry for table in tables for entry in self._rows(table)] + damage
        entries = [self._named(name, value) for name, value in content.pairs]
        if not any(entry.texts for entry in entries):
            raise ValueError("expected an object that maps file names to instructions, or a list of objects")
        return entries + damage

    def _is_table(self, rows: Iterable[Any]) -> bool:
        """Whether any row has a name and a text."""
        return any(
            isinstance(row, Mapping) and self._text_field(row) and any(_name(row, each) for each in FILE_COLUMNS)
            for row in rows
        )

    def _named(self, name: str, value: Any) -> Entry:
        """Returns the entry of `name: value`, where the value is a text, a list of texts or an object with a text."""
        if isinstance(value, Mapping):
            fields = _lowered(value)
            value = fields.get(self._text_field(fields) or "")
        return _entry(name, value)

    def _table(self, text: str) -> Iterator[Entry]:
        """Yields the entries of CSV or of what is like it; a table without a header has name and text first."""
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        while lines and not lines[0].strip():
            lines.pop(0)
        delimiter, header = self._header(lines[0] if lines else "")
        if header:
            lines[0] = ""
        else:
            header = [FILE_COLUMNS[0], self.columns[0]]
        text_column = next(column for column in self.columns if column in header)
        records = list(_records(lines, delimiter))
        rows = [dict(zip(header, cells, strict=False)) for _, _, cells in records if not isinstance(cells, str)]
        name_column = self._name_field(rows)
        for number, line, cells in records:
            name = line.partition(delimiter)[0].strip() or f"line {number}"
            if isinstance(cells, str):
                yield Entry(name, (), cells)
            elif len(cells) <= header.index(text_column):
                yield Entry(name, (), "its row has too few columns")
            elif len(cells) <= len(header):
                yield self._row(dict(zip(header, cells, strict=False)), f"line {number}", name_column)
            elif header[-1] == text_column:
                last = len(header) - 1
                row = dict(zip(header, [*cells[:last], f"{delimiter} ".join(cells[last:])], strict=True))
                fault = "its row has too many columns, the last of which were joined"
                yield self._row(row, f"line {number}", name_column)._replace(fault=fault)
            else:
                yield Entry(name, (), f"its row has {len(cells)} columns, and the header {len(header)}")

    def _header(self, line: str) -> tuple[str, list[str]]:
        """Returns delimiter and header of a table; the header is empty if there is none."""
        for delimiter in _DELIMITERS:
            cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
            header = [cell.lower() for cell in cells]
            if set(header) & set(FILE_COLUMNS) and set(header) & set(self.columns):
                return delimiter, header
            if len(cells) > 1 and self.is_recording(cells[0]):
                return delimiter, []
        raise ValueError(self._expected())


class _Pairs(dict):
    """An object of JSON, in which a name may occur twice.

    Attributes:
      pairs: all names and values, in order.
    """

    def __init__(self, pairs: Iterable[tuple[str, Any]]):
        self.pairs = list(pairs)
        super().__init__(self.pairs)


def _records(lines: list[str], delimiter: str) -> Iterator[tuple[int, str, list[str] | str]]:
    """Yields number, first line and cells of every record of a table, or what is wrong with it."""
    start = 0
    while start < len(lines):
        line, count = lines[start], 1
        if line.strip():
            cells, count = _record(lines[start : start + _MAX_LINES], delimiter)
            yield start + 1, line, cells
        start += count


def _record(lines: list[str], delimiter: str) -> tuple[list[str] | str, int]:
    """Returns the first record of some lines and how many lines it has; only one if it is damaged."""
    for count in range(1, len(lines) + 1):
        part = [f"{line}\n" for line in lines[:count]]
        try:
            (cells,) = csv.reader(part, delimiter=delimiter, strict=True, skipinitialspace=True)
            return cells, count
        except csv.Error as error:
            if '"' not in lines[0] or "unexpected end" not in str(error):
                return f"its row cannot be read: {error}", 1
        except ValueError:
            break
    return "its row has a quotation mark that is not closed", 1


def _decoded(data: bytes) -> str:
    """Decodes a text; bytes that are not UTF-8 become surrogates, which spoil only the entry that holds them."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "surrogateescape")


def _entry(name: str, value: Any) -> Entry:
    """Makes an entry of a text, or of a list of texts for the same recording."""
    values = value if isinstance(value, list) else [value]
    faults = [_fault(each) for each in values] or ["it holds no text"]
    texts = tuple(each.strip() for each in values if not _fault(each))
    return Entry(name, texts, next(filter(None, faults), ""))


def _fault(value: Any) -> str:
    if isinstance(value, ValueError):
        return f"it is damaged: {value}"
    if not isinstance(value, str):
        return f"{_shown(value)} is no text"
    # JSON can hold surrogates, which are not characters and cannot be written as UTF-8.
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "its text is not valid UTF-8"
    if any(character < " " and not character.isspace() for character in value):
        return "its text holds control characters"
    if not value.strip():
        return "its text is empty"
    # The number of a class is no instruction.
    is_words = any(character.isalpha() for character in value) and value.strip().lower() not in _NOTHING
    return "" if is_words else f"{_shown(value)} is no text"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:_MAX_SHOWN]


def _lowered(row: Any) -> Any:
    """Returns a row with the names of its fields in small letters; what is no row stays as it is."""
    return {str(key).strip().lower(): value for key, value in row.items()} if isinstance(row, Mapping) else row


def _name(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    return str(value).strip() if isinstance(value, str | int) else ""


def _lines(text: str) -> Iterator[Any]:
    """Yields the values of JSON Lines; a line that is damaged becomes an error."""
    # Only line feeds end a line of JSON; texts may contain other line separators.
    return (_parsed(line) for line in text.split("\n") if line.strip())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        return ValueError(f"{text.strip()[:_MAX_SHOWN]!r} is no JSON: {one_line(error)}")


def _salvaged(text: str) -> Any:
    """Returns what is whole in a damaged file of JSON, with errors in place of the entries that are damaged."""
    if text.lstrip()[:1] == "[":
        return [_parsed(match[0]) for match in _OBJECT.finditer(text)]
    return _Pairs((str(_parsed(match[1])), _parsed(match[2])) for match in _PAIR.finditer(text))
