"""Reads Parquet files without threads of Arrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

_BYTES_AT_ONCE = 2**26


def read_parquet(path: epath.PathLike, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a table, or some of its columns.

    Use it instead of `pyarrow.parquet.read_table`, whose threads may still hold the file when that returns. A process
    that ends just then is aborted with "terminate called without an active exception" (apache/arrow #34314).

    Raises:
      OSError or pyarrow.ArrowException: the file is missing or damaged.
    """
    with epath.Path(path).open("rb") as file, pq.ParquetFile(file) as table:
        return table.read(None if columns is None else list(columns), use_threads=False)


def read_groups(
    path: epath.PathLike, columns: Sequence[str], numbers: Sequence[int] | None = None
) -> Iterator[tuple[pa.Table, list[int]]]:
    """Yields row groups of a table, all or those of these numbers, with those of the columns that it has.

    Small groups come together, since each costs a millisecond by itself; beside them stands how many rows each has.

    Raises:
      OSError or pyarrow.ArrowException: the file is missing or damaged.
    """
    with epath.Path(path).open("rb") as file, pq.ParquetFile(file) as table:
        there = [name for name in columns if name in table.schema_arrow.names]
        for together in _runs(table.metadata, range(table.num_row_groups) if numbers is None else numbers):
            rows = [table.metadata.row_group(number).num_rows for number in together]
            yield table.read_row_groups(together, there, use_threads=False), rows


def _runs(metadata: pq.FileMetaData, numbers: Iterable[int]) -> Iterator[list[int]]:
    """Neighbours that have few bytes together."""
    run: list[int] = []
    size = 0
    for number in numbers:
        more = metadata.row_group(number).total_byte_size
        if run and size + more > _BYTES_AT_ONCE:
            yield run
            run, size = [], 0
        run.append(number)
        size += more
    if run:
        yield run
