"""Checks for episodes that occur more than once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from como_jax.doctor.findings import Finding, Severity, name_some
from como_jax.doctor.survey import EpisodeSummary, Survey

# Of the bits of a signature, and of the motion, that may differ between two encodings of one recording. Encoding
# videos anew, smaller or at poor quality, changed up to 0.037 and 0.18; other episodes of one scene differed by 0.1 or
# more of the bits.
_MAX_BITS = 0.05
_MAX_MOTION = 0.2
_MAX_LENGTH = 0.02
_BLOCK = 512


def check_duplicates(survey: Survey) -> Iterator[Finding]:
    """Episodes that are equal, and such as look like one recording stored twice."""
    equal = equal_pairs(survey.episodes)
    near = [(a, b) for a, b in near_pairs(survey.episodes) if survey.episodes[a].digest != survey.episodes[b].digest]
    for name, kind, pairs in (("duplicates", "equal to", equal), ("near-duplicates", "nearly equal to", near)):
        if pairs:
            named = [f"{survey.episodes[a].episode_id} = {survey.episodes[b].episode_id}" for a, b in pairs]
            leaking = sum(survey.episodes[a].split != survey.episodes[b].split for a, b in pairs)
            leak = f"; {leaking} of them lie in different splits" if leaking else ""
            count = len({b for _, b in pairs})
            yield Finding(
                Severity.WARNING,
                name,
                f"{count} episode{'s are' if count > 1 else ' is'} {kind} another one: {name_some(named)}{leak}.",
                "Remove the copies from the source"
                + (", since validation must not show what was trained on." if leaking else " if they are not meant."),
            )


def equal_pairs(episodes: list[EpisodeSummary]) -> list[tuple[int, int]]:
    """Every episode that equals an earlier one, behind the first that it equals."""
    first: dict[bytes, int] = {}
    pairs = []
    for index, episode in enumerate(episodes):
        earlier = first.setdefault(episode.digest, index)
        if earlier != index:
            pairs.append((earlier, index))
    return pairs


def near_pairs(episodes: list[EpisodeSummary]) -> list[tuple[int, int]]:
    """Pairs of about the same length, the same pictures and the same course of motion.

    Episodes without anything to see are passed over, since they all look alike.
    """
    order = sorted(
        (index for index, episode in enumerate(episodes) if episode.signature.any()),
        key=lambda index: episodes[index].num_steps,
    )
    if len(order) < 2:
        return []
    lengths = np.array([episodes[index].num_steps for index in order])
    signatures = np.stack([episodes[index].signature for index in order])
    limit = _MAX_BITS * signatures.shape[1] * 64
    pairs = []
    for begin in range(0, len(order), _BLOCK):
        rows = slice(begin, min(begin + _BLOCK, len(order)))
        # Sorted by length, so that candidates follow each other.
        end = int(np.searchsorted(lengths, lengths[rows][-1] * (1 + _MAX_LENGTH), side="right"))
        bits = _distances(signatures[rows], signatures[begin:end])
        close = np.triu(bits <= limit, 1) & (lengths[begin:end] <= lengths[rows, None] * (1 + _MAX_LENGTH))
        for a, b in np.argwhere(close):
            pair = order[begin + a], order[begin + b]
            if _same_motion(*(episodes[index] for index in pair)):
                pairs.append((min(pair), max(pair)))
    return sorted(pairs)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits that differ between every two signatures, `[A, B]`; word by word, to need little memory."""
    total = np.zeros((len(a), len(b)), np.int32)
    for word in range(a.shape[1]):
        total += np.bitwise_count(a[:, word, None] ^ b[None, :, word])
    return total


def _same_motion(a: EpisodeSummary, b: EpisodeSummary) -> bool:
    """Whether the motion up to any moment differs by little of all the motion."""
    total = max(float(a.profile[-1]), float(b.profile[-1]))
    return float(np.abs(a.profile - b.profile).max()) <= _MAX_MOTION * total
