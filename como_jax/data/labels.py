"""What little is known of the true motion: actions and states of a few episodes, as targets of a small head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from como_jax.data.mixture import MixturePart
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError

KINDS = ("action", "state")


class SourceLabels:
    """Labels of the pairs of one source, of a fixed few of its episodes.

    A label is the mean action between two frames, or the change of the state, or both in a row. Every number is
    standardised over the labelled episodes, so that no unit outweighs another.

    Attributes:
      size: numbers in a label; 0 where the source has none.
      episodes: bool `[E]`, which episodes are labelled.
    """

    def __init__(self, source: EpisodeSource, gap: np.ndarray, kinds: Sequence[str], fraction: float):
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
        """Labels float32 `[P, size]` of the pairs that start at records `first` `[P]` and span `gap` steps."""
        raw = self._measure(np.asarray(first), np.full(len(first), gap))
        return ((raw - self._mean) / self._scale).astype(np.float32)

    def _measure(self, first: np.ndarray, gap: np.ndarray) -> np.ndarray:
        return np.concatenate([measure(first, gap) for measure in self._measures], axis=-1)


class Labels:
    """Labels of a mixture: each dataset has a part of the vector of its own, since their actions mean different things.

    Attributes:
      size: numbers in a label of the mixture.
    """

    def __init__(self, parts: Sequence[MixturePart], kinds: Sequence[str], fraction: float):
        """Chooses the labelled episodes, by their names alone.

        Raises:
          ConfigError: an unknown kind, or a fraction out of range.
          DatasetError: no dataset has what is asked for.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ConfigError(f"data.labels {','.join(kinds)!r} must be made of {', '.join(KINDS)}.")
        if not 0 < fraction <= 1:
            raise ConfigError(f"data.labelled_fraction must lie in (0, 1], not {fraction}.")
        self._parts = [SourceLabels(part.source, part.index.gap, kinds, fraction) for part in parts]
        self._begin = np.concatenate([[0], np.cumsum([part.size for part in self._parts])])
        self.size = int(self._begin[-1])
        if not self.size:
            names = ", ".join(str(part.source.directory) for part in parts)
            raise DatasetError(f"data.labels asks for {' and '.join(kinds)}, which no dataset has: {names}.")

    def __call__(self, dataset: int, episode: int, first: np.ndarray, gap: int) -> dict[str, np.ndarray]:
        """`labels` and `labelled` of `FramePairs`, without the batch axis, for pairs of one clip."""
        labels, labelled = (np.zeros((len(first), self.size), np.float32) for _ in range(2))
        part = self._parts[dataset]
        if part.episodes[episode]:
            columns = slice(self._begin[dataset], self._begin[dataset + 1])
            labels[:, columns], labelled[:, columns] = part(first, gap), 1.0
        return {"labels": labels, "labelled": labelled}

    def describe(self) -> str:
        """How many episodes of which dataset are labelled."""
        counts = (f"{part.episodes.sum()} of {len(part.episodes)} episodes ({part.size})" for part in self._parts)
        return "labels (and their size): " + ", ".join(counts)
