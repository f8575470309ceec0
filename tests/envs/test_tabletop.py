"""Tests of the embedded tabletop environment."""

import dataclasses
import subprocess
import sys
import warnings

import cv2
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from como_jax.envs.tabletop import (
    HARD,
    HUMAN,
    PLAIN,
    SCENES,
    TASKS,
    ExpertStyle,
    Look,
    Tabletop,
    demonstrate,
    expert_action,
)
from como_jax.envs.tabletop.tasks import PHRASES

LOOKS = {"plain": PLAIN, "hard": HARD, "human": HUMAN}


def _play(env: Tabletop, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    observations = [env.reset(seed=seed)[0]]
    observations += [env.step(rng.uniform(-1, 1, 4))[0] for _ in range(steps)]
    return np.stack([o["image"] for o in observations]), np.stack([o["state"] for o in observations])


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first.astype(int) - second.astype(int)).max(-1)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_same_seed_and_actions_give_identical_frames(look):
    first, second = (_play(Tabletop("all", look=look), seed=3, steps=12)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert _difference(first, _play(Tabletop("all", look=look), seed=4, steps=12)[0]).any()


def test_reset_without_seed_starts_another_episode():
    env = Tabletop("all")
    first, second = env.reset(seed=0)[0]["image"], env.reset()[0]["image"]
    assert _difference(first, second).any()
    np.testing.assert_array_equal(env.reset(seed=0)[0]["image"], first)


def test_render_draws_the_observation_and_changes_nothing():
    env = Tabletop("push", look=HARD)
    image = env.reset(seed=0)[0]["image"]
    np.testing.assert_array_equal(env.render(), image)
    np.testing.assert_array_equal(env.render(), image)


@pytest.mark.parametrize("task", TASKS)
def test_look_does_not_change_the_physics(task):
    plain, hard, human = (demonstrate(Tabletop(task, look=look), seed=5) for look in LOOKS.values())
    for other in (hard, human):
        np.testing.assert_array_equal(plain.states, other.states)
        np.testing.assert_array_equal(plain.actions, other.actions)
        assert plain.instruction == other.instruction


@pytest.mark.parametrize("task", TASKS)
def test_expert_solves_95_percent(task):
    env = Tabletop(task, render_observations=False)
    demonstrations = [demonstrate(env, seed) for seed in range(200)]
    assert np.mean([d.success for d in demonstrations]) >= 0.95
    assert min(len(d.actions) for d in demonstrations) > 2


@pytest.mark.parametrize("task", TASKS)
def test_expert_recovers_from_noise(task):
    env = Tabletop(task, render_observations=False)
    assert np.mean([demonstrate(env, seed, noise=0.15).success for seed in range(30)]) >= 0.9


def test_demonstration_records_the_executed_actions():
    env = Tabletop("pick_place")
    demonstration = demonstrate(env, seed=1, noise=0.1)
    steps = len(demonstration.actions)
    assert demonstration.images.shape == (steps + 1, 64, 64, 3)
    assert demonstration.states.shape == (steps + 1, 4)
    assert demonstration.actions.shape == (steps, 4)
    env.reset(seed=1)
    for t, action in enumerate(demonstration.actions):
        observation, *_, info = env.step(action)
        np.testing.assert_array_equal(observation["image"], demonstration.images[t + 1])
    assert info["success"] == demonstration.success
    assert info["instruction"] == demonstration.instruction


def test_expert_actions_are_rich():
    env = Tabletop("all", render_observations=False)
    actions = np.concatenate([demonstrate(env, seed).actions for seed in range(60)])
    assert (actions.std(0) > 0.2).all()
    assert (np.abs(actions) < 0.95).mean() > 0.8


@pytest.mark.parametrize("task", TASKS)
def test_no_task_is_solved_at_reset(task):
    env = Tabletop(task, render_observations=False)
    assert not any(env.reset(seed=seed)[1]["success"] for seed in range(100))


@pytest.mark.parametrize("task", TASKS)
def test_standing_still_solves_nothing(task):
    env = Tabletop(task, render_observations=False)
    for seed in range(20):
        env.reset(seed=seed)
        for _ in range(5):
            _, reward, terminated, _, _ = env.step(np.zeros(4))
            assert not terminated and reward == 0


def test_instructions_name_the_object_and_vary():
    env = Tabletop("push", render_observations=False)
    phrases = set()
    for seed in range(30):
        instruction = env.reset(seed=seed)[1]["instruction"]
        item, zone = env.scene.objects[env.goal.target], env.scene.zones[env.goal.zone]
        assert f"{item.colour} {item.shape}" in instruction and f"{zone.colour} zone" in instruction
        phrases.add(instruction.split()[0])
    assert len(phrases) > 1


def test_gymnasium_accepts_the_environment():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Made by its class and not by name, it has no spec.
        warnings.filterwarnings("ignore", message=".*not having a spec.*")
        check_env(Tabletop("all", look=HARD))


def test_episode_is_truncated_after_max_steps():
    env = Tabletop("press_button", max_steps=3, render_observations=False)
    env.reset(seed=0)
    assert [env.step(np.zeros(4))[3] for _ in range(3)] == [False, False, True]


def test_reset_options_choose_the_task():
    env = Tabletop("all", render_observations=False)
    assert env.reset(seed=0, options={"task": "open_drawer"})[1]["task"] == "open_drawer"
    tasks = {env.reset(seed=seed)[1]["task"] for seed in range(60)}
    assert tasks == set(TASKS)


@pytest.mark.parametrize("look", [PLAIN, HUMAN], ids=["gripper", "hand"])
@pytest.mark.parametrize("dimension", range(4))
def test_each_action_dimension_is_visible(dimension, look):
    env = Tabletop("reach", look=look)
    for seed in range(5):
        env.reset(seed=seed)
        env.scene.gripper.position[:] = (0.0, 0.0, 0.1)
        env.scene.gripper.opening = 1.0
        before = env.render()
        action = np.zeros(4)
        action[dimension] = 1.0
        for _ in range(2):
            after = env.step(action)[0]["image"]
        changed = _difference(before, after) > 25
        assert changed.sum() > 25


def test_the_directions_differ_in_the_image():
    """A model that sees images only must be able to tell dx, dy and dz apart."""
    env = Tabletop("reach")
    flows = []
    for dimension in range(3):
        env.reset(seed=0)
        env.scene.gripper.position[:] = (0.0, 0.0, 0.08)
        start = _agent_centre(env.render())
        action = np.eye(4)[dimension]
        for _ in range(4):
            image = env.step(action)[0]["image"]
        flows.append(_agent_centre(image) - start)
    lengths = np.linalg.norm(flows, axis=1)
    assert (lengths > 4).all()
    directions = np.array(flows) / lengths[:, None]
    angles = np.degrees(np.arccos(np.clip(directions @ directions.T, -1, 1)))
    assert angles[np.triu_indices(3, 1)].min() > 12


def _agent_centre(image: np.ndarray) -> np.ndarray:
    """Mean (x, y) of the turquoise parts of the gripper."""
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    rows, columns = np.nonzero((blue - red > 90) & (green - red > 90))
    return np.array([columns.mean(), rows.mean()])


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("size", [96, 224])
def test_image_sizes_agree(look, size):
    small = Tabletop("all", look=look).reset(seed=2)[0]["image"]
    large = Tabletop("all", look=look, image_size=size).reset(seed=2)[0]["image"]
    assert large.shape == (size, size, 3)
    reduced = cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - reduced).mean() < 4


@pytest.mark.parametrize(
    "change", [{"background": "textured"}, {"distractors": 3}, {"camera_shake": 0.03}, {"lighting": 0.8}]
)
def test_each_switch_changes_the_image(change):
    images, _ = _play(Tabletop("push", look=Look(**change)), seed=1, steps=4)
    plain, _ = _play(Tabletop("push"), seed=1, steps=4)
    assert (_difference(images, plain) > 10).any(axis=(1, 2)).all()


def test_hand_looks_different_from_gripper():
    images = {name: _play(Tabletop("reach", look=Look(agent=name)), 0, 0)[0][0] for name in ("gripper", "hand")}
    assert (_difference(images["gripper"], images["hand"]) > 40).sum() > 100


def test_carried_object_follows_and_falls_when_released():
    env = Tabletop("pick_place", render_observations=False)
    env.reset(seed=0)
    item = env.scene.objects[env.goal.target]
    while env.scene.held_object is not item:
        env.step(expert_action(env.scene, env.goal, ExpertStyle()))
    offset = item.position - env.scene.gripper.position
    for action in ([0, 0, 1, 1], [0.5, -0.5, 1, 1], [-1, 0.2, 0.3, 0]):
        env.step(np.array(action))
        np.testing.assert_allclose(item.position - env.scene.gripper.position, offset, atol=1e-9)
    assert item.position[2] > 0.03
    for _ in range(4):
        env.step(np.array([0, 0, 0, -1.0]))
    assert env.scene.held_object is None
    assert item.position[2] == 0


def test_objects_stay_on_the_table_and_apart():
    env = Tabletop("all", render_observations=False, max_steps=1000)
    rng = np.random.default_rng(0)
    for seed in range(5):
        env.reset(seed=seed)
        drift = rng.uniform(-1, 1, (6, 4)).repeat(20, axis=0) + rng.uniform(-0.5, 0.5, (120, 4))
        drift[:, 2] -= 0.3
        for action in drift:
            observation, *_ = env.step(action)
            assert env.observation_space["state"].contains(observation["state"])
        positions = np.array([item.position for item in env.scene.objects])
        assert np.isfinite(positions).all() and (positions[:, 2] >= 0).all()
        assert (np.abs(positions[:, 0]) < 0.3).all() and (np.abs(positions[:, 1]) < 0.3).all()


def test_closed_drawer_stops_the_gripper():
    env = Tabletop("open_drawer", render_observations=False)
    env.reset(seed=0)
    drawer = env.scene.drawer
    env.scene.gripper.position[:] = (drawer.x, 0.1, 0.045)
    env.scene.gripper.opening = 0.0
    for _ in range(8):
        env.step(np.array([0, 1.0, 0, 0]))
    assert env.scene.gripper.position[1] < drawer.front
    assert drawer.opening == 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Tabletop("juggle"), ["task", "pick_place", "juggle"]),
        (lambda: Tabletop(()), ["task"]),
        (lambda: Tabletop(image_size=16), ["image_size", "64", "224"]),
        (lambda: Tabletop(max_steps=0), ["max_steps"]),
        (lambda: Tabletop(scenes="empty"), ["scenes", "drawn", "fixed", "recoloured", "empty"]),
        (lambda: Look(background="space"), ["background", "plain", "textured"]),
        (lambda: Look(agent="foot"), ["agent", "gripper", "hand"]),
        (lambda: Look(distractors=-1), ["distractors", "8"]),
        (lambda: Look(distractors=1.5), ["distractors", "integer"]),
        (lambda: Look(camera_shake=3.0), ["camera_shake", "0.1"]),
        (lambda: Look(lighting=float("nan")), ["lighting", "1"]),
        (lambda: Tabletop().reset(options={"speed": 1}), ["options", "task", "speed"]),
    ],
)
def test_bad_values_are_refused_by_name(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_a_fixed_scene_has_the_same_things_and_words_at_other_places():
    starts = {}
    for scenes in SCENES:
        env = Tabletop("push", render_observations=False, scenes=scenes)
        starts[scenes] = []
        for seed in range(12):
            env.reset(seed=seed)
            starts[scenes].append((env.goal.instruction, tuple(item.name for item in env.scene.objects)))
        places = {env.scene.objects[0].position[0] for _ in range(3) if env.reset()}
        assert len(places) == 3
    assert len(set(starts["drawn"])) == 12
    sentence = "push the cylinder to the yellow zone"
    assert set(starts["fixed"]) == {(sentence, ("red cube", "green cylinder", "blue ball"))}
    assert set(starts["recoloured"]) == {(sentence, ("yellow cube", "purple cylinder", "orange ball"))}


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_does_what_the_words_of_a_fixed_scene_say(task):
    env = Tabletop(task, render_observations=False, scenes="fixed")
    found = [demonstrate(env, seed) for seed in range(3)]
    assert all(each.success for each in found)
    goal = env.goal
    for name, thing in (("object", env.scene.objects[goal.target].shape), ("zone", env.scene.zones[goal.zone].colour)):
        assert f"{{{name}}}" not in PHRASES[task][0] or thing in goal.instruction


def test_bad_actions_are_refused():
    env = Tabletop(render_observations=False)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(4))
    env.reset(seed=0)
    for action in (np.zeros(3), np.full(4, np.nan)):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(action)


def test_look_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.agent = "hand"


def test_import_needs_no_jax():
    code = "import sys, como_jax.envs; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
