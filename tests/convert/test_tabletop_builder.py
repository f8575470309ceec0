"""Demonstrations of the embedded environment as a dataset."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from como_jax.convert.tabletop.builder import TabletopDemonstrations, TabletopSettings
from como_jax.data.sources import EpisodeSource
from como_jax.envs import tabletop
from como_jax.envs.base import MAX_DEMONSTRATION_SEED, SEED_STRIDE
from como_jax.errors import ConversionError
from como_jax.evaluation.rollouts.rollout import environment_seed


def convert(out: Path, **settings: Any) -> dict[str, Any]:
    return TabletopDemonstrations(out, TabletopSettings(**settings)).convert()


def test_steps_are_those_of_the_demonstration(tmp_path, check_dataset):
    convert(tmp_path / "out", episodes=3, tasks=("reach", "push"), seed=2)
    rows = sum(check_dataset(tmp_path / "out").values(), [])
    rows.sort(key=lambda row: row["episode_id"][-9:])
    assert [row["episode_id"] for row in rows] == ["reach/002000000", "push/002000001", "reach/002000002"]
    expected = tabletop.demonstrate(tabletop.Tabletop("push"), 2000001)
    assert rows[1]["num_steps"] == len(expected.actions)
    assert rows[1]["language_instruction"] == expected.instruction
    assert rows[1]["control_rate"] == tabletop.CONTROL_RATE_HZ
    np.testing.assert_array_equal(np.float32(rows[1]["action"]), expected.actions)
    np.testing.assert_array_equal(np.float32(rows[1]["state"]), expected.states[:-1])


def test_video_of_people_without_actions(tmp_path, check_dataset):
    convert(tmp_path / "out", episodes=2, tasks=("reach",), look="human", actions=False)
    rows = sum(check_dataset(tmp_path / "out").values(), [])
    assert {row["action"] for row in rows} == {row["state"] for row in rows} == {None}
    features = tfds.builder_from_directory(tmp_path / "out").info.features
    assert "action" not in features
    assert set(features["observation"]) == {"image"}


def test_a_dataset_names_the_environment_that_looks_like_it(tmp_path):
    convert(tmp_path / "out", episodes=1, tasks=("push",), scene="fixed", validation_fraction=0.0)
    source = EpisodeSource(tmp_path / "out", "train")
    assert source.environment == {"family": "tabletop", "look": "plain", "scene": "fixed"}


def test_failed_demonstrations_are_left_out(tmp_path, check_dataset):
    report = convert(tmp_path / "out", episodes=6, tasks=("pick_place", "reach"), noise=1.0)
    check_dataset(tmp_path / "out")
    assert report["sources"]["left_out"] > 0
    assert report["left_out"][0]["reasons"] == ["the demonstration did not solve its task"]


def test_no_demonstration_has_a_seed_of_a_rollout(tmp_path):
    settings = TabletopSettings(episodes=1, seed=MAX_DEMONSTRATION_SEED)
    (first,) = TabletopDemonstrations(tmp_path / "out", settings).sources()
    assert int(first.path.rpartition("/")[2]) + SEED_STRIDE == environment_seed(seed=0, episode=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("juggle",)}, r"unknown tasks \['juggle'\]; there are all, reach"),
        ({"look": "odd"}, "look must be one of plain, moving, hard, human, got 'odd'"),
        ({"episodes": 0}, "episodes must lie between 1 and"),
        ({"image_size": 32}, "image_size must lie between 64 and 224"),
        ({"noise": -1.0}, "noise must be 0 or more"),
        ({"seed": -1}, "seed must lie between 0 and 899, got -1"),
        ({"seed": 900}, "seed must lie between 0 and 899, got 900"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ConversionError, match=message):
        TabletopSettings(**settings)
