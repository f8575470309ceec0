"""Rollouts in worker processes: what they do not depend on, and what becomes of those that go wrong."""

import _thread
import dataclasses
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec
from como_jax.errors import ConfigError, NonFiniteError
from como_jax.evaluation.rollouts.results import summarize
from como_jax.evaluation.rollouts.rollout import (
    RolloutOptions,
    check_compatible,
    check_rollouts,
    environment_seed,
    rendered_size,
    roll_out,
)
from como_jax.spec.control import ControlConfig
from como_jax.spec.interface import PolicySpec
from tests.evaluation.rollout_fakes import LINE_POLICY, MAX_STEPS, TABLETOP_POLICY, FakeRunner, Line, always_exit

IMAGES = EnvironmentOptions(image_size=8)


def options(**changes) -> RolloutOptions:
    return RolloutOptions(**{"episodes": 4, "workers": 2, "control": ControlConfig(2), **changes})


def play(names: Sequence[str], make=Line, runner: FakeRunner | None = None, **changes):
    """All results, and the recordings by task and episode."""
    recordings = {}

    def keep(result, recording):
        recordings[result.task, result.episode] = recording

    return roll_out(runner or FakeRunner(), names, IMAGES, options(**changes), keep, make), recordings


def test_results_depend_neither_on_the_number_of_workers_nor_on_other_tasks():
    names = ["line:far", "line:near"]
    alone, alone_recordings = play(names, workers=1)
    many, recordings = play(names, workers=3)
    reversed_, _ = play(names[::-1], workers=2, episodes=3)
    assert alone == many
    assert [(result.task, result.episode) for result in alone] == [(name, i) for name in names for i in range(4)]
    assert reversed_ == alone[4:7] + alone[:3]
    for key, recording in recordings.items():
        np.testing.assert_array_equal(recording.frames, alone_recordings[key].frames)
        assert recording.rate == 10.0
    # The policy draws anew in every task, episode and rollout.
    assert len({result.steps for result in alone}) > 1 and 0 < sum(result.success for result in alone) < len(alone)
    far, near = ([recordings[name, i].frames[-1].mean() for i in range(4)] for name in names)
    assert far != near
    other, _ = play(names, seed=1)
    assert [r.steps for r in other] != [r.steps for r in alone] and other[1].seed == environment_seed(1, 1) == 901000001


@pytest.mark.parametrize(("instants", "seen"), [(1, {0, 3, 6}), (2, {0, 2, 3, 5, 6})])
def test_what_is_not_filmed_is_drawn_where_the_policy_looks_and_at_the_end(instants: int, seen: set[int]):
    policy = dataclasses.replace(LINE_POLICY, instants=instants)
    control, names = ControlConfig(3), ["line:far", "line:near"]
    filmed, all_frames = play(names, runner=FakeRunner(policy), control=control)
    partly, frames = play(names, runner=FakeRunner(policy), control=control, videos=1)
    assert partly == filmed
    for (name, number), recording in frames.items():
        every = all_frames[name, number].frames
        last = len(every) - 1
        drawn = range(last + 1) if number < 1 else sorted({step for step in seen if step < last} | {last})
        np.testing.assert_array_equal(recording.frames, [every[step] for step in drawn])


def test_the_policy_is_asked_for_all_at_once_in_batches_of_one_size():
    runner = FakeRunner(scale=0.0)
    results, recordings = play(["line:far"], runner=runner, workers=3, episodes=3, control=ControlConfig(2))
    assert runner.batches == [3] * (MAX_STEPS // 2)
    assert [result.steps for result in results] == [MAX_STEPS] * 3
    assert all(len(recording.frames) == MAX_STEPS + 1 for recording in recordings.values())
    runner = FakeRunner(scale=0.0)
    play(["line:far"], runner=runner, workers=2, episodes=3)
    assert set(runner.batches) == {2}
    assert runner.instructions == {"walk, far"}


@pytest.mark.parametrize(
    "task, reason",
    [
        ("exit", "the worker process ended: exit status 7"),
        ("raise", "ValueError: stumbled over two lines"),
        ("hang", "no answer within 1.5 seconds"),
    ],
)
def test_a_worker_that_fails_costs_its_episode_and_the_run_goes_on(task: str, reason: str):
    results, recordings = play(
        [f"line:{task}", "line:far"], runner=FakeRunner(scale=0.0), step_timeout=1.5, start_timeout=60.0
    )
    broken, sound = results[:4], results[4:]
    assert [result.reason for result in broken] == ["", reason, "", reason]
    assert [result.steps for result in broken] == [MAX_STEPS, 2, MAX_STEPS, 2]
    assert [result.outcome for result in broken] == ["failure", "crashed", "failure", "crashed"]
    assert broken[1].instruction == f"walk, {task}"
    assert all(result.steps == MAX_STEPS and not result.crashed for result in sound)
    assert len(recordings) == 8


def test_an_episode_that_cannot_begin_costs_itself_alone():
    results, _ = play(["line:unlucky"], workers=1)
    assert [result.reason for result in results] == ["", "RuntimeError: fell at the start"] * 2
    results, _ = play(["line:far"], make=always_exit, episodes=2)
    assert [result.reason for result in results] == ["the worker process ended: exit status 3"] * 2
    assert [(result.steps, result.success) for result in results] == [(0, False)] * 2


def test_what_does_not_fit_is_refused_before_any_episode():
    runner = FakeRunner()
    with pytest.raises(ConfigError, match="line:silent gives no instruction"):
        play(["line:far", "line:silent"], runner=runner)
    with pytest.raises(ConfigError, match="pip install simulator"):
        play(["line:far", "line:refuse"], runner=runner)
    assert not runner.batches
    for changes, flag in [({"episodes": 0}, "`episodes` 0"), ({"seed": 5000}, "`seed` 5000"),
                          ({"workers": 0}, "`workers`"), ({"control": ControlConfig(4)}, "`execute` 4")]:  # fmt: skip
        with pytest.raises(ConfigError, match=flag):
            play(["line:far"], runner=runner, **changes)
        with pytest.raises(ConfigError, match=flag):
            check_rollouts(LINE_POLICY, ["line:far"], IMAGES, options(**changes), Line)
    with pytest.raises(ConfigError, match="no instruction"):
        check_rollouts(LINE_POLICY, ["line:far", "line:silent"], IMAGES, options(), Line)
    check_rollouts(LINE_POLICY, ["line:far"], IMAGES, options(), Line)


def test_an_environment_must_suit_the_policy():
    good = EnvironmentSpec("line:far", ("front",), 2, 3, 10.0, 6)
    assert check_compatible(LINE_POLICY, good, "walk") == []

    def refusal(spec: PolicySpec = LINE_POLICY, instruction: str = "walk", **changes) -> str:
        with pytest.raises(ConfigError) as error:
            check_compatible(spec, dataclasses.replace(good, **changes), instruction)
        return str(error.value)

    assert refusal(action_size=7) == "line:far takes actions of 7 numbers, the policy's have 2."
    assert refusal(state_size=9) == "line:far has a state of 9 numbers, the policy was trained on 3."
    cameras = refusal(cameras=("front", "wrist"))
    assert "has the cameras front, wrist" in cameras and "trained on front:" in cameras
    both = dataclasses.replace(LINE_POLICY, cameras=("front", "wrist"))
    assert "trained on front, wrist" in refusal(both)
    assert "no instruction" in refusal(instruction=" ")

    check_compatible(dataclasses.replace(LINE_POLICY, uses_text=False), good, "")
    check_compatible(dataclasses.replace(LINE_POLICY, state_size=0), dataclasses.replace(good, state_size=9), "walk")
    (warning,) = check_compatible(LINE_POLICY, dataclasses.replace(good, control_rate=20.0), "walk")
    assert "20 actions a second, and the policy was trained on 10" in warning


def test_another_control_rate_is_warned_of_once(caplog: pytest.LogCaptureFixture):
    runner = FakeRunner(dataclasses.replace(LINE_POLICY, control_rate=5.0))
    with caplog.at_level(logging.WARNING, "como_jax"):
        play(["line:far", "line:near"], runner=runner, episodes=1)
    assert [record.message for record in caplog.records] == [
        "The environment takes 10 actions a second, and the policy was trained on 5."
    ]


def test_actions_that_are_not_finite_end_the_run():
    with pytest.raises(NonFiniteError, match="step 0"):
        play(["line:far"], runner=FakeRunner(scale=float("nan")))


def test_interrupting_ends_the_workers():
    class Stuck(FakeRunner):
        def sample(self, scenes, seeds):
            self.processes = [int(scene.instruction) for scene in scenes]
            threading.Thread(target=_thread.interrupt_main).start()
            time.sleep(30)

    runner = Stuck()
    # A job in the background of a shell is started with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            play(["line:process"], runner=runner)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(set(runner.processes)) == 2
    for process in runner.processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_the_tabletop_rolls_out_from_end_to_end():
    names = ["tabletop:reach", "tabletop:push"]
    environment = EnvironmentOptions(image_size=rendered_size(TABLETOP_POLICY), max_steps=5)
    recordings = {}
    results = roll_out(
        FakeRunner(TABLETOP_POLICY),
        names,
        environment,
        options(episodes=2),
        lambda result, recording: recordings.update({(result.task, result.episode): recording}),
    )
    assert [(result.task, result.episode) for result in results] == [(name, i) for name in names for i in range(2)]
    assert not any(result.crashed for result in results) and all(result.instruction for result in results)
    for result in results:
        frames = recordings[result.task, result.episode].frames
        assert len(frames) == result.steps + 1 and frames[0].shape == (64, 64, 3)
        assert any((frame != frames[0]).any() for frame in frames[1:])
    alone = roll_out(FakeRunner(TABLETOP_POLICY), names, environment, options(episodes=2, workers=1))
    summary = summarize(alone)
    assert [task.episodes for task in summary.tasks] == [2, 2]
    assert summary.total.successes == sum(result.success for result in results)


def test_workers_need_no_jax():
    modules = "como_jax.evaluation.rollouts.workers, como_jax.envs.tabletop.adapter"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_makers_of_environments_may_have_arguments():
    make = functools.partial(Line)
    assert len(play(["line:far"], make=make, episodes=1)[0]) == 1
