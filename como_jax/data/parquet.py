"""Reads Parquet files without threads of Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath


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
) -> Iterator[pa.Table]:
    """Yields the row groups of a table, all or those of these numbers, with those of the columns that it has.

    Raises:
      OSError or pyarrow.ArrowException: the file is missing or damaged.
    """
    with epath.Path(path).open("rb") as file, pq.ParquetFile(file) as table:
        there = [name for name in columns if name in table.schema_arrow.names]
        for number in range(table.num_row_groups) if numbers is None else numbers:
            yield table.read_row_group(number, there, use_threads=False)
