"""LIBERO's arm behind the common interface, with robosuite's own tasks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from etils import epath
from scipy.spatial.transform import Rotation

from como_jax.convert.libero import builder, demonstrations
from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.libero import arm, opengl, own_tasks, task
from como_jax.envs.registry import make_environment
from como_jax.errors import ConfigError
from tests.everyday import needs_libero

SMALL = {"render_size": "64"}


def view(settings: dict[str, str] | None = None, **options: object) -> arm.View:
    return arm.View.of(settings or {}, EnvironmentOptions(**options))


def test_missing_packages_are_named_with_the_way_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robosuite", None)
    monkeypatch.setitem(sys.modules, "libero", None)
    with pytest.raises(ConfigError, match=r"pip install 'como_jax\[libero\]'$"):
        make_environment("robosuite:Lift", EnvironmentOptions())
    with pytest.raises(ConfigError, match=r"pip install 'como_jax\[libero\]'$"):
        make_environment("libero:libero_goal/0", EnvironmentOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ("agentview",)}, "camera 'agentview' is none of agentview_rgb"),
        ({"cameras": ("agentview_rgb", "agentview_rgb")}, "named twice"),
        ({"settings": {"orientation": "up"}}, "'up' is none of rotate180, flip, stored"),
        ({"settings": {"state": "ee_pos,ee"}}, "'ee' is none of"),
        ({"settings": {"render_size": "0"}}, "render_size=0"),
        ({"settings": {"variation": "arm,sun"}}, "'sun' is none of camera"),
        ({"settings": {"look": "quick"}}, "'quick' is none of fast, full"),
        (
            {"settings": {"colour": "red"}},
            "colour: this environment has orientation, state, render_size, look, variation",
        ),
        ({"settings": {"instruction": "name"}}, "instruction: this environment has"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_environment("robosuite:Lift", EnvironmentOptions(**options))


def test_images_are_turned_as_in_converted_datasets() -> None:
    rendered = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for orientation in builder.ORIENTATIONS:
        shown = view({"orientation": orientation}, image_size=32).image(rendered)
        np.testing.assert_array_equal(shown, builder.turn(rendered, orientation, "opengl"))


def test_defaults_are_those_of_converted_datasets() -> None:
    layout = builder.Libero(epath.Path("unused"), builder.LiberoSettings(source="unused"), None).layout
    assert view().cameras == layout.cameras and view().state_size == layout.state_size == 8
    assert view().orientation == builder.LiberoSettings(source="unused").orientation
    assert {name: size for name, (_, size) in demonstrations.STATES.items()} == arm.STATES
    assert layout.action_size == arm.ACTION_SIZE and arm.CONTROL_RATE_HZ == builder.CONTROL_RATE_HZ


def test_rotations_are_axes_times_angles() -> None:
    rotations = Rotation.random(20, random_state=0)
    angles = np.stack([arm._axis_angle(quaternion) for quaternion in rotations.as_quat()])
    np.testing.assert_allclose((Rotation.from_rotvec(angles) * rotations.inv()).magnitude(), 0, atol=1e-6)
    np.testing.assert_array_equal(arm._axis_angle(np.array([0.0, 0, 0, 1])), np.zeros(3))


@pytest.fixture(scope="module")
def lift() -> Iterator[arm.PandaEnvironment]:
    """Small, and turned so that the images are what a camera sees."""
    settings = {**SMALL, "orientation": "flip", "state": ",".join(arm.STATES)}
    env = make_environment("robosuite:Lift", EnvironmentOptions(image_size=64, max_steps=3, settings=settings))
    yield env
    env.close()


@needs_libero
@pytest.mark.slow
def test_equal_seeds_give_equal_episodes(lift: arm.PandaEnvironment) -> None:
    np.random.seed(7)
    expected = np.random.RandomState(7).normal()
    other = make_environment("robosuite:Lift", EnvironmentOptions(cameras=("agentview_rgb",), settings=SMALL))

    def episode(env: arm.PandaEnvironment, seed: int) -> tuple[np.ndarray, np.ndarray]:
        env.reset(seed)
        observation = env.step(np.array([0.5, 0.2, -0.3, 0.1, 0, 0, 1])).observation
        # The other one has the default states, which come first and fourth of all.
        state = observation.state if env is other else observation.state[[0, 1, 2, 3, 4, 5, 12, 13]]
        return env.simulation.state(), state

    first, second, third = episode(lift, 3), episode(lift, 4), episode(lift, 3)
    np.testing.assert_array_equal(first[0], third[0])
    assert np.abs(first[0] - second[0]).max() > 1e-3
    for own, others in zip(first, episode(other, 3), strict=True):
        np.testing.assert_array_equal(own, others)
    assert other.spec.max_steps == 500 and other.spec.state_size == 8
    other.close()
    # Nobody else's random numbers changed.
    assert np.random.normal() == expected


@needs_libero
def test_images_are_upright_and_rgb(lift: arm.PandaEnvironment) -> None:
    from robosuite.utils import camera_utils

    image = lift.reset(0).images["agentview_rgb"].astype(int)
    sim = lift.simulation.raw.sim
    matrix = camera_utils.get_camera_transform_matrix(sim, "agentview", 64, 64)
    cube = sim.data.body_xpos[lift.simulation.raw.cube_body_id]
    expected = camera_utils.project_points_from_world_to_camera(cube, matrix, 64, 64)
    red = (image[..., 0] > 2 * image[..., 1]) & (image[..., 0] > 2 * image[..., 2]) & (image[..., 0] > 60)
    assert red.sum() > 4
    np.testing.assert_allclose(np.argwhere(red).mean(axis=0), expected, atol=2.5)


@needs_libero
def test_states_are_those_of_the_simulator(lift: arm.PandaEnvironment) -> None:
    state = lift.reset(0).state
    parts = dict(zip(arm.STATES, np.split(state, np.cumsum(list(arm.STATES.values()))[:-1]), strict=True))
    sim = lift.simulation.raw.sim
    position = sim.data.site_xpos[lift.simulation.raw.robots[0].eef_site_id]
    rotation = Rotation.from_matrix(sim.data.body_xmat[sim.model.body_name2id("robot0_right_hand")].reshape(3, 3))
    np.testing.assert_allclose(parts["ee_pos"], position, atol=1e-3)
    assert (Rotation.from_rotvec(parts["ee_ori"]) * rotation.inv()).magnitude() < 1e-2
    np.testing.assert_array_equal(parts["ee_states"], np.concatenate([parts["ee_pos"], parts["ee_ori"]]))
    np.testing.assert_allclose(parts["joint_states"], sim.data.qpos[:7], atol=1e-5)
    np.testing.assert_allclose(parts["gripper_states"], sim.data.qpos[7:9], atol=1e-3)
    fingers, place, quaternion = np.split(parts["robot_states"], [2, 5])
    np.testing.assert_array_equal(fingers, parts["gripper_states"])
    np.testing.assert_array_equal(place, parts["ee_pos"])
    assert (Rotation.from_quat(quaternion) * rotation.inv()).magnitude() < 1e-2


@needs_libero
def test_actions_move_the_arm_and_close_the_gripper(lift: arm.PandaEnvironment) -> None:
    before = lift.reset(0).state
    for _ in range(3):
        # Beyond [-1, 1] is as good as 1.
        after = lift.step(np.array([0, 9.0, 0, 0, 0, 0, 1])).observation.state
    assert after[1] - before[1] > 0.02 > abs(after[0] - before[0])
    width = slice(12, 14)
    assert np.abs(after[width]).sum() < np.abs(before[width]).sum() - 0.01


@needs_libero
def test_an_episode_ends_with_success_or_after_its_last_step(lift: arm.PandaEnvironment) -> None:
    lift.reset(0)
    assert lift.instruction == "lift the red cube"
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    results = [lift.step(still, render=False) for _ in range(3)]
    # The end is shown in any case.
    assert [bool(result.observation.images) for result in results] == [False, False, True]
    assert [(result.success, result.done) for result in results] == [(False, False), (False, False), (False, True)]
    lift.reset(0)
    joint = lift.simulation.raw.cube.joints[0]
    place = lift.simulation.raw.sim.data.get_joint_qpos(joint)
    place[2] += 0.3
    lift.simulation.raw.sim.data.set_joint_qpos(joint, place)
    result = lift.step(still)
    assert result.success and result.done
    with pytest.raises(NotImplementedError, match="robosuite:Lift has no expert"):
        lift.expert_action()


@needs_libero
@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.zeros((1, 7))])
def test_bad_actions_are_refused(lift: arm.PandaEnvironment, action: np.ndarray) -> None:
    with pytest.raises(ValueError, match="robosuite:Lift is 7 finite numbers"):
        lift.step(action)


@needs_libero
def test_robosuite_has_all_its_tasks() -> None:
    assert set(own_tasks.TASKS) <= set(task.import_robosuite().ALL_ENVIRONMENTS)


@needs_libero
@pytest.mark.parametrize("version", ["3.4.0", "3.9.1"])
def test_versions_of_mujoco_that_do_not_work_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    with pytest.raises(ConfigError, match=rf"does not work with MuJoCo {version}; .*: pip install 'mujoco>=3.10,<4'"):
        task.import_robosuite()


def test_an_error_of_opengl_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with (
        pytest.raises(ConfigError, match=r"MUJOCO_GL=osmesa \(no library\); .*apt-get install libosmesa6"),
        opengl.errors(OSError),
    ):
        raise OSError("no\nlibrary")


@pytest.mark.parametrize(
    ("gpus", "library", "expected"), [([], "lib", "osmesa"), ([], None, "egl"), (["x"], "lib", "egl")]
)
def test_opengl_is_chosen_by_what_there_is(
    gpus: list[str], library: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(opengl.glob, "glob", lambda pattern: gpus)
    monkeypatch.setattr(opengl.ctypes.util, "find_library", lambda name: library)
    monkeypatch.setenv("MUJOCO_GL", "")
    opengl.choose()
    assert os.environ["MUJOCO_GL"] == expected
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    opengl.choose()
    assert os.environ["MUJOCO_GL"] == "glfw"
