"""A policy as a robot uses it: from what is seen to the action to take.

    policy = Policy.from_pretrained("exported")
    action = policy.act({"images": {"front": image}, "state": state}, "pick up the red cube")

Several robots, or several episodes at once, share the weights and have a session each:

    session = policy.new_session()
    action = session.act(observation, instruction)

Axes: B histories, H steps of a chunk, A numbers of an action.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from como_jax.errors import ConfigError
from como_jax.runtime_torch.autoregressive import AutoregressivePolicy
from como_jax.runtime_torch.diffusion import DiffusionPolicy
from como_jax.runtime_torch.files import load_module
from como_jax.runtime_torch.instructions import Reader, make_reader
from como_jax.runtime_torch.latent_motion import DTYPES
from como_jax.runtime_torch.layers import set_compute_dtype
from como_jax.runtime_torch.noise import Noise
from como_jax.runtime_torch.observation import Observation
from como_jax.runtime_torch.session import Session
from como_jax.runtime_torch.vla import LatentVla
from como_jax.spec.control import ControlConfig
from como_jax.spec.exported import ExportedPolicy, read_description
from como_jax.spec.interface import History, observation_arrays
from como_jax.spec.policies import AutoregressiveConfig, DiffusionPolicyConfig

Module = DiffusionPolicy | AutoregressivePolicy | LatentVla


class Policy:
    """An exported policy of any family, for one robot.

    Attributes:
      config: what the policy is.
      module: the network.
      robot: name of the robot's dataset.
      spec: what the policy takes and gives, with the sizes of this robot.
    """

    def __init__(
        self, module: Module, config: ExportedPolicy, read: Reader, robot: str, control: ControlConfig, seed: int | None
    ):
        self.module, self.config, self.robot = module, config, robot
        self._stats = config.interface.robots[robot]
        self.spec = config.interface.sized_for(self._stats)
        self._read, self._control, self._seed = read, control.resolve(self.spec.chunk), seed
        self._session = self.new_session()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        robot: str = "",
        execute: int = 0,
        ensemble: float | None = None,
        seed: int | None = None,
        compile: bool = False,
    ) -> Policy:
        """Loads what `python -m tools.export_torch` wrote.

        Args:
          directory: of the exported policy.
          device: cpu, cuda or cuda:N.
          dtype: of compute, float32 or bfloat16; with bfloat16, what training keeps in float32 stays in float32.
          robot: the dataset whose normalisation is used, where the policy was trained on several.
          execute, ensemble: how chunks are carried out, see `ControlConfig`.
          seed: of the noise that policies sample from; None for another one each time.
          compile: whether `torch.compile` compiles the network, at the first chunks.

        Raises:
          ModelFileError: a file is missing or damaged, or of an unknown version.
          ConfigError: a setting that the policy does not have.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype} must be one of {', '.join(map(str, DTYPES))}.")
        config, weights = read_description(directory, ExportedPolicy)
        name = config.interface.choose_robot(robot)
        control = ControlConfig(execute, ensemble).resolve(config.interface.chunk)
        module = load_module(lambda: build_policy_module(config), directory, weights)
        set_compute_dtype(module, dtype)
        if compile:
            compile_module(module)
        read = make_reader(config.observation.text, Path(directory))
        return cls(module.to(device), config, read, name, control, seed)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.module.parameters()).device

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client must know: plain text, numbers, and lists of them."""
        spec = self.spec
        return {
            "family": self.config.family,
            "robot": self.robot,
            "cameras": list(spec.cameras),
            "state_size": spec.state_size,
            "uses_text": spec.uses_text,
            "action_size": spec.action_size,
            "chunk": spec.chunk,
            "execute": self._control.execute,
            "control_rate": spec.control_rate,
            "instants": spec.instants,
            "stride": spec.stride,
        }

    def new_session(self) -> Session:
        """A session with its own episode; sessions may be used in turn, each from one thread."""
        return Session(self.spec, self._control, self.sample, self._seed)

    def act(self, observation: Mapping[str, Any], instruction: str = "", noise: Noise | None = None) -> np.ndarray:
        """The action to take now, of the policy's own session; see `Session.act`."""
        return self._session.act(observation, instruction, noise)

    def reset(self) -> None:
        """Begins another episode of the policy's own session."""
        self._session.reset()

    @torch.inference_mode()
    def sample(self, histories: Sequence[History], noise: Noise) -> np.ndarray:
        """Action chunks in the robot's units, float32 `[B, H, A]`.

        Raises:
          InputError: an instruction that the policy cannot read.
        """
        actions = self.module.sample_actions(self.observe(histories), noise).float().cpu().numpy()
        return self._stats.action.inverse(actions[..., : self.spec.action_size])

    def observe(self, histories: Sequence[History]) -> Observation:
        """What the network is given of some histories, on its device."""
        arrays = observation_arrays(self.config.interface, self._stats, histories)
        arrays["instruction"] = np.stack([self._read(history.instruction) for history in histories])
        return Observation(**{name: torch.from_numpy(part).to(self.device) for name, part in arrays.items()})


def build_policy_module(config: ExportedPolicy) -> Module:
    """The module that a config describes, with parameters that are not set."""
    observation, model = config.observation, config.model
    if isinstance(model, DiffusionPolicyConfig):
        return DiffusionPolicy(observation, model)
    if isinstance(model, AutoregressiveConfig):
        return AutoregressivePolicy(observation, model)
    return LatentVla(observation, model)


def compile_module(module: Module) -> None:
    """Compiles the parts that do the work; the loops around them stay as they are, since they would be unrolled."""
    module.observation.compile()
    if isinstance(module, DiffusionPolicy):
        module.evaluate = torch.compile(module.evaluate)  # type: ignore[method-assign]
    elif isinstance(module, AutoregressivePolicy):
        module.compile()
    else:
        module.decoder.compile()
