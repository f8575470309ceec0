"""Reads the rows and the frames of one episode of a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import SourceError
from como_jax.convert.images import Decoded
from como_jax.convert.video import VideoReader

_TASK_COLUMN = "task_index"
_EPISODE_COLUMN = "episode_index"
_ORDER_COLUMNS = ("timestamp", "frame_index", "index")


def read_rows(path: epath.PathLike, keys: Sequence[str], episode: int | None = None) -> pa.Table:
    """Reads the columns `keys`, and `task_index` if there is one, of an episode in temporal order.

    `episode` is the number of the episode, or None if all rows of the file belong to it.

    Raises:
      SourceError: a column is missing, or there are no rows.
      OSError, pa.ArrowException: the file is damaged.
    """
    with epath.Path(path).open("rb") as file:
        schema = pq.ParquetFile(file).schema_arrow
        names = schema.names
        ordered = [name for name in _ORDER_COLUMNS if name in names and pa.types.is_primitive(schema.field(name).type)]
        order = ordered[:1]
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


def join_numbers(table: pa.Table, keys: Sequence[str]) -> list[np.ndarray] | None:
    """Joins the columns `keys` to one float32 vector for each row; None without keys.

    Raises:
      ValueError: a row does not hold numbers.
    """
    if not keys:
        return None
    try:
        columns = [table[key].to_pylist() for key in keys]
        # Numbers too large for float32 become infinite, and are found with the others that are not finite.
        with np.errstate(over="ignore"):
            return [
                np.concatenate([np.asarray(value, np.float32).ravel() for value in values])
                for values in zip(*columns, strict=True)
            ]
    except (OverflowError, TypeError) as error:
        raise ValueError(f"not every row of {', '.join(keys)} holds numbers") from error


def task_indices(table: pa.Table) -> list[int]:
    """Returns the task index of every row that has one."""
    values = table[_TASK_COLUMN].to_pylist() if _TASK_COLUMN in table.column_names else []
    # Some writers store scalars as lists of one element.
    scalars = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    return [value for value in scalars if isinstance(value, int)]


def column_names(path: epath.PathLike) -> set[str]:
    """Returns the columns of a Parquet file; raises like `read_rows` if it is damaged."""
    with epath.Path(path).open("rb") as file:
        return set(pq.ParquetFile(file).schema_arrow.names)


def first_stored(path: epath.PathLike, key: str) -> Decoded:
    """Returns the first image of a column; raises like `read_rows` and `stored_frames`."""
    with epath.Path(path).open("rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1, columns=[key]):
            return next(stored_frames(pa.chunked_array([batch.column(0)])))
    raise SourceError("the table has no rows")


def video_frames(path: epath.PathLike, seconds: tuple[float, float] | None) -> Iterator[Decoded]:
    """Yields the RGB images of a video, or of the part of it between two times."""
    with VideoReader(path) as reader:
        for image in reader.frames() if seconds is None else reader.frames_between(*seconds):
            yield Decoded(image, "; ".join(reader.notes))


def stored_frames(column: pa.ChunkedArray) -> Iterator[Decoded]:
    """Yields the RGB images of a column of encoded images, or of structs with a field `bytes`.

    Raises:
      SourceError: an image is not in the table.
      ValueError: an image is damaged.
    """
    for row, value in enumerate(column):
        stored = value.as_py()
        data = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(data, bytes):
            raise SourceError(f"the image of row {row} is not in the table")
        yield images.decode(data)
