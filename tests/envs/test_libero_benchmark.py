"""LIBERO's package: its tasks, initial states and scenes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from como_jax.convert.libero import builder, demonstrations
from como_jax.envs.base import FIRST_ROLLOUT_SEED, EnvironmentOptions
from como_jax.envs.libero import benchmark
from como_jax.envs.libero.arm import CAMERAS, PandaEnvironment
from como_jax.envs.libero.render import Renderer
from como_jax.envs.libero.simulation import Simulation
from como_jax.envs.registry import environment_names, make_environment
from como_jax.errors import ConfigError
from tests.everyday import needs_libero

IDLE = np.array([0, 0, 0, 0, 0, 0, -1.0])


def test_suites_are_groups_of_tasks() -> None:
    assert len(environment_names("libero:all")) == 130 + 160
    assert len(environment_names("libero:libero_90")) == 90
    assert environment_names("libero:libero_goal/7,libero_10")[:2] == ("libero:libero_goal/7", "libero:libero_10/0")
    assert environment_names("libero:libero_goal,libero_goal_swap")[9:11] == (
        "libero:libero_goal/9",
        "libero:libero_goal_swap/0",
    )
    assert {name.partition("/")[0] for name in benchmark.TASKS} >= set(builder.SUITES)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("libero_goal/10", "libero_goal/1"), ("libero_gaol", "libero_goal"), ("libero_goal_swp", "libero_goal_swap")],
)
def test_an_unknown_task_or_suite_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"libero has no task '{name}', .*; did you mean {nearest}\?"):
        environment_names(f"libero:{name}")


def test_names_of_tasks_say_what_to_do_as_in_converted_datasets() -> None:
    for name in ("KITCHEN_SCENE10_close_the_top_drawer", "put_the_bowl_on_the_stove"):
        assert benchmark.named_instruction(name) == demonstrations.named_instruction(f"{name}_demo.hdf5")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        {"states": np.zeros((2, 3), np.float32)},
        {"states": np.full((1, 3), np.nan)},
        {"other": np.zeros((2, 3))},
        {"states": np.array([[{}]], object)},
        {"states": np.zeros((0, 3))},
    ],
)
def test_damaged_initial_states_are_refused(tmp_path: Path, content: bytes | dict[str, np.ndarray]) -> None:
    path = epath.Path(tmp_path / "a.npz")
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    with pytest.raises(ConfigError, match="a.npz cannot be used .*pip install --force-reinstall"):
        benchmark.read_init_states(path)


def test_initial_states_are_read_and_missing_ones_refused(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(50, 79))
    np.savez(tmp_path / "a.npz", states=states)
    np.testing.assert_array_equal(benchmark.read_init_states(epath.Path(tmp_path / "a.npz")), states)
    with pytest.raises(ConfigError, match="b.npz cannot be used"):
        benchmark.read_init_states(epath.Path(tmp_path / "b.npz"))


def test_a_task_of_another_name_or_sentence_is_refused() -> None:
    with pytest.raises(ConfigError, match="no task 'libero_goal/11'; did you mean libero_goal/1"):
        benchmark.load("libero_goal/11")
    with pytest.raises(ConfigError, match="instruction=nam: must be problem or name; did you mean name?"):
        benchmark.load("libero_goal/0", "nam")


@needs_libero
def test_libero_has_all_tasks_with_instructions_and_initial_states() -> None:
    names = benchmark.task_names()
    folder = benchmark._package_folder()
    for suite, (count, _) in benchmark.SUITES.items():
        assert len(names[suite]) == count
        name = names[suite][-1]
        states = benchmark.read_init_states(folder / "init_files" / suite / f"{name}.pruned_init.npz")
        # Time, and at least the arm's nine positions and velocities.
        assert states.shape[0] == 50 and states.shape[1] > 19
        for each in names[suite]:
            assert len(benchmark.problem_instruction(benchmark.problem_file(suite, each)).split()) >= 3
    assert benchmark.named_instruction(names["libero_goal"][0]) == "open the middle drawer of the cabinet"


@pytest.fixture(scope="module")
def stove() -> Iterator[PandaEnvironment]:
    """The task that turns the stove on, as LIBERO shows it."""
    settings = {"look": "full", "orientation": "stored"}
    env = make_environment("libero:libero_goal/7", EnvironmentOptions(image_size=128, settings=settings))
    yield env
    env.close()


@needs_libero
@pytest.mark.slow
def test_the_full_look_is_that_of_libero(stove: PandaEnvironment) -> None:
    shown, sim = stove.reset(FIRST_ROLLOUT_SEED + 3).images, stove.simulation.raw.sim
    binding = importlib.import_module("robosuite.utils.binding_utils")
    context = binding.MjRenderContextOffscreen(sim, device_id=-1)
    context.vopt.geomgroup[0] = 0
    for name, own in CAMERAS.items():
        difference = np.abs(shown[name].astype(int) - sim.render(128, 128, camera_name=own)).max(axis=-1)
        # Robosuite draws into a larger buffer, which moves edges by a fraction of a pixel.
        assert (difference > 25).mean() < 0.005 and difference.mean() < 0.5
        assert shown[name].std() > 20


@needs_libero
@pytest.mark.slow
def test_an_episode_depends_on_its_seed_alone_and_is_solved_by_its_own_predicate(stove: PandaEnvironment) -> None:
    def begin(seed: int) -> np.ndarray:
        first = stove.reset(seed).state
        return np.concatenate([first, stove.step(np.array([0.5, 0, -0.5, 0, 0, 0, 1])).observation.state])

    three = begin(3)
    four = begin(FIRST_ROLLOUT_SEED + 4)
    np.testing.assert_array_equal(begin(3), three)
    drawn = []
    for seed in (3, 4, 3):
        stove.simulation.reset(seed)
        drawn.append(stove.simulation.state())
    np.testing.assert_array_equal(drawn[0], drawn[2])
    # Neither the objects nor the arm are where they were.
    assert np.abs(drawn[1] - drawn[0])[1:8].max() > 0.01 and np.abs(drawn[1] - drawn[0])[10:].max() > 0.002
    # The fiftieth state is followed by the first; the rest of the scene is drawn anew.
    states = stove.simulation.task.init_states
    assert np.abs(begin(53) - three).max() < 0.02 < np.abs(states[3] - states[4]).max()
    assert np.abs(four - three).max() > 1e-4
    assert stove.instruction == "turn on the stove" and stove.spec.max_steps == 300
    assert stove.simulation.goal == [["turnon", "flat_stove_1"]] and not stove.simulation.success()
    sim = stove.simulation.raw.sim
    sim.data.qpos[sim.model.get_joint_qpos_addr("flat_stove_1_button")] = 1.0
    assert stove.step(IDLE).success


@needs_libero
@pytest.mark.slow
@pytest.mark.parametrize("task", ["libero_spatial/4", "libero_spatial/7", "libero_spatial/9"])
def test_what_is_drawn_in_every_episode_lies_where_it_does_in_official_states(task: str) -> None:
    simulation = Simulation(benchmark.load(task))

    def places(seed: int, official: int | None) -> dict[str, np.ndarray]:
        simulation.reset(seed, official)
        raw = simulation.raw
        return {name: raw.sim.data.body_xpos[body].copy() for name, body in raw.obj_body_id.items()}

    # Bowls start on a stove, on a cabinet and in its drawer.
    expected = places(0, 0)
    for seed in range(3):
        for name, place in places(seed, None).items():
            assert np.abs(place - expected[name]).max() < 0.08, name
    simulation.close()


@needs_libero
@pytest.mark.slow
# All that LIBERO has, and one of each change of LIBERO-PRO.
@pytest.mark.parametrize(
    "suite",
    [*benchmark.ORIGINAL, "libero_object_swap", "libero_goal_task", "libero_spatial_object", "libero_goal_lan"],
)
def test_a_task_of_a_suite_can_be_reset_stepped_and_seen_in_both_looks(suite: str) -> None:
    settings = {"look": "full", "init": "drawn", "orientation": "stored"}
    env = make_environment(f"libero:{suite}/0", EnvironmentOptions(image_size=128, settings=settings))
    full, sim = env.reset(0).images, env.simulation.raw.sim
    renderer = Renderer(sim.model._model, sim.data._data, [CAMERAS[name] for name in full], 128, "fast")
    fast = renderer.render()
    # What is not drawn would not be seen.
    renderer._culls = False
    for image, whole, original in zip(fast, renderer.render(), full.values(), strict=True):
        np.testing.assert_array_equal(image, whole)
        difference = np.abs(image.astype(int) - original).max(axis=-1)
        assert 0 < (difference > 25).mean() < 0.1 and image.std() > 20
    renderer.close()
    result = env.step(np.array([0.5, 0, -0.5, 0, 0, 0, 1]))
    assert np.abs(result.observation.state - env.reset(0).state).max() > 1e-3 and not result.success
    assert any((image != full[name]).any() for name, image in result.observation.images.items())
    env.close()
