"""Meta-World (Yu et al., 2019, arXiv:1910.10897) behind the common interface; an extra of that name."""

from __future__ import annotations

import warnings

import numpy as np

from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec, Observation, StepResult, check_action
from como_jax.envs.metaworld.instructions import INSTRUCTIONS, TASKS
from como_jax.envs.metaworld.simulator import (
    CAMERAS,
    Cameras,
    check_cameras,
    check_image_size,
    load_mujoco,
    make_expert,
    make_simulator,
)
from como_jax.errors import ConfigError

ACTION_SIZE, STATE_SIZE = 4, 4
DEFAULT_ACTION_REPEAT = 2
# Meta-World's own limit is 500. Ten demonstrations of every task had at most 250 steps of the simulator, except those
# of push-back, which had up to 342.
_MAX_SIMULATOR_STEPS = 300


def tasks(family: str) -> tuple[str, ...]:
    """Names of all tasks."""
    return TASKS


def make(family: str, task: str, options: EnvironmentOptions) -> MetaWorldEnvironment:
    """One task.

    Raises:
      ConfigError: an option that it cannot follow, or a simulator that is not installed or cannot draw.
    """
    return MetaWorldEnvironment(task, options)


class MetaWorldEnvironment:
    """See `como_jax.envs.base.Environment`.

    Actions are a motion of the hand in x, y and z, and the force that closes the gripper, in [-1, 1]; the state is the
    hand's x, y and z in metres and the gripper's opening in [0, 1]. The simulator takes 80 actions per second (2.5 ms
    times 5). With the setting `action_repeat` each action is executed several times: the control rate is 80 divided by
    it, and episodes have fewer steps. An episode ends when its task is solved, or after `max_steps`, by default the
    number that lasts 300 steps of the simulator.

    The seed decides where objects and goals are, and only the images show it: a goal in free space (reach, push,
    pick-place and others) is drawn as a small coloured ball; the goals of most other tasks are where an object is, such
    as a drawer or a button.
    """

    def __init__(self, task: str, options: EnvironmentOptions):
        repeat = _action_repeat(options.take("action_repeat").get("action_repeat", str(DEFAULT_ACTION_REPEAT)))
        cameras = tuple(options.cameras) or CAMERAS[:1]
        check_cameras(cameras)
        check_image_size(options.image_size)
        max_steps = options.max_steps or -(-_MAX_SIMULATOR_STEPS // repeat)
        self._task, self._repeat = task, repeat
        self._simulator = make_simulator(task, max_steps * repeat)
        self._cameras = Cameras(self._simulator.model, self._simulator.data, cameras, options.image_size)
        self._observation, self._num_steps = None, 0
        self._expert = make_expert(task)
        self.spec = EnvironmentSpec(
            name=f"metaworld:{task}",
            cameras=cameras,
            action_size=ACTION_SIZE,
            state_size=STATE_SIZE,
            control_rate=1 / (self._simulator.dt * repeat),
            max_steps=max_steps,
        )

    def reset(self, seed: int) -> Observation:
        """Starts an episode."""
        self._simulator.seed(seed)
        self._simulator.reset()
        # Meta-World moves objects and goals last, and only the first step updates what depends on them: without this
        # the image and the observation would still show those of the episode before.
        load_mujoco().mj_forward(self._simulator.model, self._simulator.data)
        self._simulator._prev_obs = self._simulator._get_curr_obs_combined_no_goal()
        self._observation, self._num_steps = self._simulator._get_obs(), 0
        return self._observe(render=True)

    @property
    def instruction(self) -> str:
        """What the task asks for."""
        return INSTRUCTIONS[self._task]

    def step(self, action: np.ndarray, render: bool = True) -> StepResult:
        """Executes an action, or as much of it as solves the task.

        Raises:
          ValueError: the action has another shape or is not finite.
        """
        action = check_action(action, self.spec)
        action, success = np.clip(action, -1.0, 1.0), False
        for _ in range(self._repeat):
            self._observation, _, _, _, info = self._simulator.step(action)
            success = bool(info["success"])
            if success:
                break
        self._num_steps += 1
        done = success or self._num_steps >= self.spec.max_steps
        return StepResult(self._observe(render or done), success, done)

    def expert_action(self) -> np.ndarray:
        """The action of the scripted expert, which depends on the current observation alone."""
        with warnings.catch_warnings():
            # It warns at most steps that its action will be clipped.
            warnings.simplefilter("ignore")
            action = self._expert.get_action(self._observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Frees the renderer."""
        self._cameras.close()
        self._simulator.close()

    def _observe(self, render: bool) -> Observation:
        images = self._cameras.render() if render else {}
        return Observation(images, self._observation[:STATE_SIZE].astype(np.float32))


def _action_repeat(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ConfigError(f"setting action_repeat={text}: must be a whole number, 1 or more.")
    return int(text)
