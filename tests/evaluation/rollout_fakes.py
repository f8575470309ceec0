"""Environments for tests of rollouts, well-behaved ones and others, and a policy; worker processes import them."""

import dataclasses
import os
import time
from collections.abc import Sequence

import numpy as np

from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec, Observation, StepResult
from como_jax.errors import ConfigError
from como_jax.spec.interface import History, PolicySpec

MAX_STEPS = 6
LINE_POLICY = PolicySpec(
    cameras=("front",),
    image_size=8,
    fit="stretch",
    instants=2,
    stride=1,
    chunk=3,
    action_size=2,
    state_size=3,
    control_rate=10.0,
    uses_text=True,
    robots={},
)
TABLETOP_POLICY = dataclasses.replace(LINE_POLICY, cameras=("image",), action_size=4, state_size=4)


class Line:
    """Walks a line by the sum of its actions from a place that follows from the seed; solved beyond 10.

    The task says what goes wrong in episodes of an odd seed, at the third step.
    """

    def __init__(self, name: str, options: EnvironmentOptions):
        self._task = name.partition(":")[2]
        if self._task == "refuse":
            raise ConfigError("simulator cannot be imported; install it with: pip install simulator")
        self._size = options.image_size
        self.instruction = {"silent": "", "process": str(os.getpid())}.get(self._task, f"walk, {self._task}")
        max_steps = options.max_steps or MAX_STEPS
        self.spec = EnvironmentSpec(name, ("front",), 2, 3, 10.0, max_steps)

    def reset(self, seed: int) -> Observation:
        self._seed, self._steps = seed, 0
        self._place = float(np.random.default_rng(seed).uniform(0, 5))
        if self._task == "unlucky" and seed % 2:
            raise RuntimeError("fell at the start")
        return self._observe(render=True)

    def step(self, action: np.ndarray, render: bool = True) -> StepResult:
        self._steps += 1
        if self._seed % 2 and self._steps == 3:
            {"exit": lambda: os._exit(7), "hang": lambda: time.sleep(60), "raise": self._stumble}.get(self._task, int)()
        self._place += float(action.sum())
        solved = self._place > 10
        done = solved or self._steps == self.spec.max_steps
        return StepResult(self._observe(render or done), solved, done)

    def close(self) -> None:
        """Nothing is held."""

    def _stumble(self) -> None:
        raise ValueError("stumbled\nover two lines")

    def _observe(self, render: bool) -> Observation:
        image = np.full((self._size, self._size, 3), int(10 * self._place) % 256, np.uint8)
        return Observation({"front": image} if render else {}, np.array([self._place, self._steps, 0], np.float32))


def always_exit(name: str, options: EnvironmentOptions) -> None:
    """No environment at all."""
    os._exit(3)


class FakeRunner:
    """Gives chunks that depend on all that they may depend on, and nothing else."""

    step = 7
    environment: dict[str, str] = {}

    def __init__(self, spec: PolicySpec = LINE_POLICY, scale: float = 1.0):
        self.spec, self.scale, self.batches, self.instructions = spec, scale, [], set()

    def sample(self, scenes: Sequence[History], seeds: Sequence[Sequence[int]]) -> np.ndarray:
        assert len(scenes) == len(seeds)
        self.batches.append(len(scenes))
        self.instructions |= {scene.instruction for scene in scenes}
        return np.stack([self._chunk(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)])

    def _chunk(self, scene: History, seed: Sequence[int]) -> np.ndarray:
        assert len(scene.images) == self.spec.instants and set(scene.images[0]) == set(self.spec.cameras)
        noise = np.random.default_rng(list(seed)).normal(size=(self.spec.chunk, self.spec.action_size))
        seen = scene.states.mean() / 5 + np.mean(scene.images[-1][self.spec.cameras[0]]) / 500
        return (self.scale * (noise + seen)).astype(np.float32)
