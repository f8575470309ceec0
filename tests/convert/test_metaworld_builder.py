"""Demonstrations of Meta-World's experts as a dataset."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from como_jax.convert.metaworld.builder import MetaWorldDemonstrations, MetaWorldSettings, demonstrate
from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.registry import make_environment
from como_jax.errors import ConfigError, ConversionError


@pytest.fixture
def simulator() -> None:
    # Not by importing it, which would bring MuJoCo in before its renderer is chosen.
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("needs pip install 'como_jax[metaworld]'")
    try:
        make_environment("metaworld:reach-v3", EnvironmentOptions()).close()
    except ConfigError as error:
        pytest.skip(str(error))


def convert(out: Path, **settings: Any) -> dict[str, Any]:
    return MetaWorldDemonstrations(out, MetaWorldSettings(action_repeat=4, **settings)).convert()


def test_steps_are_those_of_the_demonstration(tmp_path, check_dataset, simulator):
    convert(tmp_path / "out", episodes=3, tasks=("reach-v3", "push-v3"), seed=2, camera=("corner2", "topview"))
    rows = sum(check_dataset(tmp_path / "out").values(), [])
    rows.sort(key=lambda row: row["episode_id"][-9:])
    assert [row["episode_id"] for row in rows] == ["reach-v3/002000000", "push-v3/002000001", "reach-v3/002000002"]
    environment = make_environment("metaworld:push-v3", EnvironmentOptions(settings={"action_repeat": "4"}))
    expected = demonstrate(environment, 2000001)
    environment.close()
    assert rows[1]["num_steps"] == len(expected.actions) == len(expected.states)
    assert rows[1]["language_instruction"] == "push the puck to the target"
    assert rows[1]["control_rate"] == 20
    np.testing.assert_array_equal(np.float32(rows[1]["action"]), expected.actions)
    np.testing.assert_array_equal(np.float32(rows[1]["state"]), expected.states)
    features = tfds.builder_from_directory(tmp_path / "out").info.features
    assert {"corner2", "topview"} <= set(features["observation"])


def test_the_same_seed_gives_the_same_bytes(tmp_path, simulator):
    for name in ("a", "b"):
        builder = MetaWorldDemonstrations(tmp_path / name, MetaWorldSettings(episodes=2, tasks=("reach-v3",)), "same")
        builder.convert()
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if "-of-" in path.name} for name in "ab"
    )
    assert first == second and first


def test_videos_without_actions(tmp_path, check_dataset, simulator):
    convert(tmp_path / "out", episodes=2, tasks=("reach-v3",), actions=False)
    rows = sum(check_dataset(tmp_path / "out").values(), [])
    assert {row["action"] for row in rows} == {row["state"] for row in rows} == {None}
    features = tfds.builder_from_directory(tmp_path / "out").info.features
    assert "action" not in features
    assert set(features["observation"]) == {"corner4"}


def test_failed_demonstrations_are_left_out(tmp_path, check_dataset, simulator):
    report = convert(tmp_path / "out", episodes=4, tasks=("pick-place-v3", "reach-v3"), noise=1.0, image_size=16)
    check_dataset(tmp_path / "out")
    assert report["sources"]["left_out"] > 0
    assert report["left_out"][0]["reasons"] == ["the demonstration did not solve its task"]


def test_more_tasks_than_environments_are_kept(simulator, monkeypatch):
    monkeypatch.setattr("como_jax.convert.metaworld.builder._KEPT_ENVIRONMENTS", 2)
    builder = MetaWorldDemonstrations("unused", MetaWorldSettings(image_size=16))
    tasks = ["reach-v3", "push-v3", "reach-v3", "drawer-open-v3", "reach-v3"]
    made = [builder._environment(task) for task in tasks]
    assert made[0] is made[2] is made[4]
    assert list(builder._environments) == ["drawer-open-v3", "reach-v3"]
    for environment in builder._environments.values():
        environment.close()


def test_a_missing_simulator_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ConversionError, match=r"pip install 'como_jax\[metaworld\]'"):
        convert(tmp_path / "out", episodes=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("reach-v2",)}, r"unknown tasks \['reach-v2'\]; there are all, assembly-v3"),
        ({"camera": ("front",)}, "camera must be different ones of corner4, corner, corner2.* got front"),
        ({"camera": ()}, "camera must name one or more of corner4"),
        ({"episodes": 0}, "episodes must lie between 1 and"),
        ({"image_size": 8}, "image_size must lie between 16 and 512, got 8"),
        ({"noise": float("nan")}, "noise must be 0 or more"),
        ({"action_repeat": 0}, "action_repeat must be 1 or more, got 0"),
        ({"seed": 900}, "seed must lie between 0 and 899, got 900"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ConversionError, match=message):
        MetaWorldSettings(**settings)
