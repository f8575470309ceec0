"""The one interface of all environments: reset with a seed, step, success, render; and what their makers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from como_jax.errors import ConfigError, closest

# A policy must never be evaluated on an episode that it was trained on, so demonstrations and rollouts have seeds of
# their own: demonstrations those from 0 up to FIRST_ROLLOUT_SEED, SEED_STRIDE for each of their datasets; rollouts as
# many each from there on.
SEED_STRIDE = 1_000_000
FIRST_ROLLOUT_SEED = 900_000_000
MAX_DEMONSTRATION_SEED = FIRST_ROLLOUT_SEED // SEED_STRIDE - 1
"""The largest seed that a dataset of demonstrations may have."""


@dataclasses.dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment takes and returns.

    Attributes:
      name: of environment and task, as in `tabletop:reach`.
      cameras: names of its images; the first is the one that videos show.
      action_size, state_size: numbers in an action, and in the proprioceptive state.
      control_rate: actions per second (Hz).
      max_steps: steps after which an unsolved episode ends.
    """

    name: str
    cameras: tuple[str, ...]
    action_size: int
    state_size: int
    control_rate: float
    max_steps: int


@dataclasses.dataclass(frozen=True)
class Observation:
    """What an environment shows at one step.

    Attributes:
      images: uint8 RGB `[H, W, 3]` by camera, upright; none where they were not asked for.
      state: float32 `[S]`, proprioception in the units of the environment's datasets.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The result of an action: the new observation, whether the task is solved, and whether the episode is over."""

    observation: Observation
    success: bool
    done: bool


class Environment(Protocol):
    """One task of one simulator.

    Everything that happens follows from the seed and the actions. Actions have the units of the environment's
    datasets; the environment clips them to what it can execute.
    """

    spec: EnvironmentSpec

    def reset(self, seed: int) -> Observation:
        """Starts an episode."""

    @property
    def instruction(self) -> str:
        """What the episode asks for, in words; valid after `reset`."""

    def step(self, action: np.ndarray, render: bool = True) -> StepResult:
        """Executes an action, float32 `[A]`.

        Without `render` images may be missing, unless the episode is over: drawing takes most of the time of some
        simulators, and nothing that happens depends on it.

        Raises:
          ValueError: the action has another shape or is not finite.
        """

    def expert_action(self) -> np.ndarray:
        """The action that the environment's expert takes now, float32 `[A]`.

        Raises:
          NotImplementedError: it has no expert.
        """

    def close(self) -> None:
        """Frees what the simulator holds."""


@dataclasses.dataclass(frozen=True)
class EnvironmentOptions:
    """Options that every environment understands.

    Attributes:
      image_size: side of the square images, in pixels.
      cameras: names of the images to render; empty for the environment's own choice.
      max_steps: steps after which an unsolved episode ends; 0 for the environment's own limit.
      settings: further options of one environment, such as the look of the tabletop.
    """

    image_size: int = 64
    cameras: tuple[str, ...] = ()
    max_steps: int = 0
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.max_steps < 0:
            raise ConfigError(
                f"`image_size` must be 1 or more and `max_steps` 0 or more, got {self.image_size} and {self.max_steps}."
            )

    def take(self, *known: str) -> dict[str, str]:
        """The settings, all of which must be among `known`.

        Raises:
          ConfigError: a setting that the environment does not have.
        """
        for name in self.settings:
            if name not in known:
                choices = ", ".join(known) or "none"
                raise ConfigError(f"setting {name}: this environment has {choices}{closest(name, known)}")
        return dict(self.settings)


def check_action(action: np.ndarray, spec: EnvironmentSpec) -> np.ndarray:
    """The action as float64 `[A]`.

    Raises:
      ValueError: it has another shape or is not finite.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (spec.action_size,) or not np.isfinite(action).all():
        raise ValueError(f"an action of {spec.name} is {spec.action_size} finite numbers, got {action}")
    return action


def missing_extra(simulator: str, extra: str, error: ImportError) -> ConfigError:
    """The error to raise where a simulator cannot be imported."""
    return ConfigError(f"{simulator} cannot be imported ({error}); install it with: pip install 'como_jax[{extra}]'")
