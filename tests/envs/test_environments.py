"""From names to environments; and the embedded environment behind the common interface."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from como_jax.envs import tabletop
from como_jax.envs.base import EnvironmentOptions, missing_extra
from como_jax.envs.registry import FAMILIES, environment_names, make_environment
from como_jax.errors import ConfigError


def test_names_of_several_tasks_and_of_all_are_understood() -> None:
    assert environment_names("tabletop:reach") == ("tabletop:reach",)
    assert environment_names("tabletop:push, reach,push") == ("tabletop:push", "tabletop:reach")
    assert environment_names("tabletop:all") == tuple(f"tabletop:{task}" for task in tabletop.TASKS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tabeltop:reach", "there are tabletop, metaworld, .*; did you mean tabletop?"),
        ("", "there are tabletop"),
        ("tabletop:reech", "tabletop has no task 'reech', only reach, push, .*; did you mean reach?"),
        ("tabletop:reach,all,pull", "no task 'pull'"),
        ("tabletop", "name a task, as in tabletop:reach, or all of them by tabletop:all"),
        ("tabletop:,", "name a task"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        environment_names(name)


def test_one_environment_is_made_of_one_task_only() -> None:
    with pytest.raises(ConfigError, match="'tabletop:all': name one task"):
        make_environment("tabletop:all", EnvironmentOptions())


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="setting lok: this environment has look, scene; did you mean look?"):
        make_environment("tabletop:reach", EnvironmentOptions(settings={"lok": "plain"}))


def test_a_missing_simulator_is_named_with_its_extra() -> None:
    error = missing_extra("Meta-World", "metaworld", ImportError("No module named 'metaworld'"))
    assert isinstance(error, ConfigError)
    assert str(error) == (
        "Meta-World cannot be imported (No module named 'metaworld'); "
        "install it with: pip install 'como_jax[metaworld]'"
    )


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("robosuite:Lift", "robosuite", "libero"), ("pusht:PushT", "gym_pusht", "pusht")]
)
def test_a_missing_simulator_is_found_when_an_environment_is_made(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'como_jax\[{extra}\]'"):
        make_environment(name, EnvironmentOptions())


@pytest.mark.parametrize("task", tabletop.TASKS)
def test_the_expert_solves_the_tabletop_through_the_interface(task: str) -> None:
    env = make_environment(f"tabletop:{task}", EnvironmentOptions(image_size=64))
    env.reset(0)
    assert env.instruction
    results = []
    while not (results and results[-1].done):
        action = env.expert_action()
        assert action.shape == (env.spec.action_size,) and action.dtype == np.float32
        results.append(env.step(action))
    assert results[-1].success and 3 < len(results) <= env.spec.max_steps
    observation = results[-1].observation
    assert observation.images["image"].shape == (64, 64, 3) and observation.state.shape == (env.spec.state_size,)
    env.close()


def test_workers_need_not_wait_for_jax_or_tensorflow() -> None:
    modules = ", ".join(["como_jax.evaluation.rollouts.workers", *FAMILIES.values()])
    heavy = "{'jax', 'flax', 'tensorflow', 'tensorflow_datasets'}"
    command = f"import sys, {modules}; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_equal_seeds_give_equal_episodes() -> None:
    def episode(seed: int) -> tuple[np.ndarray, np.ndarray, str]:
        env = make_environment("tabletop:push", EnvironmentOptions())
        observations = [env.reset(seed)] + [env.step(env.expert_action()).observation for _ in range(5)]
        images = np.stack([observation.images["image"] for observation in observations])
        return images, np.stack([observation.state for observation in observations]), env.instruction

    first, again, other = episode(1), episode(1), episode(2)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert first[2] == again[2] and (first[0] != other[0]).any()


def test_an_unsolved_episode_ends_after_its_last_step() -> None:
    env = make_environment("tabletop:reach", EnvironmentOptions(max_steps=2))
    env.reset(0)
    results = [env.step(np.zeros(4)) for _ in range(2)]
    assert [(result.success, result.done) for result in results] == [(False, False), (False, True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"look": "shiny"}}, "look=shiny: there are plain"),
        ({"cameras": ("corner",)}, "one camera, image, not corner"),
        ({"image_size": 0}, "image_size"),
        ({"max_steps": -1}, "max_steps"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_environment("tabletop:reach", EnvironmentOptions(**options))
