"""Rows of one episode from the Parquet files of a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.convert.builder import SourceError

_TASK_COLUMN = "task_index"
_EPISODE_COLUMN = "episode_index"
_ORDER_COLUMNS = ("timestamp", "frame_index", "index")


def read_rows(path: epath.PathLike, keys: Sequence[str], episode: int | None = None) -> pa.Table:
    """The rows of one episode in temporal order.

    Args:
      path: Parquet file.
      keys: columns to be read; `task_index` comes with them where there is one.
      episode: number of the episode, or None if all rows belong to it.

    Raises:
      SourceError: a column is missing, or there are no rows.
      OSError, pa.ArrowException: the file is damaged.
    """
    with epath.Path(path).open("rb") as file:
        schema = pq.ParquetFile(file).schema_arrow
        names = schema.names
        order = [name for name in _ORDER_COLUMNS if name in names and pa.types.is_primitive(schema.field(name).type)][
            :1
        ]
        for key in (*keys, *([] if episode is None else [_EPISODE_COLUMN])):
            if key not in names:
                raise SourceError(f"the table has no column {key!r}")
        columns = dict.fromkeys([*keys, *order, *(name for name in (_TASK_COLUMN,) if name in names)])
        for name in (*columns, _EPISODE_COLUMN):
            if names.count(name) > 1:
                raise SourceError(f"the table has {names.count(name)} columns {name!r}")
        file.seek(0)
        filters = None if episode is None else [(_EPISODE_COLUMN, "=", episode)]
        table = pq.read_table(file, columns=list(columns), filters=filters)
    if not table.num_rows:
        raise SourceError("the table has no rows of this episode")
    return table.sort_by(order[0]) if order else table


def join_numbers(table: pa.Table, keys: Sequence[str]) -> list[np.ndarray] | list[None]:
    """One float32 vector a row from the columns `keys`, or None for every row without keys.

    Raises:
      ValueError: a row does not hold numbers.
    """
    if not keys:
        return [None] * table.num_rows
    try:
        columns = [table[key].to_pylist() for key in keys]
        # What is too large for float32 becomes infinite, which is found out later.
        with np.errstate(over="ignore"):
            return [
                np.concatenate([np.asarray(value, np.float32).ravel() for value in values])
                for values in zip(*columns, strict=True)
            ]
    except (OverflowError, TypeError) as error:
        raise ValueError(f"not every row of {', '.join(keys)} holds numbers") from error


def task_indices(table: pa.Table) -> list[int]:
    """The task index of every row that has one."""
    values = table[_TASK_COLUMN].to_pylist() if _TASK_COLUMN in table.column_names else []
    # Some writers keep scalars as lists of one.
    scalars = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    return [value for value in scalars if isinstance(value, int)]


def column_names(path: epath.PathLike) -> set[str]:
    """The columns of a Parquet file; raises as `read_rows` if it is damaged."""
    with epath.Path(path).open("rb") as file:
        return set(pq.ParquetFile(file).schema_arrow.names)
