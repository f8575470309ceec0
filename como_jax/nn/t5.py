"""T5's encoder (arXiv 1910.10683). Weights are read by `como_jax.weights.text`.

Axes: B batch, M tokens, D width, H heads, K head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.nn.layers import xavier_uniform
from como_jax.nn.stack import Stack
from como_jax.nn.text import TextFeatures, masked_mean
from como_jax.nn.text_layers import GATED, activation, check_sizes, embedding_table, split_text
from como_jax.spec.towers import TextConfig
from como_jax.types import Observation


class T5Tower(nnx.Module):
    """The encoder of T5 (arXiv 1910.10683, section 2.1) and of its later versions with gated linear units."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        check_sizes(config)
        self.width, self.dtype = config.width, dtype
        self.relative_distance = config.relative_distance
        self.token_embed = embedding_table(config.vocabulary_size, config.width, rngs=rngs)
        self.relative_bias = embedding_table(config.relative_buckets, config.num_heads, rngs=rngs)
        self.blocks = Stack(lambda rngs: T5Block(config, dtype=dtype, rngs=rngs), config.depth, rngs=rngs)
        self.norm = _rms_norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text`."""
        return self.read(observation.text)

    def read(self, text: jax.Array) -> TextFeatures:
        """Features of int32 `[B, M]`, numbers of tokens plus one; the pooled ones are their mean."""
        tokens, mask = split_text(text)
        x = self.token_embed[...][tokens].astype(self.dtype)
        hidden = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
        x = self.norm(self.blocks(x, self._position_bias(text.shape[1]) + hidden[:, None, None]))
        return TextFeatures(x, mask, masked_mean(x, mask))

    def _position_bias(self, length: int) -> jax.Array:
        """What all layers add to their logits, float32 `[1, H, M, M]`."""
        table = self.relative_bias[...]
        distance = np.arange(length) - np.arange(length)[:, None]
        return jnp.moveaxis(table[relative_buckets(distance, len(table), self.relative_distance)], 2, 0)[None]


class T5Block(nnx.Module):
    """Pre-norm transformer block without means, biases and a scale of the logits."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = _rms_norm(config, dtype=dtype, rngs=rngs)
        self.attn = T5Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = _rms_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = T5Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`[B, M, D]` to `[B, M, D]`; the bias of the logits is float32 `[B, H, M, M]`."""
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class T5Attention(nnx.Module):
    """Multi-head self-attention with a bias on its logits, which are not scaled."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        heads = (config.num_heads, config.head_size or config.width // config.num_heads)
        kinds = {"use_bias": False, "kernel_init": xavier_uniform, "dtype": dtype, "rngs": rngs}
        self.qkv = nnx.LinearGeneral(config.width, (3, *heads), **kinds)
        self.proj = nnx.LinearGeneral(heads, config.width, axis=(-2, -1), **kinds)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`[B, M, D]` to `[B, M, D]`, softmax in float32; the bias is `[B, H, M, M]`."""
        query, key, value = jnp.moveaxis(self.qkv(x), 2, 0)
        logits = jnp.einsum("bqhk,bnhk->bhqn", query, key).astype(jnp.float32) + bias
        weights = jax.nn.softmax(logits).astype(x.dtype)
        return self.proj(jnp.einsum("bhqn,bnhk->bqhk", weights, value))


class T5Mlp(nnx.Module):
    """Two layers, of which the first may be a gated linear unit (arXiv 2002.05202)."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=xavier_uniform, dtype=dtype, rngs=rngs)

        self.gated = config.activation.startswith(GATED)
        self.activation = activation(config.activation.removeprefix(GATED))
        self.fc1 = linear(config.width, config.mlp_width)
        if self.gated:
            self.gate = linear(config.width, config.mlp_width)
        self.fc2 = linear(config.mlp_width, config.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.activation(self.fc1(x))
        return self.fc2(hidden * self.gate(x) if self.gated else hidden)


def relative_buckets(distance: np.ndarray, buckets: int, farthest: int) -> np.ndarray:
    """The bucket of every distance from a query to a key (arXiv 1910.10683, section 2.1), of the same shape.

    Half of the buckets are for keys that follow the query. The first half of either half is for one distance each, the
    rest cover ranges that grow with the logarithm of the distance, up to `farthest`.
    """
    side = buckets // 2
    exact = side // 2
    away = np.abs(distance)
    # In float32, as where public weights were trained: exact powers fall into buckets by its rounding.
    scale = np.float32(np.log(farthest / exact))
    log = np.log(np.maximum(away, exact).astype(np.float32) / np.float32(exact)) / scale
    far = exact + (log * np.float32(side - exact)).astype(np.int64)
    return np.where(distance > 0, side, 0) + np.where(away < exact, away, np.minimum(far, side - 1))


def _rms_norm(config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
