"""What little is known of the true motion: actions and state changes of a few episodes, as targets of a small head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from como_jax.data.mixture import MixturePart
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError

KINDS = ("action", "state")


class SourceSupervision:
    """True motion between the frames of a pair, for a fixed few episodes of one dataset.

    The target of a pair is the mean action between its two frames, the change of the state, or both concatenated.
    Every number is standardised over the chosen episodes, so that no unit outweighs another.

    Attributes:
      size: numbers in a target; 0 where the dataset has none.
      episodes: bool `[E]`, the chosen episodes.
    """

    def __init__(self, source: EpisodeSource, gap: np.ndarray, kinds: Sequence[str], fraction: float):
        """Chooses a fraction of the episodes by their names alone; `gap` `[E]` is the full gap in steps."""
        self._measures: list[Callable[[np.ndarray, np.ndarray], np.ndarray]] = []
        if "action" in kinds and source.action is not None:
            total = np.concatenate([np.zeros((1, source.action.shape[1])), np.cumsum(source.action, 0, np.float64)])
            self._measures.append(lambda t, gap: (total[t + gap] - total[t]) / np.expand_dims(gap, -1))
        if "state" in kinds and source.state is not None:
            state = source.state
            self._measures.append(lambda t, gap: state[t + gap] - state[t])
        self.episodes = np.zeros(len(source.length), bool)
        self.size = 0
        if not self._measures:
            return
        long_enough = np.flatnonzero(source.length > gap)
        order = sorted(long_enough, key=lambda row: hashlib.blake2b(source.episode_id[row].encode()).digest())
        self.episodes[order[: max(1, round(fraction * len(order)))]] = True
        first = np.concatenate(
            [source.start[row] + np.arange(source.length[row] - gap[row]) for row in np.flatnonzero(self.episodes)]
        )
        repeats = (source.length - gap)[self.episodes]
        raw = self._measure(first, np.repeat(gap[self.episodes], repeats))
        deviation = raw.std(axis=0)
        self.size, self._mean = raw.shape[1], raw.mean(axis=0)
        self._scale = np.where(deviation > 1e-6, deviation, 1.0)

    def __call__(self, first: np.ndarray, gap: int) -> np.ndarray:
        """Targets float32 `[P, size]` of the pairs that start at records `first` `[P]` and span `gap` steps."""
        raw = self._measure(np.asarray(first), np.full(len(first), gap))
        return ((raw - self._mean) / self._scale).astype(np.float32)

    def _measure(self, first: np.ndarray, gap: np.ndarray) -> np.ndarray:
        return np.concatenate([measure(first, gap) for measure in self._measures], axis=-1)


class Supervision:
    """True motion of the datasets of a mixture.

    Each dataset has columns of its own in the target, since the actions of two datasets mean different things.

    Attributes:
      size: numbers in a target of the mixture.
    """

    def __init__(self, parts: Sequence[MixturePart], kinds: Sequence[str], fraction: float):
        """Chooses episodes of every dataset.

        Args:
          parts: the datasets.
          kinds: what is taken of each, of `KINDS`.
          fraction: share of the episodes that are chosen.

        Raises:
          ConfigError: an unknown kind, or a fraction out of range.
          DatasetError: no dataset has what is asked for.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ConfigError(f"data.labels {','.join(kinds)!r} must consist of {', '.join(KINDS)}.")
        if not 0 < fraction <= 1:
            raise ConfigError(f"data.labelled_fraction must lie in (0, 1], not {fraction}.")
        self._parts = [SourceSupervision(part.source, part.index.gap, kinds, fraction) for part in parts]
        self._begin = np.concatenate([[0], np.cumsum([part.size for part in self._parts])])
        self.size = int(self._begin[-1])
        if not self.size:
            names = ", ".join(str(part.source.directory) for part in parts)
            raise DatasetError(
                f"data.labels asks for {' and '.join(kinds)}, which no dataset has: {names}. Add a dataset that has "
                "them, or set model.label_weight to 0."
            )

    def __call__(self, dataset: int, episode: int, first: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray]:
        """Targets and whether each number is known, float32 `[P, size]` both, of the pairs of one clip.

        Args:
          dataset: position in the mixture.
          episode: row in the dataset.
          first: records `[P]` of the pairs' first frames.
          gap: steps between the two frames of a pair.
        """
        target, known = (np.zeros((len(first), self.size), np.float32) for _ in range(2))
        part = self._parts[dataset]
        if part.episodes[episode]:
            columns = slice(self._begin[dataset], self._begin[dataset + 1])
            target[:, columns], known[:, columns] = part(first, gap), 1.0
        return target, known

    def describe(self) -> str:
        """How many episodes of every dataset are used, and how many numbers each gives."""
        counts = (f"{part.episodes.sum()} of {len(part.episodes)} episodes ({part.size})" for part in self._parts)
        return "true motion (and its size): " + ", ".join(counts)
