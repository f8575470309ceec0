"""Statistics of a converted dataset, computed from its episode tables without decoding any image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from como_jax.data.episode_table import EpisodeTable
from como_jax.data.sources import flatten_steps

QUANTILES = {"q01": 0.01, "q99": 0.99}
MOTION_QUANTILES = {"q01": 0.01, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_MAX_VALUES = 2**26


def dataset_statistics(tables: Mapping[str, EpisodeTable]) -> dict[str, Any]:
    """Computes counts and control rates of all splits, and the distributions of the steps of `train`.

    Quantiles are exact. For them, all values of some dimensions are held in memory: as many dimensions as have
    2**26 values together (0.25 GB), at least one, and two copies of one dimension in float64. For the next
    dimensions the tables are read again, one group of episodes at a time.

    Args:
      tables: the episode table of every split.

    Returns:
      The content of `statistics.json`. `motion` is over all steps that follow another step.
    """
    rates: Counter[float] = Counter()
    splits = {}
    for split, episodes in tables.items():
        counts = {"num_episodes": 0, "num_steps": 0, "seconds": 0.0}
        for table in episodes.read(["num_steps", "control_rate"]):
            num_steps, control_rate = table["num_steps"].to_numpy(), table["control_rate"].to_numpy()
            rates.update(control_rate.tolist())
            counts["num_episodes"] += table.num_rows
            counts["num_steps"] += int(num_steps.sum())
            counts["seconds"] += float((num_steps / control_rate).sum())
        splits[split] = counts
    train = tables.get("train")
    return {
        "splits": splits,
        "control_rates": [{"control_rate": rate, "episodes": rates[rate]} for rate in sorted(rates)],
        "action": _distribution(train, "action"),
        "state": _distribution(train, "state"),
        "motion": _motion(train),
    }


def _distribution(table: EpisodeTable | None, column: str) -> dict[str, Any] | None:
    """Statistics of every dimension of a list<list<float>> column over all steps; None if it is empty."""
    count, size = 0, 0
    for values in _steps(table, column):
        count, size = count + len(values), values.shape[1]
    if count == 0:
        return None
    width = max(1, _MAX_VALUES // count)
    dimensions = []
    for first in range(0, size, width):
        group = np.concatenate([values[:, first : first + width] for values in _steps(table, column)])
        dimensions += [_describe(values, QUANTILES) for values in group.T]
    return {"count": count} | {name: [each[name] for each in dimensions] for name in dimensions[0]}


def _steps(table: EpisodeTable | None, column: str) -> Iterator[np.ndarray]:
    """Yields the values of a column, float32 `[steps, size]` for each group of episodes that has any."""
    for group in () if table is None else table.read([column]):
        values = flatten_steps(group[column])
        if len(values):
            yield values


def _motion(table: EpisodeTable | None) -> dict[str, Any] | None:
    """Statistics of the motion from one step to the next, without the 0 of the first step of each episode."""
    parts = []
    for group in () if table is None else table.read(["motion", "num_steps"]):
        values, lengths = flatten_steps(group["motion"]), group["num_steps"].to_numpy()
        keep = np.ones(len(values), bool)
        keep[np.cumsum(lengths) - lengths] = False
        parts.append(values[keep])
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return {"count": len(values)} | _describe(values, MOTION_QUANTILES) if len(values) else None


def _describe(values: np.ndarray, quantiles: Mapping[str, float]) -> dict[str, float]:
    # In float32, sums over millions of steps lose digits.
    values = values.astype(np.float64)
    statistics = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    numbers = np.quantile(values, list(quantiles.values()), overwrite_input=True)
    return {name: float(value) for name, value in [*statistics.items(), *zip(quantiles, numbers, strict=True)]}
