"""The checks that every dataset goes through, whatever its format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from como_jax.doctor.findings import Finding, Severity, error, info, name_dimensions, name_some, share_of, warning
from como_jax.doctor.survey import CameraSummary, EpisodeSummary, Survey, VectorSummary

BLACK = 8
"""An image without a larger value is black; compression leaves some noise."""

_FIELDS = ("action", "state")
# Instructed episodes that are shorter are over before anything could be done.
_LEAST_SECONDS = 1.5
_UNIFORM_CONTRAST = 1.0
_FROZEN_CHANGE = 0.02
# Shares of still pairs that are worth saying, and that are a warning.
_WORTH_SAYING, _MUCH = 0.05, 0.3
# As in como_jax.spec.normalization, where such dimensions become 0.
_NEGLIGIBLE = 1e-6
_FAR = 10.0
_ZERO = 1e-3
_MIN_EPISODES = 3
_MOST_EPISODES, _RARELY = 0.9, 0.5
# Shares of the bits of a signature, and of the motion, that may differ between two encodings of one recording. Encoding
# videos anew, smaller or at poor quality, changed up to 0.037 and 0.18; other episodes of one scene differed by 0.1 or
# more of the bits.
_MAX_BITS = 0.05
_MAX_MOTION = 0.2
_MAX_LENGTH = 0.02
_BLOCK = 512


def run_checks(survey: Survey) -> list[Finding]:
    """Returns what all checks find in a survey of at least one episode."""
    return [finding for check in _CHECKS for finding in check(survey)]


def check_lengths(survey: Survey) -> Iterator[Finding]:
    """Finds episodes without a single pair of frames."""
    short = [episode.episode_id for episode in survey.episodes if not episode.num_pairs]
    if short:
        share = share_of(len(short), len(survey.episodes), "episode")
        yield (error if len(short) == len(survey.episodes) else warning)(
            "too-short",
            f"Two frames {survey.thresholds.gap_seconds:g} s apart do not fit into {share}, such as "
            f"{name_some(short)}.",
            "They are not used in training: lower --config.data.gap_seconds, or check the control rate.",
        )


def check_durations(survey: Survey) -> Iterator[Finding]:
    """Finds out whether episodes with an instruction are over before anything could be done."""
    seconds = [
        episode.num_steps / episode.control_rate
        for episode in survey.episodes
        if episode.control_rate and episode.instruction
    ]
    if seconds and np.median(seconds) < _LEAST_SECONDS:
        yield warning(
            "too-fast",
            f"Half of the episodes with an instruction last less than {np.median(seconds):.1f} s, "
            "which is too short for a task.",
            "The control rate is probably too high: pass that of the robot with `control_rate` when converting.",
        )


def check_rates(survey: Survey) -> Iterator[Finding]:
    """Finds control rates that are unknown or differ."""
    rates = sorted({episode.control_rate for episode in survey.episodes if episode.control_rate})
    if any(episode.control_rate is None for episode in survey.episodes):
        yield info(
            "unknown-rate",
            "The dataset does not record its control rate, so pairs were measured between neighbouring steps.",
            "Find out how many steps a second has and pass `control_rate`, here and when converting.",
        )
    if len(rates) > 1:
        yield info(
            "mixed-rates",
            f"Episodes have {len(rates)} control rates, from {rates[0]:g} to {rates[-1]:g} Hz.",
            "Gaps are given in seconds and fit all of them; actions of one step do not mean the same at every rate.",
        )


def check_same_cameras(survey: Survey) -> Iterator[Finding]:
    """Finds cameras that only some episodes have."""
    for camera, summaries in _cameras(survey).items():
        if len(summaries) < len(survey.episodes):
            yield warning(
                "missing-camera",
                f"Camera {camera!r} is only in {share_of(len(summaries), len(survey.episodes), 'episode')}.",
                "Convert the dataset without this camera, or without these episodes.",
            )


def check_resolutions(survey: Survey) -> Iterator[Finding]:
    """Finds cameras whose images differ in size."""
    for camera, summaries in _cameras(survey).items():
        sizes = sorted({(summary.resolution[1], summary.resolution[0]) for summary in summaries})
        if len(sizes) > 1:
            shapes = len({round(width / height, 2) for width, height in sizes})
            yield info(
                "mixed-resolutions",
                f"Images of camera {camera!r} have {len(sizes)} sizes, from {sizes[0][0]}x{sizes[0][1]} to "
                f"{sizes[-1][0]}x{sizes[-1][1]}, and {shapes} aspect ratio{'s' if shapes > 1 else ''}.",
                "Training scales all to one square; --config.data.fit chooses between cropping and padding.",
            )


def check_dull_cameras(survey: Survey) -> Iterator[Finding]:
    """Finds cameras that show black, one colour, or the same image all the time."""

    def is_black(camera: CameraSummary) -> bool:
        return camera.brightest < BLACK

    def is_uniform(camera: CameraSummary) -> bool:
        return camera.contrast < _UNIFORM_CONTRAST and not is_black(camera)

    def is_frozen(camera: CameraSummary) -> bool:
        return camera.change < _FROZEN_CHANGE and camera.contrast >= _UNIFORM_CONTRAST and not is_black(camera)

    yield from _check_each(survey, "black-camera", "is black", is_black)
    yield from _check_each(survey, "uniform-camera", "shows one colour only", is_uniform)
    yield from _check_each(survey, "frozen-camera", "shows the same image from beginning to end", is_frozen)


def _check_each(survey: Survey, name: str, what: str, is_faulty: Callable[[CameraSummary], bool]) -> Iterator[Finding]:
    for position, (camera, summaries) in enumerate(_cameras(survey).items()):
        faulty = sum(map(is_faulty, summaries))
        if faulty:
            everywhere = faulty == len(summaries)
            yield (error if everywhere and position == 0 else warning)(
                name,
                f"Camera {camera!r} {what} in {share_of(faulty, len(summaries), 'episode')}.",
                "Leave this camera out with the setting `camera` when converting."
                if everywhere
                else "Look at the sample strips; leave this camera, or these episodes, out when converting.",
            )


def _cameras(survey: Survey) -> dict[str, list[CameraSummary]]:
    """Returns the summaries of every camera, the main camera first."""
    found: dict[str, list[CameraSummary]] = {}
    for episode in survey.episodes:
        for camera, summary in episode.cameras.items():
            found.setdefault(camera, []).append(summary)
    return found


def check_still_pairs(survey: Survey) -> Iterator[Finding]:
    """Finds out how many pairs of frames have hardly any motion between them."""
    total = sum(episode.num_pairs for episode in survey.episodes)
    still = sum(episode.still_pairs for episode in survey.episodes)
    share = still / total if total else 0.0
    if share > _WORTH_SAYING:
        limit = survey.thresholds.still
        yield (warning if share > _MUCH else info)(
            "still-pairs",
            f"{share:.0%} of the pairs of frames are still: they change by less than {limit:g} a step.",
            f"Leave them out of training with --config.data.min_motion={limit:g}, or choose by the histogram.",
        )


def check_cuts(survey: Survey) -> Iterator[Finding]:
    """Finds steps at which the whole image changes."""
    cut = [episode for episode in survey.episodes if episode.num_cuts]
    if cut:
        cuts, limit = sum(episode.num_cuts for episode in cut), survey.thresholds.cut
        pairs = sum(episode.cut_pairs for episode in cut) / max(1, sum(e.num_pairs for e in survey.episodes))
        share = share_of(len(cut), len(survey.episodes), "episode")
        yield warning(
            "hard-cuts",
            f"The image changes by more than {limit:g} in one step in {share}, {cuts} times in all, such as "
            f"{name_some([episode.episode_id for episode in cut])}; {pairs:.1%} of the pairs span such a cut.",
            f"Leave these pairs out of training with --config.data.max_motion={limit:g}, "
            "or a larger value if fast motion is meant.",
        )


def check_presence(survey: Survey) -> Iterator[Finding]:
    """Finds actions or states that are missing."""
    for field in _FIELDS:
        having = len(_summaries(survey, field))
        if not having and field == "action":
            yield info(
                "no-action",
                "No episode has actions.",
                "Motion models need none; evaluation does without the linear probe, and policies need labels first.",
            )
        elif 0 < having < len(survey.episodes):
            yield warning(
                f"partial-{field}",
                f"Only {share_of(having, len(survey.episodes), 'episode')} have {field}s.",
                "Convert the episodes with and without them as two datasets.",
            )


def check_sizes(survey: Survey) -> Iterator[Finding]:
    """Finds vectors of several sizes."""
    for field in _FIELDS:
        sizes = sorted({len(summary.low) for _, summary in _summaries(survey, field)})
        if len(sizes) > 1:
            yield error(
                f"mixed-{field}-sizes",
                f"Episodes have {field}s of {', '.join(map(str, sizes))} numbers.",
                "Convert the episodes of each size as a dataset of their own.",
            )


def check_finite(survey: Survey) -> Iterator[Finding]:
    """Finds NaN and infinity."""
    for field in _FIELDS:
        broken = [(episode, summary) for episode, summary in _summaries(survey, field) if summary.num_not_finite]
        if broken:
            steps = sum(summary.num_not_finite for _, summary in broken)
            share = share_of(len(broken), len(survey.episodes), "episode")
            yield error(
                f"{field}-not-finite",
                f"{field.capitalize()}s are not finite in {share}, {steps} steps in all, such as "
                f"{name_some([episode.episode_id for episode, _ in broken])}.",
                "A conversion leaves these episodes out: mend them at the source if they matter.",
            )


def check_constant(survey: Survey) -> Iterator[Finding]:
    """Finds dimensions that never change, or hardly ever."""
    for field in _FIELDS:
        bounds = value_bounds(survey, field)
        if bounds is None:
            continue
        constant = _is_negligible(*bounds)
        if constant.any():
            severity = Severity.WARNING if field == "action" else Severity.INFO
            yield Finding(
                Severity.ERROR if constant.all() and field == "action" else severity,
                f"constant-{field}",
                f"{int(constant.sum())} of {len(constant)} {field} dimensions are constant: "
                f"{name_dimensions(np.flatnonzero(constant).tolist())}.",
                f"Leave them out with the setting `{field}` when converting, if they are columns of their own; "
                "normalization makes them 0, and they make metrics over all dimensions look better than they are.",
            )
        peaked = _is_negligible(*_quantiles(survey, field)) & ~constant
        if peaked.any():
            yield info(
                f"rare-{field}",
                f"{int(peaked.sum())} of {len(peaked)} {field} dimensions have one value in nearly every step: "
                f"{name_dimensions(np.flatnonzero(peaked).tolist())}.",
                "Normalization by quantiles makes them 0; choose another one if they matter.",
            )


def check_zero_episodes(survey: Survey) -> Iterator[Finding]:
    """Finds episodes in which all actions are 0."""
    summaries = _summaries(survey, "action")
    zero = [episode.episode_id for episode, summary in summaries if summary.is_zero]
    if zero:
        yield (error if len(zero) == len(summaries) else warning)(
            "zero-actions",
            f"The actions of {share_of(len(zero), len(summaries), 'episode')} are 0 throughout, "
            f"such as {name_some(zero)}.",
            "They are probably missing: convert without actions, or leave these episodes out.",
        )


def check_first_action(survey: Survey) -> Iterator[Finding]:
    """Finds dimensions that are 0 in nearly every first action, but rarely at any other time."""
    first = [summary.first for _, summary in _summaries(survey, "action") if not summary.is_zero]
    rows, bounds = survey.action.rows, value_bounds(survey, "action")
    if len(first) < _MIN_EPISODES or rows is None or bounds is None or not len(rows):
        return
    first = [row for row in first if len(row) == rows.shape[1]]
    scale = np.quantile(np.abs(rows), 0.99, axis=0)
    varies = ~_is_negligible(*bounds) & (scale > 0)
    at_first = (np.abs(np.stack(first)) <= _ZERO * scale).mean(axis=0)
    # Over all steps, of which the first ones are a part.
    ever = (np.abs(rows) <= _ZERO * scale).mean(axis=0)
    zero = varies & (at_first >= _MOST_EPISODES) & (ever <= _RARELY)
    if zero.any() and zero.sum() >= varies.sum() / 2:
        yield warning(
            "first-action-zero",
            f"The first action of nearly every episode is 0 in {int(zero.sum())} of {len(zero)} dimensions "
            f"({name_dimensions(np.flatnonzero(zero).tolist())}).",
            "Leave the first step out, and check that actions are not one step late.",
        )


def check_outliers(survey: Survey) -> Iterator[Finding]:
    """Finds values that lie far outside the range of nearly all others."""
    for field in _FIELDS:
        bounds = value_bounds(survey, field)
        if bounds is None:
            continue
        q01, q99 = _quantiles(survey, field)
        width = np.where(_is_negligible(q01, q99), np.inf, q99 - q01)
        far = np.maximum(q01 - bounds[0], bounds[1] - q99) / width
        dimensions = np.flatnonzero(far > _FAR).tolist()
        if dimensions:
            worst = int(np.argmax(far))
            episodes = [
                episode.episode_id
                for episode, summary in _summaries(survey, field)
                if len(summary.low) == len(width)
                and (np.fmax(q01 - summary.low, summary.high - q99) > _FAR * width).any()
            ]
            yield (warning if field == "action" else info)(
                f"{field}-outliers",
                f"{field.capitalize()}s leave their usual range by more than {_FAR:g} times its width in "
                f"dimension{'s' if len(dimensions) > 1 else ''} {name_dimensions(dimensions)}, "
                f"the farthest in {worst} ({far[worst]:.0f} times), in {name_some(episodes)}.",
                "Normalize by quantiles rather than by extremes, and check whether these episodes are damaged.",
            )


def value_bounds(survey: Survey, field: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns smallest and largest finite values `[size]` of actions or states; None without finite values."""
    sample = getattr(survey, field).rows
    if sample is None or not len(sample):
        return None
    summaries = [summary for _, summary in _summaries(survey, field) if len(summary.low) == sample.shape[1]]
    low, high = (np.stack([getattr(summary, name) for summary in summaries]) for name in ("low", "high"))
    return np.fmin.reduce(low, axis=0), np.fmax.reduce(high, axis=0)


def _summaries(survey: Survey, field: str) -> list[tuple[EpisodeSummary, VectorSummary]]:
    return [(episode, getattr(episode, field)) for episode in survey.episodes if getattr(episode, field) is not None]


def _quantiles(survey: Survey, field: str) -> np.ndarray:
    return np.quantile(getattr(survey, field).rows, (0.01, 0.99), axis=0)


def _is_negligible(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (high - low) / 2 <= _NEGLIGIBLE * np.maximum(1.0, np.abs(low + high) / 2)


def check_language(survey: Survey) -> Iterator[Finding]:
    """Finds episodes without an instruction, and instructions that are all the same."""
    texts = [episode.instruction for episode in survey.episodes]
    given = [text for text in texts if text]
    if not given:
        yield info(
            "no-language",
            "No episode has a language instruction.",
            "Motion models need none; policies that follow instructions do.",
        )
    elif len(given) < len(texts):
        yield warning(
            "partial-language",
            f"Only {share_of(len(given), len(texts), 'episode')} have a language instruction.",
            "A policy that follows instructions learns from the others without one: add them or leave those out.",
        )
    if len(given) > 1 and len(set(given)) == 1:
        yield info(
            "one-instruction",
            f"All {len(given)} instructions are the same: {given[0]!r}.",
            "A policy cannot learn from this dataset alone to follow instructions.",
        )


def check_spelling(survey: Survey) -> Iterator[Finding]:
    """Finds instructions that differ only in case and punctuation."""
    spellings: dict[str, set[str]] = {}
    for text in {episode.instruction for episode in survey.episodes if episode.instruction}:
        spellings.setdefault(" ".join(re.findall(r"\w+", text.lower())), set()).add(text)
    several = sorted(sorted(texts) for texts in spellings.values() if len(texts) > 1)
    if several:
        yield info(
            "spellings",
            f"{len(several)} instruction{'s' if len(several) > 1 else ''} occur in several spellings, such as "
            f"{several[0][0]!r} and {several[0][1]!r}.",
            "Count tasks without regard to case and punctuation.",
        )


def check_duplicates(survey: Survey) -> Iterator[Finding]:
    """Finds episodes that are equal, and episodes that look like one recording stored twice."""
    episodes = survey.episodes
    near = [(a, b) for a, b in near_pairs(episodes) if episodes[a].digest != episodes[b].digest]
    for name, kind, pairs in (
        ("duplicates", "equal to", equal_pairs(episodes)),
        ("near-duplicates", "nearly equal to", near),
    ):
        if pairs:
            named = [f"{episodes[a].episode_id} = {episodes[b].episode_id}" for a, b in pairs]
            leaking = sum(episodes[a].split != episodes[b].split for a, b in pairs)
            leak = f"; {leaking} of them lie in different splits" if leaking else ""
            count = len({b for _, b in pairs})
            yield warning(
                name,
                f"{count} episode{'s are' if count > 1 else ' is'} {kind} another one: {name_some(named)}{leak}.",
                "Remove the copies from the source"
                + (
                    ", since validation must not show what was trained on." if leaking else " if they are not intended."
                ),
            )


def equal_pairs(episodes: list[EpisodeSummary]) -> list[tuple[int, int]]:
    """Returns every episode that equals an earlier one, as a pair with the first one that it equals."""
    first: dict[bytes, int] = {}
    pairs = []
    for index, episode in enumerate(episodes):
        earlier = first.setdefault(episode.digest, index)
        if earlier != index:
            pairs.append((earlier, index))
    return pairs


def near_pairs(episodes: list[EpisodeSummary]) -> list[tuple[int, int]]:
    """Returns pairs of about the same length, with the same images and the same course of motion.

    Episodes whose images show nothing are left out, since they all look alike.
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
        # The episodes are sorted by length, so all candidates follow here.
        end = int(np.searchsorted(lengths, lengths[rows][-1] * (1 + _MAX_LENGTH), side="right"))
        bits = _distances(signatures[rows], signatures[begin:end])
        close = np.triu(bits <= limit, 1) & (lengths[begin:end] <= lengths[rows, None] * (1 + _MAX_LENGTH))
        for a, b in np.argwhere(close):
            pair = order[begin + a], order[begin + b]
            if _same_motion(*(episodes[index] for index in pair)):
                pairs.append((min(pair), max(pair)))
    return sorted(pairs)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Counts the bits that differ between every two signatures, `[A, B]`; word by word, which needs little memory."""
    total = np.zeros((len(a), len(b)), np.int32)
    for word in range(a.shape[1]):
        total += np.bitwise_count(a[:, word, None] ^ b[None, :, word])
    return total


def _same_motion(a: EpisodeSummary, b: EpisodeSummary) -> bool:
    """Whether the sums of motion up to any moment differ by a small share of all the motion."""
    total = max(float(a.profile[-1]), float(b.profile[-1]))
    return float(np.abs(a.profile - b.profile).max()) <= _MAX_MOTION * total


_CHECKS = (
    check_lengths,
    check_durations,
    check_rates,
    check_same_cameras,
    check_resolutions,
    check_dull_cameras,
    check_still_pairs,
    check_cuts,
    check_presence,
    check_sizes,
    check_finite,
    check_constant,
    check_zero_episodes,
    check_first_action,
    check_outliers,
    check_language,
    check_spelling,
    check_duplicates,
)
