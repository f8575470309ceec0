"""The decoder-only transformer of a vision-language-action model, with the layout of Gemma (arXiv 2403.08295).

It has grouped-query attention (arXiv 2305.13245), rotary positions (arXiv 2104.09864), RMS norm (arXiv 1910.07467) and
a gated MLP (arXiv 2002.05202).

Axes: B batch, N tokens, S places of the cache (N without a cache), D width, H query heads, G key-value heads, K head
size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.nn.primitives import matmul, project
from como_jax.nn.stack import Stack
from como_jax.spec.towers import DecoderConfig

_fan_in = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


class KeyValues(NamedTuple):
    """Keys and values of the tokens so far, `[B, S, G, K]` each, or of all layers, `[depth, B, S, G, K]`."""

    keys: jax.Array
    values: jax.Array


class RmsNorm(nnx.Module):
    """Divides by the root mean square, in float32, and multiplies by `1 + scale`, as Gemma stores it."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        full = x.astype(jnp.float32)
        full = full * jax.lax.rsqrt(jnp.mean(full**2, axis=-1, keepdims=True) + self.epsilon)
        return (full * (1 + self.scale[...])).astype(x.dtype)


class Projection(nnx.Module):
    """A linear map without bias; with `lora_rank` plus a trained change of low rank (LoRA, arXiv 2106.09685)."""

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.inputs, self.outputs, self.dtype = inputs, outputs, dtype
        size_in, size_out, rank = math.prod(inputs), math.prod(outputs), config.lora_rank
        self.kernel = nnx.Param(_fan_in(rngs.params(), (size_in, size_out)).reshape(*inputs, *outputs))
        self.lora_scale = config.lora_alpha / rank if rank else 0.0
        if rank:
            # One of the two factors starts at zero, and with it the change.
            self.lora_a = nnx.Param(_fan_in(rngs.params(), (size_in, rank)))
            self.lora_b = nnx.Param(jnp.zeros((rank, size_out)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., *inputs]` to `[..., *outputs]`."""
        x = x.astype(self.dtype)
        out = project(x, self.kernel[...], num_inputs=len(self.inputs))
        if self.lora_scale:
            flat = x.reshape(-1, math.prod(self.inputs))
            change = matmul(matmul(flat, self.lora_a[...]), self.lora_b[...])
            out = out + self.lora_scale * change.reshape(out.shape)
        return out


class GroupedAttention(nnx.Module):
    """Attention in which groups of query heads share one head of keys and values."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        width, heads = (config.width,), (config.num_heads, config.head_size)
        shared = (config.num_kv_heads, config.head_size)
        self.q = Projection(width, heads, config, dtype, rngs)
        self.k = Projection(width, shared, config, dtype, rngs)
        self.v = Projection(width, shared, config, dtype, rngs)
        self.proj = Projection(heads, width, config, dtype, rngs)

    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: KeyValues | None, index: jax.Array | None
    ) -> tuple[jax.Array, KeyValues]:
        """`[B, N, D]` to `[B, N, D]`, and the keys and values: with a cache, those of the cache and the new ones."""
        config = self.config
        query = rotate(self.q(x), positions, config.rope_period)
        key, value = rotate(self.k(x), positions, config.rope_period), self.v(x)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache.keys, key.astype(cache.keys.dtype), index, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache.values, value.astype(cache.values.dtype), index, axis=1)
        groups = query.reshape(*x.shape[:2], config.num_kv_heads, -1, config.head_size)
        logits = jnp.einsum("bngrk,bsgk->bgrns", groups * config.head_size**-0.5, key).astype(jnp.float32)
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits).astype(self.dtype)
        mixed = jnp.einsum("bgrns,bsgk->bngrk", weights, value.astype(self.dtype))
        return self.proj(mixed.reshape(*query.shape)), KeyValues(key, value)


class GatedMlp(nnx.Module):
    """The GELU of one linear map multiplied by another (GEGLU), then projected back."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, hidden = (config.width,), (config.mlp_width,)
        self.gate = Projection(width, hidden, config, dtype, rngs)
        self.up = Projection(width, hidden, config, dtype, rngs)
        self.down = Projection(hidden, width, config, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class DecoderBlock(nnx.Module):
    """Pre-norm block of attention and gated MLP."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = RmsNorm(config.width, config.norm_epsilon)
        self.attn = GroupedAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = RmsNorm(config.width, config.norm_epsilon)
        self.mlp = GatedMlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, cache: KeyValues | None, positions: jax.Array, mask: jax.Array, index: jax.Array | None
    ) -> tuple[jax.Array, KeyValues]:
        """`[B, N, D]` to `[B, N, D]`, and the keys and values; see `GroupedAttention`."""
        attended, cache = self.attn(self.norm1(x), positions, mask, cache, index)
        x = x + attended
        return x + self.mlp(self.norm2(x)), cache


class Decoder(nnx.Module):
    """The stack of blocks and the last norm; its user brings the embedding and the heads."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype = jnp.float32, remat: str = "none", rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.blocks = Stack(
            lambda rngs: DecoderBlock(config, dtype=dtype, rngs=rngs), config.depth, remat=remat, rngs=rngs
        )
        self.norm = RmsNorm(config.width, config.norm_epsilon)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: KeyValues | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """`[B, N, D]` to `[B, N, D]`, and the keys and values of all layers.

        Args:
          x: embedded tokens.
          positions: int32 `[B, N]`, for the rotary positions.
          mask: bool `[B, N, S]`, which places each token reads.
          cache: keys and values of earlier tokens, or None.
          index: int32 scalar, the place of the first token in the cache; None without a cache.
        """
        chex.assert_shape(x, (None, None, self.config.width))
        chex.assert_shape(positions, x.shape[:2])
        chex.assert_shape(mask, (*x.shape[:2], x.shape[1] if cache is None else cache.keys.shape[2]))
        x, cache = self.blocks.carry(x.astype(self.dtype), cache, positions, mask, index)
        return self.norm(x), cache

    def frozen_paths(self) -> tuple[str, ...]:
        """Paths of the parameters that the optimiser leaves alone: with `lora_rank` all but the low-rank changes."""
        if not self.config.lora_rank:
            return ()
        kernels = [f"attn/{name}" for name in ("q", "k", "v", "proj")] + [
            f"mlp/{name}" for name in ("gate", "up", "down")
        ]
        layer = [*(f"{name}/kernel" for name in kernels), "norm1", "norm2"]
        return (*(f"blocks/layers/{name}" for name in layer), "norm")

    def empty_cache(self, batch: int, places: int) -> KeyValues:
        """A cache with room for the keys and values of `places` tokens."""
        config = self.config
        zeros = jnp.zeros((config.depth, batch, places, config.num_kv_heads, config.head_size), self.dtype)
        return KeyValues(zeros, zeros)


def rotate(x: jax.Array, positions: jax.Array, period: float) -> jax.Array:
    """Rotary positions `[B, N]` of queries or keys `[B, N, H, K]`; number i is paired with i + K / 2, as in Gemma."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * period ** (-jnp.arange(half) / half)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)
