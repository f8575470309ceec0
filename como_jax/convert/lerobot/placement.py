"""Where the frames of an episode lie in a video that holds several: by time and by number, which must agree."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from como_jax.convert.builder import SourceError

MATCHED_BY_NUMBER = (
    "the metadata and the video give other times for its frames: frames and rows were matched by their numbers"
)
# A share of a frame. Times in a container are rounded, to milliseconds for example.
_TOLERANCE = 0.1
_ROUNDING_SECONDS = 0.002
# Rates that differ by less are the same, but for rounding.
_SAME_RATE = 0.01
# No video is as long.
_MAX_SECONDS = 1e9


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of a video that the metadata give to an episode.

    Attributes:
      episode: its number.
      seconds: begin and end; NaN where the metadata do not say.
      length: number of its frames, or None if the metadata do not say.
    """

    episode: int
    seconds: tuple[float, float]
    length: int | None


class VideoLayout:
    """The episodes of one video.

    If they have as many frames together as the video has, their lengths say where each begins. Where the times of the
    metadata lead elsewhere, because they count at another rate than the video runs, the lengths decide, but only for an
    episode whose begin and end are these numbers at the rate of the metadata.
    """

    def __init__(self, times: np.ndarray, windows: Sequence[Window], fps: float | None):
        """Finds the frames of all episodes.

        Args:
          times: of all frames of the video, in order.
          windows: of all episodes in the video, one for each.
          fps: of info.json.
        """
        self.times = times
        self._windows = {window.episode: window for window in windows}
        self._rate = _rate(windows, fps)
        self._by_time = _places_by_time(times, windows)
        self._numbers = _numbers(windows, len(times), self._rate)

    def place(self, episode: int) -> tuple[int, int, list[str]]:
        """Returns the numbers of the first frame of an episode and of that after its last, and what is odd about them.

        Raises:
          SourceError: the metadata do not say where its frames lie, or contradict the video.
        """
        window = self._windows[episode]
        begin, end = window.seconds
        if not -_MAX_SECONDS < begin < end < _MAX_SECONDS:
            raise SourceError(f"the metadata say that it runs from {begin} to {end} seconds of its video")
        first, stop = self._by_time[episode]
        if self._numbers is None:
            others = [each for each in self._windows.values() if each.episode != episode]
            if self._fill(others, _numbers(others, len(self.times), self._rate)):
                raise SourceError("the metadata put it into a video in which all frames belong to other episodes")
            # Without all lengths only the times are left. A frame of another episode may lie where they lead by chance.
            if first is not None and (abs(begin * (self._rate or 0) - first) <= 0.5 or not self._has_same_steps):
                return first, stop, []
        else:
            number = self._numbers[episode]
            after = number + (window.length or 0)
            if (first, stop) == (number, after):
                return number, after, []
            if abs(begin * (self._rate or 0) - number) <= 0.5 and abs(end * (self._rate or 0) - after) <= 0.5:
                return number, after, [MATCHED_BY_NUMBER]
            if first == number:
                return first, stop, []
        raise SourceError(f"no frame of it lies where the metadata say that it begins, at {begin:.3f} s of its video")

    @property
    def is_full(self) -> bool:
        """Whether the episodes, by time and by number, divide all frames of the video among them."""
        return self._fill(list(self._windows.values()), self._numbers)

    def _fill(self, windows: Sequence[Window], numbers: dict[int, int] | None) -> bool:
        return numbers is not None and all(
            self._by_time[each.episode] == (numbers[each.episode], numbers[each.episode] + (each.length or 0))
            for each in windows
        )

    @functools.cached_property
    def _has_same_steps(self) -> bool:
        """Whether all frames are shown equally long, at a rate that is known."""
        if len(self.times) < 3 or self._rate is None:
            return self._rate is not None
        line = np.linspace(self.times[0], self.times[-1], len(self.times))
        return bool(np.abs(self.times - line).max() < 0.5 * np.median(np.diff(self.times)))


def _rate(windows: Sequence[Window], fps: float | None) -> float | None:
    """Returns the frames per second at which the metadata count."""
    rates = [
        each.length / (each.seconds[1] - each.seconds[0])
        for each in windows
        if each.length and math.isfinite(sum(each.seconds)) and each.seconds[1] > each.seconds[0]
    ]
    usual = float(np.median(rates)) if rates else fps
    # The rate of info.json is exact, unlike a length in seconds.
    return fps if fps is not None and usual is not None and abs(usual / fps - 1) < _SAME_RATE else usual


def _places_by_time(times: np.ndarray, windows: Sequence[Window]) -> dict[int, tuple[int | None, int]]:
    """Returns the first frame of every episode, or None if none lies where it begins, and that after its last one."""
    frame = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    begins, ends = np.transpose([each.seconds for each in windows])
    known = np.isfinite(begins) & np.isfinite(ends)
    begins, ends = np.where(known, begins, 0.0), np.where(known, ends, 0.0)

    def firsts(origin: float) -> tuple[np.ndarray, np.ndarray]:
        after = np.searchsorted(times, begins + origin).clip(1, len(times) - 1) if len(times) > 1 else 0 * known
        first = after - (np.abs(times[after - 1] - begins - origin) < np.abs(times[after] - begins - origin))
        near = np.abs(times[first] - begins - origin) <= max(_TOLERANCE * frame, _ROUNDING_SECONDS)
        return first, near & known

    # Times count from the first frame if more episodes begin with a frame then.
    origin = max((0.0, float(times[0])), key=lambda origin: firsts(origin)[1].sum())
    first, lies_there = firsts(origin)
    stop = np.searchsorted(times, ends + origin - frame / 2)
    return {
        each.episode: (int(first[row]) if lies_there[row] else None, int(stop[row]) if known[row] else 0)
        for row, each in enumerate(windows)
    }


def _numbers(windows: Sequence[Window], num_frames: int, rate: float | None) -> dict[int, int] | None:
    """Returns the number of the first frame of every episode by the lengths of those before it, if all are known."""
    if any(each.length is None for each in windows) or sum(each.length or 0 for each in windows) != num_frames:
        return None

    def count(ordered: Sequence[Window]) -> dict[int, int]:
        lengths = [each.length or 0 for each in ordered]
        return dict(zip((each.episode for each in ordered), np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))

    def agreement(numbers: dict[int, int]) -> int:
        return sum(abs(each.seconds[0] * (rate or 0) - numbers[each.episode]) <= 0.5 for each in windows)

    by_number = count(sorted(windows, key=lambda each: each.episode))
    by_begin = count(sorted(windows, key=lambda each: (math.isnan(each.seconds[0]), each.seconds[0])))
    return by_begin if agreement(by_begin) > agreement(by_number) else by_number
