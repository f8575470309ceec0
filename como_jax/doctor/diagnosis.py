"""Examines a dataset: reads its episodes, runs the checks, and collects facts."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from tqdm import tqdm

from como_jax.doctor.checks import run_checks
from como_jax.doctor.findings import Finding, Problem, Severity, count_of, error, name_some
from como_jax.doctor.sources.base import DatasetView
from como_jax.doctor.survey import PROBES, Survey, Thresholds
from como_jax.errors import DatasetError

_MAX_INSTRUCTIONS = 10
_ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything that the doctor says about a dataset.

    Attributes:
      name: name of the dataset.
      facts: text of every fact, by its name.
      findings: the worst ones first.
      instructions: the most frequent ones, with their numbers of episodes.
      survey: what the figures are drawn from.
    """

    name: str
    facts: Mapping[str, str]
    findings: list[Finding]
    instructions: list[tuple[str, int]]
    survey: Survey

    def count(self, severity: Severity) -> int:
        """Returns the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


def examine(view: DatasetView, limit: int, thresholds: Thresholds, *, show_progress: bool = False) -> Diagnosis:
    """Examines a dataset.

    Args:
      view: the dataset; it can be used only once.
      limit: about how many episodes to look at, evenly spread; 0 for all.
      thresholds: what counts as still, as a cut and as too short.
      show_progress: draw a progress bar on stderr if that is a terminal.

    Raises:
      DatasetError: no episode can be read.
    """
    survey, problems = Survey(thresholds), []
    # A log file should not fill up with progress bars.
    disable = None if show_progress else True
    for item in tqdm(view.recordings(limit), unit="episode", disable=disable):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            survey.add(item)
    if not survey.episodes:
        reasons = [f"{problem.source}: {problem.reason}" for problem in problems]
        raise DatasetError(f"{view.directory} has no episode that can be read; {name_some(reasons) or 'it is empty'}")
    findings = [*_check_problems(problems), *view.findings(), *run_checks(survey)]
    counts = Counter(episode.instruction for episode in survey.episodes if episode.instruction)
    return Diagnosis(
        name=view.name,
        facts=_facts(view, survey, len(counts)),
        findings=sorted(findings, key=lambda finding: _ORDER.index(finding.severity)),
        instructions=sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_INSTRUCTIONS],
        survey=survey,
    )


def _check_problems(problems: list[Problem]) -> Iterable[Finding]:
    if problems:
        named = name_some([f"{problem.source} ({problem.reason.rstrip('.')})" for problem in problems])
        yield error(
            "unreadable",
            f"{count_of(len(problems), 'part')} of the dataset cannot be read: {named}.",
            "A conversion leaves them out; fetch these files again if they matter.",
        )


def _facts(view: DatasetView, survey: Survey, num_instructions: int) -> dict[str, str]:
    episodes, thresholds = survey.episodes, survey.thresholds
    lengths = [episode.num_steps for episode in episodes]
    covered = sum(bool(episode.instruction) for episode in episodes)
    return {
        "Kind": f"{view.kind} in {view.directory}",
        "Looked at": f"{count_of(len(episodes), 'episode')}, out of {count_of(view.total, view.unit)}: "
        f"{sum(lengths)} steps, {PROBES} images of each camera",
        **view.facts(),
        "Length": f"{min(lengths)} to {max(lengths)} steps, median {statistics.median(lengths):g}",
        **_seconds(survey),
        "Cameras": "; ".join(_describe_cameras(survey)),
        "Language": f"{covered / len(episodes):.0%} of episodes, {count_of(num_instructions, 'distinct instruction')}",
        "Actions": _describe_vectors(survey, "action"),
        "States": _describe_vectors(survey, "state"),
        "Motion of a step": _describe_motion(survey),
        "Still pairs": f"{_share(survey, 'still_pairs')}; mean motion a step below {thresholds.still:g} (`still`)",
        "Pairs with a hard cut": f"{_share(survey, 'cut_pairs')}; motion of a step above {thresholds.cut:g} (`cut`)",
        "Pair": f"two frames {thresholds.gap_seconds:g} s apart (`gap_seconds`), or neighbours if the rate is unknown",
    }


def _seconds(survey: Survey) -> dict[str, str]:
    timed = [episode for episode in survey.episodes if episode.control_rate]
    if not timed:
        return {"Control rate": "unknown"}
    seconds = [episode.num_steps / episode.control_rate for episode in timed if episode.control_rate]
    rates = Counter(episode.control_rate for episode in timed)
    named = [
        f"{rate:g} Hz" + (f" ({count_of(count, 'episode')})" if len(rates) > 1 else "")
        for rate, count in rates.most_common()
    ]
    return {
        "Control rate": name_some(named),
        "Duration": f"{min(seconds):.1f} to {max(seconds):.1f} s, median {statistics.median(seconds):.1f} s, "
        f"{sum(seconds) / 3600:.2f} h in all",
    }


def _describe_cameras(survey: Survey) -> list[str]:
    sizes: dict[str, Counter[tuple[int, int]]] = {}
    for episode in survey.episodes:
        for camera, summary in episode.cameras.items():
            sizes.setdefault(camera, Counter())[summary.resolution] += 1
    return [
        f"{camera} {name_some([f'{width}x{height}' for (height, width), _ in counts.most_common()])}"
        for camera, counts in sizes.items()
    ]


def _describe_vectors(survey: Survey, field: str) -> str:
    sizes = sorted({len(vectors.low) for e in survey.episodes if (vectors := getattr(e, field)) is not None})
    return f"{' or '.join(map(str, sizes))} dimensions" if sizes else "none"


def _describe_motion(survey: Survey) -> str:
    rows = survey.motion.rows
    if rows is None or not len(rows):
        return "unknown"
    low, middle, high = np.quantile(rows, (0.01, 0.5, 0.99))
    return f"median {middle:.4f}; 1 % below {low:.5f}, 1 % above {high:.4f}"


def _share(survey: Survey, field: str) -> str:
    total = sum(episode.num_pairs for episode in survey.episodes)
    part = sum(getattr(episode, field) for episode in survey.episodes)
    return f"{part / total:.1%} of {total}" if total else "there are no pairs"
