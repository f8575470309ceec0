"""Checks of actions and states."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from como_jax.doctor.findings import Finding, Severity, name_dimensions, name_some, share_of
from como_jax.doctor.survey import EpisodeSummary, Survey, VectorSummary

_FIELDS = ("action", "state")
# As in como_jax.data.normalization, where such dimensions become 0.
_NEGLIGIBLE = 1e-6
_FAR = 10.0
_ZERO = 1e-3
_MIN_EPISODES = 3
_MOST_EPISODES, _RARELY = 0.9, 0.5


def check_presence(survey: Survey) -> Iterator[Finding]:
    """Actions or states that are missing."""
    for field in _FIELDS:
        having = len(_summaries(survey, field))
        if not having and field == "action":
            yield Finding(
                Severity.INFO,
                "no-action",
                "No episode has actions.",
                "Motion models need none; evaluation does without the linear probe, and policies need labels first.",
            )
        elif 0 < having < len(survey.episodes):
            yield Finding(
                Severity.WARNING,
                f"partial-{field}",
                f"Only {share_of(having, len(survey.episodes), 'episode')} have {field}s.",
                "Convert the episodes with and without them as two datasets.",
            )


def check_sizes(survey: Survey) -> Iterator[Finding]:
    """Vectors of several sizes."""
    for field in _FIELDS:
        sizes = sorted({len(summary.low) for _, summary in _summaries(survey, field)})
        if len(sizes) > 1:
            yield Finding(
                Severity.ERROR,
                f"mixed-{field}-sizes",
                f"Episodes have {field}s of {', '.join(map(str, sizes))} numbers.",
                "Convert the episodes of each size as a dataset of their own.",
            )


def check_finite(survey: Survey) -> Iterator[Finding]:
    """NaN and infinity."""
    for field in _FIELDS:
        broken = [(episode, summary) for episode, summary in _summaries(survey, field) if summary.num_not_finite]
        if broken:
            steps = sum(summary.num_not_finite for _, summary in broken)
            share = share_of(len(broken), len(survey.episodes), "episode")
            yield Finding(
                Severity.ERROR,
                f"{field}-not-finite",
                f"{field.capitalize()}s are not finite in {share}, {steps} steps in all, such as "
                f"{name_some([episode.episode_id for episode, _ in broken])}.",
                "A conversion leaves these episodes out: mend them at the source if they matter.",
            )


def check_constant(survey: Survey) -> Iterator[Finding]:
    """Dimensions that never, or hardly ever, change."""
    for field in _FIELDS:
        bounds = value_bounds(survey, field)
        if bounds is None:
            continue
        low, high = bounds
        constant = _is_negligible(low, high)
        size, kind = len(low), Severity.WARNING if field == "action" else Severity.INFO
        if constant.any():
            yield Finding(
                Severity.ERROR if constant.all() and field == "action" else kind,
                f"constant-{field}",
                f"{int(constant.sum())} of {size} {field} dimensions are constant: "
                f"{name_dimensions(np.flatnonzero(constant).tolist())}.",
                f"Leave them out with --{field} when converting, if they are columns of their own; "
                "normalization makes them 0, and metrics over all dimensions flatter.",
            )
        q01, q99 = _quantiles(survey, field)
        peaked = _is_negligible(q01, q99) & ~constant
        if peaked.any():
            yield Finding(
                Severity.INFO,
                f"rare-{field}",
                f"{int(peaked.sum())} of {size} {field} dimensions have one value in nearly every step: "
                f"{name_dimensions(np.flatnonzero(peaked).tolist())}.",
                "Normalization by quantiles makes them 0; choose another one if they matter.",
            )


def check_zero_episodes(survey: Survey) -> Iterator[Finding]:
    """Episodes in which nothing is done."""
    summaries = _summaries(survey, "action")
    zero = [episode.episode_id for episode, summary in summaries if summary.is_zero]
    if zero:
        yield Finding(
            Severity.ERROR if len(zero) == len(summaries) else Severity.WARNING,
            "zero-actions",
            f"The actions of {share_of(len(zero), len(summaries), 'episode')} are 0 throughout, "
            f"such as {name_some(zero)}.",
            "They are probably missing: convert without actions, or leave these episodes out.",
        )


def check_first_action(survey: Survey) -> Iterator[Finding]:
    """First actions that are 0 in dimensions that hardly are at any other time."""
    first = [summary.first for _, summary in _summaries(survey, "action") if not summary.is_zero]
    rows, bounds = survey.action.rows, value_bounds(survey, "action")
    if len(first) < _MIN_EPISODES or rows is None or bounds is None or not len(rows):
        return
    first = [row for row in first if len(row) == rows.shape[1]]
    scale = np.quantile(np.abs(rows), 0.99, axis=0)
    varies = ~_is_negligible(*bounds) & (scale > 0)
    at_first = (np.abs(np.stack(first)) <= _ZERO * scale).mean(axis=0)
    ever = (np.abs(rows) <= _ZERO * scale).mean(axis=0)
    # The first steps are part of all steps.
    zero = varies & (at_first >= _MOST_EPISODES) & (ever <= _RARELY)
    if zero.any() and zero.sum() >= varies.sum() / 2:
        yield Finding(
            Severity.WARNING,
            "first-action-zero",
            f"The first action of nearly every episode is 0 in {int(zero.sum())} of {len(zero)} dimensions "
            f"({name_dimensions(np.flatnonzero(zero).tolist())}).",
            "Leave the first step out, and check that actions are not one step late.",
        )


def check_outliers(survey: Survey) -> Iterator[Finding]:
    """Values that lie far from the range of nearly all others."""
    for field in _FIELDS:
        bounds = value_bounds(survey, field)
        if bounds is None:
            continue
        q01, q99 = _quantiles(survey, field)
        width = np.where(_is_negligible(q01, q99), np.inf, q99 - q01)
        far = np.maximum(q01 - bounds[0], bounds[1] - q99) / width
        dimensions = np.flatnonzero(far > _FAR)
        if len(dimensions):
            worst = int(np.argmax(far))
            episodes = [
                episode.episode_id
                for episode, summary in _summaries(survey, field)
                if len(summary.low) == len(width)
                and (np.fmax(q01 - summary.low, summary.high - q99) > _FAR * width).any()
            ]
            yield Finding(
                Severity.WARNING if field == "action" else Severity.INFO,
                f"{field}-outliers",
                f"{field.capitalize()}s leave their usual range by more than {_FAR:g} times its width in "
                f"dimension{'s' if len(dimensions) > 1 else ''} {name_dimensions(dimensions.tolist())}, "
                f"the farthest in {worst} ({far[worst]:.0f} times), in {name_some(episodes)}.",
                "Normalize by quantiles rather than by extremes, and look whether these episodes are damaged.",
            )


def value_bounds(survey: Survey, field: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Smallest and largest finite value of every dimension that the sample has; None without finite values."""
    sample = getattr(survey, field).rows
    if sample is None or not len(sample):
        return None
    summaries = [summary for _, summary in _summaries(survey, field) if len(summary.low) == sample.shape[1]]
    low, high = (np.stack([getattr(summary, name) for summary in summaries]) for name in ("low", "high"))
    return np.fmin.reduce(low, axis=0), np.fmax.reduce(high, axis=0)


def _summaries(survey: Survey, field: str) -> list[tuple[EpisodeSummary, VectorSummary]]:
    return [(episode, getattr(episode, field)) for episode in survey.episodes if getattr(episode, field) is not None]


def _quantiles(survey: Survey, field: str) -> tuple[np.ndarray, np.ndarray]:
    q01, q99 = np.quantile(getattr(survey, field).rows, (0.01, 0.99), axis=0)
    return q01, q99


def _is_negligible(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (high - low) / 2 <= _NEGLIGIBLE * np.maximum(1.0, np.abs(low + high) / 2)
