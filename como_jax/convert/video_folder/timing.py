"""Steps of equal length from frames that are not shown equally long, by the frames' own times."""

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
