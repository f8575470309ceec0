"""A policy as a robot uses it: from what is seen to the action to take.

    policy = Policy.from_pretrained("exported")
    action = policy.act({"images": {"front": picture}, "state": state}, "pick up the red cube")

Robots that share the weights have a session each, and so has every episode:

    session = policy.new_session()
    action = session.act(observation, instruction)

Axes: B scenes, H steps of a chunk, A action.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from como_jax.runtime_torch.autoregressive_policy import AutoregressivePolicy
from como_jax.runtime_torch.chunks import ControlConfig
from como_jax.runtime_torch.diffusion_policy import DiffusionPolicy
from como_jax.runtime_torch.errors import InputError
from como_jax.runtime_torch.files import CONFIG_NAME, load_module, read_config
from como_jax.runtime_torch.instructions import Reader, make_reader
from como_jax.runtime_torch.latent_motion import DTYPES
from como_jax.runtime_torch.latent_vla import LatentVla
from como_jax.runtime_torch.layers import set_compute_dtype
from como_jax.runtime_torch.noise import Noise
from como_jax.runtime_torch.observation import Observation
from como_jax.runtime_torch.policy_config import (
    AutoregressiveConfig,
    DiffusionPolicyConfig,
    PolicyConfig,
    Robot,
    parse_policy,
)
from como_jax.runtime_torch.session import Scene, Session
from como_jax.spec.images import fit_frames

Module = DiffusionPolicy | AutoregressivePolicy | LatentVla


class Policy:
    """An exported policy of any family, for one robot.

    Attributes:
      config: what the policy is.
      module: the network.
      robot: name of the robot's dataset.
    """

    def __init__(
        self, module: Module, config: PolicyConfig, read: Reader, robot: str, control: ControlConfig, seed: int | None
    ):
        """Takes the network, what it is, the reader of its instructions, one of its robots, and how it acts."""
        self.module, self.config, self.robot = module, config, robot
        self._read, self._scales = read, config.robots[robot]
        self._control, self._seed = control, seed
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
          dtype: of compute, float32 or bfloat16; where training kept float32, bfloat16 does too.
          robot: the dataset whose scales to use, where the policy was trained on several.
          execute: steps after which the next chunk is asked for; 0 for half a chunk.
          ensemble: see `chunks.ControlConfig`.
          seed: of the noise that policies sample from; None for another one each time.
          compile: whether `torch.compile` makes programs of the network, at the first chunks.

        Raises:
          ModelFileError: a file is missing or damaged, or of an unknown version.
          InputError: a setting that the policy does not have.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype} must be one of {', '.join(map(str, DTYPES))}.")
        content = read_config(directory)
        config = parse_policy(content, Path(directory) / CONFIG_NAME)
        name = _choose_robot(config.robots, robot)
        control = ControlConfig(execute, ensemble).resolve(config.model.chunk)
        module = load_module(lambda: build_policy_module(config), directory, content)
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
    def cameras(self) -> tuple[str, ...]:
        """Names of the pictures that an observation must have."""
        return self.config.interface.cameras

    @property
    def action_size(self) -> int:
        """Numbers in an action of this robot."""
        return self._scales.action.size

    @property
    def state_size(self) -> int:
        """Numbers in the state that an observation must have; 0 where none is used."""
        return self._scales.state.size if self._scales.state and self.config.observation.state_size else 0

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client must know: plain text, numbers, and lists of them."""
        interface, model = self.config.interface, self.config.model
        return {
            "family": self.config.family,
            "robot": self.robot,
            "cameras": list(interface.cameras),
            "state_size": self.state_size,
            "uses_text": interface.uses_text,
            "action_size": self.action_size,
            "chunk": model.chunk,
            "execute": self._control.execute,
            "control_rate": interface.control_rate,
            "instants": self.config.observation.instants,
            "stride": interface.stride,
        }

    def new_session(self) -> Session:
        """An episode of its own, which shares the weights; sessions may be used in turn, and each from one thread."""
        return Session(self, self._control, self._seed)

    def act(self, observation: Mapping[str, Any], instruction: str = "", noise: Noise | None = None) -> np.ndarray:
        """The action to take now, of the policy's own session; see `Session.act`."""
        return self._session.act(observation, instruction, noise)

    def reset(self) -> None:
        """Begins another episode of the policy's own session."""
        self._session.reset()

    @torch.inference_mode()
    def sample(self, scenes: Sequence[Scene], noise: Noise) -> np.ndarray:
        """Action chunks in the robot's units, float32 `[B, H, A]`.

        Raises:
          InputError: an instruction that the policy cannot read.
        """
        actions = self.module.sample_actions(self.observe(scenes), noise).float().cpu().numpy()
        return self._scales.action.inverse(actions[..., : self.action_size])

    def observe(self, scenes: Sequence[Scene]) -> Observation:
        """What the network is given of some scenes, on its device."""
        config, interface = self.config.observation, self.config.interface
        images = np.stack(
            [
                [
                    [fit_frames(seen[camera], config.image_size, interface.fit) for camera in interface.cameras]
                    for seen in scene.images
                ]
                for scene in scenes
            ]
        )
        state = has_state = None
        if config.state_size:
            state = np.zeros((len(scenes), config.instants, config.state_size), np.float32)
            if self.state_size and self._scales.state:
                state[..., : self.state_size] = self._scales.state(np.stack([scene.states for scene in scenes]))
            has_state = np.full(len(scenes), self.state_size > 0, np.float32)
        has_camera = np.ones((len(scenes), len(interface.cameras)), np.float32)
        instruction = np.stack([self._read(scene.instruction) for scene in scenes])
        arrays = (images, has_camera, instruction, state, has_state)
        return Observation(*(None if part is None else torch.from_numpy(part).to(self.device) for part in arrays))


def build_policy_module(config: PolicyConfig) -> Module:
    """The module that a config describes, with parameters that are not set."""
    observation, model = config.observation, config.model
    if isinstance(model, DiffusionPolicyConfig):
        return DiffusionPolicy(observation, model)
    if isinstance(model, AutoregressiveConfig):
        return AutoregressivePolicy(observation, model)
    return LatentVla(observation, model)


def compile_module(module: Module) -> None:
    """Makes programs of the parts that do the work; what repeats them stays as it is, since it would be unrolled."""
    module.observation.compile()
    if isinstance(module, DiffusionPolicy):
        module.evaluate = torch.compile(module.evaluate)  # type: ignore[method-assign]
    elif isinstance(module, AutoregressivePolicy):
        module.compile()
    else:
        module.decoder.compile()


def _choose_robot(robots: Mapping[str, Robot], name: str) -> str:
    if not name and len(robots) == 1:
        return next(iter(robots))
    if name not in robots:
        known = ", ".join(robots)
        raise InputError(f"robot {name!r} must be one of those that the policy was trained on: {known}.")
    return name
