"""From places in the stream to what is read there: records, gaps and augmentation, all drawn, nothing decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from como_jax.data.clips import draw_gaps, draw_offsets
from como_jax.data.mixture import Mixture, MixturePart
from como_jax.data.order import ClipOrder
from como_jax.errors import ConfigError

# Of a batch, the rows that one host reads.
Rows = slice | np.ndarray
ALL_ROWS = slice(None)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How frames are changed at random, all frames of a clip alike.

    Attributes:
      random_shift: largest shift in pixels, in both directions.
      min_crop_fraction: a part of the picture is cut out whose side is between this share of the whole and the whole.
    """

    random_shift: int = 0
    min_crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.random_shift < 0:
            raise ConfigError(f"data.random_shift must not be negative, not {self.random_shift}.")
        if not 0 < self.min_crop_fraction <= 1:
            raise ConfigError(f"data.min_crop_fraction must lie in (0, 1], not {self.min_crop_fraction}.")

    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The crops `[size, 3]` and shifts `[size, 2]` of `Samples`."""
        crop = rng.random((size, 3))
        if self.min_crop_fraction == 1:
            crop = np.full_like(crop, 0.5)
        crop[:, 0] = 1 - (1 - self.min_crop_fraction) * crop[:, 0]
        return crop, rng.integers(-self.random_shift, self.random_shift + 1, (size, 2))


NO_AUGMENTATION = Augmentation()


@dataclasses.dataclass(frozen=True)
class Samples:
    """Clips to be read. Axes: B clips, K instants, P = K - 1 pairs.

    Attributes:
      dataset, episode: int64 `[B]`.
      gap: int64 `[B]`, steps between instants.
      records: int64 `[B, K]`.
      offsets: int64 `[B, P]`, records of the offset frames, or None.
      crop: float64 `[B, 3]`, scale, top and left of a `transforms.View`.
      shift: int64 `[B, 2]`, down and right of it.
    """

    dataset: np.ndarray
    episode: np.ndarray
    gap: np.ndarray
    records: np.ndarray
    offsets: np.ndarray | None
    crop: np.ndarray
    shift: np.ndarray

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Rows) -> Samples:
        arrays = {name: value[rows] for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(self, **arrays)


class TrainingSamples:
    """The batches of an endless stream by their number; this host's rows of each.

    A batch is drawn as a whole by every host, so that it does not depend on how many hosts share it.
    """

    def __init__(
        self,
        mixture: Mixture,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        rows: Rows = ALL_ROWS,
    ):
        """Takes the batch size of all hosts together, and the rows that are this host's."""
        self._parts, self._augmentation = mixture.parts, augmentation
        self._batch_size, self._seed, self._rows = batch_size, seed, rows
        self._order = ClipOrder([len(part.index) for part in mixture.parts], mixture.weights.tolist(), seed)

    def __call__(self, number: int) -> Samples:
        """Batch `number`."""
        places = number * self._batch_size + np.arange(self._batch_size)
        datasets, clips = self._order(places)
        rng = np.random.default_rng((self._seed, number))
        return draw_samples(self._parts, datasets, clips, rng, self._augmentation)[self._rows]


def draw_samples(
    parts: Sequence[MixturePart],
    datasets: np.ndarray,
    clips: np.ndarray,
    rng: np.random.Generator,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Samples:
    """Draws gaps, offsets and augmentation of clips `[B]` of datasets `[B]`."""
    config = parts[0].clips
    size, pairs = len(datasets), config.instants - 1
    for_gap, for_offset = rng.random(size), rng.random((size, pairs))
    crop, shift = augmentation.draw(rng, size)
    first, episode, full_gap, last = _look_up(parts, datasets, clips)
    gap = full_gap if config.pair_span > 1 else draw_gaps(full_gap, config.min_gap_fraction, for_gap)
    records = first[:, None] + gap[:, None] * np.arange(config.instants)
    offsets = draw_offsets(records[:, 1:], gap, last, for_offset) if config.offset_frames else None
    return Samples(datasets, episode, gap, records, offsets, crop, shift)


def _look_up(parts: Sequence[MixturePart], datasets: np.ndarray, clips: np.ndarray) -> list[np.ndarray]:
    """First record, episode, full gap and last record of the episode, int64 `[B]` each."""
    found = [np.empty(len(datasets), np.int64) for _ in range(4)]
    for dataset in np.unique(datasets):
        index, rows = parts[dataset].index, datasets == dataset
        episode = index.episode[clips[rows]]
        values = index.first[clips[rows]], episode, index.gap[episode], index.last[episode]
        for column, value in zip(found, values, strict=True):
            column[rows] = value
    return found
