"""The checks that every dataset goes through, whatever its format."""

from __future__ import annotations

from como_jax.doctor.checks import cameras, duplicates, episodes, language, motion, vectors
from como_jax.doctor.findings import Finding
from como_jax.doctor.survey import Survey

_CHECKS = (
    episodes.check_lengths,
    episodes.check_durations,
    episodes.check_rates,
    cameras.check_same_cameras,
    cameras.check_resolutions,
    cameras.check_black,
    cameras.check_frozen,
    motion.check_still_pairs,
    motion.check_cuts,
    vectors.check_presence,
    vectors.check_sizes,
    vectors.check_finite,
    vectors.check_constant,
    vectors.check_zero_episodes,
    vectors.check_first_action,
    vectors.check_outliers,
    language.check_coverage,
    language.check_spelling,
    duplicates.check_duplicates,
)


def run_checks(survey: Survey) -> list[Finding]:
    """What all checks find in a survey of at least one episode."""
    return [finding for check in _CHECKS for finding in check(survey)]
