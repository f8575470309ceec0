"""Bottlenecks after the inverse dynamics model. Axes: K codes, L numbers of a latent vector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from como_jax.spec.motion import BottleneckConfig


class Identity(nn.Module):
    """No bottleneck."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.input_dim = latent_dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents `[..., L]` from `[..., input_dim]` and, if they are discrete, their codes, int32 `[...]`."""
        return z, None


class Gaussian(nn.Module):
    """The mean of a Gaussian; training draws from it."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.input_dim = 2 * latent_dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Identity`."""
        return z.chunk(2, dim=-1)[0], None


class FiniteScalar(nn.Module):
    """FSQ (arXiv 2309.15505): every number rounded to a few values in [-1, 1]."""

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.input_dim = len(levels)
        count = np.asarray(levels)
        half_width = (count - 1) * (1 - 1e-3) / 2
        # An even number of integers around 0 leans to the negative side.
        offset = np.where(count % 2 == 0, 0.5, 0.0)
        constants = {"half_width": half_width, "offset": offset, "shift": np.arctanh(offset / half_width)}
        for name, values in {**constants, "center": count // 2}.items():
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)), persistent=False)
        radix = np.concatenate([[1], np.cumprod(count)[:-1]])
        self.register_buffer("radix", torch.from_numpy(radix.astype(np.int32)), persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Identity`."""
        steps = torch.round(torch.tanh(z + self.shift) * self.half_width - self.offset)
        codes = ((steps + self.center).to(torch.int32) * self.radix).sum(dim=-1, dtype=torch.int32)
        return steps / self.center, codes


class Codebook(nn.Module):
    """The nearest of K learned codes."""

    def __init__(self, latent_dim: int, codebook_size: int):
        super().__init__()
        self.input_dim = latent_dim
        self.codebook = nn.Parameter(torch.empty(codebook_size, latent_dim))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Identity`."""
        # The square of z is the same for all codes.
        distance = self.codebook.square().sum(dim=-1) - 2.0 * z @ self.codebook.T
        codes = distance.argmin(dim=-1)
        return self.codebook[codes], codes.to(torch.int32)


def make_bottleneck(config: BottleneckConfig, latent_dim: int) -> nn.Module:
    """The bottleneck that a config describes."""
    if config.kind == "none":
        return Identity(latent_dim)
    if config.kind == "kl":
        return Gaussian(latent_dim)
    if config.kind == "fsq":
        return FiniteScalar(config.fsq_levels)
    return Codebook(latent_dim, config.codebook_size)
