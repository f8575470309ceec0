"""Writes a diagnosis as text, as an HTML page with figures, and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from como_jax.doctor.checks import value_bounds
from como_jax.doctor.diagnosis import Diagnosis
from como_jax.doctor.findings import Severity, count_of
from como_jax.doctor.survey import Thresholds
from como_jax.pages import figure_uri, image_uri, render_page

_TEMPLATE = epath.Path(__file__).with_name("report.html.jinja")
_WIDTH = 100
_BINS = 40
_LEAST_MOTION = 1e-5


def summary_line(diagnosis: Diagnosis) -> str:
    """Returns how many findings there are of each severity."""
    counts = [(diagnosis.count(severity), severity.value) for severity in reversed(Severity)]
    named = [count_of(count, name) for count, name in counts if count]
    return ", ".join(named) or "nothing found"


def to_text(diagnosis: Diagnosis) -> str:
    """Returns a summary for a terminal."""
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


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Returns all facts and findings as JSON can hold them, for programs."""
    return {
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


def write_page(path: epath.PathLike, diagnosis: Diagnosis) -> None:
    """Writes one HTML file that needs no other files."""
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
    """Yields title and data URI of every figure."""
    survey = diagnosis.survey
    yield "Lengths of episodes", figure_uri(_length_histogram([e.num_steps for e in survey.episodes]))
    motion = survey.motion.rows
    if motion is not None and len(motion):
        yield "Motion of steps", figure_uri(_motion_histogram(motion[:, 0], survey.thresholds))
    for field in ("action", "state"):
        bounds = value_bounds(survey, field)
        if bounds is not None:
            rows = np.asarray(getattr(survey, field).rows)
            yield f"Values of {field}s", figure_uri(_range_figure(rows, *bounds))


def _wrap(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _length_histogram(lengths: Sequence[int]) -> Figure:
    """Draws the lengths of episodes in steps."""
    figure = Figure(figsize=(5.6, 2.8), layout="constrained")
    axes = figure.subplots()
    low, high = min(lengths), max(lengths)
    # With bins of whole steps, every bar stands for the same number of possible lengths.
    width = max(1, -(-(high - low + 1) // _BINS))
    axes.hist(lengths, np.arange(low, high + width + 1, width) - 0.5, color="C0")
    axes.set(xlabel="steps", ylabel="episodes")
    axes.set_xlim(low - width - 0.5, high + width + 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure


def _motion_histogram(motion: np.ndarray, thresholds: Thresholds) -> Figure:
    """Draws the motion of single steps `[N]`, with the two thresholds."""
    figure = Figure(figsize=(5.6, 2.8), layout="constrained")
    axes = figure.subplots()
    high = max(float(motion.max()), thresholds.cut, 2 * _LEAST_MOTION) * 1.2
    bins = np.geomspace(min(_LEAST_MOTION, thresholds.still or _LEAST_MOTION), high, _BINS + 1)
    weights = np.full(len(motion), 1.0 / len(motion))
    axes.hist(np.clip(motion, bins[0], bins[-1]), bins, weights=weights, color="C0")
    axes.set_xscale("log")
    axes.axvline(thresholds.still, color="C1", linestyle="--", label=f"still below {thresholds.still:g}")
    axes.axvline(thresholds.cut, color="C3", linestyle="--", label=f"hard cut above {thresholds.cut:g}")
    axes.set(xlabel="mean absolute change of a step, in [0, 1]", ylabel="share of steps")
    axes.legend(fontsize="small")
    return figure


def _range_figure(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> Figure:
    """Draws the range of all values and that of the middle 98 % of every dimension; `rows` is `[N, size]`."""
    size = rows.shape[1]
    figure = Figure(figsize=(max(5.6, 0.18 * size + 1), 2.8), layout="constrained")
    axes = figure.subplots()
    q01, q99 = np.quantile(rows, (0.01, 0.99), axis=0)
    axes.vlines(np.arange(size), low, high, color="C0", linewidth=1, label="all values")
    axes.vlines(np.arange(size), q01, q99, color="C0", linewidth=5, label="1st to 99th percentile")
    axes.scatter(np.arange(size), rows.mean(axis=0), color="C3", s=8, zorder=3, label="mean")
    axes.set(xlabel="dimension", ylabel="value")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
