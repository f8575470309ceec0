"""Statistics of a converted dataset, computed from its episode tables without decoding any image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from como_jax.data.parquet import read_parquet

QUANTILES = {"q01": 0.01, "q99": 0.99}
MOTION_QUANTILES = {"q01": 0.01, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_MAX_VALUES = 2**26


def dataset_statistics(tables: Mapping[str, Sequence[epath.Path]]) -> dict[str, Any]:
    """Computes counts and control rates of all splits, and the distributions of the steps of `train`.

    Quantiles are exact. For them, all values of some dimensions are held in memory: as many dimensions as have
    2**26 values together (0.25 GB), at least one, and two copies of one dimension in float64. For the next
    dimensions the tables are read again, one file at a time.

    Args:
      tables: files of the episode table of every split, in order.

    Returns:
      The content of `statistics.json`. `motion` is over all steps that follow another step.
    """
    rates: Counter[float] = Counter()
    splits = {}
    for split, paths in tables.items():
        counts = {"num_episodes": 0, "num_steps": 0, "seconds": 0.0}
        for table in _read(paths, ["num_steps", "control_rate"]):
            num_steps, control_rate = table["num_steps"].to_numpy(), table["control_rate"].to_numpy()
            rates.update(control_rate.tolist())
            counts["num_episodes"] += table.num_rows
            counts["num_steps"] += int(num_steps.sum())
            counts["seconds"] += float((num_steps / control_rate).sum())
        splits[split] = counts
    train = tables.get("train", ())
    return {
        "splits": splits,
        "control_rates": [{"control_rate": rate, "episodes": rates[rate]} for rate in sorted(rates)],
        "action": _distribution(train, "action"),
        "state": _distribution(train, "state"),
        "motion": _motion(train),
    }


def _read(paths: Iterable[epath.Path], columns: list[str]) -> Iterator[pa.Table]:
    for path in paths:
        yield read_parquet(path, columns)


def _distribution(paths: Sequence[epath.Path], column: str) -> dict[str, Any] | None:
    """Statistics of every dimension of a list<list<float>> column over all steps; None if it is empty."""
    count, size = 0, 0
    for values in _steps(paths, column):
        count, size = count + len(values), values.shape[1]
    if count == 0:
        return None
    width = max(1, _MAX_VALUES // count)
    dimensions = []
    for first in range(0, size, width):
        group = np.concatenate([values[:, first : first + width] for values in _steps(paths, column)])
        dimensions += [_describe(values, QUANTILES) for values in group.T]
    return {"count": count} | {name: [each[name] for each in dimensions] for name in dimensions[0]}


def _steps(paths: Sequence[epath.Path], column: str) -> Iterator[np.ndarray]:
    """Yields the values of a column, float32 `[steps, size]` for each file that has any."""
    for table in _read(paths, [column]):
        steps = table[column].combine_chunks().flatten()
        if len(steps):
            yield steps.flatten().to_numpy().reshape(len(steps), -1)


def _motion(paths: Sequence[epath.Path]) -> dict[str, Any] | None:
    """Statistics of the motion from one step to the next, without the 0 of the first step of each episode."""
    parts = []
    for table in _read(paths, ["motion"]):
        lists = table["motion"].combine_chunks()
        keep = np.ones(len(lists.flatten()), bool)
        lengths = lists.value_lengths().to_numpy()
        keep[np.cumsum(lengths) - lengths] = False
        parts.append(lists.flatten().to_numpy()[keep])
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return {"count": len(values)} | _describe(values, MOTION_QUANTILES) if len(values) else None


def _describe(values: np.ndarray, quantiles: Mapping[str, float]) -> dict[str, float]:
    # In float32, sums over millions of steps lose digits.
    values = values.astype(np.float64)
    statistics = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    numbers = np.quantile(values, list(quantiles.values()), overwrite_input=True)
    return {name: float(value) for name, value in [*statistics.items(), *zip(quantiles, numbers, strict=True)]}
