"""Which clips are offered, and which offset frames are drawn."""

import types
from collections.abc import Sequence

import numpy as np
import pytest

from como_jax.data.clips import ClipConfig, draw_offsets, gap_steps, index_clips, num_pairs, pair_spans
from como_jax.errors import ConfigError, DatasetError


def make_source(
    lengths: list[int], rates: list[float] | float = 5.0, motion: np.ndarray | None = None
) -> types.SimpleNamespace:
    """What `index_clips` reads of an `EpisodeSource`."""
    length = np.array(lengths)
    return types.SimpleNamespace(
        directory="somewhere",
        split="train",
        length=length,
        start=np.cumsum(length) - length,
        control_rate=np.broadcast_to(rates, length.shape),
        motion=np.zeros(length.sum(), np.float32) if motion is None else np.asarray(motion, np.float32),
    )


@pytest.mark.parametrize(("rate", "steps"), [(3.0, 2), (5.0, 2), (30.0, 15), (0.5, 1)])
def test_a_gap_in_seconds_becomes_the_nearest_number_of_control_steps(rate: float, steps: int) -> None:
    assert gap_steps(0.5, np.array([rate])).tolist() == [steps]


@pytest.mark.parametrize("instants", [2, 3, 5])
@pytest.mark.parametrize("gap_seconds", [0.2, 0.6])
@pytest.mark.parametrize("offset_frames", [False, True])
def test_all_clips_inside_an_episode_are_offered_and_no_other(
    instants: int, gap_seconds: float, offset_frames: bool
) -> None:
    source = make_source([9, 1, 14, 20, 3], rates=[5.0, 5.0, 5.0, 10.0, 5.0])
    index = index_clips(source, ClipConfig(gap_seconds, instants, offset_frames))
    expected, short = [], 0
    for episode, (start, length) in enumerate(zip(source.start, source.length, strict=True)):
        gap = round(gap_seconds * source.control_rate[episode])
        room = 1 if offset_frames and gap == 1 else 0
        firsts = [start + t for t in range(length) if t + (instants - 1) * gap + room < length]
        expected += [(first, episode) for first in firsts]
        short += not firsts
    assert list(zip(index.first, index.episode, strict=True)) == expected
    assert index.short_episodes == short
    assert index.filtered_clips == 0


def test_every_clip_has_an_offset_frame_for_all_its_pairs() -> None:
    source, rng = make_source([4, 7, 12], rates=[5.0, 10.0, 30.0]), np.random.default_rng(0)
    index = index_clips(source, ClipConfig(0.2, instants=3))
    for first, episode in zip(index.first, index.episode, strict=True):
        gap, last = index.gap[episode], index.last[episode]
        assert last == source.start[episode] + source.length[episode] - 1
        futures = np.array([[first + gap, first + 2 * gap]])
        offsets = draw_offsets(futures, np.array([gap]), np.array([last]), rng.random((1, 2)))
        assert np.all(futures - gap < offsets) and np.all(offsets <= last) and np.all(offsets != futures)


@pytest.mark.parametrize(
    ("gap", "room", "expected"),
    [
        (1, 5, {1}),  # One step back would be the current frame.
        (2, 5, {-1, 1}),
        (4, 0, {-1}),
        (9, 5, {-1, 1}),
        (10, 5, {-2, -1, 1, 2}),
        (15, 2, {-3, -2, -1, 1, 2}),
        (10, 0, {-2, -1}),
    ],
)
def test_offsets_are_all_of_a_fifth_of_the_gap_but_zero_and_past_the_end(
    gap: int, room: int, expected: set[int]
) -> None:
    rng = np.random.default_rng(0)
    futures, gaps = np.full((400, 1), 100), np.full(400, gap)
    drawn = (draw_offsets(futures, gaps, futures[:, 0] + room, rng.random((400, 1))) - 100)[:, 0].tolist()
    assert set(drawn) == expected
    counts = np.bincount(np.array(drawn) - min(drawn))
    assert counts[counts > 0].min() > 0.6 * 400 / len(expected)


def test_still_clips_and_cuts_are_left_out() -> None:
    motion = [0.0, 0.25, 0.25, 0.0, 0.0, 0.5, 0.9, 0.25]
    config = ClipConfig(0.4, offset_frames=False, min_motion=0.125, max_motion=0.5)
    index = index_clips(make_source([8], motion=motion), config)
    # The six clips have mean motions 0.25, 0.125, 0 and 0.25, and the last two a cut.
    assert index.first.tolist() == [0, 1, 3]
    assert index.filtered_clips == 3


def test_the_motion_before_a_clip_does_not_count() -> None:
    motion = [0.9, 0.1, 0.1, 0.1]
    config = ClipConfig(0.4, offset_frames=False, max_motion=0.5)
    assert index_clips(make_source([4], motion=motion), config).first.tolist() == [0, 1]


def test_motion_is_taken_from_the_episode_of_the_clip() -> None:
    motion = [0.0, 0.0, 0.0, 0.0, 0.3, 0.3]
    config = ClipConfig(0.4, offset_frames=False, min_motion=0.2)
    index = index_clips(make_source([3, 3], motion=motion), config)
    assert (index.first.tolist(), index.episode.tolist()) == ([3], [1])


@pytest.mark.parametrize(
    ("span", "fraction", "spans", "pairs"),
    [(1, 1.0, [1], 7), (1, 0.2, [1], 7), (7, 0.01, range(1, 8), 28), (4, 0.5, [2, 3, 4], 15)],
)
def test_pairs_span_the_gaps_that_are_asked_for(span: int, fraction: float, spans: Sequence[int], pairs: int) -> None:
    found = pair_spans(span, fraction)
    assert list(found) == list(spans)
    assert num_pairs(8, found) == pairs


def test_instants_divide_the_gap() -> None:
    source = make_source([9, 14, 20], rates=[5.0, 5.0, 10.0])
    index = index_clips(source, ClipConfig(0.8, 4, pair_span=3, offset_frames=False))
    # Gaps of 4 and 8 steps in three whole parts.
    assert index.gap.tolist() == [1, 1, 2]
    counts = np.bincount(index.episode)
    assert counts.tolist() == [9 - 3, 14 - 3, 20 - 6]


def test_a_gap_of_fewer_steps_than_its_parts_is_refused() -> None:
    with pytest.raises(DatasetError, match="0.4 s are fewer control steps than data.pair_span 3, at 5 Hz"):
        index_clips(make_source([9]), ClipConfig(0.4, 4, pair_span=3))


def test_a_dataset_of_short_episodes_is_refused_with_what_is_needed() -> None:
    with pytest.raises(DatasetError, match=r"all 2 episodes are shorter .*the longest has 4 steps, 6 or more"):
        index_clips(make_source([3, 4]), ClipConfig(1.0))


def test_a_dataset_without_enough_motion_is_refused_with_the_thresholds() -> None:
    with pytest.raises(DatasetError, match="no clip has a motion between data.min_motion 0.5 and data.max_motion 0.9"):
        index_clips(make_source([9]), ClipConfig(0.4, min_motion=0.5, max_motion=0.9))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"gap_seconds": 0.0}, "gap_seconds"), ({"instants": 1}, "instants"), ({"pair_span": 2}, "pair_span")],
)
def test_settings_that_make_no_pair_are_refused(arguments: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{field} .*must"):
        ClipConfig(**{"gap_seconds": 0.5, **arguments})
