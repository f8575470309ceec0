"""A decoder-only transformer laid out as Gemma (arXiv 2403.08295): what a vision-language-action model is made of.

Grouped-query attention (arXiv 2305.13245), rotary positions (arXiv 2104.09864), RMS norm (arXiv 1910.07467) and a gated
MLP (arXiv 2002.05202). Axes: B batch, N tokens, S places of the cache, D width, H query heads, G key-value heads,
K head size, F width of the MLP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.nn.mixed_precision import matmul, project
from como_jax.nn.stack import Stack
from como_jax.spec.towers import DecoderConfig

_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


class KeyValues(NamedTuple):
    """Keys and values of the tokens so far, `[B, S, G, K]` each, or of all layers, `[depth, B, S, G, K]`."""

    keys: jax.Array
    values: jax.Array


class RmsNorm(nnx.Module):
    """Scales to unit mean square, in float32; the scale is kept less one, as in Gemma."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        full = x.astype(jnp.float32)
        full = full * jax.lax.rsqrt(jnp.mean(full**2, axis=-1, keepdims=True) + self.epsilon)
        return (full * (1 + self.scale[...])).astype(x.dtype)


class Projection(nnx.Module):
    """A linear map without bias, `[..., *inputs]` to `[..., *outputs]`, with a low-rank change of it where asked."""

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.inputs, self.outputs, self.dtype = inputs, outputs, dtype
        size_in, size_out, rank = math.prod(inputs), math.prod(outputs), config.lora_rank
        self.kernel = nnx.Param(_init(rngs.params(), (size_in, size_out)).reshape(*inputs, *outputs))
        self.lora_scale = config.lora_alpha / rank if rank else 0.0
        if rank:
            # Of the two factors one starts at zero, so that the change does.
            self.lora_a = nnx.Param(_init(rngs.params(), (size_in, rank)))
            self.lora_b = nnx.Param(jnp.zeros((rank, size_out)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        out = project(x, self.kernel[...], num_inputs=len(self.inputs))
        if self.lora_scale:
            flat = x.reshape(-1, math.prod(self.inputs))
            change = matmul(matmul(flat, self.lora_a[...]), self.lora_b[...])
            out = out + self.lora_scale * change.reshape(out.shape)
        return out


class GroupedAttention(nnx.Module):
    """Attention whose heads share keys and values in groups."""

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
        """`[B, N, D]` to `[B, N, D]` and the keys and values, those of the cache with the new ones in place."""
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
    """GELU of one linear map times another, mapped back."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, hidden = (config.width,), (config.mlp_width,)
        self.gate = Projection(width, hidden, config, dtype, rngs)
        self.up = Projection(width, hidden, config, dtype, rngs)
        self.down = Projection(hidden, width, config, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class DecoderBlock(nnx.Module):
    """Pre-norm block."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = RmsNorm(config.width, config.norm_epsilon)
        self.attn = GroupedAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = RmsNorm(config.width, config.norm_epsilon)
        self.mlp = GatedMlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, cache: KeyValues | None, positions: jax.Array, mask: jax.Array, index: jax.Array | None
    ) -> tuple[jax.Array, KeyValues]:
        attended, cache = self.attn(self.norm1(x), positions, mask, cache, index)
        x = x + attended
        return x + self.mlp(self.norm2(x)), cache


class Decoder(nnx.Module):
    """The stack of blocks and the last norm; embedding and heads are those of whoever uses it."""

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
        """`[B, N, D]` to `[B, N, D]`, and keys and values of all layers.

        Args:
          x: embedded tokens.
          positions: int32 `[B, N]`.
          mask: bool `[B, N, S]`, which places each token reads; S is N without a cache.
          cache: of earlier tokens, or None.
          index: int32 scalar, the place in the cache of the first token.
        """
        chex.assert_shape(positions, x.shape[:2])
        x, cache = self.blocks.carry(x.astype(self.dtype), cache, positions, mask, index)
        return self.norm(x), cache

    def frozen_paths(self) -> tuple[str, ...]:
        """What the optimiser leaves alone: all but the low-rank changes, where there are any."""
        if not self.config.lora_rank:
            return ()
        kernels = [f"attn/{name}" for name in ("q", "k", "v", "proj")] + [
            f"mlp/{name}" for name in ("gate", "up", "down")
        ]
        layer = [*(f"{name}/kernel" for name in kernels), "norm1", "norm2"]
        return (*(f"blocks/layers/{name}" for name in layer), "norm")

    def empty_cache(self, batch: int, places: int) -> KeyValues:
        """A cache for so many tokens."""
        config = self.config
        zeros = jnp.zeros((config.depth, batch, places, config.num_kv_heads, config.head_size), self.dtype)
        return KeyValues(zeros, zeros)


def rotate(x: jax.Array, positions: jax.Array, period: float) -> jax.Array:
    """Rotary positions: `[B, N, H, K]`, the first half of the numbers paired with the second, as in Gemma."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * period ** (-jnp.arange(half) / half)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)
