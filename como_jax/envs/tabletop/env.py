"""`Tabletop`: a small gymnasium environment with language-conditioned manipulation tasks."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from como_jax.envs.tabletop.look import PLAIN, Look
from como_jax.envs.tabletop.render import Renderer
from como_jax.envs.tabletop.scene import CONTROL_RATE_HZ, WORKSPACE_HIGH, WORKSPACE_LOW, Scene
from como_jax.envs.tabletop.tasks import SCENES, TASKS, Goal, is_solved, sample_episode

IMAGE_SIZES = (64, 224)
"""Smallest and largest side of the image, in pixels."""


class Tabletop(gymnasium.Env):
    """A gripper on a table with three objects, two coloured zones, a drawer and a button.

    Observations are a dict: `image`, uint8 [H, W, 3], RGB, and `state`, float32 [4], the gripper's x, y, z in
    metres and its opening in [0, 1]. Actions are float32 [4] in [-1, 1]: motion along x (right), y (away from
    the camera) and z (up), each as a share of 2.6 cm, and grip, positive to close and negative to open.

    The reward is 1 in the step that solves the task, which also ends the episode, and 0 otherwise. `info`
    holds `instruction` (str), `task` (str) and `success` (bool). The look never affects the physics.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE_HZ}

    def __init__(
        self,
        task: str | Sequence[str] = "reach",
        image_size: int = 64,
        look: Look = PLAIN,
        max_steps: int = 80,
        render_observations: bool = True,
        scenes: str = "drawn",
    ):
        """Sets up the environment; `reset` starts an episode.

        Args:
            task: one of TASKS, several of them to choose from in each episode, or "all".
            image_size: side of the square image, 64 to 224 pixels.
            look: how the images look.
            max_steps: number of steps after which an unsolved episode is truncated.
            render_observations: False leaves the images black, which makes steps much faster.
            scenes: what lies on the table, one of `tasks.SCENES`.

        Raises:
            ValueError: if an argument is out of range.
        """
        self.tasks = _check_tasks(task)
        low, high = IMAGE_SIZES
        if not isinstance(image_size, int) or not low <= image_size <= high:
            raise ValueError(f"image_size must be an integer from {low} to {high}, got {image_size!r}")
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}")
        if scenes not in SCENES:
            raise ValueError(f"scenes must be one of {', '.join(SCENES)}, got {scenes!r}")
        self.image_size = image_size
        self.look = look
        self.scenes = scenes
        self.max_steps = max_steps
        self.render_observations = render_observations
        self.render_mode = "rgb_array"
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image": gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "state": gymnasium.spaces.Box(
                    np.array([*WORKSPACE_LOW, 0.0], np.float32), np.array([*WORKSPACE_HIGH, 1.0], np.float32)
                ),
            }
        )
        self._renderer = Renderer(image_size, self.look)
        self._scene: Scene | None = None
        self._goal: Goal | None = None
        self._steps = 0

    @property
    def scene(self) -> Scene:
        """The true state, for experts and tests.

        Raises:
            RuntimeError: before the first `reset`.
        """
        if self._scene is None:
            raise RuntimeError("no episode has been started: call reset() first")
        return self._scene

    @property
    def goal(self) -> Goal:
        """What the episode asks for.

        Raises:
            RuntimeError: before the first `reset`.
        """
        if self._goal is None:
            raise RuntimeError("no episode has been started: call reset() first")
        return self._goal

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: fixes this and the following episodes.
            options: `{"task": name}` chooses the task of this episode.

        Raises:
            ValueError: if `options` has an unknown key or task.
        """
        super().reset(seed=seed)
        unknown = set(options or {}) - {"task"}
        if unknown:
            raise ValueError(f"options may only hold 'task', got {sorted(unknown)}")
        tasks = _check_tasks(options["task"]) if options else self.tasks
        episode_seed = int(self.np_random.integers(2**32))
        # Separate generators: what the look draws must not shift what the scene draws.
        scene_rng, look_rng = (np.random.default_rng([episode_seed, stream]) for stream in range(2))
        task = tasks[scene_rng.integers(len(tasks))]
        self._scene, self._goal = sample_episode(task, scene_rng, self.scenes)
        self._renderer.start_episode(self._scene, look_rng)
        self._steps = 0
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes an action, [4], clipped to [-1, 1].

        Raises:
            ValueError: if the action has another shape or is not finite.
            RuntimeError: before the first `reset`.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 4 finite numbers, got shape {action.shape}: {action}")
        self.scene.advance(np.clip(action, -1.0, 1.0))
        self._steps += 1
        info = self._info()
        truncated = self._steps >= self.max_steps and not info["success"]
        return self._observe(), float(info["success"]), info["success"], truncated, info

    def render(self) -> np.ndarray:
        """The image of the current state, uint8 [H, W, 3], RGB."""
        return self._renderer.render(self.scene, self._steps)

    def _observe(self) -> dict[str, np.ndarray]:
        size = self.image_size
        image = self.render() if self.render_observations else np.zeros((size, size, 3), np.uint8)
        return {"image": image, "state": self.scene.proprioception()}

    def _info(self) -> dict[str, Any]:
        goal = self.goal
        return {
            "instruction": goal.instruction,
            "task": goal.task,
            "success": is_solved(self.scene, goal),
        }


def _check_tasks(task: str | Sequence[str]) -> tuple[str, ...]:
    if task == "all":
        return TASKS
    tasks = (task,) if isinstance(task, str) else tuple(task)
    if not tasks or any(name not in TASKS for name in tasks):
        raise ValueError(f"task must be 'all' or of {', '.join(TASKS)}, got {task!r}")
    return tasks
