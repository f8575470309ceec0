"""One demonstration of the expert: first acted without looking, then, if it succeeded, looked at step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from como_jax.convert.demonstrations import Demonstration
from como_jax.envs.libero.arm import Expert, PandaEnvironment

HELD_STEPS = 10
"""Steps for which a solved task must stay solved after the expert has let go."""
# A policy learns from them that nothing is left to do.
_KEPT_HELD_STEPS = 2
_ARM = 6


MakeExpert = Callable[[Any, int], Expert]


class FailedAttempt(Exception):
    """The expert did not solve the task; the message says how it ended."""


@dataclasses.dataclass
class _Course:
    """What happened at each step: state of the arm, look of the scene before the action, and the action."""

    states: list[np.ndarray] = dataclasses.field(default_factory=list)
    scenes: list[Any] = dataclasses.field(default_factory=list)
    actions: list[np.ndarray] = dataclasses.field(default_factory=list)

    def cut(self, length: int) -> _Course:
        """Its first steps."""
        return _Course(self.states[:length], self.scenes[:length], self.actions[:length])


def record(env: PandaEnvironment, make_expert: MakeExpert, seed: int, noise: float) -> Demonstration:
    """Records one successful demonstration; equal seeds give equal ones.

    Args:
      env: of the task; images are drawn only once the task is known to be solved.
      make_expert: of LIBERO's environment and a seed.
      seed: fixes the start, the expert and the noise.
      noise: standard deviation of Gaussian noise that is added to the six numbers that move the arm; what was executed
        is what is recorded.

    Raises:
      FailedAttempt: the task was not solved, or not for `HELD_STEPS` steps.
    """
    env.begin(seed)
    course = _act(env, make_expert(env.simulation.raw, seed), np.random.default_rng([seed, 2]), noise)
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in env.spec.cameras}
    for scene in course.scenes:
        env.show(scene)
        for camera, image in env.images().items():
            images[camera].append(image)
    states, actions = np.stack(course.states), np.stack(course.actions)
    return Demonstration(images, states, actions, env.instruction, env.spec.control_rate, success=True)


def _act(env: PandaEnvironment, expert: Expert, rng: np.random.Generator, noise: float) -> _Course:
    """Lets the expert act until the task is solved and stays solved."""
    course, held, idle = _Course(), 0, 0
    while len(course.actions) < env.spec.max_steps:
        course.states.append(env.state())
        course.scenes.append(env.scene())
        action = np.array(expert.act(), np.float32)
        action[:_ARM] += noise * rng.standard_normal(_ARM)
        action = np.clip(action, -1, 1)
        course.actions.append(action)
        env.simulation.step(action)
        if expert.reason:
            raise FailedAttempt(expert.reason)
        if expert.done:
            idle += 1
            held = held + 1 if env.simulation.success() else 0
            if held == HELD_STEPS:
                return course.cut(len(course.actions) - HELD_STEPS + _KEPT_HELD_STEPS)
            if idle == 2 * HELD_STEPS:
                raise FailedAttempt("the expert had finished, and the goal did not hold")
    raise FailedAttempt(f"not solved within {env.spec.max_steps} steps")
