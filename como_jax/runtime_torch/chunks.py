"""From chunks of actions to the action of each step: receding horizon and temporal ensembling."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from como_jax.runtime_torch.errors import InputError


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """How chunks are carried out.

    Attributes:
      execute: steps after which the next chunk is asked for; 0 for half a chunk.
      ensemble: None to follow the newest chunk alone. Otherwise the action is the mean over all chunks that cover the
        step, weighted by `exp(-ensemble * steps since the oldest of them was asked for)` as in temporal ensembling
        (arXiv 2304.13705): 0 weighs all alike, and the larger, the more the oldest counts.
    """

    execute: int = 0
    ensemble: float | None = None

    def resolve(self, chunk: int) -> ControlConfig:
        """The same with all values set, for chunks of so many steps; raises InputError where they do not suit them."""
        if not 0 <= self.execute <= chunk:
            raise InputError(f"execute {self.execute}: the policy predicts chunks of {chunk} steps.")
        if self.ensemble is not None and not math.isfinite(self.ensemble):
            raise InputError(f"ensemble {self.ensemble} must be finite, as in 0.01.")
        return dataclasses.replace(self, execute=self.execute or max(1, chunk // 2))


class ActionQueue:
    """The chunks of one episode.

    Each step: `add` a chunk if one `is_due`, then take `next`.
    """

    def __init__(self, config: ControlConfig):
        """Takes a config that `resolve` gave."""
        self._config = config
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._step = 0

    @property
    def is_due(self) -> bool:
        """Whether a chunk must be added before the next action."""
        return self._step % self._config.execute == 0 and not (self._chunks and self._chunks[-1][0] == self._step)

    def add(self, chunk: np.ndarray) -> None:
        """Takes the actions, float32 `[H, A]`, from now on."""
        if self._config.ensemble is None:
            self._chunks.clear()
        self._chunks.append((self._step, chunk))

    def next(self) -> np.ndarray:
        """The action to take now, float32 `[A]`."""
        self._chunks = [(start, chunk) for start, chunk in self._chunks if self._step < start + len(chunk)]
        starts = np.array([start for start, _ in self._chunks])
        actions = np.stack([chunk[self._step - start] for start, chunk in self._chunks])
        weights = np.exp(-(self._config.ensemble or 0.0) * (starts - starts[0]))
        self._step += 1
        return (weights @ actions / weights.sum()).astype(np.float32)
