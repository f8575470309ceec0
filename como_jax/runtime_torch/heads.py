"""Heads that predict a token from the output before it: by regression, by diffusion or as a code.

A head is a module with `sample(features, noise)`, features `[B, D]`. Axes: B batch, D width, L numbers of one token,
K codes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.denoising import denoise
from como_jax.runtime_torch.layers import LayerNorm, Linear
from como_jax.runtime_torch.noise import Noise
from como_jax.spec.policies import DiffusionConfig


class CodeEmbedding(nn.Module):
    """A learned vector for every code."""

    def __init__(self, codebook_size: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(codebook_size, width))

    def forward(self, codes: Tensor) -> Tensor:
        """int64 `[...]` to `[..., D]`."""
        return self.table[codes]


class RegressionHead(nn.Module):
    """A linear layer."""

    in_float32 = ("out",)

    def __init__(self, width: int, size: int):
        super().__init__()
        self.out = Linear(width, size)

    def sample(self, features: Tensor, noise: Noise) -> Tensor:
        """The prediction `[B, L]`; draws no noise."""
        return self.out(features)


class CodeHead(nn.Module):
    """A linear layer to logits of codes."""

    in_float32 = ("out",)

    def __init__(self, width: int, codebook_size: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.out = Linear(width, codebook_size)

    def sample(self, features: Tensor, noise: Noise) -> Tensor:
        """Codes, int64 `[B]`: the likeliest at temperature 0."""
        logits = self.out(features)
        if self.temperature:
            logits = logits / self.temperature + noise.gumbel(*logits.shape).to(logits.device)
        return logits.argmax(dim=-1)


class DiffusionHead(nn.Module):
    """A small network that makes one token from noise, as in MAR (arXiv 2406.11838, section 3.2)."""

    in_float32 = ("noisy_in", "condition_in", "time_in", "blocks", "norm", "out")

    def __init__(self, width: int, size: int, diffusion: DiffusionConfig, *, hidden: int, depth: int):
        super().__init__()
        self.size, self.hidden, self.diffusion = size, hidden, diffusion
        self.noisy_in, self.condition_in = Linear(size, hidden), Linear(width, hidden)
        self.time_in = Linear(hidden, hidden)
        self.blocks = nn.ModuleList(ModulatedMlp(hidden) for _ in range(depth))
        self.norm = LayerNorm(hidden)
        self.out = Linear(hidden, size)

    def sample(self, features: Tensor, noise: Noise) -> Tensor:
        """A draw `[B, L]`, denoised step by step."""
        condition = self.condition_in(features)
        start = noise.normal(len(features), self.size).to(features.device)
        return denoise(self.diffusion, lambda x, time: self.estimate(x, time, condition), start, noise)

    def estimate(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The prediction for noisy tokens `[B, L]` at times `[B]`, given projected features `[B, hidden]`."""
        frequencies = np.geomspace(1.0, 1000.0, self.hidden // 2, dtype=np.float32)
        angles = time[:, None] * torch.from_numpy(frequencies).to(time.device)
        told = F.silu(condition + self.time_in(torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)))
        x = self.noisy_in(noisy)
        for block in self.blocks:
            x = block(x, told)
        return self.out(self.norm(x))


class ModulatedMlp(nn.Module):
    """A residual pair of layers whose input is scaled and shifted by a condition."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.modulation = Linear(width, 2 * width)
        self.fc1, self.fc2 = Linear(width, width), Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Input, condition and output have the shape `[..., width]`."""
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        return x + self.fc2(F.silu(self.fc1(self.norm(x) * (1.0 + scale) + shift)))


def with_gripper(actions: Tensor, dim: int) -> Tensor:
    """Actions `[..., A]` with -1 or 1, by its sign, in the dimension of the gripper; -1 for no such dimension."""
    if dim < 0:
        return actions
    actions = actions.clone()
    actions[..., dim] = torch.where(actions[..., dim] > 0, 1.0, -1.0)
    return actions
