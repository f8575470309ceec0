"""The diagnosis as text, as a page and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from como_jax.doctor import figures
from como_jax.doctor.checks.vectors import value_bounds
from como_jax.doctor.diagnosis import Diagnosis
from como_jax.doctor.findings import Severity, count_of
from como_jax.pages import figure_uri, image_uri, render_page

_TEMPLATE = epath.Path(__file__).with_name("report.html.jinja")
_WIDTH = 100


def summary_line(diagnosis: Diagnosis) -> str:
    """How many findings there are of each severity."""
    counts = [(diagnosis.count(severity), severity.value) for severity in reversed(Severity)]
    named = [count_of(count, name) for count, name in counts if count]
    return ", ".join(named) or "nothing found"


def to_text(diagnosis: Diagnosis) -> str:
    """A summary for a terminal."""
    lines = [diagnosis.name]
    margin = max(map(len, diagnosis.facts)) + 4
    for name, value in diagnosis.facts.items():
        lines += _wrap(f"  {name}".ljust(margin), value)
    if diagnosis.instructions:
        lines += ["", "most frequent instructions"]
        lines += [f"  {count:5}  {text}" for text, count in diagnosis.instructions]
    lines += ["", summary_line(diagnosis)]
    for finding in diagnosis.findings:
        lines += _wrap(f"  {finding.severity.value:<8} ", finding.message)
        lines += _wrap("           -> ", finding.advice)
    return "\n".join(lines)


def to_json(diagnosis: Diagnosis) -> str:
    """All facts and findings, for programs."""
    content: dict[str, Any] = {
        "dataset": diagnosis.name,
        "facts": dict(diagnosis.facts),
        "findings": [dataclasses.asdict(finding) for finding in diagnosis.findings],
        "instructions": [{"instruction": text, "episodes": count} for text, count in diagnosis.instructions],
        "thresholds": dataclasses.asdict(diagnosis.survey.thresholds),
        "episodes": [
            {
                "episode_id": episode.episode_id,
                "split": episode.split,
                "num_steps": episode.num_steps,
                "control_rate": episode.control_rate,
                "pairs": episode.num_pairs,
                "still_pairs": episode.still_pairs,
                "hard_cuts": episode.num_cuts,
            }
            for episode in diagnosis.survey.episodes
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_page(path: epath.PathLike, diagnosis: Diagnosis) -> None:
    """Writes one HTML file that refers to nothing outside it."""
    render_page(
        path,
        _TEMPLATE,
        diagnosis=diagnosis,
        summary=summary_line(diagnosis),
        charts=list(_charts(diagnosis)),
        strips=itertools.groupby(diagnosis.survey.strips, lambda strip: (strip.episode_id, strip.instruction)),
        image_uri=image_uri,
    )


def _charts(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """Title and data of every figure."""
    survey = diagnosis.survey
    yield "Lengths of episodes", figure_uri(figures.length_histogram([e.num_steps for e in survey.episodes]))
    motion = survey.motion.rows
    if motion is not None and len(motion):
        yield "Motion of steps", figure_uri(figures.motion_histogram(motion[:, 0], survey.thresholds))
    for field in ("action", "state"):
        bounds = value_bounds(survey, field)
        if bounds is not None:
            rows = np.asarray(getattr(survey, field).rows)
            yield f"Values of {field}s", figure_uri(figures.range_figure(rows, *bounds))


def _wrap(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
