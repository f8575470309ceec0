"""A GPT over language, observations, latent motion and action queries (Moto, arXiv 2412.04445).

Axes: B batch, T instants, Q latent tokens of an instant, L latent size of one, H steps of a chunk, A action, N all
tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from como_jax.runtime_torch.heads import CodeEmbedding, CodeHead, DiffusionHead, RegressionHead, with_gripper
from como_jax.runtime_torch.layers import Block, LayerNorm, Linear, run_blocks
from como_jax.runtime_torch.noise import Noise
from como_jax.runtime_torch.observation import Observation, ObservationEncoder, ObservationFeatures
from como_jax.spec.autoregressive_mask import actions_read_latents, always_allowed, make_layout
from como_jax.spec.policies import AutoregressiveConfig, ObservationConfig


class KnownLatents(NamedTuple):
    """Latents of all instants, `[B, T, Q, L]` or codes `[B, T, Q]`, and where they are known, bool `[B, T]`."""

    values: Tensor
    known: Tensor


class Outputs(NamedTuple):
    """Outputs of the transformer at latent tokens `[B, T, Q + 1, D]` and at action queries `[B, T, H, D]`."""

    latents: Tensor
    actions: Tensor


class AutoregressivePolicy(nn.Module):
    """See the module's docstring; it has latents only if it generates them before it acts."""

    in_float32 = ("norm", "action_head")

    def __init__(self, observation: ObservationConfig, config: AutoregressiveConfig):
        super().__init__()
        self.config, self.instants, width = config, observation.instants, config.width
        self.observation = ObservationEncoder(observation, width)
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.depth))
        self.norm = LayerNorm(width)
        self.instant_embed = nn.Parameter(torch.empty(observation.instants, width))
        self.action_queries = nn.Parameter(torch.empty(config.chunk, width))
        self.action_head = Linear(width, config.action_size)
        if config.generate_latents:
            self.latent_start = nn.Parameter(torch.empty(width))
            self.latent_pos = nn.Parameter(torch.empty(config.latent_queries + 1, width))
            self.latent_in, self.latent_head = _make_latent_ends(config)

    def sample_actions(self, observation: Observation, noise: Noise) -> Tensor:
        """Normalised actions, float32 `[B, H, A]`, from now on.

        If latents are generated, their head draws from `noise` token after token.
        """
        features = self.observation(observation)
        motion = self._generate(features, noise) if self.config.generate_latents else None
        actions = self.action_head(self(features, motion).actions[:, -1])
        return with_gripper(actions, self.config.gripper_dim)

    def forward(self, features: ObservationFeatures, motion: KnownLatents | None) -> Outputs:
        """Runs the transformer over the whole sequence; action queries read the latents that are known."""
        config, width = self.config, self.config.width
        batch, instants, observations = features.tokens.shape[:3]
        placed = self.instant_embed[:, None]
        queries = (self.action_queries + placed).expand(batch, -1, -1, -1)
        latents = queries[:, :, :0] if motion is None else self._latent_tokens(motion) + placed
        parts = [features.text.tokens, features.tokens, latents, queries]
        tokens = [part.reshape(batch, -1, width) for part in parts]
        known = features.mask.new_zeros((batch, instants)) if motion is None else motion.known
        present = [
            features.text.mask,
            features.mask.flatten(1),
            known.repeat_interleave(latents.shape[2], dim=1),
            known.new_ones((batch, instants * config.chunk)),
        ]
        counts = {"observations": observations, "latents": latents.shape[2], "actions": config.chunk}
        layout = make_layout(instants, language=features.text.tokens.shape[1], **counts)
        readable = torch.from_numpy(always_allowed(layout) | actions_read_latents(layout))
        own = torch.eye(len(readable), dtype=torch.bool, device=known.device)
        # A token that is not there is read only by itself, which keeps every row of the softmax finite.
        mask = (readable.to(known.device) & torch.cat(present, dim=1)[:, None]) | own
        x = run_blocks(self.blocks, torch.cat(tokens, dim=1), mask)
        _, _, *outputs = x.split([part.shape[1] for part in tokens], dim=1)
        return Outputs(*(self.norm(part).reshape(batch, instants, -1, width) for part in outputs))

    def _latent_tokens(self, motion: KnownLatents) -> Tensor:
        """`[B, T, Q + 1, D]`: a start token and the latents, so that the output of each predicts the next."""
        latents = self.latent_in(motion.values)
        start = self.latent_start.expand_as(latents[:, :, :1])
        return torch.cat([start, latents], dim=2) + self.latent_pos

    def _generate(self, features: ObservationFeatures, noise: Noise) -> KnownLatents:
        """Latents of the last instant, token after token; those of earlier instants are unknown."""
        config, device = self.config, features.tokens.device
        shape = (len(features.tokens), self.instants, config.latent_queries)
        if config.codebook_size:
            values = torch.zeros(shape, dtype=torch.int64, device=device)
        else:
            values = torch.zeros((*shape, config.latent_dim), device=device)
        known = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        known[:, -1] = True
        for token in range(config.latent_queries):
            # Latents that are not generated yet are in the sequence too, but no earlier token reads them.
            output = self(features, KnownLatents(values, known)).latents[:, -1, token]
            values = values.clone()
            values[:, -1, token] = self.latent_head.sample(output, noise)
        return KnownLatents(values, known)


def _make_latent_ends(config: AutoregressiveConfig) -> tuple[nn.Module, nn.Module]:
    """The module that embeds latents as tokens, and the head that predicts latents."""
    width, latent_dim = config.width, config.latent_dim
    if config.codebook_size:
        return CodeEmbedding(config.codebook_size, width), CodeHead(width, config.codebook_size, config.temperature)
    if config.latent_head == "regression":
        return Linear(latent_dim, width), RegressionHead(width, latent_dim)
    sizes = {"hidden": config.head_width, "depth": config.head_depth}
    return Linear(latent_dim, width), DiffusionHead(width, latent_dim, config.head_diffusion, **sizes)
