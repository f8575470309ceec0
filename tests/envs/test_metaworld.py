"""Meta-World behind the common interface; what needs the simulator is skipped where it is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.metaworld import CAMERAS, INSTRUCTIONS, TASKS
from como_jax.envs.registry import environment_names, make_environment
from como_jax.errors import ConfigError


@pytest.fixture
def make(request):
    """Makes environments that are closed after the test."""
    # Not by importing it, which would bring MuJoCo in before its renderer is chosen.
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("needs pip install 'como_jax[metaworld]'")

    def make_one(task="reach-v3", image_size=64, cameras=(), max_steps=0, **settings):
        options = EnvironmentOptions(image_size, cameras, max_steps, settings)
        try:
            environment = make_environment(f"metaworld:{task}", options)
        except ConfigError as error:
            if "cannot render" not in str(error):
                raise
            pytest.skip(str(error))
        request.addfinalizer(environment.close)
        return environment

    return make_one


def play(environment, seed, steps=4):
    """Images and states of an episode's first steps under the expert."""
    observations = [environment.reset(seed)]
    observations += [environment.step(environment.expert_action()).observation for _ in range(steps)]
    return np.stack([s.images["corner4"] for s in observations]), np.stack([s.state for s in observations])


def cyan_finger(image):
    """Row and column of the cyan finger."""
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    rows, columns = np.nonzero((green > red + 60) & (blue > red + 60))
    assert rows.size, "the finger is not in the image"
    return np.array([rows.mean(), columns.mean()])


def test_every_task_has_an_instruction_of_its_own():
    assert len(INSTRUCTIONS) == len(set(INSTRUCTIONS.values())) == 50
    assert list(TASKS) == sorted(TASKS)
    for task, instruction in INSTRUCTIONS.items():
        assert instruction == instruction.strip().lower() and len(instruction.split()) >= 3 or task == "dial-turn-v3"
        assert "v3" not in instruction


def test_tasks_are_known_without_the_simulator(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert len(environment_names("metaworld:all")) == 50
    with pytest.raises(ConfigError, match="no task 'drawer-open-v2'.*did you mean drawer-open-v3"):
        environment_names("metaworld:drawer-open-v2")


@pytest.mark.parametrize("missing", ["mujoco", "metaworld"])
def test_a_missing_extra_is_named_with_the_line_that_installs_it(monkeypatch, missing):
    for name in ("mujoco", "gymnasium.envs.mujoco", "gymnasium.envs.mujoco.mujoco_rendering", "metaworld"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else types.ModuleType(name))
    with pytest.raises(ConfigError, match=r"Meta-World cannot be imported \(.*pip install 'como_jax\[metaworld\]'"):
        make_environment("metaworld:reach-v3", EnvironmentOptions())


def test_missing_opengl_is_named_with_its_packages(monkeypatch, tmp_path):
    (tmp_path / "mujoco.py").write_text("raise AttributeError('no attribute eglQueryString')")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(ConfigError, match=r"MUJOCO_GL=egl \(no attribute eglQueryString\).*apt-get install libosmesa6"):
        make_environment("metaworld:reach-v3", EnvironmentOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ("front",)}, "no camera front: corner4, corner, corner2"),
        ({"cameras": ("corner", "corner")}, "a camera is named twice: corner, corner"),
        ({"image_size": 8}, "images of 16 to 512 pixels, not 8"),
        ({"settings": {"action_repeat": "0"}}, "action_repeat=0: must be a whole number, 1 or more"),
        ({"settings": {"action_repeat": "two"}}, "action_repeat=two: must be"),
        ({"settings": {"repeat": "2"}}, "setting repeat: this environment has action_repeat"),
    ],
)
def test_options_that_cannot_be_followed(options, message):
    with pytest.raises(ConfigError, match=message):
        make_environment("metaworld:reach-v3", EnvironmentOptions(**options))


def test_opengl_that_fails_later_is_named_too(make):
    make()
    code = """if True:
        from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.registry import make_environment
        try:
            make_environment("metaworld:reach-v3", EnvironmentOptions())
        except ValueError as error:
            print(type(error).__name__, error)
    """
    environment = {**os.environ, "MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}
    # Which MuJoCo has set in this process, for the renderer of this process.
    environment.pop("PYOPENGL_PLATFORM", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "ConfigError MuJoCo cannot render with MUJOCO_GL=egl (The MUJOCO_EGL_DEVICE_ID" in result.stdout


def test_tasks_and_cameras_are_those_of_the_simulator(make):
    environment = make()
    from metaworld.env_dict import ENV_CLS_MAP
    from metaworld.policies import ENV_POLICY_MAP

    model = environment._simulator.model
    assert set(TASKS) == set(ENV_CLS_MAP) == set(ENV_POLICY_MAP)
    assert {model.camera(index).name for index in range(model.ncam)} == set(CAMERAS)


def test_an_episode_follows_from_its_seed_alone(make):
    before = np.random.get_state()[1].copy()
    first, second = make("push-v3"), make("push-v3")
    images, states = play(first, 5)
    # Another episode before, and steps of another environment in between, leave no trace.
    play(second, 6, steps=12)
    first.reset(5)
    again, same_states = play(second, 5)
    np.testing.assert_array_equal(again, images)
    np.testing.assert_array_equal(same_states, states)
    assert (play(first, 6)[0][0] != images[0]).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_the_first_image_shows_where_things_lie_now(make):
    environment = make("drawer-open-v3", action_repeat="1")
    environment.reset(1)
    for seed in (2, 3):
        first = environment.reset(seed).images["corner4"].astype(int)
        second = environment.step(np.array([0, 0, 0, -1])).observation.images["corner4"]
        # The hand stands still for a step, and so must the drawer: 0.5 as it is, and 1.3 for one that jumps.
        assert np.abs(first - second).max(axis=-1).mean() < 0.9


def test_steps_of_two_environments_can_alternate(make):
    alone = play(make("reach-v3"), 3)[0]
    one, other = make("reach-v3"), make("drawer-open-v3")
    images = [one.reset(3).images["corner4"]]
    other.reset(4)
    for _ in range(4):
        images.append(one.step(one.expert_action()).observation.images["corner4"])
        other.step(other.expert_action())
    np.testing.assert_array_equal(images, alone)


@pytest.mark.parametrize(("camera", "away"), [("corner4", 1), ("corner2", 1), ("corner3", 1), ("corner", -1)])
def test_images_are_upright_not_mirrored_and_rgb(make, camera, away):
    environment = make(image_size=128, cameras=(camera,), action_repeat="5")
    start = cyan_finger(environment.reset(0).images[camera])
    for _ in range(3):
        raised = environment.step(np.array([0, 0, 1, -1])).observation
    assert cyan_finger(raised.images[camera])[0] < start[0] - 2
    environment.reset(0)
    for _ in range(3):
        moved = environment.step(np.array([0, 1, 0, -1])).observation
    # The robot stands at the left in these images, but at the right for the corner on the other side.
    assert away * (cyan_finger(moved.images[camera])[1] - start[1]) > 1


def test_several_cameras(make):
    environment = make(image_size=32, cameras=("topview", "corner4"))
    images = environment.reset(0).images
    assert environment.spec.cameras == tuple(images) == ("topview", "corner4")
    assert {image.shape for image in images.values()} == {(32, 32, 3)}
    assert {image.dtype for image in images.values()} == {np.dtype(np.uint8)}
    assert (images["topview"] != images["corner4"]).any()


@pytest.mark.parametrize("task", ["reach-v3", "drawer-open-v3"])
def test_the_expert_solves_its_task(make, task):
    environment = make(task, image_size=16, action_repeat="4")
    assert environment.spec.max_steps == 75
    environment.reset(0)
    assert environment.instruction == INSTRUCTIONS[task]
    for _ in range(environment.spec.max_steps):
        action = environment.expert_action()
        assert action.dtype == np.float32 and np.abs(action).max() <= 1
        result = environment.step(action)
        if result.done:
            break
    assert result.success and result.done


def test_an_action_is_repeated(make):
    once, thrice = make(image_size=16, action_repeat="1"), make(image_size=16, action_repeat="3")
    assert (once.spec.control_rate, thrice.spec.control_rate) == pytest.approx((80, 80 / 3))
    np.testing.assert_array_equal(once.reset(1).state, thrice.reset(1).state)
    action = np.array([0.3, -0.2, 0.5, 1.0], np.float32)
    states = [once.step(action).observation.state for _ in range(6)]
    np.testing.assert_array_equal(states[2], thrice.step(action).observation.state)
    np.testing.assert_array_equal(states[5], thrice.step(action).observation.state)


def test_state_is_the_hand_and_how_far_it_is_open(make):
    environment = make(image_size=16, action_repeat="5")
    start = environment.reset(0)
    assert start.state.shape == (4,) and start.state.dtype == np.float32
    for _ in range(4):
        state = environment.step(np.array([0.0, 0.0, 1.0, 1.0])).observation.state
    assert state[2] > start.state[2] + 0.05
    assert 0 <= state[3] < start.state[3] - 0.2 <= 1


def test_actions_are_clipped_and_checked(make):
    environment, other = make(image_size=16), make(image_size=16)
    environment.reset(0), other.reset(0)
    large = environment.step(np.array([9.0, -9.0, 0.0, 5.0])).observation.state
    np.testing.assert_array_equal(large, other.step(np.array([1.0, -1.0, 0.0, 1.0])).observation.state)
    for action in (np.zeros(3), np.zeros((1, 4)), np.array([0, 0, np.nan, 0])):
        with pytest.raises(ValueError, match="4 finite numbers"):
            environment.step(action)


def test_an_unsolved_episode_ends(make):
    environment = make(image_size=16, max_steps=3)
    for _ in range(2):
        environment.reset(0)
        results = [environment.step(np.zeros(4), render=False) for _ in range(3)]
        assert [bool(result.observation.images) for result in results] == [False, False, True]
        assert [result.done for result in results] == [False, False, True]
        assert not any(result.success for result in results)
