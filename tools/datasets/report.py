"""What a conversion says about itself: statistics of the data, and a report of what was left out.

Shards note the outcome of each of their sources in a file beside their records. When all shards are written,
the notes become `conversion_report.json` and the episode tables become `statistics.json`.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from como_jax.data import schema
from como_jax.files import write_text

REPORT_NAME = "conversion_report.json"
STATISTICS_NAME = "statistics.json"
_MAX_EXAMPLES = 5
_QUANTILES = {"q01": 0.01, "q99": 0.99}


@dataclasses.dataclass
class SourceOutcome:
    """What became of one source.

    Attributes:
      source: its name.
      episodes: number of episodes that were written.
      problems: why the source, or parts of it, were left out.
      warnings: what its user should know; equal texts of several sources are counted together.
    """

    source: str
    episodes: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def write_json(path: epath.PathLike, content: Any) -> None:
    """Writes strict JSON, without NaN, atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_outcomes(directory: epath.Path, split: str, shard: int, outcomes: Sequence[SourceOutcome]) -> None:
    """Notes the outcomes of one shard's sources, until `collect_outcomes` picks them up."""
    notes = [dataclasses.asdict(outcome) for outcome in outcomes]
    write_json(directory / f"outcomes-{split}-{shard:05d}.json", notes)


def collect_outcomes(directory: epath.Path) -> list[SourceOutcome]:
    """Reads and removes the notes of all shards; the outcomes come in order of their sources' names."""
    outcomes = []
    for path in sorted(directory.glob("outcomes-*.json")):
        outcomes += [SourceOutcome(**note) for note in json.loads(path.read_text())]
        path.unlink()
    return sorted(outcomes, key=lambda outcome: outcome.source)


def summarize_outcomes(outcomes: Sequence[SourceOutcome], extra_warnings: Iterable[str] = ()) -> dict[str, Any]:
    """The part of the report that is about the sources."""
    converted = [outcome for outcome in outcomes if outcome.episodes and not outcome.problems]
    partial = [outcome for outcome in outcomes if outcome.episodes and outcome.problems]
    left_out = [outcome for outcome in outcomes if not outcome.episodes]
    return {
        "sources": {
            "found": len(outcomes),
            "converted": len(converted),
            "partially_converted": len(partial),
            "left_out": len(left_out),
        },
        "left_out": [
            {"source": outcome.source, "reasons": outcome.problems or ["holds no episode"]} for outcome in left_out
        ],
        "partially_converted": [
            {"source": outcome.source, "episodes": outcome.episodes, "reasons": outcome.problems} for outcome in partial
        ],
        "warnings": [{"message": message, "count": 1, "examples": []} for message in extra_warnings]
        + _group_warnings(outcomes),
    }


def dataset_statistics(tables: Mapping[str, pa.Table]) -> dict[str, Any]:
    """Counts and control rates of all splits, and the distribution of states and actions in `train`.

    Args:
      tables: the episode table of every split.
    """
    rates = Counter(rate for table in tables.values() for rate in table["control_rate"].to_pylist())
    train = tables.get("train")
    return {
        "splits": {split: _count(table) for split, table in tables.items()},
        "control_rates": [{"control_rate": rate, "episodes": rates[rate]} for rate in sorted(rates)],
        "action": None if train is None else _distribution(train["action"]),
        "state": None if train is None else _distribution(train["state"]),
    }


def _group_warnings(outcomes: Sequence[SourceOutcome]) -> list[dict[str, Any]]:
    sources: dict[str, list[str]] = {}
    for outcome in outcomes:
        for message in dict.fromkeys(outcome.warnings):
            sources.setdefault(message, []).append(outcome.source)
    return [
        {"message": message, "count": len(names), "examples": names[:_MAX_EXAMPLES]}
        for message, names in sorted(sources.items())
    ]


def _count(table: pa.Table) -> dict[str, Any]:
    num_steps = table["num_steps"].to_numpy()
    return {
        "num_episodes": table.num_rows,
        "num_steps": int(num_steps.sum()),
        "seconds": float((num_steps / table["control_rate"].to_numpy()).sum()),
    }


def _distribution(column: pa.ChunkedArray) -> dict[str, Any] | None:
    """Per-dimension statistics of a list<list<float>> column, over all steps of all episodes."""
    steps = column.combine_chunks().flatten()
    if len(steps) == 0:
        return None
    # float64, or sums over millions of steps lose digits.
    values = steps.flatten().to_numpy().reshape(len(steps), -1).astype(np.float64)
    statistics = {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
    } | {name: np.quantile(values, q, axis=0) for name, q in _QUANTILES.items()}
    return {"count": len(values)} | {name: value.tolist() for name, value in statistics.items()}


def write_summary(
    directory: epath.Path,
    description: Mapping[str, Any],
    outcomes: Sequence[SourceOutcome],
    warnings: Iterable[str],
) -> dict[str, Any]:
    """Writes statistics and report of a finished set of shards, and returns the report.

    Args:
      directory: holds the episode tables.
      description: what was converted and how, at the head of the report.
      outcomes: of all sources.
      warnings: those that belong to no single source.
    """
    splits = [split for split in schema.SPLITS if any(directory.glob(f"episodes-{split}-*.parquet"))]
    tables = {split: schema.read_episode_table(directory, split) for split in splits}
    statistics = dataset_statistics(tables)
    summary = {
        **description,
        "episodes": {split: counts["num_episodes"] for split, counts in statistics["splits"].items()},
        "steps": {split: counts["num_steps"] for split, counts in statistics["splits"].items()},
        **summarize_outcomes(outcomes, warnings),
    }
    write_json(directory / STATISTICS_NAME, statistics)
    write_json(directory / REPORT_NAME, summary)
    return summary
