"""Diffusion policy: a DiT (arXiv 2212.09748) over action chunks, on robot actions and latent motion alike.

The trunk is one; light linear heads at its input and output are those of actions or of latent motion, chosen for every
sample by what it has (CoMo, arXiv 2505.17006, stage 2). Axes: B batch, H steps of a chunk, A action, Z latent motion,
N context tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.layers import Attention, CrossAttention, LayerNorm, Linear, Mlp
from como_jax.nn.mixed_precision import broadcast_param
from como_jax.nn.stack import Stack
from como_jax.policies.diffusion import add_noise, denoise
from como_jax.policies.observation import ObservationEncoder
from como_jax.spec.policies import DiffusionConfig, DiffusionPolicyConfig, ObservationConfig
from como_jax.types import LossOutput, Observation, PolicyBatch

_TIME_FREQUENCIES = 64
_zeros = nnx.initializers.zeros


class Context(NamedTuple):
    """What the trunk is told: tokens `[B, N, D]`, which of them are there `[B, N]`, and one vector `[B, D]`."""

    tokens: jax.Array
    mask: jax.Array
    pooled: jax.Array


class Heads(nnx.Module):
    """Into the trunk and out of it, for one kind of chunk."""

    def __init__(self, size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.size = size
        self.inputs = Linear(size, width, dtype=dtype, rngs=rngs)
        self.outputs = Linear(width, size, kernel_init=_zeros, dtype=jnp.float32, rngs=rngs)


class DiffusionPolicy(nnx.Module):
    """See the module's docstring."""

    def __init__(
        self,
        observation: ObservationConfig,
        config: DiffusionPolicyConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        width = config.width
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)

        def embedding(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (*shape, width)))

        self.observation = ObservationEncoder(observation, width, dtype=dtype, remat=remat, rngs=rngs)
        self.no_instruction = embedding()
        self.context_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.time_hidden = linear(2 * _TIME_FREQUENCIES, width)
        self.time_out = linear(width, width)
        self.step_embed = embedding(config.chunk)
        self.blocks = Stack(
            lambda rngs: DitBlock(width, config.num_heads, dtype=dtype, rngs=rngs), config.depth, remat=remat, rngs=rngs
        )
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.modulation = linear(width, 2 * width, kernel_init=_zeros)
        self.action = Heads(config.action_size, width, dtype=dtype, rngs=rngs) if config.action_size else None
        # Last, so that a policy without it starts from an equal trunk.
        self.latent = Heads(config.latent_size, width, dtype=dtype, rngs=rngs) if config.latent_size else None

    def frozen_paths(self) -> tuple[str, ...]:
        """What the optimiser leaves alone."""
        return tuple(f"observation/{path}" for path in self.observation.frozen_paths())

    def loss(self, batch: PolicyBatch, key: jax.Array) -> LossOutput:
        """Mean squared error of what the trunk says of noisy chunks, of actions and of latent motion."""
        config = self.config
        choice_key, hide_key, *noise_keys = jax.random.split(key, 4)
        context = self._context(batch.observation, hide_key)
        kinds = self._kinds(batch, choice_key)
        draws = [_draw(config, kind, noise_key) for kind, noise_key in zip(kinds, noise_keys, strict=False)]
        # Of every sample, what its own kind gives.
        tokens = sum(
            jnp.where(draw.own[:, None, None], kind.heads.inputs(draw.noisy), 0)
            for kind, draw in zip(kinds, draws, strict=True)
        )
        time = sum(jnp.where(draw.own, draw.time, 0) for draw in draws)
        steps = functools.reduce(jnp.logical_or, [draw.mask.any(axis=-1) for draw in draws])
        x = self._trunk(tokens, time, context, steps)
        total, terms = jnp.zeros(()), {}
        for kind, draw in zip(kinds, draws, strict=True):
            error = (kind.heads.outputs(x.astype(jnp.float32)) - draw.target) ** 2
            terms[f"{kind.name}_loss"] = (error * draw.mask).sum() / jnp.maximum(draw.mask.sum(), 1.0)
            terms[f"{kind.name}_share"] = draw.own.mean()
            total += kind.weight * terms[f"{kind.name}_loss"]
        return LossOutput(total, terms)

    def sample_actions(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """Action chunks; see `Policy`.

        Raises:
          ConfigError: the policy was trained on latent motion alone.
        """
        if self.action is None:
            raise ConfigError("This policy was trained on latent motion alone; finetune it on robot data first.")
        return self._sample(observation, keys, self.action, self.config.diffusion)

    def sample_latents(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """Chunks of normalised latent motion, float32 `[B, H, Z]`.

        Raises:
          ConfigError: the policy has no such head.
        """
        if self.latent is None:
            raise ConfigError("This policy was trained without latent motion, so it has none to sample.")
        # Only actions have limits.
        return self._sample(observation, keys, self.latent, dataclasses.replace(self.config.diffusion, clip=0.0))

    def _sample(self, observation: Observation, keys: jax.Array, heads: Heads, diffusion: DiffusionConfig) -> jax.Array:
        config = self.config
        batch, guided = len(keys), config.guidance != 1
        context = self._context(observation)
        if guided:
            blind = self._context(observation, hidden=jnp.ones((batch, 1), bool))
            context = jax.tree.map(lambda *parts: jnp.concatenate(parts), context, blind)
        steps = jnp.ones((len(context.pooled), config.chunk), bool)

        def network(x: jax.Array, time: jax.Array) -> jax.Array:
            if guided:
                x, time = jnp.concatenate([x, x]), jnp.concatenate([time, time])
            said = heads.outputs(self._trunk(heads.inputs(x), time, context, steps).astype(jnp.float32))
            if not guided:
                return said
            told, blind = jnp.split(said, 2)
            return blind + config.guidance * (told - blind)

        noise = jax.vmap(lambda key: jax.random.normal(key, (config.chunk, heads.size)))(keys)
        return denoise(diffusion, network, noise, keys)

    def _kinds(self, batch: PolicyBatch, key: jax.Array) -> list[_Kind]:
        """Of every sample its actions or, where it has no others or chance says so, its latent motion."""
        config = self.config
        start = (self.observation.config.instants - 1) * config.stride
        kinds = []
        latent_own = jnp.zeros(len(batch.action), bool)
        if self.latent is not None and batch.latent is not None:
            latent, mask = batch.latent[:, start:], batch.has_latent[:, start:, None]
            latent_own = (mask > 0).any(axis=(1, 2))
            if self.action is not None:
                has_action = (batch.has_action[:, start:] > 0).any(axis=(1, 2))
                latent_own &= jax.random.bernoulli(key, config.latent_share, has_action.shape) | ~has_action
            mask = jnp.broadcast_to(mask, latent.shape)
            kinds.append(_Kind("latent", self.latent, config.latent_weight, latent, mask, latent_own))
        if self.action is not None:
            action, mask = batch.action[:, start:], batch.has_action[:, start:]
            kinds.append(_Kind("action", self.action, config.action_weight, action, mask, ~latent_own))
        return kinds

    def _context(
        self, observation: Observation, key: jax.Array | None = None, hidden: jax.Array | None = None
    ) -> Context:
        """Reads the observation once for all steps of denoising.

        Args:
          observation: what is seen.
          key: draws whose instruction is hidden.
          hidden: bool `[B, 1]`, whose is, in place of drawing.
        """
        features = self.observation(observation)
        if key is not None and self.config.instruction_dropout:
            hidden = jax.random.bernoulli(key, self.config.instruction_dropout, (len(features.tokens), 1))
        if hidden is not None:
            nothing, text = self.no_instruction[...], features.text
            text = text._replace(
                tokens=jnp.where(
                    hidden[..., None], broadcast_param(nothing, text.tokens.shape, text.tokens.dtype), text.tokens
                ),
                pooled=jnp.where(hidden, broadcast_param(nothing, text.pooled.shape, text.pooled.dtype), text.pooled),
            )
            features = features._replace(text=text)
        tokens, mask = features.context()
        return Context(self.context_norm(tokens), mask, features.text.pooled)

    def _trunk(self, tokens: jax.Array, time: jax.Array, context: Context, steps: jax.Array) -> jax.Array:
        """`[B, H, D]` to `[B, H, D]`; `steps`, bool `[B, H]`, says which steps of the chunk are there.

        The context may be that of fewer samples, each of which has several chunks in a row.
        """
        told = self.time_out(jax.nn.silu(self.time_hidden(_time_features(time))))
        told = jax.nn.silu(told + _tile(context.pooled, len(told) // len(context.pooled)))
        x = tokens + broadcast_param(self.step_embed[...], tokens.shape, tokens.dtype)
        x = self.blocks(x, told, context.tokens, steps[:, None], context.mask[:, None])
        shift, scale = jnp.split(self.modulation(told)[:, None], 2, axis=-1)
        return self.norm(x) * (1 + scale) + shift


class DitBlock(nnx.Module):
    """Self-attention, cross-attention and MLP, each modulated by a vector that starts without effect (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attn = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.cross_attn = CrossAttention(width, width, num_heads, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, 4 * width, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 9 * width, kernel_init=_zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, told: jax.Array, context: jax.Array, steps: jax.Array, context_mask: jax.Array
    ) -> jax.Array:
        """`[B, H, D]` to `[B, H, D]`, told `[B, D]`.

        Args:
          x: tokens of the chunk.
          told: vector that modulates.
          context: `[B / n, N, D]`, for n chunks each.
          steps, context_mask: bool `[B, 1, H]` and `[B / n, 1, N]`, what is there.
        """
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = jnp.split(
            self.modulation(told)[:, None], 9, axis=-1
        )
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, None, steps)
        # Chunks that share a context read it as one sequence, so that its keys and values are computed once.
        query = (self.norm2(x) * (1 + scale2) + shift2).reshape(len(context), -1, x.shape[-1])
        x = x + gate2 * self.cross_attn(query, context, context_mask).reshape(x.shape)
        return x + gate3 * self.mlp(self.norm3(x) * (1 + scale3) + shift3)


class _Kind(NamedTuple):
    """What some samples of a batch are trained on.

    Attributes:
      name: of its terms.
      heads: that read and say it.
      weight: of its loss.
      chunk: `[B, H, size]`.
      mask: 1 where `chunk` holds a number.
      own: bool `[B]`, which samples are trained on it.
    """

    name: str
    heads: Heads
    weight: float
    chunk: jax.Array
    mask: jax.Array
    own: jax.Array


class _Draw(NamedTuple):
    """Noisy chunks of one kind with their times and targets, the mask of their numbers, and whose own they are."""

    noisy: jax.Array
    time: jax.Array
    target: jax.Array
    mask: jax.Array
    own: jax.Array


def _draw(config: DiffusionPolicyConfig, kind: _Kind, key: jax.Array) -> _Draw:
    """Noises every chunk `draws` times."""
    chex.assert_shape(kind.chunk, (None, config.chunk, kind.heads.size))
    own = _tile(kind.own, config.draws)
    noised = add_noise(config.diffusion, _tile(kind.chunk, config.draws), key)
    mask = _tile(kind.mask, config.draws) * own[:, None, None]
    return _Draw(noised.x, noised.time, noised.target, mask, own)


def _tile(x: jax.Array, count: int) -> jax.Array:
    """`[B, ...]` to `[B * count, ...]`; the copies of a row stay on its device."""
    return jnp.repeat(x, count, axis=0) if count > 1 else x


def _time_features(time: jax.Array) -> jax.Array:
    """Sines and cosines `[B, 2 * F]` of times in [0, 1]."""
    angles = time[:, None] * np.geomspace(1.0, 1000.0, _TIME_FREQUENCIES, dtype=np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
