"""Which clip comes at which place of an endless, shuffled, weighted stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

_BLOCK = 4096


class ClipOrder:
    """Gives `(dataset, clip)` for any places of the stream, in any order: a function of the seed alone.

    Each dataset is gone through in a new order every epoch. Datasets alternate as evenly as their weights allow, in
    blocks of 4096 samples that all look alike, so that shares are exact to 1/8192 after each block.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        """Takes the number of clips and the weight of every dataset."""
        self._sizes, self._seed = np.asarray(sizes, np.int64), seed
        self._counts = _shares(np.asarray(weights, np.float64))
        # Sample k of n of a dataset lies at (k + 1/2) / n of the block.
        numbers = np.repeat(np.arange(len(sizes)), self._counts)
        ranks = np.concatenate([np.arange(count) for count in self._counts])
        order = np.argsort((ranks + 0.5) / self._counts[numbers], kind="stable")
        self._dataset, self._rank = numbers[order], ranks[order]
        self._lock = threading.Lock()
        self._epochs: dict[int, dict[int, np.ndarray]] = {}

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Datasets and clips, int64 `[B]` both, at places `[B]` of the stream."""
        block, within = np.divmod(places, len(self._dataset))
        datasets = self._dataset[within]
        epochs, positions = np.divmod(block * self._counts[datasets] + self._rank[within], self._sizes[datasets])
        clips = np.empty_like(positions)
        for dataset, epoch in set(zip(datasets.tolist(), epochs.tolist(), strict=True)):
            chosen = (datasets == dataset) & (epochs == epoch)
            clips[chosen] = self._permutation(dataset, epoch)[positions[chosen]]
        return datasets, clips

    def _permutation(self, dataset: int, epoch: int) -> np.ndarray:
        """The order of one epoch; two are kept of every dataset, since a batch may lie across a border."""
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
        # Locks do not travel to worker processes.
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_epochs")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._lock, self._epochs = threading.Lock(), {}


def _shares(weights: np.ndarray) -> np.ndarray:
    """Samples of every dataset in a block, int64, at least one each; largest remainders are rounded up."""
    exact = weights / weights.sum() * _BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: _BLOCK - counts.sum()]] += 1
    return np.maximum(counts, 1)
