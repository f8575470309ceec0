"""Layers of LAQ's video transformer (LAPA, arXiv 2410.11758, after C-ViViT of Phenaki, arXiv 2210.02399).

Axes: B batch, T frames, I and J rows and columns of patches, N tokens, M context tokens, D width, H heads, K head size.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.nn.layers import LayerNorm, Linear, xavier_uniform
from como_jax.nn.mixed_precision import broadcast_param, project

# Fixed temperature of cosine attention.
ATTENTION_SCALE = 8.0
NUM_NULL_TOKENS = 2


class CosineAttention(nnx.Module):
    """Attention between queries and keys of length one, with a learned scale of every number."""

    def __init__(
        self, width: int, num_heads: int, head_size: int, *, num_null: int = 0, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        general = functools.partial(nnx.LinearGeneral, kernel_init=xavier_uniform, use_bias=False, rngs=rngs)
        self.dtype = dtype
        self.q = general(width, (num_heads, head_size))
        self.kv = general(width, (2, num_heads, head_size))
        self.proj = general((num_heads, head_size), width, axis=(-2, -1))
        self.q_scale = nnx.Param(jnp.ones(head_size))
        self.k_scale = nnx.Param(jnp.ones(head_size))
        if num_null:
            # Something to look at when no context token matters.
            self.null_kv = nnx.Param(jax.random.normal(rngs.params(), (2, num_null, num_heads, head_size)))

    def __call__(self, x: jax.Array, context: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """`[B, N, D]` from queries `x` of that shape, `context` `[B, M, D]`, and `bias` `[H, N, M]` on the logits."""
        x, context = x.astype(self.dtype), context.astype(self.dtype)
        query, (key, value) = project(x, self.q.kernel[...]), jnp.moveaxis(project(context, self.kv.kernel[...]), 2, 0)
        if hasattr(self, "null_kv"):
            shape = self.null_kv[...].shape
            null = broadcast_param(self.null_kv[...][:, None], (shape[0], len(x), *shape[1:]), self.dtype)
            key, value = (jnp.concatenate([null[part], own], axis=1) for part, own in enumerate((key, value)))
        query, key = unit(query) * self.q_scale[...], unit(key) * self.k_scale[...]
        logits = ATTENTION_SCALE * jnp.einsum("bnhk,bmhk->bhnm", query, key)
        if bias is not None:
            logits = logits + bias
        weights = jax.nn.softmax(logits).astype(self.dtype)
        return project(jnp.einsum("bhnm,bmhk->bnhk", weights, value), self.proj.kernel[...], num_inputs=2)


class GatedMlp(nnx.Module):
    """GEGLU (arXiv 2002.05202): one half of the hidden layer gates the other; as many parameters as a plain MLP."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = int(width * 4 * 2 / 3)
        self.fc1 = Linear(width, 2 * hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        value, gate = jnp.split(self.fc1(x), 2, axis=-1)
        return self.fc2(value * jax.nn.gelu(gate, approximate=False))


class PositionGenerator(nnx.Module):
    """PEG (arXiv 2102.10882): a depthwise 3 x 3 x 3 convolution over time, rows and columns.

    It is written as one matrix over the few places of a clip for every channel: compilers are slow at depthwise
    convolutions in three dimensions (on a CPU 8 ms instead of 360 for both passes of 32 clips of 2 x 8 x 8 x 96). The
    released code of LAPA reshapes tokens here in another order than they have, which mixes the axes; this does not.
    """

    def __init__(self, width: int, *, causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.causal, self.dtype = causal, dtype
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 3, 3, width)) / np.sqrt(27))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, I, J, D]` to the same; a causal one sees two frames back and none ahead."""
        chex.assert_rank(x, 5)
        # In float32, since the gradient of the few taps is a sum over all clips and places.
        taps = self.kernel[...].reshape(27, -1)
        nowhere = jnp.zeros((1, taps.shape[1]))
        matrix = jnp.concatenate([taps, nowhere])[_taps(*x.shape[1:4], self.causal)]
        tokens = x.astype(jnp.float32).reshape(len(x), -1, x.shape[-1])
        mixed = jnp.einsum("nmd,bmd->bnd", matrix, tokens).reshape(x.shape)
        return (mixed + self.bias[...]).astype(self.dtype)


def _taps(frames: int, rows: int, columns: int, causal: bool) -> np.ndarray:
    """Which of the 27 taps connects an output place to an input place, `[N, N]`; 27 where none does."""
    axes = [np.arange(size) for size in (frames, rows, columns)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    offset = places[None] - places[:, None] + np.array([2 if causal else 1, 1, 1])
    inside = np.all((offset >= 0) & (offset < 3), axis=-1)
    return np.where(inside, offset @ np.array([9, 3, 1]), 27)


class PositionBias(nnx.Module):
    """Continuous position bias (Swin v2, arXiv 2111.09883): an MLP over the logarithms of relative positions."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.float32, rngs=rngs)
        self.fc1, self.fc2, self.out = linear(2, width), linear(width, width), linear(width, num_heads)

    def __call__(self, rows: int, columns: int) -> jax.Array:
        """Bias on the logits `[H, rows * columns, rows * columns]`, float32."""
        grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
        offset = (grid[:, None] - grid[None]).astype(np.float32)
        x = jnp.asarray(np.sign(offset) * np.log1p(np.abs(offset)))
        x = jax.nn.leaky_relu(self.fc1(x), 0.1)
        x = jax.nn.leaky_relu(self.fc2(x), 0.1)
        return jnp.moveaxis(self.out(x), -1, 0)


class _VideoBlock(nnx.Module):
    """What spatial and temporal blocks share: pre-norm attention over some axes, and a gated MLP."""

    def __init__(self, width: int, num_heads: int, head_size: int, *, causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.peg = PositionGenerator(width, causal=causal, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attn = CosineAttention(width, num_heads, head_size, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = GatedMlp(width, dtype=dtype, rngs=rngs)


class SpatialBlock(_VideoBlock):
    """Every patch attends to all patches of its frame, and then to context tokens if it is made for them."""

    def __init__(
        self, width: int, num_heads: int, head_size: int, *, cross: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(width, num_heads, head_size, causal=False, dtype=dtype, rngs=rngs)
        if cross:
            self.cross_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
            self.cross = nnx.Dict(
                attn=CosineAttention(width, num_heads, head_size, num_null=NUM_NULL_TOKENS, dtype=dtype, rngs=rngs)
            )

    def __call__(self, x: jax.Array, bias: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """`[B, T, I, J, D]` to the same, from `bias` `[H, I * J, I * J]` and `context` `[B * T, M, D]`."""
        chex.assert_rank(x, 5)
        x = x + self.peg(x)
        tokens = x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])
        normed = self.norm1(tokens)
        tokens = tokens + self.attn(normed, normed, bias)
        if context is not None:
            tokens = tokens + self.cross["attn"](self.cross_norm(tokens), context)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.reshape(x.shape)


class TemporalBlock(_VideoBlock):
    """Every patch attends to the same place in its own and earlier frames."""

    def __init__(self, width: int, num_heads: int, head_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, num_heads, head_size, causal=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, I, J, D]` to the same."""
        batch, frames, rows, columns, width = x.shape
        x = x + self.peg(x)
        tokens = jnp.moveaxis(x, 1, 3).reshape(-1, frames, width)
        normed = self.norm1(tokens)
        future = jnp.where(np.tril(np.ones((frames, frames), bool)), 0.0, jnp.finfo(jnp.float32).min)
        tokens = tokens + self.attn(normed, normed, future[None])
        tokens = tokens + self.mlp(self.norm2(tokens))
        return jnp.moveaxis(tokens.reshape(batch, rows, columns, frames, width), 3, 1)


def unit(x: jax.Array) -> jax.Array:
    """Float32 vectors of length one along the last axis; 0 stays 0, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))
