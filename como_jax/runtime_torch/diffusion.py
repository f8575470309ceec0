"""Diffusion policy: a DiT (arXiv 2212.09748) over action chunks, by denoising diffusion or flow matching.

Axes: B batch, H steps of a chunk, A action, N context tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.denoising import denoise
from como_jax.runtime_torch.layers import Attention, CrossAttention, LayerNorm, Linear, Mlp
from como_jax.runtime_torch.noise import Noise
from como_jax.runtime_torch.observation import Observation, ObservationEncoder, ObservationFeatures
from como_jax.spec.policies import DiffusionPolicyConfig, ObservationConfig

_TIME_FREQUENCIES = 64


class Context(NamedTuple):
    """The observation as the trunk reads it: tokens `[B, N, D]`, their mask `[B, N]`, and one vector `[B, D]`."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class Heads(nn.Module):
    """The linear layers into the trunk and out of it."""

    in_float32 = ("outputs",)

    def __init__(self, size: int, width: int):
        super().__init__()
        self.inputs, self.outputs = Linear(size, width), Linear(width, size)


class DitBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each modulated by a vector."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1, self.attn = LayerNorm(width), Attention(width, num_heads)
        self.norm2, self.cross_attn = LayerNorm(width), CrossAttention(width, num_heads)
        self.norm3, self.mlp = LayerNorm(width), Mlp(width, 4 * width)
        self.modulation = Linear(width, 9 * width)

    def forward(self, x: Tensor, told: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """`[B, H, D]` to the same, from a vector `[B, D]` and a context `[B, N, D]` with its mask `[B, 1, N]`."""
        parts = self.modulation(told)[:, None].chunk(9, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = parts
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * self.cross_attn(self.norm2(x) * (1 + scale2) + shift2, context, mask)
        return x + gate3 * self.mlp(self.norm3(x) * (1 + scale3) + shift3)


class DiffusionPolicy(nn.Module):
    """See the module's docstring."""

    def __init__(self, observation: ObservationConfig, config: DiffusionPolicyConfig):
        super().__init__()
        self.config, width = config, config.width
        self.observation = ObservationEncoder(observation, width)
        self.no_instruction = nn.Parameter(torch.empty(width))
        self.context_norm = LayerNorm(width)
        self.time_hidden, self.time_out = Linear(2 * _TIME_FREQUENCIES, width), Linear(width, width)
        self.step_embed = nn.Parameter(torch.empty(config.chunk, width))
        self.blocks = nn.ModuleList(DitBlock(width, config.num_heads) for _ in range(config.depth))
        self.norm = LayerNorm(width)
        self.modulation = Linear(width, 2 * width)
        self.action = Heads(config.action_size, width)

    def sample_actions(self, observation: Observation, noise: Noise) -> Tensor:
        """Normalised actions, float32 `[B, H, A]`, from now on.

        Sampling starts from `[B, H, A]` of `noise`, and draws as much again at every step if `eta` is not 0.
        """
        config, context = self.config, self.read(observation)
        start = noise.normal(len(observation.images), config.chunk, config.action_size).to(context.tokens.device)
        return denoise(config.diffusion, lambda x, time: self.evaluate(x, time, context), start, noise)

    def read(self, observation: Observation) -> Context:
        """The context of all steps; with guidance, the batch follows a second time without its instructions."""
        features = self.observation(observation)
        context = self._context(features)
        if self.config.guidance == 1:
            return context
        text = features.text
        hidden = text._replace(
            tokens=self.no_instruction.expand_as(text.tokens), pooled=self.no_instruction.expand_as(text.pooled)
        )
        blind = self._context(features._replace(text=hidden))
        return Context(*(torch.cat(parts) for parts in zip(context, blind, strict=True)))

    def evaluate(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        """The network's prediction for noisy chunks `[B, H, A]` at times `[B]`, float32 `[B, H, A]`."""
        guidance = self.config.guidance
        if guidance == 1:
            return self._trunk(x, time, context)
        told, blind = self._trunk(torch.cat([x, x]), torch.cat([time, time]), context).chunk(2)
        return blind + guidance * (told - blind)

    def _context(self, features: ObservationFeatures) -> Context:
        tokens, mask = features.context()
        return Context(self.context_norm(tokens), mask, features.text.pooled)

    def _trunk(self, noisy: Tensor, time: Tensor, context: Context) -> Tensor:
        told = self.time_out(F.silu(self.time_hidden(_time_features(time))))
        told = F.silu(told + context.pooled)
        x = self.action.inputs(noisy) + self.step_embed
        for block in self.blocks:
            x = block(x, told, context.tokens, context.mask[:, None])
        shift, scale = self.modulation(told)[:, None].chunk(2, dim=-1)
        return self.action.outputs(self.norm(x) * (1 + scale) + shift)


def _time_features(time: Tensor) -> Tensor:
    """Sines and cosines `[B, 2 * F]` of times in [0, 1]."""
    frequencies = np.geomspace(1.0, 1000.0, _TIME_FREQUENCIES, dtype=np.float32)
    angles = time[:, None] * torch.from_numpy(frequencies).to(time.device)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
