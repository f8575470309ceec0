"""Which steps a policy is trained on, in which order, and from which cameras."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import chex
import numpy as np
import pytest

from como_jax.data.chunks import ChunkConfig, ChunkFiller, PolicyPart, find_cameras
from como_jax.data.mixture import MixtureEntry
from como_jax.data.policy_data import open_policy_data
from como_jax.data.sampler import Augmentation, BatchSampler, Samples
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from tests.data.robots import GAP
from tests.policies.smoke_policies import smoke


@pytest.fixture(scope="module")
def parts(arm: Path, clips: Path) -> tuple[PolicyPart, ...]:
    """A robot and labelled videos, the former three times as often."""
    return open_policy_data(smoke("diffusion", f"{arm}=3", clips)).parts


def draw(parts: tuple[PolicyPart, ...], count: int, **options: int | Augmentation) -> list[Samples]:
    """The first batches."""
    augmentation = options.pop("augmentation", Augmentation(2, 0.5))
    stream = BatchSampler(ChunkFiller(parts, ChunkConfig()), augmentation, **{"batch_size": 8, "seed": 0, **options})
    return [stream(number) for number in range(count)]


def join(batches: list[Samples]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([vars(batch)[name] for batch in batches]) for name in vars(batches[0])}


def test_a_window_reaches_from_the_first_image_to_the_end_of_the_chunk() -> None:
    assert (ChunkConfig(1, 5, 4).history, ChunkConfig(1, 5, 4).window) == (0, 4)
    assert (ChunkConfig(3, 2, 4).history, ChunkConfig(3, 2, 4).window) == (4, 8)


@pytest.mark.parametrize("name", ["instants", "stride", "chunk"])
def test_a_window_without_steps_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name} must be at least 1, not 0"):
        ChunkConfig(**{name: 0})


def test_an_epoch_holds_every_step_of_a_robot_and_every_labelled_step_of_videos_once(
    parts: tuple[PolicyPart, ...],
) -> None:
    found = join(draw(parts, 40))
    for number, part in enumerate(parts):
        source, records = part.source, found["records"][:, 0][found["dataset"] == number]
        left_out = 0 if part.action else GAP
        steps = [
            start + step
            for start, length in zip(source.start, source.length, strict=True)
            for step in range(length - left_out)
        ]
        assert Counter(records[: len(steps)].tolist()) == Counter(steps)
        assert Counter(records[len(steps) : 2 * len(steps)].tolist()) == Counter(steps)
        assert records[: len(steps)].tolist() != records[len(steps) : 2 * len(steps)].tolist()
        episodes = np.searchsorted(source.start, found["records"][:, 0], side="right") - 1
        chosen = found["dataset"] == number
        np.testing.assert_array_equal(found["episode"][chosen], episodes[chosen])


def test_shares_follow_the_weights(parts: tuple[PolicyPart, ...]) -> None:
    assert np.mean(join(draw(parts, 10))["dataset"] == 0) == pytest.approx(0.75, abs=0.02)


def test_batches_depend_on_seed_and_number_alone(parts: tuple[PolicyPart, ...]) -> None:
    chex.assert_trees_all_equal(*([vars(batch) for batch in draw(parts, 3)] for _ in range(2)))
    first, second, other = join(draw(parts, 1)), join(draw(parts, 2)[1:]), join(draw(parts, 1, seed=1))
    for name in ("records", "crop", "shift"):
        assert np.any(first[name] != second[name]) and np.any(first[name] != other[name]), name


def test_two_hosts_share_the_batches_of_one(parts: tuple[PolicyPart, ...]) -> None:
    hosts = [draw(parts, 3, rows=rows) for rows in (slice(4), slice(4, 8))]
    assert all(len(batch) == 4 for host in hosts for batch in host)
    joined = [join(list(pair)) for pair in zip(*hosts, strict=True)]
    chex.assert_trees_all_equal(joined, [vars(batch) for batch in draw(parts, 3)])


def test_crops_and_shifts_stay_within_their_limits_and_differ(parts: tuple[PolicyPart, ...]) -> None:
    found = join(draw(parts, 40))
    scale, place = found["crop"][:, 0], found["crop"][:, 1:]
    assert 0.5 <= scale.min() < 0.6 and 0.9 < scale.max() <= 1 and place.min() >= 0 and place.max() <= 1
    assert len(np.unique(found["crop"])) == found["crop"].size
    assert np.unique(found["shift"]).tolist() == [-2, -1, 0, 1, 2]
    assert {tuple(row) for row in found["shift"].tolist()} >= {(2, -2), (-2, 2), (0, 1)}


def test_without_augmentation_images_are_seen_whole(parts: tuple[PolicyPart, ...]) -> None:
    found = join(draw(parts, 2, augmentation=Augmentation()))
    assert not found["shift"].any() and np.all(found["crop"] == [1, 0.5, 0.5])


def test_a_image_of_every_name_is_looked_for_in_each_dataset(arm: Path, hand: Path) -> None:
    source, entry = EpisodeSource(arm, "train"), MixtureEntry(str(arm))
    assert find_cameras(source, entry, ()) == ("front",)
    assert find_cameras(source, entry, ("front", "wrist")) == ("front", "wrist")
    assert find_cameras(source, entry, ("wrist", "top")) == ("wrist", "")
    renamed = MixtureEntry(str(hand), camera="top")
    assert find_cameras(EpisodeSource(hand, "train"), renamed, ("front", "wrist")) == ("top", "")
    assert find_cameras(EpisodeSource(arm, "train", "wrist"), MixtureEntry(str(arm), camera="wrist"), ()) == ("wrist",)


def test_a_dataset_with_none_of_the_images_is_refused_by_name(hand: Path) -> None:
    with pytest.raises(DatasetError, match=f"{hand} has none of the cameras front, wrist; it has top.*camera = "):
        find_cameras(EpisodeSource(hand, "train"), MixtureEntry(str(hand)), ("front", "wrist"))


def test_the_description_says_what_is_learned_from_what(parts: tuple[PolicyPart, ...], coded_clips: Path) -> None:
    robot, videos = parts
    assert robot.describe(0.75) == ("arm [train]: 75% of samples, actions, 3 episodes, 21 of 21 steps, cameras front")
    assert videos.describe(0.25) == (
        "clips [train]: 25% of samples, latent motion, 3 episodes, 15 of 21 steps, cameras front"
    )
    [coded] = open_policy_data(smoke("autoregressive", coded_clips, **{"data.latent_only": True})).parts
    assert " codes, " in coded.describe(1) and coded.codes is not None and videos.codes is None
    assert dataclasses.replace(coded, latent=None).codes is None
    assert not robot.labelled.any() and videos.labelled.sum() == len(videos.steps)
