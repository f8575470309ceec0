"""What a conversion says about itself: the report of what became of each source, and the progress bar."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from como_jax.convert.statistics import dataset_statistics
from como_jax.data import schema
from como_jax.data.episode_table import EpisodeTable, has_split
from como_jax.files import write_json
from como_jax.spec.normalization import AffineNormalizer, lost_dimensions

REPORT_NAME = "conversion_report.json"
STATISTICS_NAME = "statistics.json"
_MAX_EXAMPLES = 5
_MAX_LISTED = 5


@dataclasses.dataclass
class SourceOutcome:
    """What became of one source.

    Attributes:
      source: its name.
      episodes: number of episodes that were written.
      problems: why the source, or parts of it, were left out.
      warnings: what the user should know; equal messages of several sources are counted together.
    """

    source: str
    episodes: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def summarize_outcomes(outcomes: Sequence[SourceOutcome], extra_warnings: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the part of the report that is about the sources."""
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
    label_files: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes statistics and report of a finished set of shards, and returns the report.

    The report begins with `description`; `warnings` are those that belong to no single source, and `label_files` what
    looks as if it held instructions.
    """
    tables = {split: EpisodeTable(directory, split) for split in schema.SPLITS if has_split(directory, split)}
    statistics = dataset_statistics(tables)
    summary = {
        **description,
        "episodes": {split: counts["num_episodes"] for split, counts in statistics["splits"].items()},
        "steps": {split: counts["num_steps"] for split, counts in statistics["splits"].items()},
        "instructions": {split: _num_instructed(table) for split, table in tables.items()},
        "label_files": list(label_files[:_MAX_EXAMPLES]),
        **summarize_outcomes(outcomes, [*warnings, *rare_motion(statistics)]),
    }
    write_json(directory / STATISTICS_NAME, statistics)
    write_json(directory / REPORT_NAME, summary)
    return summary


def rare_motion(statistics: Mapping[str, Any]) -> list[str]:
    """Says of actions and states which dimensions move in so few steps that quantiles do not show it."""
    found = []
    for field in ("action", "state"):
        values = statistics[field]
        if values is None:
            continue
        low, high = np.asarray(values["min"]), np.asarray(values["max"])
        lost = lost_dimensions(AffineNormalizer.fit("quantile", values), low, high)
        if lost:
            names = [f"{number} ({low[number]:g} to {high[number]:g})" for number in lost[:_MAX_LISTED]]
            found.append(
                f"{field}: {len(lost)} of {len(low)} dimensions move in fewer than 2 % of the steps: {', '.join(names)}"
                f"{', ...' if len(lost) > _MAX_LISTED else ''}; data.normalization=quantile would make them constant, "
                "min_max and mean_std keep them"
            )
    return found


def summarize(summary: Mapping[str, Any], out: str) -> list[str]:
    """Returns the lines that a user reads after a conversion into `out`: its size, and what is missing from it."""
    sizes = [
        f"{split} {summary['episodes'][split]} episodes, {steps} steps" for split, steps in summary["steps"].items()
    ]
    lines = [f"dataset {summary['name']} in {out}: {'; '.join(sizes)}"]
    for title in ("left_out", "partially_converted"):
        entries = summary[title]
        if entries:
            lines.append(f"{title.replace('_', ' ')}: {len(entries)} of {summary['sources']['found']} sources")
        lines += [f"  {entry['source']}: {entry['reasons'][0]}" for entry in entries[:_MAX_LISTED]]
        if len(entries) > _MAX_LISTED:
            lines.append(f"  and {len(entries) - _MAX_LISTED} more")
    for warning in summary["warnings"]:
        times = f" ({warning['count']} sources)" if warning["count"] > 1 else ""
        lines.append(f"warning: {warning['message']}{times}")
    lines.append(f"the full report is {out}/{REPORT_NAME}")
    if summary["label_files"] and not any(summary["instructions"].values()):
        named = ", ".join(summary["label_files"])
        lines.append(f"NO EPISODE HAS AN INSTRUCTION, although this looks like labels: {named}")
    return lines


def _num_instructed(table: EpisodeTable) -> int:
    """Returns how many episodes of a table have an instruction."""
    groups = table.read(["language_instruction"])
    return sum(bool(text) for group in groups for text in group["language_instruction"].to_pylist())


def _group_warnings(outcomes: Sequence[SourceOutcome]) -> list[dict[str, Any]]:
    sources: dict[str, list[str]] = {}
    for outcome in outcomes:
        for message in dict.fromkeys(outcome.warnings):
            sources.setdefault(message, []).append(outcome.source)
    return [
        {"message": message, "count": len(names), "examples": names[:_MAX_EXAMPLES]}
        for message, names in sorted(sources.items())
    ]


class Progress:
    """Progress bar over the sources, with rate and time left; beside it episodes, and sources with problems."""

    def __init__(self, total: int, done: Iterable[SourceOutcome] = (), show: bool = True):
        """Draws the bar; the outcomes of an earlier run, `done`, do not count for the rate."""
        done = list(done)
        self._counts: Counter[str] = Counter()
        # A log file should not fill up with progress bars.
        pace = 0.1 if sys.stderr.isatty() else 30
        self._bar = tqdm(total=total, initial=len(done), disable=not show, unit="source", mininterval=pace)
        for outcome in done:
            self._count(outcome)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def add(self, outcome: SourceOutcome) -> None:
        """Counts one more source."""
        self._count(outcome)
        self._bar.update()

    def _count(self, outcome: SourceOutcome) -> None:
        self._counts["episodes"] += outcome.episodes
        self._counts["with problems"] += bool(outcome.problems)
        self._bar.set_postfix(self._counts, refresh=False)
