"""What a conversion says about itself: the report of what became of each source, beside the statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from como_jax.convert.statistics import dataset_statistics
from como_jax.data import schema
from como_jax.files import write_json

REPORT_NAME = "conversion_report.json"
STATISTICS_NAME = "statistics.json"
_MAX_EXAMPLES = 5


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
    tables = {split: sorted(directory.glob(f"episodes-{split}-*.parquet")) for split in schema.SPLITS}
    statistics = dataset_statistics({split: paths for split, paths in tables.items() if paths})
    summary = {
        **description,
        "episodes": {split: counts["num_episodes"] for split, counts in statistics["splits"].items()},
        "steps": {split: counts["num_steps"] for split, counts in statistics["splits"].items()},
        **summarize_outcomes(outcomes, warnings),
    }
    write_json(directory / STATISTICS_NAME, statistics)
    write_json(directory / REPORT_NAME, summary)
    return summary


def _group_warnings(outcomes: Sequence[SourceOutcome]) -> list[dict[str, Any]]:
    sources: dict[str, list[str]] = {}
    for outcome in outcomes:
        for message in dict.fromkeys(outcome.warnings):
            sources.setdefault(message, []).append(outcome.source)
    return [
        {"message": message, "count": len(names), "examples": names[:_MAX_EXAMPLES]}
        for message, names in sorted(sources.items())
    ]
