"""The episode table of a split: one Parquet file for all of its shards, so that opening a dataset is one read.

The file has groups of consecutive episodes, each of which can be read on its own. It also tells the numbers of records
and the sizes of the files of records that it was made for, by which a table is noticed that belongs to others. Datasets
of earlier versions have a table for each shard in place of the one; they are read too, one file after the other.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.data.parquet import read_groups
from como_jax.data.schema import EPISODE_TABLE_SCHEMA
from como_jax.errors import DatasetError
from como_jax.files import names_in, write_atomic

logger = logging.getLogger(__name__)

_SHARDS_KEY = b"como_jax.shards"
# A group is what is labelled at once, and what is in memory while a table is gone through.
_MOST_GROUPS = 512
_GROUP_STEPS = 2**18
_FEW_TABLES = 64


class ShardSizes(NamedTuple):
    """Numbers of records and of bytes in the files of records of a split, int64 `[N]` in the order of the files."""

    records: np.ndarray
    num_bytes: np.ndarray


class Group(NamedTuple):
    """Consecutive episodes of a table that are read together: a file, the number of its row group, and of episodes."""

    path: epath.Path
    number: int
    num_episodes: int


class EpisodeTable:
    """The episodes of one split.

    Attributes:
      shards: what the files of records held when the table was made; None where it does not tell.
    """

    def __init__(self, directory: epath.PathLike, split: str):
        """Finds the table.

        Raises:
          DatasetError: the directory has none for this split, or it is damaged.
        """
        folder = epath.Path(directory)
        path = folder / table_name(split)
        self._paths = [path] if path.exists() else _tables_of_shards(folder, split)
        self._stamps = {path: _stamp(path)} if self._paths == [path] else {}
        self.shards = _read_shards(path) if self._stamps else None
        if not self._paths:
            raise DatasetError(
                f"{directory} has no episode table {path.name}, so it is no dataset of this project; make one of it "
                "with `python -m tools.datasets.build`, of TFDS and RLDS directories by the builder `rlds`."
            )
        if len(self._paths) > _FEW_TABLES:
            logger.warning(
                "%s is of an earlier version: it has %d episode tables where there is one today, and opens slowly. "
                "Convert it again.",
                directory,
                len(self._paths),
            )

    @functools.cached_property
    def groups(self) -> list[Group]:
        """All groups, in the order of their episodes."""
        found = []
        for path in self._paths:
            with _damage_named(path), path.open("rb") as file, pq.ParquetFile(file) as table:
                rows = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
            found += [Group(path, number, count) for number, count in enumerate(rows) if count]
        return found

    def read(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yields all groups, with some of the columns of `EPISODE_TABLE_SCHEMA` or with all.

        Raises:
          DatasetError: a file is damaged, or no episode table.
        """
        for path in self._paths:
            self._check_same(path)
            yield from (table for table in _read(path, columns) if len(table))

    def read_group(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads one of `groups`, like `read`."""
        group = self.groups[number]
        self._check_same(group.path)
        [table] = _read(group.path, columns, [group.number])
        return table

    def _check_same(self, path: epath.Path) -> None:
        """Raises DatasetError if the file was replaced, since columns are read long after the dataset was opened."""
        if self._stamps.get(path) not in (None, _stamp(path)):
            raise DatasetError(f"{path} was replaced while it was in use; start the command again.")


def table_name(split: str) -> str:
    """File name of the episode table of a split."""
    return f"episodes-{split}.parquet"


def has_split(directory: epath.PathLike, split: str) -> bool:
    """Whether a directory has an episode table for the split."""
    folder = epath.Path(directory)
    return (folder / table_name(split)).exists() or bool(_tables_of_shards(folder, split))


def read_episode_table(directory: epath.PathLike, split: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads some or all columns of the episodes of a split as one table.

    Raises:
      DatasetError: the directory has no table for the split, or it is damaged.
    """
    return pa.concat_tables(EpisodeTable(directory, split).read(columns))


def read_part(path: epath.PathLike) -> pa.Table:
    """Reads a whole table, of one shard for example.

    Raises:
      DatasetError: the file is damaged, or no episode table.
    """
    return pa.concat_tables([EPISODE_TABLE_SCHEMA.empty_table(), *_read(epath.Path(path), None)])


def write_episodes(path: epath.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes episode rows to one Parquet file, atomically."""
    write_part(path, pa.Table.from_pylist(list(rows), schema=EPISODE_TABLE_SCHEMA))


def write_part(path: epath.PathLike, table: pa.Table) -> None:
    """Writes a table to one Parquet file, atomically."""
    write_atomic(path, lambda file: pq.write_table(table, file, row_group_size=max(1, len(table))))


def write_episode_table(
    path: epath.PathLike, tables: Iterable[pa.Table], shards: ShardSizes | None, tables_of_group: int = 1
) -> None:
    """Joins tables, such as those of all shards, to the one table of a split, atomically.

    Args:
      path: of the table.
      tables: in the order of their episodes; one after the other is in memory.
      shards: what the files of records hold, if it is known.
      tables_of_group: how many of the tables share a group, at most; see `share_groups`.
    """
    sizes = None if shards is None else {name: getattr(shards, name).tolist() for name in ShardSizes._fields}
    schema = EPISODE_TABLE_SCHEMA.with_metadata(None if sizes is None else {_SHARDS_KEY: json.dumps(sizes)})

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            for table in _grouped(tables, tables_of_group):
                writer.write_table(table, row_group_size=len(table))

    write_atomic(path, write)


def share_groups(num_tables: int) -> int:
    """How many tables share a group, so that there are about 512 groups or fewer."""
    return math.ceil(num_tables / _MOST_GROUPS)


def _grouped(tables: Iterable[pa.Table], tables_of_group: int) -> Iterator[pa.Table]:
    """Joins so many tables each, or fewer where they have many steps; leaves out what is empty."""
    waiting: list[pa.Table] = []
    steps = parts = 0
    for table in tables:
        waiting.append(table)
        parts, steps = parts + 1, steps + int(table["num_steps"].to_numpy().sum())
        if parts == tables_of_group or steps >= _GROUP_STEPS:
            joined, waiting, parts, steps = pa.concat_tables(waiting), [], 0, 0
            if len(joined):
                yield joined
    if waiting and len(joined := pa.concat_tables(waiting)):
        yield joined


def _tables_of_shards(folder: epath.Path, split: str) -> list[epath.Path]:
    """The tables of datasets of earlier versions."""
    start, end = f"episodes-{split}-", ".parquet"
    try:
        names = [name for name in names_in(folder) if name.startswith(start) and name.endswith(end)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names, key=lambda name: (len(name), name))]


def _stamp(path: epath.Path) -> tuple[int, float] | None:
    """Size and time of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.length, found.mtime


def _read_shards(path: epath.Path) -> ShardSizes | None:
    with _damage_named(path), path.open("rb") as file, pq.ParquetFile(file) as table:
        text = (table.metadata.metadata or {}).get(_SHARDS_KEY)
        if text is None:
            return None
        found = json.loads(text)
        return ShardSizes(*(np.array(found[name], np.int64) for name in ShardSizes._fields))


def _read(path: epath.Path, columns: Sequence[str] | None, numbers: Sequence[int] | None = None) -> Iterator[pa.Table]:
    names = list(EPISODE_TABLE_SCHEMA.names if columns is None else columns)
    with _damage_named(path):
        for run, rows in read_groups(path, names, numbers):
            first, table = 0, _complete(run, names)
            for count in rows:
                yield table.slice(first, count)
                first += count


def _complete(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Brings the columns of a table into the schema; tables that were made before a column existed have none of it."""
    fields = [EPISODE_TABLE_SCHEMA.field(name) for name in names]
    columns = {
        field.name: pa.nulls(len(table), field.type)
        if field.nullable and field.name not in table.column_names
        else table[field.name]
        for field in fields
    }
    return pa.table(columns).cast(pa.schema(fields))


@contextlib.contextmanager
def _damage_named(path: epath.Path) -> Iterator[None]:
    """Turns what Parquet raises for a damaged file into a DatasetError that names the file."""
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read; convert the dataset again: {error}") from error
