"""Which clips a dataset offers: those whose instants and offset frames all lie inside one episode."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, NoClipsError


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """How clips are cut out of episodes.

    Attributes:
      gap_seconds: time between the two frames of a pair, called the full gap.
      instants: frames of a clip; at least 2.
      offset_frames: whether every pair also needs an offset frame, for the temporal contrastive loss.
      min_motion: smallest mean motion of a clip's steps; drops still clips (see `schema.EPISODE_TABLE_SCHEMA`).
      max_motion: largest motion of any step of a clip; drops clips with a hard cut.
      min_gap_fraction: gaps lie between this share of the full gap and the full gap. With a `pair_span` of 1 every clip
        draws its gap at random, unless the share is 1; otherwise all gaps in this range occur in every clip.
      pair_span: number of instants that the full gap spans; with 1, neighbouring instants are one gap apart.
    """

    gap_seconds: float
    instants: int = 2
    offset_frames: bool = True
    min_motion: float = 0.0
    max_motion: float = 1.0
    min_gap_fraction: float = 1.0
    pair_span: int = 1

    def __post_init__(self) -> None:
        if self.gap_seconds <= 0:
            raise ConfigError(f"data.gap_seconds must be positive, not {self.gap_seconds}.")
        if not 0 < self.min_gap_fraction <= 1:
            raise ConfigError(f"data.min_gap_fraction must lie in (0, 1], not {self.min_gap_fraction}.")
        if self.instants < 2:
            raise ConfigError(f"data.instants must be at least 2, not {self.instants}.")
        if not 1 <= self.pair_span < self.instants:
            raise ConfigError(f"data.pair_span {self.pair_span} must lie between 1 and data.instants - 1.")


@dataclasses.dataclass(frozen=True)
class ClipIndex:
    """All clips of one source, without an entry for each: there are as many as steps.

    Axes: C clips, E episodes. A candidate is a clip that fits into an episode, whatever its motion.

    Attributes:
      start: int64 `[E]`, first record of every episode.
      ends: int64 `[E]`, candidates of this episode and those before it.
      gap: int64 `[E]`, steps between neighbouring instants.
      last: int64 `[E]`, last record of every episode.
      kept: int64 `[C]`, the candidates that are clips; None for all.
    """

    start: np.ndarray
    ends: np.ndarray
    gap: np.ndarray
    last: np.ndarray
    kept: np.ndarray | None = None

    @classmethod
    def empty(cls) -> ClipIndex:
        """Of no clip."""
        return cls(*(np.empty(0, np.int64),) * 4)

    def __len__(self) -> int:
        return self.num_candidates if self.kept is None else len(self.kept)

    @property
    def num_candidates(self) -> int:
        """Clips that fit into an episode."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def candidates(self) -> np.ndarray:
        """Those that are clips, int64 `[C]`."""
        return np.arange(self.num_candidates) if self.kept is None else self.kept

    @property
    def first(self) -> np.ndarray:
        """Record of the first instant of every clip, int64 `[C]`."""
        return self.look_up(np.arange(len(self)))[0]

    @property
    def episode(self) -> np.ndarray:
        """Row of the episode of every clip, int64 `[C]`."""
        return self.look_up(np.arange(len(self)))[1]

    @property
    def short_episodes(self) -> int:
        """Number of episodes that are too short for a clip."""
        return int((np.diff(self.ends, prepend=0) == 0).sum())

    @property
    def filtered_clips(self) -> int:
        """Number of clips that the motion thresholds dropped."""
        return self.num_candidates - len(self)

    def look_up(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First records and rows of the episodes of clips `[B]`, int64 `[B]` both."""
        candidates = clips if self.kept is None else self.kept[clips]
        episode = np.searchsorted(self.ends, candidates, side="right")
        before = np.where(episode > 0, self.ends[episode - 1], 0)
        return self.start[episode] + candidates - before, episode


def pair_spans(pair_span: int, min_gap_fraction: float) -> range:
    """How many instants the second frame of a pair may lie after the first; see `ClipConfig`."""
    return range(max(1, math.ceil(min_gap_fraction * pair_span)), pair_span + 1)


def num_pairs(instants: int, spans: range) -> int:
    """Number of pairs in one clip."""
    return sum(instants - span for span in spans)


def gap_steps(gap_seconds: float, control_rate: np.ndarray) -> np.ndarray:
    """A gap as a whole number of control steps, at least one; `control_rate` is in Hz."""
    return np.maximum(1, np.rint(gap_seconds * np.asarray(control_rate)).astype(np.int64))


def index_clips(source: EpisodeSource, config: ClipConfig) -> ClipIndex:
    """Lists the clips of a dataset.

    Raises:
      NoClipsError: the dataset offers no clip; the message says why.
    """
    gap = gap_steps(config.gap_seconds, source.control_rate) // config.pair_span
    if gap.min() < 1:
        raise NoClipsError(
            f"{source.directory} ({source.split}): {config.gap_seconds} s are fewer control steps than data.pair_span "
            f"{config.pair_span}, at {source.control_rate.min():g} Hz. Lower data.pair_span or raise data.gap_seconds."
        )
    span = (config.instants - 1) * gap
    # At a gap of one step the offset frame cannot lie before the future frame, so it needs the step after it.
    reach = span + (1 if config.offset_frames else 0) * (gap == 1)
    counts = np.maximum(0, source.length - reach)
    if not counts.any():
        raise NoClipsError(
            f"{source.directory} ({source.split}): all {len(counts)} episodes are shorter than a clip of "
            f"{config.instants} frames, {config.gap_seconds / config.pair_span:g} s apart (the longest has "
            f"{source.length.max()} steps, {reach.min() + 1} or more are needed). Lower data.gap_seconds, or check the "
            "control rate."
        )
    index = ClipIndex(source.start, np.cumsum(counts), gap, source.start + source.length - 1)
    if config.min_motion <= 0 and config.max_motion >= 1:
        return index
    first, episode = index.look_up(np.arange(len(index)))
    kept = np.flatnonzero(_within_motion(source.motion, first, span[episode], config))
    if not len(kept):
        raise NoClipsError(
            f"{source.directory} ({source.split}): no clip has a motion between data.min_motion "
            f"{config.min_motion} and data.max_motion {config.max_motion}."
        )
    return dataclasses.replace(index, kept=kept)


def draw_gaps(gaps: np.ndarray, min_fraction: float, uniform: np.ndarray) -> np.ndarray:
    """Gaps `[B]` in steps, uniform between `min_fraction` of the full gap, but at least one step, and the full gap.

    Args:
      gaps: full gaps `[B]`.
      min_fraction: with 1, all gaps are full gaps.
      uniform: numbers in [0, 1) `[B]`.
    """
    least = np.maximum(1, np.ceil(min_fraction * gaps).astype(np.int64))
    return least + (uniform * (gaps - least + 1)).astype(np.int64)


def draw_offsets(futures: np.ndarray, gaps: np.ndarray, last: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The offset frames `t+n+d` `[B, P]` of pairs whose future frames `t+n` are `futures` `[B, P]`.

    `d` is uniform in `[-n/5, n/5]` without 0 (CoMo, arXiv 2505.17006); for gaps under five steps it is -1 or 1.
    Every offset frame lies after the pair's first frame and inside the episode.

    Args:
      futures: records `[B, P]`.
      gaps: `n`, `[B]`.
      last: last records of the episodes, `[B]`.
      uniform: numbers in [0, 1) `[B, P]`.
    """
    gaps, last = gaps[:, None], last[:, None]
    radius = np.maximum(1, gaps // 5)
    low, high = np.maximum(-radius, 1 - gaps), np.minimum(radius, last - futures)
    # There are high - low candidates, since 0 is left out.
    offset = low + (uniform * (high - low)).astype(np.int64)
    return futures + offset + (offset >= 0)


def _within_motion(motion: np.ndarray, first: np.ndarray, span: np.ndarray, config: ClipConfig) -> np.ndarray:
    """Whether each clip, which starts at record `first` and spans `span` steps, keeps the thresholds, bool `[C]`."""
    total = np.concatenate([[0.0], np.cumsum(motion, dtype=np.float64)])
    mean = (total[first + span + 1] - total[first + 1]) / span
    cuts = np.concatenate([[0], np.cumsum(motion > config.max_motion)])
    return (mean >= config.min_motion) & (cuts[first + span + 1] == cuts[first + 1])
