"""Demonstrations in LIBERO's simulator, with a stand-in for simulator and expert."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from como_jax.convert.catalog import make_settings
from como_jax.convert.libero_sim import builder, recording
from como_jax.convert.libero_sim.builder import LiberoDemonstrations
from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec
from como_jax.errors import ConfigError, ConversionError


class StandIn:
    """A task that is solved at one step; its state and image are the number of the step."""

    solved_at = 5

    def __init__(self, options: EnvironmentOptions, fails: Any = lambda seed: ""):
        self.spec = EnvironmentSpec("libero:stand_in", options.cameras, 7, 2, 20.0, 40)
        self.simulation = SimpleNamespace(raw=self, step=self._step, success=lambda: self._time >= self.solved_at)
        self.instruction, self.drawn, self.executed = "wait", 0, []
        self._size, self._fails = options.image_size, fails

    def begin(self, seed: int) -> None:
        self.seed, self._time, self.shown, self.executed = seed, 0, None, []

    def _step(self, action: np.ndarray) -> None:
        self._time += 1
        self.executed.append(action)

    def state(self) -> np.ndarray:
        return np.array([self.seed, self._time], np.float32)

    def scene(self) -> int:
        return self._time

    def show(self, scene: int) -> None:
        self.shown = scene

    def images(self) -> dict[str, np.ndarray]:
        self.drawn += 1
        return {name: np.full((self._size,) * 2 + (3,), 9 * self.shown, np.uint8) for name in self.spec.cameras}

    def close(self) -> None:
        self.closed = True


class Waiting:
    """An expert that has finished after eight steps, unless the stand-in's rule gives it a reason to give up."""

    def __init__(self, env: StandIn, seed: int):
        self._env, self.done, self.reason = env, False, ""
        assert seed == env.seed

    def act(self) -> np.ndarray:
        self.reason = self._env._fails(self._env.seed)
        if self.reason == "crash":
            raise RuntimeError("bad\nstate")
        self.done = self._env._time >= 8
        return np.array([0, 0, 0, 0, 0, 1, -1], np.float32)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Every fifth seed gives up and the one after it crashes; returns the environments that are made."""
    made: list[StandIn] = []

    def make(family: str, task: str, options: EnvironmentOptions) -> StandIn:
        assert options.settings["init"] == "drawn"
        made.append(StandIn(options, lambda seed: {0: "no grasp", 1: "crash"}.get(seed % 5, "")))
        return made[-1]

    monkeypatch.setattr(builder, "make", make)
    monkeypatch.setattr(builder.benchmark, "task_names", dict)
    monkeypatch.setattr(LiberoDemonstrations, "make_expert", staticmethod(Waiting))
    return made


def convert(out: Path, **settings: Any) -> dict[str, Any]:
    given = {"suite": "libero_goal", "tasks": ("7", "3"), "episodes_per_task": 3, "image_size": 16}
    return LiberoDemonstrations(
        out, make_settings("libero_sim", {**given, "state": ("gripper_states",), **settings}), None
    ).convert()


def test_demonstrations_that_fail_are_replaced_and_counted(tmp_path: Path, check_dataset: Any, stand_in: Any) -> None:
    report = convert(tmp_path / "out")
    splits = check_dataset(tmp_path / "out")
    rows = {row["episode_id"]: row for rows in splits.values() for row in rows}
    # From seeds 0, 8 and 16 on; 0 gives up, and 1 and 16 crash.
    seeds = ("000000002", "000000008", "000000017")
    assert set(rows) == {f"libero_goal/{task}/{seed}" for task in (7, 3) for seed in seeds}
    assert {each["source"]: each["reasons"] for each in report["partially_converted"]}["libero_goal/7/00000"] == [
        "the attempt with seed 0 was replaced: no grasp",
        "the attempt with seed 1 was replaced: bad state",
    ]
    assert stand_in[0].closed and not report["left_out"]
    row = rows["libero_goal/7/000000002"]
    assert row["language_instruction"] == "wait" and row["control_rate"] == 20
    np.testing.assert_array_equal(np.asarray(row["state"])[:, 1], np.arange(row["num_steps"]))
    # Both tasks are in both splits.
    assert {row["source_file"] for row in splits["val"]} == {"libero_goal/7", "libero_goal/3"}


def test_the_dataset_says_how_its_environment_looks(tmp_path: Path, check_dataset: Any, stand_in: Any) -> None:
    convert(tmp_path / "out", actions=False, look="full", camera=("eye_in_hand_rgb",), tasks=("7",))
    rows = sum(check_dataset(tmp_path / "out").values(), [])
    assert {row["action"] for row in rows} == {row["state"] for row in rows} == {None}
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["environment"] == {
        "family": "libero",
        "look": "full",
        "orientation": "rotate180",
        "state": "gripper_states",
    }
    assert stand_in[0].spec.cameras == ("eye_in_hand_rgb",)


def test_a_task_that_is_never_solved_is_left_out(
    tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "solved_at", 100)
    with pytest.raises(ConversionError, match="the expert had finished, and the goal did not hold"):
        convert(tmp_path / "out")


def test_noise_moves_the_arm_alone_and_what_was_executed_is_recorded() -> None:
    env = StandIn(EnvironmentOptions(image_size=4, cameras=("a", "b")))
    found, again = (recording.record(env, Waiting, 3, noise=0.3) for _ in range(2))
    # Solved and finished from the ninth action on, whose ten steps were held, of which two are kept.
    assert len(found.actions) == 8 + 2 == len(found.images["b"]) and env.drawn == 2 * len(found.actions)
    np.testing.assert_array_equal(found.actions, env.executed[: len(found.actions)])
    np.testing.assert_array_equal(found.actions, again.actions)
    assert found.actions.dtype == np.float32 and (found.actions[:, 6] == -1).all() and (found.actions[:, :6] <= 1).all()
    assert 0.1 < found.actions[:, :5].std() < 0.5
    np.testing.assert_array_equal([image[0, 0, 0] for image in found.images["a"]], 9 * np.arange(10))
    assert (recording.record(env, Waiting, 4, noise=0.3).actions != found.actions).any()


def test_nothing_is_drawn_of_an_attempt_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    env = StandIn(EnvironmentOptions(image_size=4, cameras=("a",)), lambda seed: "too far")
    with pytest.raises(recording.FailedAttempt, match="too far"):
        recording.record(env, Waiting, 3, 0.0)
    monkeypatch.setattr(Waiting, "act", lambda self: np.zeros(7, np.float32))
    with pytest.raises(recording.FailedAttempt, match="not solved within 40 steps"):
        recording.record(env, Waiting, 3, 0.0)
    assert env.drawn == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "libero_goul"}, "'libero_goul'; did you mean libero_goal"),
        ({"tasks": ("7", "10")}, r"tasks of libero_goal are numbers from 0 to 9, or all, got \['10'\]"),
        ({"tasks": ()}, "numbers from 0 to 9"),
        ({"look": "quick"}, "look must be one of fast, full"),
        ({"camera": ("agentview",)}, "camera must be different ones of agentview_rgb"),
        ({"state": ()}, "state must name one or more"),
        ({"noise": -1.0}, "noise must be 0 or more"),
        ({"episodes": 3}, "`episodes` does not apply to libero_sim"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, stand_in: Any
) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "out", **settings)


def test_the_suite_must_be_given_and_a_missing_simulator_is_named(
    tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConversionError, match="libero_sim needs `suite`"):
        make_settings("libero_sim", {})

    def missing() -> None:
        raise ConfigError("pip install it")

    monkeypatch.setattr(builder.benchmark, "task_names", missing)
    with pytest.raises(ConversionError, match="pip install it"):
        convert(tmp_path / "out")


def test_a_simulator_that_cannot_draw_ends_the_conversion(
    tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_opengl(self: StandIn) -> None:
        raise ConfigError("apt-get install it")

    monkeypatch.setattr(StandIn, "images", no_opengl)
    with pytest.raises(ConfigError, match="apt-get install it"):
        convert(tmp_path / "out")
