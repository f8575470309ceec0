"""What a decoder writes after its prefix, token after token: one kind of output, with its embedding and its head.

Axes: B batch, S tokens of the output, L numbers of one, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.nn.layers import Linear
from como_jax.policies.latent_heads import CodeEmbedding, CodeHead, DiffusionHead, RegressionHead
from como_jax.spec.policies import DiffusionConfig


class OutputTokens(nnx.Module):
    """An output of `length` tokens, each a code, int32 `[B, S]`, or a vector, float32 `[B, S, L]`.

    Attributes:
      head: see `como_jax.policies.latent_heads`.
    """

    def __init__(
        self, embed: nnx.Module, head: nnx.Module, width: int, length: int, vector_size: int, *, rngs: nnx.Rngs
    ):
        """Takes the two ends, and the size of one token, 0 for codes."""
        self.start = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.embed, self.head, self.length, self.vector_size = embed, head, length, vector_size

    def inputs(self, values: jax.Array) -> jax.Array:
        """`[B, S, D]`: the start and all values but the last, so that the output at each token is the next one's."""
        embedded = self.embed(values[:, :-1])
        start = jnp.broadcast_to(self.start[...], (len(values), 1, self.start.shape[0]))
        return jnp.concatenate([start.astype(embedded.dtype), embedded], axis=1) + self.places[...]

    def input_at(self, values: jax.Array, token: jax.Array) -> jax.Array:
        """`[B, D]`: the input at one token, of which those before are known."""
        before = self.embed(jnp.take(values, jnp.maximum(token - 1, 0), axis=1))
        return jnp.where(token == 0, self.start[...], before) + self.places[...][token]

    def empty(self, batch: int) -> jax.Array:
        """Values of which nothing is known."""
        if self.vector_size:
            return jnp.zeros((batch, self.length, self.vector_size))
        return jnp.zeros((batch, self.length), jnp.int32)


def code_tokens(width: int, length: int, codes: int, *, temperature: float, rngs: nnx.Rngs) -> OutputTokens:
    """An output of codes, each of one codebook of so many; temperature 0 takes the likeliest."""
    ends = CodeEmbedding(codes, width, rngs=rngs), CodeHead(width, codes, temperature, rngs=rngs)
    return OutputTokens(*ends, width, length, 0, rngs=rngs)


def vector_tokens(
    width: int,
    length: int,
    size: int,
    *,
    head: str,
    hidden: int,
    depth: int,
    steps: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> OutputTokens:
    """An output of vectors.

    Args:
      width: of the decoder.
      length, size: vectors, and numbers of one.
      head: one of `VECTOR_HEADS`.
      hidden, depth, steps: of the network that matches flows, and of its sampling.
      dtype: of compute.
      rngs: of the parameters.
    """
    embed = Linear(size, width, dtype=dtype, rngs=rngs)
    if head == "regression":
        made = RegressionHead(width, size, rngs=rngs)
    else:
        flow = DiffusionConfig("flow", sample_steps=steps)
        made = DiffusionHead(width, size, flow, hidden=hidden, depth=depth, rngs=rngs)
    return OutputTokens(embed, made, width, length, size, rngs=rngs)


def to_bins(values: jax.Array, num_bins: int) -> jax.Array:
    """The bin, int32, of each number, of so many equal ones from -1 to 1; those beyond are in the outermost."""
    return jnp.clip(jnp.floor((values + 1) / 2 * num_bins), 0, num_bins - 1).astype(jnp.int32)


def bin_midpoints(bins: jax.Array, num_bins: int) -> jax.Array:
    """The middle of each bin, float32."""
    return (bins.astype(jnp.float32) + 0.5) * np.float32(2 / num_bins) - 1
