"""Diffusion policy: a DiT (arXiv 2212.09748) that denoises chunks of robot actions or of latent motion.

As in stage 2 of CoMo (arXiv 2505.17006), actions and latent motion share the trunk. Each kind has its own linear layers
into and out of the trunk, and every sample uses those of the kind that it has.

Axes: B batch, H steps of a chunk, A action, Z numbers of a latent motion, N context tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.attention import Attention, CrossAttention
from como_jax.nn.layers import LayerNorm, Linear, Mlp
from como_jax.nn.primitives import broadcast_param, embedding
from como_jax.nn.stack import Stack
from como_jax.policies.denoising import add_noise, denoise, time_features
from como_jax.policies.observation import ObservationEncoder
from como_jax.spec.policies import DiffusionConfig, DiffusionPolicyConfig, ObservationConfig
from como_jax.types import LossOutput, Observation, PolicyBatch

_TIME_FEATURES = 128
_zeros = nnx.initializers.zeros


class Context(NamedTuple):
    """The observation as the trunk reads it: tokens `[B, N, D]`, their mask `[B, N]`, and one vector `[B, D]`."""

    tokens: jax.Array
    mask: jax.Array
    pooled: jax.Array


class Heads(nnx.Module):
    """The linear layers into the trunk and out of it, for one kind of chunk."""

    def __init__(self, size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.size = size
        self.inputs = Linear(size, width, dtype=dtype, rngs=rngs)
        self.outputs = Linear(width, size, kernel_init=_zeros, dtype=jnp.float32, rngs=rngs)


class DiffusionPolicy(nnx.Module):
    """The policy that this module's docstring describes."""

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
        self.observation = ObservationEncoder(observation, width, dtype=dtype, remat=remat, rngs=rngs)
        self.no_instruction = embedding(width, rngs=rngs)
        self.context_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.time_hidden = linear(_TIME_FEATURES, width)
        self.time_out = linear(width, width)
        self.step_embed = embedding(config.chunk, width, rngs=rngs)
        self.blocks = Stack(
            lambda rngs: DitBlock(width, config.num_heads, dtype=dtype, rngs=rngs), config.depth, remat=remat, rngs=rngs
        )
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.modulation = linear(width, 2 * width, kernel_init=_zeros)
        self.action = Heads(config.action_size, width, dtype=dtype, rngs=rngs) if config.action_size else None
        # Last, so that with the same seed a policy without latent motion starts from the same parameters.
        self.latent = Heads(config.latent_size, width, dtype=dtype, rngs=rngs) if config.latent_size else None

    def frozen_paths(self) -> tuple[str, ...]:
        """Paths of the parameters that the optimiser leaves alone."""
        return tuple(f"observation/{path}" for path in self.observation.frozen_paths())

    def loss(self, batch: PolicyBatch, key: jax.Array) -> LossOutput:
        """Mean squared errors of the predictions from noisy chunks of actions and of latent motion, weighted."""
        config = self.config
        choice_key, hide_key, *noise_keys = jax.random.split(key, 4)
        context = self._context(batch.observation, hide_key)
        kinds = self._kinds(batch, choice_key)
        draws = [_draw(config, kind, noise_key) for kind, noise_key in zip(kinds, noise_keys, strict=False)]
        # Every sample takes the input of its own kind.
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
        """Chunks of normalised actions, float32 `[B, H, A]`; see `Policy`.

        Raises:
          ConfigError: the policy was trained on latent motion alone.
        """
        if self.action is None:
            raise ConfigError("This policy was trained on latent motion alone; finetune it on robot data first.")
        return self._sample(observation, keys, self.action, self.config.diffusion)

    def sample_latents(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """Chunks of normalised latent motion, float32 `[B, H, Z]`.

        Raises:
          ConfigError: the policy was trained without latent motion.
        """
        if self.latent is None:
            raise ConfigError("This policy was trained without latent motion, so it has none to sample.")
        # Only actions have known limits.
        return self._sample(observation, keys, self.latent, dataclasses.replace(self.config.diffusion, clip=0.0))

    def _sample(self, observation: Observation, keys: jax.Array, heads: Heads, diffusion: DiffusionConfig) -> jax.Array:
        """Chunks of one kind, float32 `[B, H, size]`, with guidance by the instruction where it is on."""
        config = self.config
        batch, guided = len(keys), config.guidance != 1
        context = self._context(observation)
        if guided:
            without = self._context(observation, hidden=jnp.ones((batch, 1), bool))
            context = jax.tree.map(lambda *parts: jnp.concatenate(parts), context, without)
        steps = jnp.ones((len(context.pooled), config.chunk), bool)

        def network(x: jax.Array, time: jax.Array) -> jax.Array:
            if guided:
                x, time = jnp.concatenate([x, x]), jnp.concatenate([time, time])
            prediction = heads.outputs(self._trunk(heads.inputs(x), time, context, steps).astype(jnp.float32))
            if not guided:
                return prediction
            with_instruction, without = jnp.split(prediction, 2)
            return without + config.guidance * (with_instruction - without)

        noise = jax.vmap(lambda key: jax.random.normal(key, (config.chunk, heads.size)))(keys)
        return denoise(diffusion, network, noise, keys)

    def _kinds(self, batch: PolicyBatch, key: jax.Array) -> list[_Kind]:
        """The kinds of chunks in the batch. A sample that has both kinds is trained on one, which is drawn."""
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
        """Encodes the observation, once for all steps of denoising.

        Args:
          observation: of the policy.
          key: draws the samples whose instruction is hidden.
          hidden: bool `[B, 1]`, the samples whose instruction is hidden, instead of drawing them.
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
        """The DiT, `[B, H, D]` to `[B, H, D]`.

        Args:
          tokens: of noisy chunks.
          time: of their noise, `[B]`.
          context: of `B / n` observations, for n chunks in a row each.
          steps: bool `[B, H]`, False at steps that the chunk lacks.
        """
        condition = self.time_out(jax.nn.silu(self.time_hidden(time_features(time, _TIME_FEATURES))))
        condition = jax.nn.silu(condition + _tile(context.pooled, len(condition) // len(context.pooled)))
        x = tokens + broadcast_param(self.step_embed[...], tokens.shape, tokens.dtype)
        x = self.blocks(x, condition, context.tokens, steps[:, None], context.mask[:, None])
        shift, scale = jnp.split(self.modulation(condition)[:, None], 2, axis=-1)
        return self.norm(x) * (1 + scale) + shift


class DitBlock(nnx.Module):
    """Self-attention, cross-attention and MLP, each modulated by a vector (adaLN-Zero); at first it changes nothing."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attn = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.cross_attn = CrossAttention(width, width, num_heads, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, 4 * width, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 9 * width, kernel_init=_zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, condition: jax.Array, context: jax.Array, steps: jax.Array, context_mask: jax.Array
    ) -> jax.Array:
        """`[B, H, D]` to `[B, H, D]`.

        Args:
          x: tokens of the chunks.
          condition: the vector that modulates, `[B, D]`.
          context: tokens of the observations `[B / n, N, D]`, for n chunks each.
          steps, context_mask: bool `[B, 1, H]` and `[B / n, 1, N]`, which tokens of either are there.
        """
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = jnp.split(
            self.modulation(condition)[:, None], 9, axis=-1
        )
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, steps)
        # Chunks that share a context read it as one sequence, so that its keys and values are computed once.
        query = (self.norm2(x) * (1 + scale2) + shift2).reshape(len(context), -1, x.shape[-1])
        x = x + gate2 * self.cross_attn(query, context, context_mask).reshape(x.shape)
        return x + gate3 * self.mlp(self.norm3(x) * (1 + scale3) + shift3)


class _Kind(NamedTuple):
    """One kind of chunks, which some samples of a batch are trained on.

    Attributes:
      name: prefix of its terms on the dashboard.
      heads: its layers into and out of the trunk.
      weight: of its loss.
      chunk: `[B, H, size]`.
      mask: of the shape of `chunk`, 1 where a number is known.
      own: bool `[B]`, which samples are trained on this kind.
    """

    name: str
    heads: Heads
    weight: float
    chunk: jax.Array
    mask: jax.Array
    own: jax.Array


class _Draw(NamedTuple):
    """`draws` noisy versions of every chunk of one kind, with their times, targets and masks; `own` as in `_Kind`."""

    noisy: jax.Array
    time: jax.Array
    target: jax.Array
    mask: jax.Array
    own: jax.Array


def _draw(config: DiffusionPolicyConfig, kind: _Kind, key: jax.Array) -> _Draw:
    """Adds noise to every chunk, `config.draws` times."""
    chex.assert_shape(kind.chunk, (None, config.chunk, kind.heads.size))
    own = _tile(kind.own, config.draws)
    noised = add_noise(config.diffusion, _tile(kind.chunk, config.draws), key)
    mask = _tile(kind.mask, config.draws) * own[:, None, None]
    return _Draw(noised.x, noised.time, noised.target, mask, own)


def _tile(x: jax.Array, count: int) -> jax.Array:
    """`[B, ...]` to `[B * count, ...]`; the copies of a row stay on its device."""
    return jnp.repeat(x, count, axis=0) if count > 1 else x
