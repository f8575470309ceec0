"""What the checks see of a dataset: a summary of each episode, samples of their steps, and strips of a few.

Episodes stream past one at a time as a `Recording`; only summaries and samples of fixed size are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from como_jax.convert import images
from como_jax.data.clips import gap_steps
from como_jax.data.schema import Episode

PROBES = 6
"""Number of images of every camera that are looked at, evenly spaced over the episode."""
PROFILE_SIZE = 32
_STRIP_HEIGHT = 96
_HASH_SIDE = 16
# Neighbours whose grey values differ by less count as equal, so that compression does not flip bits.
_HASH_MARGIN = 3
_SAMPLED_ROWS = 50_000


@dataclasses.dataclass(frozen=True)
class Recording:
    """An episode of T steps with all its numbers and a few of its images, whatever it was read from.

    Attributes:
      episode_id: unique within the dataset.
      control_rate: Hz, or None if unknown.
      motion: float32 `[T]`, see `schema.EPISODE_TABLE_SCHEMA`.
      frames: RGB images, uint8 `[H, W, 3]`, at `probe_steps(T)`, by camera; the first camera is the main one.
      resolution: height and width of the stored images, by camera.
      action, state: float32 `[T, size]`, or None.
      instruction: empty if unknown.
      split: empty if the dataset has no splits.
    """

    episode_id: str
    control_rate: float | None
    motion: np.ndarray
    frames: Mapping[str, Sequence[np.ndarray]]
    resolution: Mapping[str, tuple[int, int]]
    action: np.ndarray | None = None
    state: np.ndarray | None = None
    instruction: str = ""
    split: str = ""


def probe_steps(num_steps: int) -> list[int]:
    """Returns the numbers of the `PROBES` steps whose images are looked at; short episodes repeat some."""
    return np.linspace(0, num_steps - 1, PROBES).round().astype(int).tolist()


def record_episode(
    episode: Episode,
    control_rate: float | None,
    resolution: Mapping[str, tuple[int, int]] | None = None,
    split: str = "",
) -> Recording:
    """Makes a recording of an episode of a dataset builder, which has at least one step.

    The control rate takes the place of that of the episode. `resolution` holds height and width of the cameras whose
    stored images are larger than those of the episode.

    Raises:
      ValueError: an image is damaged, or the steps have vectors of several sizes.
    """
    probed = [episode.steps[index] for index in probe_steps(len(episode.steps))]
    frames = {camera: [images.decode_image(step.images[camera]) for step in probed] for camera in probed[0].images}
    return Recording(
        episode_id=episode.episode_id,
        control_rate=control_rate,
        motion=np.asarray(episode.motion, np.float32),
        frames=frames,
        resolution={camera: shots[0].shape[:2] for camera, shots in frames.items()} | dict(resolution or {}),
        action=_stack([step.action for step in episode.steps], "action"),
        state=_stack([step.state for step in episode.steps], "state"),
        instruction=episode.language_instruction,
        split=split,
    )


def _stack(values: Sequence[np.ndarray | None], kind: str) -> np.ndarray | None:
    present = [np.asarray(value, np.float32) for value in values if value is not None]
    if not present:
        return None
    if len(present) < len(values) or len({value.shape for value in present}) > 1:
        raise ValueError(f"not every step has the same number of {kind} values")
    return np.stack(present)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Limits of the checks.

    Attributes:
      gap_seconds: time between the two frames of a pair.
      still: a pair with less mean motion per step is still.
      cut: a step with more motion is a hard cut.
    """

    gap_seconds: float = 0.5
    still: float = 0.0002
    cut: float = 0.15


@dataclasses.dataclass(frozen=True)
class VectorSummary:
    """Summary of the actions or states of an episode; values that are not finite count as missing.

    Attributes:
      low, high, first: smallest, largest and first values, float32 `[size]`; low and high are NaN where none is finite.
      num_not_finite: number of steps with a value that is not finite.
      is_zero: whether every value of every step is 0.
    """

    low: np.ndarray
    high: np.ndarray
    first: np.ndarray
    num_not_finite: int
    is_zero: bool


@dataclasses.dataclass(frozen=True)
class CameraSummary:
    """Summary of the probed images of one camera in an episode, in values of 0 to 255.

    Attributes:
      brightest: largest value.
      contrast: largest standard deviation within an image.
      change: largest mean difference between two consecutive probes.
      resolution: height and width.
    """

    brightest: int
    contrast: float
    change: float
    resolution: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class EpisodeSummary:
    """Everything that the checks know of an episode.

    Attributes:
      num_pairs: number of pairs of frames that are one gap apart.
      still_pairs, cut_pairs: number of pairs that are still, and of pairs that span a hard cut.
      num_cuts: number of hard cuts.
      profile: float32 `[PROFILE_SIZE]`, the course of the motion, independent of the length.
      signature: uint64 `[W]`, bits by which images can be told apart.
      digest: equal for episodes that are equal in everything that was read.
    """

    episode_id: str
    split: str
    instruction: str
    control_rate: float | None
    num_steps: int
    num_pairs: int
    still_pairs: int
    cut_pairs: int
    num_cuts: int
    profile: np.ndarray
    signature: np.ndarray
    digest: bytes
    cameras: Mapping[str, CameraSummary]
    action: VectorSummary | None
    state: VectorSummary | None


@dataclasses.dataclass(frozen=True)
class Strip:
    """Frames of one camera in one episode, joined to one image, uint8 `[H, W, 3]`."""

    episode_id: str
    camera: str
    instruction: str
    image: np.ndarray


class RowSample:
    """A uniform sample of the rows of a stream, of at most `limit` rows.

    Attributes:
      rows: the sample `[N, size]`, or None if nothing was added.
    """

    def __init__(self, limit: int = _SAMPLED_ROWS):
        self.rows: np.ndarray | None = None
        self._limit, self._random = limit, np.random.default_rng(0)
        self._keys = np.empty(0)

    def add(self, rows: np.ndarray) -> None:
        """Adds rows `[N, size]`; rows of another size than the first ones are ignored."""
        if self.rows is not None and rows.shape[1] != self.rows.shape[1]:
            return
        keys = np.concatenate([self._keys, self._random.random(len(rows))])
        joined = rows if self.rows is None else np.concatenate([self.rows, rows])
        # Every row has a random key; the rows with the smallest keys are a uniform sample.
        kept = np.sort(np.argsort(keys)[: self._limit]) if len(keys) > self._limit else slice(None)
        self.rows, self._keys = joined[kept], keys[kept]


class Survey:
    """Summaries of the episodes, samples of their steps, and strips of `num_strips` of them.

    Attributes:
      thresholds: the limits that the summaries were made with.
      episodes: summaries, in order.
      action, state: samples of steps whose values are all finite.
      motion: sample of the motion of single steps, `[N, 1]`.
    """

    def __init__(self, thresholds: Thresholds, num_strips: int = 4):
        self.thresholds = thresholds
        self.episodes: list[EpisodeSummary] = []
        self.action, self.state, self.motion = RowSample(), RowSample(), RowSample()
        self._strips: dict[int, list[Strip]] = {}
        self._num_strips, self._random = num_strips, random.Random(0)

    def add(self, recording: Recording) -> None:
        """Adds one episode."""
        self._keep_strips(recording)
        self.episodes.append(summarize(recording, self.thresholds))
        self.motion.add(recording.motion[1:, None])
        for sample, values in ((self.action, recording.action), (self.state, recording.state)):
            if values is not None:
                sample.add(values[np.isfinite(values).all(axis=1)])

    @property
    def strips(self) -> list[Strip]:
        """The strips of the chosen episodes, in order."""
        return [strip for index in sorted(self._strips) for strip in self._strips[index]]

    def _keep_strips(self, recording: Recording) -> None:
        # Reservoir sampling: every episode has the same chance, although their number is not known in advance.
        index = len(self.episodes)
        if len(self._strips) >= self._num_strips:
            drawn = self._random.randrange(index + 1)
            if drawn >= self._num_strips:
                return
            del self._strips[sorted(self._strips)[drawn]]
        self._strips[index] = [
            Strip(recording.episode_id, camera, recording.instruction, _join_strip(frames))
            for camera, frames in recording.frames.items()
        ]


def summarize(recording: Recording, thresholds: Thresholds) -> EpisodeSummary:
    """Summarizes one episode."""
    pair_motion, cuts_within = _pairs(recording, thresholds)
    main = next(iter(recording.frames.values()))
    return EpisodeSummary(
        episode_id=recording.episode_id,
        split=recording.split,
        instruction=recording.instruction.strip(),
        control_rate=recording.control_rate,
        num_steps=len(recording.motion),
        num_pairs=len(pair_motion),
        still_pairs=int((pair_motion < thresholds.still).sum()),
        cut_pairs=int((cuts_within > 0).sum()),
        num_cuts=int((recording.motion[1:] > thresholds.cut).sum()),
        profile=_profile(recording.motion),
        signature=_signature(main),
        digest=_digest(recording, main),
        cameras={
            camera: _summarize_camera(frames, recording.resolution[camera])
            for camera, frames in recording.frames.items()
        },
        action=_summarize_vectors(recording.action),
        state=_summarize_vectors(recording.state),
    )


def _pairs(recording: Recording, thresholds: Thresholds) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean motion per step and number of hard cuts of every pair one gap apart.

    Without a control rate, the pairs are neighbouring steps.
    """
    rate = recording.control_rate
    gap = 1 if rate is None else int(gap_steps(thresholds.gap_seconds, np.asarray(rate)))
    motion = recording.motion[1:].astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(motion)])
    cuts = np.concatenate([[0], np.cumsum(motion > thresholds.cut)])
    return (sums[gap:] - sums[:-gap]) / gap, cuts[gap:] - cuts[:-gap]


def _profile(motion: np.ndarray) -> np.ndarray:
    """Returns the sum of the motion up to `PROFILE_SIZE` evenly spaced points of the episode."""
    total = np.cumsum(motion, dtype=np.float64)
    at = np.linspace(0, len(motion) - 1, PROFILE_SIZE)
    return np.interp(at, np.arange(len(motion)), total).astype(np.float32)


def _signature(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Computes a difference hash: for each cell of a coarse grey image, whether it is clearly darker than the next."""
    bits = []
    for frame in frames:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, (_HASH_SIDE + 1, _HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.int16)
        bits.append(np.diff(small, axis=1) > _HASH_MARGIN)
    return np.packbits(np.stack(bits).ravel()).view(np.uint64)


def _digest(recording: Recording, frames: Sequence[np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for values in (recording.motion, recording.action, recording.state, *frames):
        digest.update(b"-" if values is None else repr(values.shape).encode() + np.ascontiguousarray(values).tobytes())
    return digest.digest()


def _summarize_camera(frames: Sequence[np.ndarray], resolution: tuple[int, int]) -> CameraSummary:
    thumbnails = [images.thumbnail(frame).astype(np.float32) for frame in frames]
    changes = [float(np.abs(b - a).mean()) for a, b in zip(thumbnails[:-1], thumbnails[1:], strict=True)]
    return CameraSummary(
        brightest=max(int(frame.max()) for frame in frames),
        contrast=max(float(frame.std(axis=(0, 1)).max()) for frame in frames),
        change=max(changes),
        resolution=(int(resolution[0]), int(resolution[1])),
    )


def _summarize_vectors(values: np.ndarray | None) -> VectorSummary | None:
    if values is None:
        return None
    finite = np.isfinite(values)
    # NumPy would warn of dimensions without any finite value, which give NaN here.
    some = finite.any(axis=0)
    return VectorSummary(
        low=np.where(some, np.where(finite, values, np.inf).min(axis=0), np.nan),
        high=np.where(some, np.where(finite, values, -np.inf).max(axis=0), np.nan),
        first=values[0].copy(),
        num_not_finite=int((~finite.all(axis=1)).sum()),
        is_zero=not values.any(),
    )


def _join_strip(frames: Sequence[np.ndarray]) -> np.ndarray:
    height, width = frames[0].shape[:2]
    size = (max(1, round(width * _STRIP_HEIGHT / height)), _STRIP_HEIGHT)
    return np.concatenate([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames], axis=1)
