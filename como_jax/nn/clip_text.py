"""CLIP's text encoder (arXiv 2103.00020). Weights are read by `como_jax.weights.text`.

Axes: B batch, M tokens, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.layers import Attention, Linear
from como_jax.nn.stack import Stack
from como_jax.nn.text import TextFeatures
from como_jax.nn.text_layers import activation, check_sizes, embedding_table, split_text
from como_jax.spec.towers import TextConfig
from como_jax.types import Observation


class ClipTextTower(nnx.Module):
    """The text encoder of CLIP (arXiv 2103.00020, section 2.4): a causal transformer, read at the end of the text."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        check_sizes(config)
        positions = config.positions or config.max_length
        if config.max_length > positions:
            raise ConfigError(f"text.max_length {config.max_length} is more than the {positions} positions of CLIP.")
        self.width, self.dtype = config.width, dtype
        self.token_embed = embedding_table(config.vocabulary_size, config.width, rngs=rngs)
        self.pos_embed = embedding_table(positions, config.width, rngs=rngs)
        self.blocks = Stack(lambda rngs: ClipBlock(config, dtype=dtype, rngs=rngs), config.depth, rngs=rngs)
        self.norm = _layer_norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text`."""
        return self.read(observation.text)

    def read(self, text: jax.Array) -> TextFeatures:
        """Features of int32 `[B, M]`, numbers of tokens plus one; the pooled ones are those of the last token."""
        tokens, mask = split_text(text)
        length = text.shape[1]
        x = (self.token_embed[...][tokens] + self.pos_embed[...][:length]).astype(self.dtype)
        # What follows the end is hidden from the text by the causal mask.
        x = self.norm(self.blocks(x, jnp.tril(jnp.ones((1, length, length), bool))))
        last = mask.sum(axis=1) - 1
        return TextFeatures(x, mask, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])


class ClipBlock(nnx.Module):
    """Pre-norm transformer block with CLIP's activation and epsilon."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = _layer_norm(config, dtype=dtype, rngs=rngs)
        self.attn = Attention(config.width, config.num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = _layer_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = ClipMlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, M, D]` to `[B, M, D]`; see `Attention` for the mask."""
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class ClipMlp(nnx.Module):
    """Two layers with the config's activation between them."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.activation = activation(config.activation)
        self.fc1 = Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


def _layer_norm(config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)
