"""What little is known of the true motion: actions and state changes of a few episodes, as targets of a small head."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from como_jax.data.mixture import MixturePart
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.spec.normalization import AffineNormalizer, Normalizer, Scales

KINDS = ("action", "state")
# The field of the scales of a run.
_FIELD = "true_motion"


class SourceSupervision:
    """True motion between the frames of a pair, for a fixed few episodes of one dataset.

    The target of a pair is the mean action between its two frames, the change of the state, or both concatenated.
    Every number is standardised over the chosen episodes, so that no unit outweighs another.

    Attributes:
      size: numbers in a target; 0 where the dataset has none.
      episodes: bool `[E]`, the chosen episodes.
      normalizer: what standardises a target; None where there is none.
    """

    def __init__(
        self,
        source: EpisodeSource,
        gap: np.ndarray,
        kinds: Sequence[str],
        fraction: float,
        normalizer: Normalizer | None = None,
    ):
        """Chooses a fraction of the episodes by their names alone.

        Args:
          source: the dataset.
          gap: the full gap in steps, `[E]`.
          kinds, fraction: see `Supervision`.
          normalizer: of the first start of a run, instead of one that is fitted to the chosen episodes.

        Raises:
          DatasetError: the normalizer is that of other numbers.
        """
        self._measures: list[Callable[[np.ndarray, np.ndarray], np.ndarray]] = []
        if "action" in kinds and source.action is not None:
            total = np.concatenate([np.zeros((1, source.action.shape[1])), np.cumsum(source.action, 0, np.float64)])
            self._measures.append(lambda t, gap: (total[t + gap] - total[t]) / np.expand_dims(gap, -1))
        if "state" in kinds and source.state is not None:
            state = source.state
            self._measures.append(lambda t, gap: state[t + gap] - state[t])
        self.episodes = np.zeros(len(source.length), bool)
        self.size, self.normalizer = 0, None
        if not self._measures:
            return
        long_enough = np.flatnonzero(source.length > gap)
        order = sorted(long_enough, key=lambda row: hashlib.blake2b(source.episode_id[int(row)].encode()).digest())
        self.episodes[order[: max(1, round(fraction * len(order)))]] = True
        first = np.concatenate(
            [source.start[row] + np.arange(source.length[row] - gap[row]) for row in np.flatnonzero(self.episodes)]
        )
        repeats = (source.length - gap)[self.episodes]
        raw = self._measure(first, np.repeat(gap[self.episodes], repeats))
        self.size = raw.shape[1]
        if normalizer is not None and normalizer.size != self.size:
            raise DatasetError(
                f"{source.directory} has {self.size} numbers of true motion, and the run was started with "
                f"{normalizer.size}; choose a new `workdir`."
            )
        moments = {"mean": raw.mean(axis=0), "std": raw.std(axis=0)}
        self.normalizer = normalizer or AffineNormalizer.fit("mean_std", moments)

    def __call__(self, first: np.ndarray, gap: int) -> np.ndarray:
        """Targets float32 `[P, size]` of the pairs that start at records `first` `[P]` and span `gap` steps."""
        assert self.normalizer is not None
        return self.normalizer(self._measure(np.asarray(first), np.full(len(first), gap)))

    def _measure(self, first: np.ndarray, gap: np.ndarray) -> np.ndarray:
        return np.concatenate([measure(first, gap) for measure in self._measures], axis=-1)


class Supervision:
    """True motion of the datasets of a mixture.

    Each dataset has columns of its own in the target, since the actions of two datasets mean different things.

    Attributes:
      size: numbers in a target of the mixture.
    """

    def __init__(
        self,
        parts: Sequence[MixturePart],
        kinds: Sequence[str],
        fraction: float,
        scales: Scales = types.MappingProxyType({}),
    ):
        """Chooses episodes of every dataset.

        Args:
          parts: the datasets.
          kinds: what is taken of each, of `KINDS`.
          fraction: share of the episodes that are chosen.
          scales: of the first start of a run, which stay; others are fitted to the chosen episodes.

        Raises:
          ConfigError: an unknown kind, or a fraction out of range.
          DatasetError: no dataset has what is asked for, or one has other numbers than at the first start.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ConfigError(f"data.labels {','.join(kinds)!r} must consist of {', '.join(KINDS)}.")
        if not 0 < fraction <= 1:
            raise ConfigError(f"data.labelled_fraction must lie in (0, 1], not {fraction}.")
        self._names = _names([part.source for part in parts])
        known = [scales.get(name, {}).get(_FIELD) for name in self._names]
        self._parts = [
            SourceSupervision(part.source, part.index.gap, kinds, fraction, normalizer)
            for part, normalizer in zip(parts, known, strict=True)
        ]
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

    def scales(self) -> dict[str, dict[str, Normalizer | None]]:
        """What standardises the targets of every dataset, by its name."""
        return {name: {_FIELD: part.normalizer} for name, part in zip(self._names, self._parts, strict=True)}

    def describe(self) -> str:
        """How many episodes of every dataset are used, and how many numbers each gives."""
        counts = (f"{part.episodes.sum()} of {len(part.episodes)} episodes ({part.size})" for part in self._parts)
        return "true motion (and its size): " + ", ".join(counts)


def _names(sources: Sequence[EpisodeSource]) -> list[str]:
    """The last part of the path of every dataset, or the whole where several have the same one."""
    paths = [epath.Path(source.directory) for source in sources]
    names = [path.name for path in paths]
    return [path.name if names.count(path.name) == 1 else str(path) for path in paths]
