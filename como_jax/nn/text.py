"""Towers that read an instruction: a byte-level transformer of the project's own, and embeddings made beforehand.

Axes: B batch, M tokens, D width, E size of an embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.layers import LayerNorm, Linear, MaskedBlock
from como_jax.nn.stack import Stack
from como_jax.spec.towers import TextConfig
from como_jax.types import Observation

BYTE_VOCABULARY = 257
"""Token 0 ends the text, byte b is token b + 1."""
NGRAMS = (3, 4, 5, 6)
NGRAM_ROWS = 4096


class TextFeatures(NamedTuple):
    """Tokens of an instruction `[B, M, D]`, which of them are there, bool `[B, M]`, and one for all `[B, D]`."""

    tokens: jax.Array
    mask: jax.Array
    pooled: jax.Array


class ByteTransformer(nnx.Module):
    """A small transformer over the bytes of the instruction.

    A byte comes with the few before it, looked up by their hash as in the Byte Latent Transformer (arXiv 2412.09871,
    section 3.2.1), so that words can be told apart before attention has learned to spell.
    """

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        width = config.width

        def embedding(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        self.width, self.pool, self.dtype = width, config.pool, dtype
        self.token_embed = embedding(BYTE_VOCABULARY, width)
        self.ngram_embed = embedding(len(NGRAMS), NGRAM_ROWS, width)
        self.pos_embed = embedding(config.max_length, width)
        self.blocks = Stack(
            lambda rngs: MaskedBlock(width, config.num_heads, dtype=dtype, rngs=rngs), config.depth, rngs=rngs
        )
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text`."""
        text = observation.text
        # The token that ends the text is read too, so that no instruction is without tokens.
        mask = jnp.pad(text[:, :-1] != 0, ((0, 0), (1, 0)), constant_values=True)
        ngrams = sum(table[hash_ngrams(text, size)] for table, size in zip(self.ngram_embed[...], NGRAMS, strict=True))
        x = (self.token_embed[...][text] + ngrams + self.pos_embed[...][: text.shape[1]]).astype(self.dtype)
        x = self.norm(self.blocks(x, mask[:, None]))
        pooled = masked_mean(x, mask)
        groups = mask.reshape(len(mask), -1, self.pool)
        x = masked_mean(x.reshape(-1, self.pool, self.width), groups.reshape(-1, self.pool))
        return TextFeatures(x.reshape(*groups.shape[:2], self.width), groups.any(axis=-1), pooled)


class EmbeddingTower(nnx.Module):
    """One token from an embedding that the dataset holds."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        if not config.embedding_size:
            raise ConfigError("text.embedding_size is 0: the size of the dataset's embeddings is not known.")
        self.width = config.width
        self.proj = Linear(config.embedding_size, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text_embedding`."""
        x = self.proj(observation.text_embedding)
        return TextFeatures(x[:, None], jnp.ones((len(x), 1), bool), x)


class TokenTable(nnx.Module):
    """A learned vector for every token, times the root of the width as in Gemma (arXiv 2403.08295)."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.width, self.dtype = config.width, dtype
        rows = config.vocabulary_size or BYTE_VOCABULARY - 1
        self.table = nnx.Param(self.width**-0.5 * jax.random.normal(rngs.params(), (rows, self.width)))

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text`, whose tokens know nothing of each other."""
        mask = observation.text > 0
        table = self.table[...].astype(self.dtype)
        x = table[jnp.maximum(observation.text - 1, 0)] * jnp.asarray(self.width**0.5, self.dtype)
        return TextFeatures(x, mask, masked_mean(x, mask))


def hash_ngrams(text: jax.Array, size: int) -> jax.Array:
    """A row of a table, int32 `[B, M]`, for every token and the `size - 1` before it: a polynomial hash."""
    padded = jnp.pad(text.astype(jnp.uint32), ((0, 0), (size - 1, 0)))
    value = jnp.zeros(text.shape, jnp.uint32)
    for offset in range(size):
        value = value * jnp.uint32(16_777_619) + padded[:, offset : offset + text.shape[1]]
    # The lowest bits depend on the last bytes alone; multiplying brings the others' influence to the highest.
    return (value * jnp.uint32(2_654_435_769) >> jnp.uint32(32 - NGRAM_ROWS.bit_length() + 1)).astype(jnp.int32)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean `[B, D]` of the tokens `[B, M, D]` that are there; 0 where there are none."""
    weights = mask.astype(x.dtype)[..., None]
    return (x * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
