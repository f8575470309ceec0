"""What a trained policy needs to know to act: its inputs, its outputs and their scales. Kept in RUN/policy.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from como_jax.errors import ConfigError, RunError, closest
from como_jax.files import write_json
from como_jax.spec.normalization import Normalizer, normalizer_from_json

FILE_NAME = "policy.json"


class Scene(NamedTuple):
    """What a policy is asked about.

    Attributes:
      images: uint8 RGB `[H, W, 3]` by camera, for every instant of the history, the oldest first.
      states: float32 `[T, S]`, proprioception in the dataset's units; ignored by policies without.
      instruction: what to do, in words.
    """

    images: Sequence[Mapping[str, np.ndarray]]
    states: np.ndarray
    instruction: str


@dataclasses.dataclass(frozen=True)
class Scales:
    """One robot dataset's scales of action and state; None where the policy does not use the state."""

    action: Normalizer
    state: Normalizer | None


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """Inputs and outputs of a policy.

    Attributes:
      cameras: names of its pictures.
      image_size: side of the square pictures that the model sees.
      fit: how pictures become square, see `como_jax.data.transforms`.
      instants, stride: pictures of each camera, and control steps between them.
      chunk: actions of one chunk.
      action_size: numbers in an action.
      state_size: numbers in the proprioceptive state; 0 where it is not used.
      control_rate: actions a second (Hz), of the first robot dataset.
      uses_text: whether it reads an instruction.
      scales: of every robot dataset, by name.
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
    scales: Mapping[str, Scales]

    def scales_of(self, dataset: str = "") -> Scales:
        """The scales of a robot dataset; of the only one when none is named.

        Raises:
          ConfigError: an unknown dataset, or several to choose from.
        """
        names = ", ".join(self.scales)
        if not dataset and len(self.scales) == 1:
            return next(iter(self.scales.values()))
        if not dataset:
            raise ConfigError(f"The policy was trained on several robots; choose one by --dataset: {names}.")
        if dataset not in self.scales:
            raise ConfigError(f"--dataset {dataset}: the policy was trained on {names}{closest(dataset, self.scales)}")
        return self.scales[dataset]

    def save(self, workdir: epath.PathLike) -> None:
        """Writes the file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["scales"] = {
            name: {"action": scales.action.to_json(), "state": scales.state and scales.state.to_json()}
            for name, scales in self.scales.items()
        }
        write_json(epath.Path(workdir) / FILE_NAME, values)

    @classmethod
    def load(cls, workdir: epath.PathLike) -> PolicySpec:
        """Reads the file of a run.

        Raises:
          RunError: there is none, or it is damaged.
        """
        path = epath.Path(workdir) / FILE_NAME
        try:
            return cls._from_json(json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(f"{workdir} holds no policy: it has no {FILE_NAME}.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{path} is damaged or of another version: {error}") from error

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> PolicySpec:
        scales = {
            name: Scales(
                normalizer_from_json(item["action"]),
                normalizer_from_json(item["state"]) if item["state"] else None,
            )
            for name, item in values["scales"].items()
        }
        return cls(**{**values, "cameras": tuple(values["cameras"]), "scales": scales})
