"""Where the frames of an episode lie in a video that holds several: by time and by number, which must agree."""

from __future__ import annotations

import dataclasses
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


def place(times: np.ndarray, windows: Sequence[Window], episode: int, fps: float | None) -> tuple[int, int, list[str]]:
    """Returns the numbers of the first frame of an episode and of that after its last, and what is odd about them.

    If the episodes of a video have as many frames together as the video has, their lengths say where each begins.
    Where the times of the metadata lead elsewhere, because they count at another rate than the video runs, the
    lengths decide, but only for an episode whose begin and end are these numbers at the rate of the metadata.

    Args:
      times: of all frames of the video, in order.
      windows: of all episodes in the video.
      episode: number of the one that is wanted.
      fps: of info.json.

    Raises:
      SourceError: the metadata do not say where its frames lie, or contradict the video.
    """
    window = next(each for each in windows if each.episode == episode)
    begin, end = window.seconds
    if not -_MAX_SECONDS < begin < end < _MAX_SECONDS:
        raise SourceError(f"the metadata say that it runs from {begin} to {end} seconds of its video")
    rate = _rate(windows, fps)
    times = _from_origin(times, windows)
    first, stop = _by_time(times, window)
    numbers = _numbers(windows, len(times), rate)
    if numbers is None:
        if _fill_video(times, [each for each in windows if each.episode != episode], rate):
            raise SourceError("the metadata put it into a video in which all frames belong to other episodes")
        # Without all lengths only the times are left. A frame of another episode may lie where they lead by chance.
        same_clock = rate is None or not _is_even(times) or first is None or abs(begin * rate - first) <= 0.5
        if first is not None and same_clock:
            return first, stop, []
    else:
        number = numbers[episode]
        after = number + (window.length or 0)
        if (first, stop) == (number, after):
            return number, after, []
        if rate is not None and abs(begin * rate - number) <= 0.5 and abs(end * rate - after) <= 0.5:
            return number, after, [MATCHED_BY_NUMBER]
        if first == number:
            return first, stop, []
    raise SourceError(f"no frame of it lies where the metadata say that it begins, at {begin:.3f} s of its video")


def fits_gap(times: np.ndarray, windows: Sequence[Window], window: Window, fps: float | None) -> bool:
    """Whether a video has just those frames left, beside those of the episodes in it, that an episode needs."""
    together = [*windows, window]
    return _fill_video(_from_origin(times, together), together, _rate(together, fps))


def _fill_video(times: np.ndarray, windows: Sequence[Window], rate: float | None) -> bool:
    """Whether the windows, by time and by number, divide all frames of a video among them."""
    numbers = _numbers(windows, len(times), rate)
    return numbers is not None and all(
        _by_time(times, each) == (numbers[each.episode], numbers[each.episode] + (each.length or 0)) for each in windows
    )


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


def _from_origin(times: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
    """Counts times from the first frame if more windows begin with a frame then."""
    moved = times - times[0]
    fitting = [sum(_by_time(each, window)[0] is not None for window in windows) for each in (times, moved)]
    return moved if fitting[1] > fitting[0] else times


def _by_time(times: np.ndarray, window: Window) -> tuple[int | None, int]:
    """Returns the first frame of a window, or None if none lies at its begin, and that after its last one."""
    begin, end = window.seconds
    frame = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if not math.isfinite(begin + end):
        return None, 0
    after = int(np.searchsorted(times, begin))
    first = min((index for index in (after - 1, after) if 0 <= index < len(times)), key=lambda i: abs(times[i] - begin))
    lies_there = abs(times[first] - begin) <= max(_TOLERANCE * frame, _ROUNDING_SECONDS)
    return first if lies_there else None, int(np.searchsorted(times, end - frame / 2))


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


def _is_even(times: np.ndarray) -> bool:
    """Whether all frames are shown equally long."""
    if len(times) < 3:
        return True
    line = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - line).max() < 0.5 * np.median(np.diff(times)))
