"""Which steps of a CALVIN split become an episode, and with which instruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from como_jax.convert.builder import MIN_STEPS
from como_jax.convert.calvin.annotations import Annotation
from como_jax.convert.calvin.steps import MAX_STEPS
from como_jax.errors import ConversionError

_RANGES = "ep_start_end_ids.npy"


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps of one split.

    Attributes:
      name: unique within the split.
      start: number of the first step.
      stop: number of the step after the last.
      instruction: None where nothing is annotated.
    """

    name: str
    start: int
    stop: int
    instruction: str | None = None

    @property
    def is_possible(self) -> bool:
        """Whether there can be files of these steps."""
        return 0 <= self.start < self.stop <= MAX_STEPS


def language_segments(annotations: Sequence[Annotation]) -> list[Segment]:
    """One segment for every annotated window."""
    return [
        Segment(f"language/{index:06d}", each.start, each.end + 1, each.instruction)
        for index, each in enumerate(annotations)
    ]


def play_segments(split: epath.Path, length: int) -> list[Segment]:
    """The uninterrupted recordings of a split, cut to clips of `length` steps; the last is shorter, or longer by one.

    Raises:
      ConversionError: the list of the recordings is missing or damaged.
    """
    segments = []
    for index, (first, last) in enumerate(_read_ranges(split / _RANGES)):
        whole = Segment(f"play/{index:04d}", first, last + 1)
        segments += _cut(whole, length) if whole.is_possible else [whole]
    return segments


def count_repeated(segments: Iterable[Segment]) -> tuple[int, int]:
    """Number of different steps in some segments, and how many of them are in more than one."""
    bounds = [(segment.start, 1) for segment in segments if segment.is_possible]
    bounds += [(segment.stop, -1) for segment in segments if segment.is_possible]
    covered = repeated = depth = previous = 0
    for position, change in sorted(bounds):
        covered += (position - previous) * (depth > 0)
        repeated += (position - previous) * (depth > 1)
        depth, previous = depth + change, position
    return covered, repeated


def _cut(whole: Segment, length: int) -> list[Segment]:
    # A single step left at the end would be no episode.
    starts = range(whole.start, max(whole.start + 1, whole.stop - MIN_STEPS + 1), length)
    stops = [*starts[1:], whole.stop]
    return [
        Segment(f"{whole.name}/{index:05d}", *bounds) for index, bounds in enumerate(zip(starts, stops, strict=True))
    ]


def _read_ranges(path: epath.Path) -> list[tuple[int, int]]:
    if not path.exists():
        raise ConversionError(f"{path} is missing, which lists the recordings that --segments play needs")
    try:
        with path.open("rb") as file:
            ranges = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(ranges, np.ndarray) or ranges.dtype.kind not in "iu" or ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ConversionError(f"{path} does not hold pairs of step numbers")
    return [(int(first), int(last)) for first, last in ranges]
