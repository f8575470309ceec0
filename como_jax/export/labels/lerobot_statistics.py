"""Statistics of a LeRobot dataset, as its `meta/stats.json` holds them: one vector for each, by feature."""

from __future__ import annotations

from typing import Any

import numpy as np

_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


def number_statistics(values: np.ndarray) -> dict[str, list[float]]:
    """Statistics of numbers `[N, size]`, N > 0, over N."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, _QUANTILES, axis=0)
    return {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "count": [len(values)],
        **{f"q{round(100 * share):02d}": row.tolist() for share, row in zip(_QUANTILES, quantiles, strict=True)},
    }


class PictureStatistics:
    """Statistics of the colours of many pictures, channel by channel, with 1 for full brightness."""

    def __init__(self) -> None:
        self._histogram = np.zeros((3, 256), np.int64)
        self._num_pictures = 0

    def add(self, image: np.ndarray) -> None:
        """Counts a picture, uint8 `[H, W, 3]`."""
        for channel in range(3):
            self._histogram[channel] += np.bincount(image[..., channel].ravel(), minlength=256)
        self._num_pictures += 1

    def summary(self) -> dict[str, list[Any]]:
        """All statistics `[3, 1, 1]`, and the number of pictures `[1]`; there has to be a picture."""
        levels = np.arange(256) / 255
        share = self._histogram / self._histogram.sum(axis=1, keepdims=True)
        mean = share @ levels
        std = np.sqrt(share @ levels**2 - mean**2)
        present = [np.flatnonzero(row) for row in self._histogram]
        statistics = {
            "min": [levels[row[0]] for row in present],
            "max": [levels[row[-1]] for row in present],
            "mean": mean,
            "std": np.nan_to_num(std),
        }
        # LeRobot holds pictures with the channels first.
        shaped = {name: np.reshape(value, (3, 1, 1)).tolist() for name, value in statistics.items()}
        return {**shaped, "count": [self._num_pictures]}
