"""The motion model as a robot uses it: latent motion of camera frames, and the frame that a latent motion leads to.

    model = LatentMotion.from_pretrained("exported")
    motion = model.encode(frames)  # uint8 [B, T, H, W, 3], NumPy or PyTorch, of any size
    image = model.predict(frames[:, -1], motion.latent[:, -1])

Axes: B batch, T instants, H and W pixels, S side of the model's frames, Q latent tokens, L size of one.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from como_jax.errors import ConfigError, InputError
from como_jax.runtime_torch.como import Como
from como_jax.runtime_torch.files import load_module
from como_jax.runtime_torch.laq import Laq
from como_jax.runtime_torch.layers import set_compute_dtype
from como_jax.spec.exported import ExportedMotion, read_description
from como_jax.spec.images import fit_frames
from como_jax.spec.motion import LaqConfig

DTYPES = (torch.float32, torch.bfloat16)


class Motion(NamedTuple):
    """Latent motion `[B, T - 1, Q, L]`, and where it is discrete the numbers of its codes, int32 `[B, T - 1, Q]`."""

    latent: Tensor
    codes: Tensor | None


class LatentMotion:
    """An exported motion model of any family.

    Attributes:
      config: what the model is.
      module: `Como` or `Laq`; its `encode` and `predict` take frames of the model's own size, on its device.
    """

    def __init__(self, module: Como | Laq, config: ExportedMotion):
        self.module, self.config = module, config
        self._encode, self._predict = module.encode, module.predict

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> LatentMotion:
        """Loads what `python -m tools.export_torch` wrote.

        Args:
          directory: of the exported model.
          device: cpu, cuda or cuda:N.
          dtype: of compute, float32 or bfloat16; with bfloat16, what training keeps in float32 stays in float32.
          compile: whether `torch.compile` compiles it, once for each shape, at the first calls.

        Raises:
          ModelFileError: a file is missing or damaged, or of an unknown version.
          ConfigError: another dtype.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype} must be one of {', '.join(map(str, DTYPES))}.")
        config, weights = read_description(directory, ExportedMotion)
        module = load_module(lambda: build_module(config), directory, weights)
        set_compute_dtype(module, dtype)
        model = cls(module.to(device), config)
        if compile:
            model._encode, model._predict = (torch.compile(call) for call in (module.encode, module.predict))
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.module.parameters()).device

    @torch.inference_mode()
    def encode(self, frames: np.ndarray | Tensor) -> Motion:
        """The motion between consecutive frames of uint8 RGB `[B, T, H, W, 3]`, on the model's device.

        Frames of another size are made square and resized as in training; `config.gap_seconds` says how far apart
        in time training had them.

        Raises:
          InputError: other shapes or dtypes.
        """
        frames = self._prepare(frames, "frames", "[B, T, H, W, 3]", 5)
        if frames.shape[1] < 2:
            raise InputError(f"frames are {list(frames.shape)} and must be at least two, along their second axis.")
        return Motion(*self._encode(frames))

    @torch.inference_mode()
    def predict(self, frame: np.ndarray | Tensor, latent: np.ndarray | Tensor) -> Tensor:
        """The frames, float32 in [0, 1] `[B, S, S, 3]`, that follow uint8 RGB `[B, H, W, 3]` under `[B, Q, L]`.

        Raises:
          InputError: other shapes or dtypes.
        """
        frame = self._prepare(frame, "frame", "[B, H, W, 3]", 4)
        latent = torch.as_tensor(latent, dtype=torch.float32, device=self.device)
        expected = (len(frame), *self.config.latent_shape)
        if tuple(latent.shape) != expected:
            raise InputError(f"latent is {list(latent.shape)} and must be {list(expected)}.")
        return self._predict(frame, latent)

    def _prepare(self, frames: np.ndarray | Tensor, name: str, axes: str, rank: int) -> Tensor:
        """Frames of the model's size, on its device."""
        if frames.ndim != rank or frames.shape[-1] != 3 or 0 in frames.shape:
            raise InputError(f"{name} are {list(frames.shape)} and must be {axes}.")
        if frames.dtype not in (torch.uint8, np.uint8):
            raise InputError(f"{name} are {frames.dtype} and must be uint8, RGB from 0 to 255.")
        size = self.config.image_size
        if isinstance(frames, Tensor) and frames.shape[-3:-1] == (size, size):
            return frames.to(self.device)
        fitted = fit_frames(frames.cpu().numpy() if isinstance(frames, Tensor) else frames, size, self.config.fit)
        # PyTorch cannot take reversed axes, and warns about read-only memory.
        return torch.from_numpy(np.require(fitted, requirements=("C", "W"))).to(self.device)


def build_module(config: ExportedMotion) -> Como | Laq:
    """The module that a config describes, with parameters that are not set."""
    if isinstance(config.model, LaqConfig):
        return Laq(config.image_size, config.model)
    assert config.encoder is not None  # `ExportedMotion` checks this.
    return Como(config.encoder, config.model)
