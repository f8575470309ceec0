"""From chunks of actions to the action of each step: history, receding horizon and temporal ensembling.

Axes: H steps of a chunk, A numbers of an action, S numbers of a state.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from como_jax.errors import ConfigError, NonFiniteError
from como_jax.spec.interface import History, PolicySpec


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """How chunks are carried out.

    Attributes:
      execute: steps after which the next chunk is asked for; 0 means half a chunk.
      ensemble: None to follow the newest chunk alone. Otherwise the action is the mean over all chunks that cover the
        step, weighted by `exp(-ensemble * steps since the oldest of them was asked for)` as in temporal ensembling
        (Zhao et al. 2023, arXiv 2304.13705): 0 weighs all alike, and the larger it is, the more the oldest counts.
    """

    execute: int = 0
    ensemble: float | None = None

    def resolve(self, chunk: int) -> ControlConfig:
        """The same with `execute` set, for chunks of so many steps.

        Raises:
          ConfigError: a value out of range.
        """
        if not 0 <= self.execute <= chunk:
            raise ConfigError(
                f"`execute` {self.execute} must lie between 0 and {chunk}, since the policy predicts chunks of {chunk} "
                "steps."
            )
        if self.ensemble is not None and not math.isfinite(self.ensemble):
            raise ConfigError(f"`ensemble` {self.ensemble} must be a finite number, such as 0.01.")
        return dataclasses.replace(self, execute=self.execute or max(1, chunk // 2))


class Controller:
    """History and chunks of one episode.

    At each step call `observe`, then `add_chunk` with the policy's answer to `history` if `needs_chunk`, then
    `next_action`. Images may be missing where they were not needed (`needs_images`).

    Attributes:
      steps: actions taken so far.
    """

    def __init__(self, spec: PolicySpec, config: ControlConfig):
        self._spec, self._config = spec, config.resolve(spec.chunk)
        # One observation more than a history reaches back, which `forget` brings back into it.
        length = (spec.instants - 1) * spec.stride + 2
        self._seen: collections.deque[tuple[Mapping[str, np.ndarray], np.ndarray]] = collections.deque(maxlen=length)
        self._chunks: list[tuple[int, np.ndarray]] = []
        self.steps = 0

    def observe(self, images: Mapping[str, np.ndarray], state: np.ndarray) -> None:
        """Adds what is seen now: uint8 RGB `[H, W, 3]` by camera, and the state `[S]` in the robot's units."""
        self._seen.append((images, state))

    def forget(self) -> None:
        """Takes the last `observe` back."""
        self._seen.pop()

    def history(self, instruction: str) -> History:
        """What the policy is asked about now; the first observation stands for those before the episode."""
        now = len(self._seen) - 1
        times = [max(0, now - back * self._spec.stride) for back in reversed(range(self._spec.instants))]
        seen = [self._seen[time] for time in times]
        states = np.stack([state for _, state in seen]).astype(np.float32)
        return History([images for images, _ in seen], states, instruction)

    def needs_chunk(self) -> bool:
        """Whether a chunk must be added before the next action."""
        return self.steps % self._config.execute == 0 and not (self._chunks and self._chunks[-1][0] == self.steps)

    def needs_images(self) -> bool:
        """Whether the images after the actions taken so far are part of this or a later `history`."""
        backs = range(0, self._spec.instants * self._spec.stride, self._spec.stride)
        return any((self.steps + back) % self._config.execute == 0 for back in backs)

    def add_chunk(self, chunk: np.ndarray) -> None:
        """Adds the actions, float32 `[H, A]` in the robot's units, that the policy predicts from now on.

        Raises:
          ValueError: the chunk has another shape.
          NonFiniteError: an action is not finite.
        """
        expected = (self._spec.chunk, self._spec.action_size)
        if chunk.shape != expected:
            raise ValueError(f"a chunk is {chunk.shape} and must be {expected}")
        if not np.isfinite(chunk).all():
            raise NonFiniteError(f"The policy gave an action that is not finite at step {self.steps}.")
        if self._config.ensemble is None:
            self._chunks.clear()
        self._chunks.append((self.steps, chunk))

    def next_action(self) -> np.ndarray:
        """The action to take now, float32 `[A]`; raises RuntimeError where `needs_chunk`."""
        if self.needs_chunk():
            raise RuntimeError("add_chunk must be called before next_action when needs_chunk() holds")
        self._chunks = [(start, chunk) for start, chunk in self._chunks if self.steps < start + len(chunk)]
        starts = np.array([start for start, _ in self._chunks])
        actions = np.stack([chunk[self.steps - start] for start, chunk in self._chunks])
        weights = np.exp(-(self._config.ensemble or 0.0) * (starts - starts[0]))
        self.steps += 1
        return (weights @ actions / weights.sum()).astype(np.float32)
