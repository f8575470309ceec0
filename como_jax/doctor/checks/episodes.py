"""Checks of lengths and rates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from como_jax.doctor.findings import Finding, Severity, name_some, share_of
from como_jax.doctor.survey import Survey

_LEAST_SECONDS = 1.5


def check_lengths(survey: Survey) -> Iterator[Finding]:
    """Episodes without a single pair of frames."""
    short = [episode for episode in survey.episodes if not episode.num_pairs]
    if short:
        gap = survey.thresholds.gap_seconds
        share = share_of(len(short), len(survey.episodes), "episode")
        yield Finding(
            Severity.ERROR if len(short) == len(survey.episodes) else Severity.WARNING,
            "too-short",
            f"Two frames {gap:g} s apart do not fit into {share}, such as {name_some(_ids(short))}.",
            "They are passed over in training: lower --config.data.gap_seconds, or check the control rate.",
        )


def check_durations(survey: Survey) -> Iterator[Finding]:
    """Instructed episodes that are over before anything could be done."""
    seconds = [
        episode.num_steps / episode.control_rate
        for episode in survey.episodes
        if episode.control_rate and episode.instruction
    ]
    if seconds and np.median(seconds) < _LEAST_SECONDS:
        yield Finding(
            Severity.WARNING,
            "too-fast",
            f"Half of the episodes with an instruction last less than {np.median(seconds):.1f} s, "
            "which is too short for a task.",
            "The control rate is probably too high: pass the robot's with --control_rate when converting.",
        )


def check_rates(survey: Survey) -> Iterator[Finding]:
    """Rates that are unknown or differ."""
    rates = sorted({episode.control_rate for episode in survey.episodes if episode.control_rate})
    if any(episode.control_rate is None for episode in survey.episodes):
        yield Finding(
            Severity.INFO,
            "unknown-rate",
            "The dataset does not record its control rate, so that pairs were measured between neighbouring steps.",
            "Find out how many steps a second has and pass --control_rate, here and when converting.",
        )
    if len(rates) > 1:
        yield Finding(
            Severity.INFO,
            "mixed-rates",
            f"Episodes have {len(rates)} control rates, from {rates[0]:g} to {rates[-1]:g} Hz.",
            "Gaps are given in seconds and fit all of them; actions of one step do not mean the same at every rate.",
        )


def _ids(episodes: list) -> list[str]:
    return [episode.episode_id for episode in episodes]
