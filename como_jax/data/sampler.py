"""What every batch of the endless training stream holds: a function of the seed and the batch's number alone."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from como_jax.errors import ConfigError

# The rows of a batch that one host reads.
Rows = slice | np.ndarray
ALL_ROWS = slice(None)

_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How images are changed at random, all images of a sample alike.

    Attributes:
      random_shift: largest shift in pixels, in both directions.
      min_crop_fraction: the side of the square that is cut out is drawn between this share of the whole and the whole.
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
    """Which records a batch is read from. Axes: B samples, K instants, P offset frames (0 where none are needed).

    Attributes:
      dataset, episode: int64 `[B]`, position of the dataset in the mixture and of the episode in the dataset.
      gap: int64 `[B]`, steps between two instants.
      records: int64 `[B, K]`, records of the instants.
      offsets: int64 `[B, P]`, records of the offset frames.
      crop: float64 `[B, 3]`, scale, top and left of a `transforms.Crop`.
      shift: int64 `[B, 2]`, down and right of a `transforms.Crop`.
      text: float64 `[B]` in [0, 1), which of an episode's instructions is read; 0 is the first.
    """

    dataset: np.ndarray
    episode: np.ndarray
    gap: np.ndarray
    records: np.ndarray
    offsets: np.ndarray
    crop: np.ndarray
    shift: np.ndarray
    text: np.ndarray

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Rows) -> Samples:
        return Samples(**{name: value[rows] for name, value in vars(self).items()})


class SampleSet(Protocol):
    """All samples of a mixture, numbered in every dataset from 0; see `ClipFiller` and `ChunkFiller`."""

    @property
    def num_samples(self) -> Sequence[int]:
        """Number of samples of every dataset."""

    @property
    def weights(self) -> Sequence[float]:
        """Share of every dataset in the stream, relative to the others."""

    def draw(
        self,
        datasets: np.ndarray,
        numbers: np.ndarray,
        rng: np.random.Generator,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> Samples:
        """The samples of these numbers `[B]` of datasets `[B]`, with what is random about them."""


class BatchSampler:
    """The samples of every batch of an endless stream; of each batch only the rows of this host.

    Every host draws the whole batch, so that the stream does not depend on how many hosts share it.
    """

    def __init__(
        self,
        samples: SampleSet,
        augmentation: Augmentation = NO_AUGMENTATION,
        *,
        batch_size: int,
        seed: int,
        rows: Rows = ALL_ROWS,
    ):
        """Batches of `batch_size` samples of all hosts together, of which this host reads `rows`."""
        self._samples, self._augmentation = samples, augmentation
        self._batch_size, self._seed, self._rows = batch_size, seed, rows
        self._sampler = WeightedSampler(samples.num_samples, samples.weights, seed)

    def __call__(self, number: int) -> Samples:
        """The samples of batch `number`."""
        datasets, numbers = self._sampler(number * self._batch_size + np.arange(self._batch_size))
        rng = np.random.default_rng((self._seed, number))
        return self._samples.draw(datasets, numbers, rng, self._augmentation)[self._rows]


class WeightedSampler:
    """Which sample stands at which place of an endless, shuffled, weighted stream.

    Places may be asked for in any order. Each dataset is gone through in a new random order every epoch. Datasets
    alternate as evenly as their weights allow, in equal blocks of 4096 samples, after each of which the shares are
    exact to 1/8192.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        """A stream over datasets of these sizes (numbers of samples) and weights."""
        self._sizes, self._seed = np.asarray(sizes, np.int64), seed
        self._counts = _counts_per_block(np.asarray(weights, np.float64))
        # Sample k of the n samples that a dataset has in a block lies at (k + 1/2) / n of the block.
        numbers = np.repeat(np.arange(len(sizes)), self._counts)
        ranks = np.concatenate([np.arange(count) for count in self._counts])
        order = np.argsort((ranks + 0.5) / self._counts[numbers], kind="stable")
        self._dataset, self._rank = numbers[order], ranks[order]
        self._lock = threading.Lock()
        self._epochs: dict[int, dict[int, np.ndarray]] = {}

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset, and number of the sample in it, int64 `[B]` each, at places `[B]` of the stream."""
        block, within = np.divmod(places, len(self._dataset))
        datasets = self._dataset[within]
        epochs, positions = np.divmod(block * self._counts[datasets] + self._rank[within], self._sizes[datasets])
        samples = np.empty_like(positions)
        for dataset, epoch in set(zip(datasets.tolist(), epochs.tolist(), strict=True)):
            chosen = (datasets == dataset) & (epochs == epoch)
            samples[chosen] = self._permutation(dataset, epoch)[positions[chosen]]
        return datasets, samples

    def _permutation(self, dataset: int, epoch: int) -> np.ndarray:
        """The order of one epoch. Two are kept of every dataset, since a batch may reach into the next epoch."""
        with self._lock:
            kept = self._epochs.setdefault(dataset, {})
            if epoch not in kept:
                if len(kept) == 2:
                    del kept[next(iter(kept))]
                size = int(self._sizes[dataset])
                numbers = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64)
                kept[epoch] = np.random.default_rng((self._seed, dataset, epoch)).permutation(numbers)
            return kept[epoch]

    def __getstate__(self) -> dict[str, object]:
        # A lock cannot be pickled for a worker process.
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_epochs")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._lock, self._epochs = threading.Lock(), {}


def _counts_per_block(weights: np.ndarray) -> np.ndarray:
    """Samples of every dataset in a block, int64, at least one each; the largest remainders are rounded up."""
    exact = weights / weights.sum() * _BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: _BLOCK - counts.sum()]] += 1
    return np.maximum(counts, 1)
