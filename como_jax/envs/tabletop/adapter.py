"""The embedded environment behind the common interface."""

from __future__ import annotations

import numpy as np

from como_jax.envs import tabletop
from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec, Observation, StepResult
from como_jax.errors import ConfigError
from como_jax.names import DEFAULT_CAMERA

_MAX_STEPS = 80


def tasks(family: str) -> tuple[str, ...]:
    """Names of all tasks."""
    return tabletop.TASKS


def make(family: str, task: str, options: EnvironmentOptions) -> TabletopEnvironment:
    """One task.

    Raises:
      ConfigError: an option that it cannot follow.
    """
    return TabletopEnvironment(task, options)


class TabletopEnvironment:
    """See `como_jax.envs.base.Environment`; the settings `look` and `scene` name looks and scenes."""

    def __init__(self, task: str, options: EnvironmentOptions):
        settings = options.take("look", "scene")
        look, scene = settings.get("look", "plain"), settings.get("scene", "drawn")
        for name, value, known in (("look", look, tabletop.LOOKS), ("scene", scene, tabletop.SCENES)):
            if value not in known:
                raise ConfigError(f"setting {name}={value}: there are {', '.join(known)}.")
        cameras = options.cameras or (DEFAULT_CAMERA,)
        if cameras != (DEFAULT_CAMERA,):
            raise ConfigError(f"The tabletop has one camera, {DEFAULT_CAMERA}, not {', '.join(cameras)}.")
        max_steps = options.max_steps or _MAX_STEPS
        try:
            self._env = tabletop.Tabletop(task, options.image_size, tabletop.LOOKS[look], max_steps, scenes=scene)
        except ValueError as error:
            raise ConfigError(f"tabletop:{task}: {error}") from error
        self.spec = EnvironmentSpec(
            name=f"tabletop:{task}",
            cameras=cameras,
            action_size=4,
            state_size=4,
            control_rate=float(tabletop.CONTROL_RATE_HZ),
            max_steps=max_steps,
        )

    def reset(self, seed: int) -> Observation:
        """Starts an episode."""
        return _observe(self._env.reset(seed=seed)[0])

    @property
    def instruction(self) -> str:
        """What the episode asks for."""
        return self._env.goal.instruction

    def step(self, action: np.ndarray, render: bool = True) -> StepResult:
        """Executes an action and draws in any case, which is quick; see `Tabletop.step`."""
        observation, _, success, truncated, _ = self._env.step(action)
        return StepResult(_observe(observation), success, success or truncated)

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action."""
        return tabletop.expert_action(self._env.scene, self._env.goal).astype(np.float32)

    def close(self) -> None:
        """Does nothing: nothing is held."""


def _observe(observation: dict[str, np.ndarray]) -> Observation:
    return Observation({DEFAULT_CAMERA: observation["image"]}, observation["state"])
