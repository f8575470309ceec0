"""PushT behind the common interface."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.pusht import PushTEnvironment
from como_jax.envs.registry import make_environment
from como_jax.errors import ConfigError

needs_pusht = pytest.mark.skipif(
    importlib.util.find_spec("gym_pusht") is None, reason="gym-pusht is not installed (extra pusht)"
)


def make(**options: object) -> PushTEnvironment:
    return make_environment("pusht:PushT", EnvironmentOptions(**options))


def put(env: PushTEnvironment, *state: float) -> None:
    """Sets the position of the agent and the pose of the block."""
    env._env._set_state(np.array(state))


def test_the_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(ConfigError, match=r"gym-pusht cannot be imported .*pip install 'como_jax\[pusht\]'"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ("top",)}, "one camera, image, not top"),
        ({"settings": {"look": "plain"}}, "look: this environment has none"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


@needs_pusht
def test_equal_seeds_give_equal_episodes() -> None:
    def episode(env: PushTEnvironment, seed: int) -> list[np.ndarray]:
        start = env.reset(seed)
        observations = [start] + [env.step(np.array([256.0, 10 * step])).observation for step in range(10)]
        return [
            np.stack([observation.images["image"] for observation in observations]),
            np.stack([observation.state for observation in observations]),
        ]

    env, other = make(), make()
    first, second, third = episode(env, 1), episode(env, 2), episode(other, 1)
    for one, two in zip(first, third, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first[1][0] != second[1][0]).any()


@needs_pusht
@pytest.mark.parametrize("size", [64, 96, 128])
def test_the_agent_goes_where_it_is_sent_and_is_seen_there(size: int) -> None:
    env = make(image_size=size)
    env.reset(0)
    put(env, 100, 100, 300, 300, 0)
    for _ in range(20):
        observation = env.step(np.array([400.0, 80.0])).observation
    np.testing.assert_allclose(observation.state, [400, 80], atol=2)
    image = observation.images["image"].astype(int)
    assert image.shape == (size, size, 3)
    blue = image[..., 2] - image[..., 0] > 80
    rows, columns = np.nonzero(blue)
    np.testing.assert_allclose([columns.mean() * 512 / size, rows.mean() * 512 / size], [400, 80], atol=10)


@needs_pusht
def test_an_episode_ends_with_success_or_after_its_last_step() -> None:
    env = make(max_steps=3)
    assert make().spec.max_steps == 300
    env.reset(0)
    corner = np.array([20.0, 20.0])
    results = [env.step(corner) for _ in range(3)]
    assert [(result.success, result.done) for result in results] == [(False, False), (False, False), (False, True)]
    env.reset(0)
    # The block's centre of mass lies beside its origin, about which it is turned.
    put(env, 20, 20, 256, 256, np.pi / 4)
    env._env.block.position = (256, 256)
    result = env.step(corner)
    assert result.success and result.done
    assert env.instruction and env.spec.control_rate == 10
    with pytest.raises(NotImplementedError, match="PushT has no expert"):
        env.expert_action()
    env.close()


@needs_pusht
@pytest.mark.parametrize("action", [np.zeros(3), np.array([np.nan, 0]), np.zeros((1, 2))])
def test_bad_actions_are_refused(action: np.ndarray) -> None:
    env = make()
    env.reset(0)
    with pytest.raises(ValueError, match="pusht:PushT is 2 finite numbers"):
        env.step(action)


@needs_pusht
def test_actions_beyond_the_board_lead_to_its_border() -> None:
    far, border = make(), make()
    for env in (far, border):
        env.reset(3)
    observations = far.step(np.array([9e9, -5.0])).observation, border.step(np.array([512.0, 0.0])).observation
    np.testing.assert_array_equal(observations[0].state, observations[1].state)
