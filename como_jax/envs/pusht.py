"""Pushing a T onto its mark (gym-pusht; arXiv 2303.04137, section 5.3)."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import numpy as np

from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec, Observation, StepResult, check_action, missing_extra
from como_jax.errors import ConfigError
from como_jax.names import DEFAULT_CAMERA
from como_jax.spec.images import resize

TASKS = ("PushT",)
ACTION_SIZE = 2
BOARD_SIZE = 512
CONTROL_RATE_HZ = 10.0
INSTRUCTION = "push the T-shaped block onto the T-shaped mark"
# As in its gymnasium registration and in evaluations of its datasets.
_MAX_STEPS = 300
# Side of the images in its datasets, in pixels.
_RENDER_SIZE = 96


def tasks(family: str) -> tuple[str, ...]:
    """Names of all tasks."""
    return TASKS


def make(family: str, task: str, options: EnvironmentOptions) -> PushTEnvironment:
    """The task.

    Raises:
      ConfigError: an option that it cannot follow, or gym-pusht is not installed.
    """
    return PushTEnvironment(task, options)


class PushTEnvironment:
    """See `como_jax.envs.base.Environment`.

    An action is the position to which the round agent should go, and the state is its current position; both are (x, y)
    in pixels of a board of 512 x 512, x to the right and y down. Images are rendered with 96 pixels, as in the
    datasets, and then scaled. The task is solved when the block covers more than 95 % of the mark.
    """

    def __init__(self, task: str, options: EnvironmentOptions):
        options.take()
        cameras = options.cameras or (DEFAULT_CAMERA,)
        if cameras != (DEFAULT_CAMERA,):
            raise ConfigError(f"PushT has one camera, {DEFAULT_CAMERA}, not {', '.join(cameras)}.")
        self._image_size = options.image_size
        self._steps = 0
        self._env = _import().PushTEnv(
            obs_type="pixels_agent_pos", observation_width=_RENDER_SIZE, observation_height=_RENDER_SIZE
        )
        self.spec = EnvironmentSpec(
            name=f"pusht:{task}",
            cameras=cameras,
            action_size=ACTION_SIZE,
            state_size=2,
            control_rate=CONTROL_RATE_HZ,
            max_steps=options.max_steps or _MAX_STEPS,
        )

    def reset(self, seed: int) -> Observation:
        """Starts an episode."""
        self._steps = 0
        return self._observe(self._env.reset(seed=seed)[0])

    @property
    def instruction(self) -> str:
        """What the episode asks for."""
        return INSTRUCTION

    def step(self, action: np.ndarray, render: bool = True) -> StepResult:
        """Executes an action, clipped to the board; the simulator draws in any case.

        Raises:
          ValueError: the action has another shape or is not finite.
        """
        action = check_action(action, self.spec)
        self._steps += 1
        observation, _, _, _, info = self._env.step(np.clip(action, 0, BOARD_SIZE))
        success = bool(info["is_success"])
        return StepResult(self._observe(observation), success, success or self._steps >= self.spec.max_steps)

    def expert_action(self) -> np.ndarray:
        """Always raises NotImplementedError: there is no expert."""
        raise NotImplementedError(f"{self.spec.name} has no expert")

    def close(self) -> None:
        """Frees what the simulator holds."""
        self._env.close()

    def _observe(self, observation: dict[str, np.ndarray]) -> Observation:
        image = np.empty((self._image_size, self._image_size, 3), np.uint8)
        resize(observation["pixels"], image)
        return Observation({DEFAULT_CAMERA: image}, observation["agent_pos"].astype(np.float32))


def _import() -> ModuleType:
    """The module with the environment, imported without pygame's message on stdout."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        return importlib.import_module("gym_pusht.envs.pusht")
    except ImportError as error:
        raise missing_extra("gym-pusht", "pusht", error) from error
