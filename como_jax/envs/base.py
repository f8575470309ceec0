"""The one interface of all environments: reset with a seed, step, success, render."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment gives and takes.

    Attributes:
      name: of environment and task, as in `tabletop:reach`.
      cameras: names of its pictures; the first is the one that videos show.
      action_size, state_size: numbers in an action, and in the proprioceptive state.
      control_rate: actions a second (Hz).
      max_steps: steps after which an unsolved episode ends.
    """

    name: str
    cameras: tuple[str, ...]
    action_size: int
    state_size: int
    control_rate: float
    max_steps: int


@dataclasses.dataclass(frozen=True)
class Sight:
    """What an environment shows at one step.

    Attributes:
      images: uint8 RGB `[H, W, 3]` by camera, upright.
      state: float32 `[S]`, proprioception in the units of the environment's datasets.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What an action led to: the new sight, whether the task is solved, and whether the episode is over."""

    sight: Sight
    success: bool
    done: bool


class Environment(Protocol):
    """One task of one simulator.

    Everything that happens follows from the seed and the actions. Actions are those of the environment's datasets,
    in the same units; the environment clips them to what it can execute.
    """

    spec: EnvironmentSpec

    def reset(self, seed: int) -> Sight:
        """Starts an episode."""

    @property
    def instruction(self) -> str:
        """What the episode asks for, in words; only after `reset`."""

    def step(self, action: np.ndarray) -> StepResult:
        """Executes an action, float32 `[A]`.

        Raises:
          ValueError: the action has another shape or is not finite.
        """

    def expert_action(self) -> np.ndarray:
        """What the environment's expert would do now, float32 `[A]`.

        Raises:
          NotImplementedError: it has no expert.
        """

    def close(self) -> None:
        """Frees what the simulator holds."""


def check_action(action: np.ndarray, spec: EnvironmentSpec) -> np.ndarray:
    """The action as float64 `[A]`.

    Raises:
      ValueError: it has another shape or is not finite.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (spec.action_size,) or not np.isfinite(action).all():
        raise ValueError(f"an action of {spec.name} is {spec.action_size} finite numbers, got {action}")
    return action
