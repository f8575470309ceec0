"""The usual rate of steps, where time jumps between them, and steps of equal length from frames of other lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# Shares of the usual time between two frames; clocks of phones tremble.
_SHORT, _LONG = 0.5, 1.5
_USUAL = 0.25
# A longer time between two frames is a pause of the recording: at least so many seconds, and so many steps.
_PAUSE_SECONDS, _PAUSE_STEPS = 1.0, 3.0
# The times of fewer frames say nothing of a usual rate.
_MIN_FRAMES = 3
# In usual steps. Where a step differs from them by more, time jumps.
_JUMP = 0.5


def usual_rate(times: np.ndarray | None, numbers: np.ndarray | None = None) -> float | None:
    """Returns the usual number of steps per second, or None without two times; `numbers` are those of the steps."""
    if times is None or len(times) < 2:
        return None
    steps = np.diff(times) / (1 if numbers is None else np.diff(numbers))
    median = np.median(steps)
    # The mean is more exact than the median, since times are rounded.
    return float(1 / steps[~_jumping(steps / median - 1)].mean()) if median > 0 else None


def jumps(clock: np.ndarray | None, numbers: np.ndarray | None = None) -> list[int]:
    """Returns the rows that do not follow the row before by one step: none may lie between the frames of a pair.

    A single row that is late or early, so that the next one is in time again, does not count.

    Args:
      clock: times of the rows or of their frames, in order, or None if they are not known.
      numbers: `frame_index` of the rows, or None if it is not known.
    """
    rate = usual_rate(clock, numbers)
    if clock is None or rate is None:
        return []
    return (np.flatnonzero(_jumping(np.diff(clock) * rate / stride(numbers) - 1)) + 1).tolist()


def _jumping(extra: np.ndarray) -> np.ndarray:
    """Whether steps, longer than usual by a share `extra`, are too long or short, and no neighbour makes up for it."""
    alone = np.abs([extra, extra + np.append(extra[1:], 0), extra + np.append(0, extra[:-1])])
    return alone.min(0) > _JUMP


def stride(numbers: np.ndarray | None) -> float:
    """Returns by how much `frame_index` usually grows from row to row: 2, say, if every second frame has a row."""
    if numbers is None or len(numbers) < 2:
        return 1.0
    steps, counts = np.unique(np.diff(numbers), return_counts=True)
    return float(steps[np.argmax(counts)])


def uneven_rate(times: np.ndarray | None) -> float | None:
    """Returns the usual number of frames per second if frames are not shown equally long, or None if they are.

    `times` are those of all frames in seconds, or None if they are not known.
    """
    if times is None or len(times) < _MIN_FRAMES:
        return None
    steps = np.diff(times)
    usual = np.median(steps)
    if usual <= 0 or (_SHORT * usual <= steps.min() and steps.max() <= _LONG * usual):
        return None
    # The mean is more exact than the median, since containers round times.
    return float(1 / steps[np.abs(steps - usual) <= _USUAL * usual].mean())


def regular_steps(frames: Iterable[tuple[float | None, T]], rate: float) -> Iterator[tuple[int, int, T]]:
    """Yields the image that is shown at each step, with the number of the recording and that of the step in it.

    An image is repeated while no other follows, and left out if others come faster than the steps. After a pause,
    or where times jump back, another recording begins.
    """
    pause = max(_PAUSE_SECONDS, _PAUSE_STEPS / rate)
    recording, begin, before, number = 0, 0.0, None, 0
    image: T | None = None
    for time, shown in frames:
        # A frame without a time comes one step after that before it.
        time = (0.0 if before is None else before + 1 / rate) if time is None else time
        if before is None or not 0 <= time - before <= pause:
            recording += before is not None
            begin, number, image = time, 0, None
        position = round((time - begin) * rate)
        while image is not None and number < position:
            yield recording, number, image
            number += 1
        if number == position:
            yield recording, number, shown
            number += 1
        before, image = time, shown
