"""Checks of how much the pictures change."""

from __future__ import annotations

from collections.abc import Iterator

from como_jax.doctor.findings import Finding, Severity, name_some, share_of
from como_jax.doctor.survey import Survey

_WORTH_SAYING, _MUCH = 0.05, 0.3


def check_still_pairs(survey: Survey) -> Iterator[Finding]:
    """Pairs of frames between which hardly anything moves."""
    total = sum(episode.num_pairs for episode in survey.episodes)
    still = sum(episode.still_pairs for episode in survey.episodes)
    share = still / total if total else 0.0
    if share > _WORTH_SAYING:
        limit = survey.thresholds.still
        yield Finding(
            Severity.WARNING if share > _MUCH else Severity.INFO,
            "still-pairs",
            f"{share:.0%} of the pairs of frames are still: they change by less than {limit:g} a step.",
            f"Leave them out of training with --config.data.min_motion={limit:g}, or choose by the histogram.",
        )


def check_cuts(survey: Survey) -> Iterator[Finding]:
    """Steps at which the whole picture changes."""
    cut = [episode for episode in survey.episodes if episode.num_cuts]
    if cut:
        cuts, limit = sum(episode.num_cuts for episode in cut), survey.thresholds.cut
        pairs = sum(episode.cut_pairs for episode in cut) / max(1, sum(e.num_pairs for e in survey.episodes))
        share = share_of(len(cut), len(survey.episodes), "episode")
        yield Finding(
            Severity.WARNING,
            "hard-cuts",
            f"The picture changes by more than {limit:g} in one step in {share}, {cuts} times in all, such as "
            f"{name_some([episode.episode_id for episode in cut])}; {pairs:.1%} of the pairs span such a cut.",
            f"Leave these pairs out of training with --config.data.max_motion={limit:g}, "
            "or a larger value if fast motion is meant.",
        )
