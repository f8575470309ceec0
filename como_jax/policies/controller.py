"""From chunks of actions to the action of each step: history, receding horizon and temporal ensembling."""

from __future__ import annotations

import collections
import dataclasses
import math

import chex
import numpy as np

from como_jax.envs.base import Observation
from como_jax.errors import ConfigError, NonFiniteError
from como_jax.policies.spec import PolicySpec, Scene


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """How chunks are carried out.

    Attributes:
      execute: steps after which the next chunk is asked for; 0 for half a chunk.
      ensemble: None to follow the newest chunk alone. Otherwise the action is the mean over all chunks that cover the
        step, weighted by `exp(-ensemble * steps since the oldest of them was asked for)` as in temporal ensembling
        (Zhao et al. 2023, arXiv 2304.13705): 0 weighs all alike, and the larger, the more the oldest counts.
    """

    execute: int = 0
    ensemble: float | None = None

    def resolve(self, spec: PolicySpec) -> ControlConfig:
        """The same with all values set.

        Raises:
          ConfigError: values that do not suit the policy's chunks.
        """
        if not 0 <= self.execute <= spec.chunk:
            raise ConfigError(f"--execute {self.execute}: the policy predicts chunks of {spec.chunk} steps.")
        if self.ensemble is not None and not math.isfinite(self.ensemble):
            raise ConfigError(f"--ensemble {self.ensemble}: must be finite, as in 0.01.")
        return dataclasses.replace(self, execute=self.execute or max(1, spec.chunk // 2))


class Controller:
    """One episode's history and chunks.

    Each step: `observe` what is seen, `add_chunk` for the current `scene` if it `needs_chunk`, take `next_action`.

    Attributes:
      steps: actions taken so far.
    """

    def __init__(self, spec: PolicySpec, config: ControlConfig, instruction: str):
        self._spec, self._config, self._instruction = spec, config.resolve(spec), instruction
        self._history: collections.deque[Observation] = collections.deque(maxlen=(spec.instants - 1) * spec.stride + 1)
        self._chunks: list[tuple[int, np.ndarray]] = []
        self.steps = 0

    def observe(self, observation: Observation) -> None:
        """Takes note of what is seen now."""
        self._history.append(observation)

    def scene(self) -> Scene:
        """What the policy is asked about; the first observation stands for those before the episode."""
        spec, now = self._spec, len(self._history) - 1
        times = (max(0, now - back * spec.stride) for back in reversed(range(spec.instants)))
        observations = [self._history[time] for time in times]
        states = np.stack([observation.state for observation in observations]).astype(np.float32)
        return Scene([observation.images for observation in observations], states, self._instruction)

    def needs_chunk(self) -> bool:
        """Whether a chunk must be added before the next action."""
        return self.steps % self._config.execute == 0 and not (self._chunks and self._chunks[-1][0] == self.steps)

    def add_chunk(self, chunk: np.ndarray) -> None:
        """Takes the actions, float32 `[H, A]`, that the policy predicts from now on.

        Raises:
          NonFiniteError: an action is not finite.
        """
        chex.assert_shape(chunk, (self._spec.chunk, self._spec.action_size))
        if not np.isfinite(chunk).all():
            raise NonFiniteError(f"The policy gave an action that is not finite at step {self.steps}.")
        if self._config.ensemble is None:
            self._chunks.clear()
        self._chunks.append((self.steps, chunk))

    def next_action(self) -> np.ndarray:
        """The action to take now, float32 `[A]`."""
        if self.needs_chunk():
            raise RuntimeError("add_chunk must be called before next_action when needs_chunk() holds")
        self._chunks = [(start, chunk) for start, chunk in self._chunks if self.steps < start + len(chunk)]
        starts = np.array([start for start, _ in self._chunks])
        actions = np.stack([chunk[self.steps - start] for start, chunk in self._chunks])
        weights = np.exp(-(self._config.ensemble or 0.0) * (starts - starts[0]))
        self.steps += 1
        return (weights @ actions / weights.sum()).astype(np.float32)
