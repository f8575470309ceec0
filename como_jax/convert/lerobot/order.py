"""The order and the clock of an episode's rows: `frame_index`, `index` and `timestamp` are compared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from como_jax.convert.builder import SourceError
from como_jax.convert.timing import jumps, stride, usual_rate

TIMESTAMP = "timestamp"
ORDER_COLUMNS = ("frame_index", "index", TIMESTAMP)
OTHER_RATE_TOLERANCE = 0.05
"""Rates that differ by a smaller share count as equal: clocks are not exact."""
OTHER_VIDEO_RATE = "its videos run at another frame rate than the metadata say, which counts"
OTHER_CLOCK = "its timestamps run at another rate than info.json and its videos, which count"
OTHER_FPS = "its timestamps and its videos run at another rate than the `fps` of info.json, and count"
OTHER_UNIT = "its timestamps are not seconds, but parts of them"
FRAMES_WITHOUT_ROWS = "some frames of its videos have no row, as `frame_index` says, and were left out"
JUMPS = "some of its rows do not follow the row before by one step, as its clocks show: each begins another episode"
JUMPS_AT_RATE = "some of its rows do not follow the row before by one step, but `control_rate` counts each as one"
_PARTS_OF_SECONDS = (1e3, 1e6, 1e9)


def sort_rows(table: pa.Table) -> tuple[pa.Table, list[str]]:
    """Puts the rows of an episode in the order in which they were recorded, and says what contradicts that order.

    A column that has another value in every row gives an order. If columns give different ones, that of most of
    them counts, and among equally many that of the file. Columns that repeat values, as a clock does that begins
    anew, give none.

    Raises:
      SourceError: the columns contradict each other, and nothing decides between them.
    """
    if table.num_rows < 2:
        return table, []
    columns = {name: scalars(table[name]) for name in ORDER_COLUMNS if name in table.column_names}
    known = {name: values for name, values in columns.items() if values is not None}
    same = [name for name, values in known.items() if (values == values[0]).all()]
    orders = {name: np.argsort(values) for name, values in known.items() if len(np.unique(values)) == len(values)}
    warnings = [f"`{name}` is the same in every row" for name in same]
    repeating = [name for name in columns if name not in (*same, *orders)]
    in_file = np.arange(table.num_rows)
    if not orders:
        if not repeating:
            return table, warnings
        if not all(known.get(name) is not None and _begins_anew(known[name]) for name in repeating):
            raise SourceError(f"{_listed(repeating)} {_do(repeating)} not number its rows, so their order is not known")
        return table, [*warnings, _contradiction(repeating, "the file")]
    votes: dict[bytes, list[str]] = {}
    for name, order in orders.items():
        votes.setdefault(order.tobytes(), []).append(name)
    most = max(map(len, votes.values()))
    best = [names for names in votes.values() if len(names) == most]
    if len(best) > 1:
        best = [names for names in best if np.array_equal(orders[names[0]], in_file)]
    if not best:
        raise SourceError(f"{_listed(list(orders))} put its rows in different orders")
    (winners,) = best
    if others := [name for name in columns if name not in (*same, *winners)]:
        warnings.append(_contradiction(others, _listed(winners)))
    order = orders[winners[0]]
    return table if np.array_equal(order, in_file) else table.take(pa.array(order)), warnings


def scalars(column: pa.ChunkedArray) -> np.ndarray | None:
    """Returns a number for each row, float64, or None if not every row has a finite one; times become seconds."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        column, divisor = column.cast(pa.int64()), {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[kind.unit]
    else:
        divisor = 1.0
    try:
        # Some writers store scalars as lists of one element.
        values = np.asarray(column.to_pylist(), np.float64).reshape(-1)
    except (OverflowError, TypeError, ValueError):
        return None
    return values / divisor if len(values) == len(column) and np.isfinite(values).all() else None


def row_times(table: pa.Table) -> np.ndarray | None:
    """Returns the timestamps of sorted rows, or None if they do not increase from row to row."""
    values = scalars(table[TIMESTAMP]) if TIMESTAMP in table.column_names else None
    return values if values is not None and len(values) > 1 and (np.diff(values) > 0).all() else None


def frames_of_rows(table: pa.Table, num_frames: int) -> list[int] | None:
    """Returns the number of the frame of each sorted row, if a video has more frames and `frame_index` says which.

    It does if it counts from the first frame to the last one.
    """
    values = scalars(table["frame_index"]) if "frame_index" in table.column_names else None
    if values is None or num_frames <= len(values) or (np.diff(values) < 1).any() or (values % 1).any():
        return None
    return values.astype(int).tolist() if (values[0], values[-1]) == (0, num_frames - 1) else None


def first_index(table: pa.Table) -> float | None:
    """Returns the number of the first of sorted rows within the dataset, or None if it is not known."""
    values = scalars(table["index"]) if "index" in table.column_names else None
    return None if values is None else float(values[0])


def row_numbers(table: pa.Table) -> np.ndarray | None:
    """Returns `frame_index` of sorted rows, which jumps where rows were lost, or None if it does not count up."""
    values = scalars(table["frame_index"]) if "frame_index" in table.column_names else None
    return values if values is not None and len(values) > 1 and (np.diff(values) > 0).all() else None


class Timing(NamedTuple):
    """How fast an episode runs.

    Attributes:
      rate: steps per second.
      starts: rows that do not follow the row before by one step, in order.
      warnings: which clocks contradict the others.
    """

    rate: float
    starts: list[int]
    warnings: list[str]


def find_timing(
    fps: float,
    num_rows: int,
    rows: np.ndarray | None,
    videos: Sequence[np.ndarray],
    numbers: np.ndarray | None = None,
) -> Timing:
    """Returns how fast an episode runs, by the clocks that agree.

    Args:
      fps: what info.json says.
      num_rows: of the episode.
      rows: timestamps of the rows, or None if they say nothing.
      videos: times of the frames of each video.
      numbers: `frame_index` of the rows, or None if it is not known.

    Raises:
      SourceError: the timestamps contradict info.json, and no video decides.
    """
    by_rows = usual_rate(rows, numbers)
    known = [(times, rate) for times in videos if (rate := usual_rate(times)) is not None]
    by_videos = [rate for _, rate in known]
    warnings = []
    if by_rows is not None and not _near(by_rows, fps):
        if any(_near(by_rows * parts, fps) for parts in _PARTS_OF_SECONDS):
            warnings = [OTHER_UNIT]
        elif by_videos and all(_near(rate, by_rows) for rate in by_videos):
            fps, warnings = by_rows, [OTHER_FPS]
        elif by_videos and all(_near(rate, fps) for rate in by_videos):
            rows, warnings = None, [OTHER_CLOCK]
        else:
            raise SourceError(f"info.json says {fps:g} Hz, and its timestamps {by_rows:g} Hz; `control_rate` decides")
    if not all(_near(rate, fps) for rate in by_videos):
        warnings.append(OTHER_VIDEO_RATE)
    # A video with other frames than those of the rows does not tell when the rows were recorded.
    aligned = [times for times, rate in known if _near(rate, fps) and len(times) == num_rows]
    starts = {*jumps(numbers), *jumps(rows, numbers), *itertools.chain.from_iterable(map(jumps, aligned))}
    return Timing(fps / stride(numbers), sorted(starts), [*warnings, *([JUMPS] if starts else [])])


def _near(rate: float, other: float) -> bool:
    return abs(rate / other - 1) <= OTHER_RATE_TOLERANCE


def _begins_anew(values: np.ndarray) -> bool:
    """Whether values count up in the order of the file, and begin with the first one again wherever they do not."""
    steps = np.diff(values)
    return bool((values[1:][steps <= 0] == values[0]).all())


def _contradiction(names: Sequence[str], winner: str) -> str:
    return f"{_listed(names)} {_do(names)} not run on from row to row: the order is that of {winner}"


def _do(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
