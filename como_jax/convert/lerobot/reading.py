"""Reads the rows and the frames of one episode of a LeRobot dataset."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import SourceError
from como_jax.convert.images import Decoded
from como_jax.convert.lerobot.order import ORDER_COLUMNS, scalars, sort_rows
from como_jax.convert.video import VideoReader

_TASK_COLUMN = "task_index"
_EPISODE_COLUMN = "episode_index"


class NoRowsError(SourceError):
    """A table has no rows of an episode."""


def read_rows(path: epath.PathLike, keys: Sequence[str], episode: int | None = None) -> tuple[pa.Table, list[str]]:
    """Reads the columns `keys` of an episode in temporal order, and says what contradicts that order.

    The columns that order the rows, and `task_index`, are read too where they exist. `episode` is the number of the
    episode, or None if all rows of the file belong to it.

    Raises:
      SourceError: a column is missing, there are no rows, or their order is not known.
      OSError, pa.ArrowException: the file is damaged.
    """
    with epath.Path(path).open("rb") as file:
        names = pq.ParquetFile(file).schema_arrow.names
        for key in (*keys, *([] if episode is None else [_EPISODE_COLUMN])):
            if key not in names:
                raise SourceError(f"the table has no column {key!r}")
        columns = dict.fromkeys([*keys, *(name for name in (*ORDER_COLUMNS, _TASK_COLUMN) if name in names)])
        for name in (*columns, _EPISODE_COLUMN):
            if names.count(name) > 1:
                raise SourceError(f"the table has {names.count(name)} columns {name!r}")
        file.seek(0)
        filters = None if episode is None else [(_EPISODE_COLUMN, "=", episode)]
        # Threads of Arrow may still hold the file when the process ends, which would abort it: see `read_parquet`.
        threads = {"use_threads": False, "pre_buffer": False}
        table = pq.read_table(file, columns=list(columns), filters=filters, **threads)
    if not table.num_rows:
        raise NoRowsError("the table has no rows of this episode")
    return sort_rows(table)


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


def stored_episodes(path: epath.PathLike) -> set[int]:
    """Returns the numbers of the episodes that have rows in a table; raises like `read_rows` if it is damaged."""
    with epath.Path(path).open("rb") as file:
        column = pq.ParquetFile(file).read([_EPISODE_COLUMN], use_threads=False)[_EPISODE_COLUMN]
    values = scalars(column)
    return set() if values is None else set(values.astype(int).tolist())


def first_stored(path: epath.PathLike, key: str) -> Decoded:
    """Returns the first image of a column; raises like `read_rows` and `stored_frames`."""
    with epath.Path(path).open("rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1, columns=[key], use_threads=False):
            return next(stored_frames(pa.chunked_array([batch.column(0)])))
    raise SourceError("the table has no rows")


def video_frames(path: epath.PathLike, seconds: tuple[float, float] | None = None) -> Iterator[Decoded]:
    """Yields the RGB images of a video, or those that begin between two times."""
    with VideoReader(path) as reader:
        for image in reader.frames() if seconds is None else reader.frames_between(*seconds):
            yield Decoded(image, "; ".join(reader.notes))


def bounds(times: np.ndarray, first: int, stop: int) -> tuple[float, float]:
    """Returns the seconds between which the frames `first` to `stop - 1` begin; `times` are those of all frames."""
    # Halfway between two frames, so that rounding moves no frame across.
    between = np.concatenate([[times[0] - 1], (times[1:] + times[:-1]) / 2, [times[-1] + 1]])
    return float(between[first]), float(between[stop])


def frame_times(path: epath.Path) -> np.ndarray | None:
    """Returns the times of all frames of a video, see `VideoReader.times`; raises like `VideoReader` if it fails."""
    stat = path.stat()
    return _frame_times(path, stat.mtime, stat.length)


# The episodes of a file follow each other. Time and size tell a file from another that has taken its place.
@functools.lru_cache(maxsize=16)
def _frame_times(path: epath.Path, _mtime: float, _length: int) -> np.ndarray | None:
    with VideoReader(path) as reader:
        return reader.times()


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
