"""Reads Parquet files without threads of Arrow."""

from __future__ import annotations

from collections.abc import Sequence

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
