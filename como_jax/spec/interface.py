"""What a policy takes and gives: its cameras and sizes, the normalisation of every robot, and what it is asked about.

Axes: B histories, T instants, C cameras, H and W pixels, S numbers of a state.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from como_jax.errors import ConfigError, RunError, closest
from como_jax.spec.images import FITS, fitting_part, resize
from como_jax.spec.normalization import Normalizer, normalizer_from_json

POLICY_FILE = "policy.json"
"""The file of a run that holds its `PolicySpec`."""

RENAMED_FIELDS = {"scales": "robots"}
"""Fields that runs of earlier versions hold under another name."""


class History(NamedTuple):
    """What a policy is asked about.

    Attributes:
      images: for every instant, the oldest first, uint8 RGB `[H, W, 3]` of any size by camera.
      states: float32 `[T, S]`, proprioception in the robot's units; policies that use none ignore it.
      instruction: what to do, in words.
    """

    images: Sequence[Mapping[str, np.ndarray]]
    states: np.ndarray
    instruction: str


@dataclasses.dataclass(frozen=True)
class NormStats:
    """How the actions and states of one robot dataset are normalised; `state` is None where the policy uses none."""

    action: Normalizer
    state: Normalizer | None


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """Inputs and outputs of a policy.

    Attributes:
      cameras: their names.
      image_size: side of the square frames that the model sees.
      fit: how images become square, one of `como_jax.spec.images.FITS`.
      instants: frames of each camera that the policy sees at once.
      stride: control steps between two instants.
      chunk: actions that are predicted at once.
      action_size: numbers in an action.
      state_size: numbers in the proprioceptive state; 0 where it is not used.
      control_rate: actions a second (Hz), of the first robot dataset.
      uses_text: whether the policy reads an instruction.
      robots: by the name of their dataset, how actions and states are normalised.
      environments: by the name of their dataset, family and settings of the environment that it was made in; for
        datasets that know of none, nothing.
    """

    cameras: tuple[str, ...]
    image_size: int
    fit: str
    instants: int
    stride: int
    chunk: int
    action_size: int
    state_size: int
    control_rate: float
    uses_text: bool
    robots: Mapping[str, NormStats]
    environments: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    def choose_robot(self, name: str = "") -> str:
        """The name of a robot dataset: the given one or, where none is given, the only one.

        Raises:
          ConfigError: the policy was not trained on that dataset, or none is given and there are several.
        """
        known = ", ".join(self.robots)
        if not name and len(self.robots) == 1:
            return next(iter(self.robots))
        if not name:
            raise ConfigError(f"The policy was trained on several robot datasets; choose one of {known}.")
        if name not in self.robots:
            raise ConfigError(
                f"The policy was not trained on the robot dataset {name!r}; choose one of {known}"
                f"{closest(name, self.robots)}"
            )
        return name

    def sized_for(self, stats: NormStats) -> PolicySpec:
        """The same with one robot's own sizes of action and state, which may be smaller than those of the model."""
        own_state = stats.state.size if stats.state else 0
        return dataclasses.replace(self, action_size=stats.action.size, state_size=own_state)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        robots = {
            name: {"action": stats.action.to_json(), "state": stats.state and stats.state.to_json()}
            for name, stats in self.robots.items()
        }
        values |= {"cameras": list(self.cameras), "robots": robots}
        # Files of runs whose datasets know of none are as they always were.
        environments = {name: dict(settings) for name, settings in values.pop("environments").items()}
        return values | ({"environments": environments} if environments else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PolicySpec:
        """Reads what `to_json` wrote.

        Raises:
          ValueError, TypeError, KeyError, AttributeError: it is something else.
        """
        values = {RENAMED_FIELDS.get(name, name): value for name, value in values.items()}
        robots = {
            name: NormStats(
                normalizer_from_json(stats["action"]),
                normalizer_from_json(stats["state"]) if stats["state"] else None,
            )
            for name, stats in values["robots"].items()
        }
        if values["fit"] not in FITS:
            raise ValueError(f"fit {values['fit']!r} must be one of {', '.join(FITS)}")
        return cls(**{**values, "cameras": tuple(values["cameras"]), "robots": robots})

    @classmethod
    def load(cls, workdir: Path) -> PolicySpec:
        """Reads the file of a run.

        Raises:
          RunError: there is none, or it is damaged.
        """
        path = workdir / POLICY_FILE
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(f"{workdir} holds no policy: it has no {POLICY_FILE}.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{path} is damaged or of another version: {error}") from error


def observation_arrays(spec: PolicySpec, stats: NormStats, histories: Sequence[History]) -> dict[str, np.ndarray]:
    """What the network is given of some histories, but for their instructions.

    Args:
      spec: of the policy, with the model's own sizes.
      stats: of the robot.
      histories: with as many instants and cameras as the policy sees.

    Returns:
      `images`, uint8 `[B, T, C, H, W, 3]`, and `has_camera`, float32 `[B, C]`. Where the policy uses states also
      `state`, float32 `[B, T, S]`, normalised and zero in dimensions that the robot lacks, and `has_state` `[B]`.
    """
    count, size = len(histories), spec.image_size
    images = np.empty((count, spec.instants, len(spec.cameras), size, size, 3), np.uint8)
    for row, history in enumerate(histories):
        for instant, seen in enumerate(history.images):
            for slot, camera in enumerate(spec.cameras):
                resize(fitting_part(seen[camera], spec.fit), images[row, instant, slot])
    found = {"images": images, "has_camera": np.ones((count, len(spec.cameras)), np.float32)}
    if not spec.state_size:
        return found
    state = np.zeros((count, spec.instants, spec.state_size), np.float32)
    if stats.state is not None:
        states = np.stack([history.states for history in histories])
        if states.shape != (count, spec.instants, stats.state.size):
            raise ValueError(f"states are {states.shape[1:]} and must be {(spec.instants, stats.state.size)}")
        state[..., : stats.state.size] = stats.state(states)
    return found | {"state": state, "has_state": np.full(count, stats.state is not None, np.float32)}
