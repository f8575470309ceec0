"""Checks of language instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from como_jax.doctor.findings import Finding, Severity, share_of
from como_jax.doctor.survey import Survey


def check_coverage(survey: Survey) -> Iterator[Finding]:
    """Episodes without an instruction, and instructions that tell nothing apart."""
    texts = [episode.instruction for episode in survey.episodes]
    covered = sum(map(bool, texts))
    if not covered:
        yield Finding(
            Severity.INFO,
            "no-language",
            "No episode has a language instruction.",
            "Motion models need none; policies that follow instructions do.",
        )
    elif covered < len(texts):
        yield Finding(
            Severity.WARNING,
            "partial-language",
            f"Only {share_of(covered, len(texts), 'episode')} have a language instruction.",
            "A policy that follows instructions learns from the others without one: add them or leave those out.",
        )
    if covered > 1 and len(set(filter(None, texts))) == 1:
        yield Finding(
            Severity.INFO,
            "one-instruction",
            f"All {covered} instructions are the same: {next(filter(None, texts))!r}.",
            "A policy cannot learn from this dataset alone to follow instructions.",
        )


def check_spelling(survey: Survey) -> Iterator[Finding]:
    """Instructions that differ in nothing that is heard."""
    spellings: dict[str, set[str]] = {}
    for text in {episode.instruction for episode in survey.episodes if episode.instruction}:
        spellings.setdefault(" ".join(re.findall(r"\w+", text.lower())), set()).add(text)
    several = sorted(sorted(texts) for texts in spellings.values() if len(texts) > 1)
    if several:
        yield Finding(
            Severity.INFO,
            "spellings",
            f"{len(several)} instruction{'s' if len(several) > 1 else ''} occur in several spellings, such as "
            f"{several[0][0]!r} and {several[0][1]!r}.",
            "Count tasks without regard to case and punctuation.",
        )
