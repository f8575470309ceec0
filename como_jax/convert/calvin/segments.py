"""The steps of a CALVIN split: their files (npz), and which of them become an episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from como_jax.convert.builder import MIN_STEPS
from como_jax.convert.calvin.annotations import Annotation
from como_jax.errors import ConversionError

CAMERAS = ("rgb_static", "rgb_gripper")
ACTIONS = {"rel_actions": 7, "actions": 7}
STATES = {"robot_obs": 15, "scene_obs": 24}
_RANGES = "ep_start_end_ids.npy"
# File names have seven digits.
_MAX_STEPS = 10**7


class StepError(Exception):
    """One step cannot be used; the message gives the reason without its number."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps of one split.

    Attributes:
      name: unique within the split.
      start: number of the first step.
      stop: number of the step after the last.
      instruction: None if the segment is not annotated.
    """

    name: str
    start: int
    stop: int
    instruction: str | None = None

    @property
    def is_possible(self) -> bool:
        """Whether there can be files of these steps."""
        return 0 <= self.start < self.stop <= _MAX_STEPS


def language_segments(annotations: Sequence[Annotation]) -> list[Segment]:
    """Returns one segment for every annotated window."""
    return [
        Segment(f"language/{index:06d}", each.start, each.end + 1, each.instruction)
        for index, each in enumerate(annotations)
    ]


def play_segments(split: epath.Path, length: int) -> list[Segment]:
    """Cuts the uninterrupted recordings of a split to clips of `length` steps; a last one is shorter, or longer by one.

    Raises:
      ConversionError: the list of the recordings is missing or damaged.
    """
    segments = []
    for index, (first, last) in enumerate(_read_ranges(split / _RANGES)):
        whole = Segment(f"play/{index:04d}", first, last + 1)
        segments += _cut(whole, length) if whole.is_possible else [whole]
    return segments


def count_repeated(segments: Iterable[Segment]) -> tuple[int, int]:
    """Returns the number of different steps in some segments, and how many of them are in more than one."""
    bounds = [(segment.start, 1) for segment in segments if segment.is_possible]
    bounds += [(segment.stop, -1) for segment in segments if segment.is_possible]
    covered = repeated = depth = previous = 0
    for position, change in sorted(bounds):
        covered += (position - previous) * (depth > 0)
        repeated += (position - previous) * (depth > 1)
        depth, previous = depth + change, position
    return covered, repeated


def step_name(number: int) -> str:
    """Returns the file name of a step."""
    return f"episode_{number:07d}.npz"


def read_step(path: epath.Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads some arrays of one step: images uint8 `[H, W, 3]`, numbers float32 `[size]`.

    Raises:
      StepError: the file is missing or damaged, or an array is missing, of another kind, or not finite.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in keys if key in stored}
    except FileNotFoundError:
        raise StepError("the file is missing") from None
    except Exception as error:  # A damaged archive may raise anything.
        raise StepError("the file is damaged") from error
    for key in keys:
        if key not in arrays:
            raise StepError(f"the file has no {key}")
    return {key: _image(key, array) if key in CAMERAS else _numbers(key, array) for key, array in arrays.items()}


def _image(key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise StepError(f"{key} has shape {array.shape} and type {array.dtype}, not an image")
    return array


def _numbers(key: str, array: np.ndarray) -> np.ndarray:
    size = (ACTIONS | STATES)[key]
    if array.dtype.kind not in "fiu" or array.shape != (size,):
        raise StepError(f"{key} has shape {array.shape} and type {array.dtype}, not {size} numbers")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise StepError(f"{key} is not finite")
    return numbers


def _cut(whole: Segment, length: int) -> list[Segment]:
    # A single step left at the end would not be an episode.
    starts = range(whole.start, max(whole.start + 1, whole.stop - MIN_STEPS + 1), length)
    stops = [*starts[1:], whole.stop]
    return [
        Segment(f"{whole.name}/{index:05d}", *bounds) for index, bounds in enumerate(zip(starts, stops, strict=True))
    ]


def _read_ranges(path: epath.Path) -> list[tuple[int, int]]:
    if not path.exists():
        raise ConversionError(f"{path} is missing, which lists the recordings that `segments` other than language need")
    try:
        with path.open("rb") as file:
            ranges = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(ranges, np.ndarray) or ranges.dtype.kind not in "iu" or ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ConversionError(f"{path} does not hold pairs of step numbers")
    return [(int(first), int(last)) for first, last in ranges]
