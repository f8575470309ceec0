"""Towers that read an instruction, each an `Observation` to `TextFeatures`.

- `ByteTransformer`, a small transformer over bytes that is trained with the policy;
- `ClipTextTower` and `T5Tower`, public text encoders whose weights `como_jax.weights.text` reads;
- `EmbeddingTower`, for embeddings that the dataset holds;
- `TokenTable`, a table alone, for models that read the instruction themselves.

`Observation.text` holds the number of each token plus one, and 0 after the end of the text. So token 0 of a public
vocabulary stays a token, and whatever that vocabulary pads with does not matter. Texts for public towers come with the
special tokens that these models expect, so that the last token is the end-of-text token.

Axes: B batch, M tokens, D width, E size of an embedding, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.errors import ConfigError, closest
from como_jax.nn.attention import Attention
from como_jax.nn.layers import Block, LayerNorm, Linear
from como_jax.nn.primitives import embedding, xavier_uniform
from como_jax.nn.stack import Stack
from como_jax.spec.towers import BYTE_VOCABULARY, GATED, NGRAM_ROWS, NGRAMS, TextConfig
from como_jax.types import Observation

Activation = Callable[[jax.Array], jax.Array]

# Named as in the config.json of public weights.
ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""Prefix of the activation of a gated linear unit."""


class TextFeatures(NamedTuple):
    """Features of an instruction.

    Attributes:
      tokens: `[B, M, D]`.
      mask: bool `[B, M]`, False at padding.
      pooled: one vector for the whole instruction, `[B, D]`.
    """

    tokens: jax.Array
    mask: jax.Array
    pooled: jax.Array


def make_text_tower(config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """The tower of the config; every tower has an attribute `width`."""
    towers = {
        "bytes": ByteTransformer,
        "clip": ClipTextTower,
        "t5": T5Tower,
        "embedding": EmbeddingTower,
        "tokens": TokenTable,
    }
    return towers[config.tower](config, dtype=dtype, rngs=rngs)


def pool_tokens(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean `[B, D]` of the tokens `[B, M, D]` where `mask` `[B, M]` is True; 0 where it is True nowhere."""
    weights = mask.astype(x.dtype)[..., None]
    return (x * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


class ByteTransformer(nnx.Module):
    """A small transformer over the bytes of the instruction.

    Each byte is embedded together with the bytes just before it, whose n-grams are looked up by their hash as in the
    Byte Latent Transformer (arXiv 2412.09871, section 3.2.1). So words can be told apart before attention has learned
    to spell.
    """

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        width = config.width
        self.width, self.pool, self.dtype = width, config.pool, dtype
        self.token_embed = embedding(BYTE_VOCABULARY, width, rngs=rngs)
        self.ngram_embed = embedding(len(NGRAMS), NGRAM_ROWS, width, rngs=rngs)
        self.pos_embed = embedding(config.max_length, width, rngs=rngs)
        self.blocks = Stack(
            lambda rngs: Block(width, config.num_heads, dtype=dtype, rngs=rngs), config.depth, rngs=rngs
        )
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text`; `pool` bytes in a row are averaged to one token."""
        text = observation.text
        chex.assert_rank(text, 2)
        # The token that ends the text is read too, so that no instruction is without tokens.
        mask = jnp.pad(text[:, :-1] != 0, ((0, 0), (1, 0)), constant_values=True)
        ngrams = sum(table[hash_ngrams(text, size)] for table, size in zip(self.ngram_embed[...], NGRAMS, strict=True))
        x = (self.token_embed[...][text] + ngrams + self.pos_embed[...][: text.shape[1]]).astype(self.dtype)
        x = self.norm(self.blocks(x, mask[:, None]))
        pooled = pool_tokens(x, mask)
        groups = mask.reshape(len(mask), -1, self.pool)
        x = pool_tokens(x.reshape(-1, self.pool, self.width), groups.reshape(-1, self.pool))
        return TextFeatures(x.reshape(*groups.shape[:2], self.width), groups.any(axis=-1), pooled)


def hash_ngrams(text: jax.Array, size: int) -> jax.Array:
    """A row of the table, int32 `[B, M]`, for every token and the `size - 1` before it: a polynomial hash."""
    padded = jnp.pad(text.astype(jnp.uint32), ((0, 0), (size - 1, 0)))
    value = jnp.zeros(text.shape, jnp.uint32)
    for offset in range(size):
        value = value * jnp.uint32(16_777_619) + padded[:, offset : offset + text.shape[1]]
    # The lowest bits depend on the last bytes only; the product brings the influence of all bytes to the highest bits.
    return (value * jnp.uint32(2_654_435_769) >> jnp.uint32(32 - NGRAM_ROWS.bit_length() + 1)).astype(jnp.int32)


class EmbeddingTower(nnx.Module):
    """One token, projected from an embedding that the dataset holds."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        if not config.embedding_size:
            raise ConfigError("text.embedding_size is 0: the size of the dataset's embeddings is not known.")
        self.width = config.width
        self.proj = Linear(config.embedding_size, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text_embedding` `[B, E]`."""
        chex.assert_rank(observation.text_embedding, 2)
        x = self.proj(observation.text_embedding)
        return TextFeatures(x[:, None], jnp.ones((len(x), 1), bool), x)


class TokenTable(nnx.Module):
    """A learned vector for every token, multiplied by the square root of the width as in Gemma (arXiv 2403.08295)."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.width, self.dtype = config.width, dtype
        rows = config.vocabulary_size or BYTE_VOCABULARY - 1
        self.table = nnx.Param(self.width**-0.5 * jax.random.normal(rngs.params(), (rows, self.width)))

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text`, each from its own token only."""
        chex.assert_rank(observation.text, 2)
        mask = observation.text > 0
        table = self.table[...].astype(self.dtype)
        x = table[jnp.maximum(observation.text - 1, 0)] * jnp.asarray(self.width**0.5, self.dtype)
        return TextFeatures(x, mask, pool_tokens(x, mask))


class ClipTextTower(nnx.Module):
    """CLIP's text encoder (arXiv 2103.00020, section 2.4): a causal transformer, read at the end of the text."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        _check_public_sizes(config)
        positions = config.num_positions
        if config.max_length > positions:
            raise ConfigError(f"text.max_length {config.max_length} is more than the {positions} positions of CLIP.")
        self.width, self.dtype = config.width, dtype
        self.token_embed = embedding(config.vocabulary_size, config.width, rngs=rngs)
        self.pos_embed = embedding(positions, config.width, rngs=rngs)
        self.blocks = Stack(lambda rngs: ClipBlock(config, dtype=dtype, rngs=rngs), config.depth, rngs=rngs)
        self.norm = _layer_norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text`."""
        return self.read(observation.text)

    def read(self, text: jax.Array) -> TextFeatures:
        """Features of int32 `[B, M]`, numbers of tokens plus one; the pooled vector is that of the last token."""
        tokens, mask = _split_text(text)
        length = text.shape[1]
        x = (self.token_embed[...][tokens] + self.pos_embed[...][:length]).astype(self.dtype)
        # The causal mask also hides the padding from the text.
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
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class ClipMlp(nnx.Module):
    """Two layers with the config's activation between them."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.activation = activation(config.activation)
        self.fc1 = Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, M, D]` to `[B, M, D]`."""
        return self.fc2(self.activation(self.fc1(x)))


class T5Tower(nnx.Module):
    """The encoder of T5 (arXiv 1910.10683, section 2.1) and of its later versions with gated linear units."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        _check_public_sizes(config)
        self.width, self.dtype = config.width, dtype
        self.relative_distance = config.relative_distance
        self.token_embed = embedding(config.vocabulary_size, config.width, rngs=rngs)
        self.relative_bias = embedding(config.relative_buckets, config.num_heads, rngs=rngs)
        self.blocks = Stack(lambda rngs: T5Block(config, dtype=dtype, rngs=rngs), config.depth, rngs=rngs)
        self.norm = _rms_norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, observation: Observation) -> TextFeatures:
        """Features of `observation.text`."""
        return self.read(observation.text)

    def read(self, text: jax.Array) -> TextFeatures:
        """Features of int32 `[B, M]`, numbers of tokens plus one; the pooled vector is the mean of all tokens."""
        tokens, mask = _split_text(text)
        x = self.token_embed[...][tokens].astype(self.dtype)
        hidden = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
        x = self.norm(self.blocks(x, self._position_bias(text.shape[1]) + hidden[:, None, None]))
        return TextFeatures(x, mask, pool_tokens(x, mask))

    def _position_bias(self, length: int) -> jax.Array:
        """What every layer adds to its logits, float32 `[1, H, M, M]`."""
        table = self.relative_bias[...]
        distance = np.arange(length) - np.arange(length)[:, None]
        return jnp.moveaxis(table[relative_buckets(distance, len(table), self.relative_distance)], 2, 0)[None]


class T5Block(nnx.Module):
    """Pre-norm transformer block without biases, and with norms that subtract no mean."""

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
    """Multi-head self-attention with a bias on its logits, which are not scaled by the size of a head."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        heads = (config.num_heads, config.head_width)
        kinds = {"use_bias": False, "kernel_init": xavier_uniform, "dtype": dtype, "rngs": rngs}
        self.qkv = nnx.LinearGeneral(config.width, (3, *heads), **kinds)
        self.proj = nnx.LinearGeneral(heads, config.width, axis=(-2, -1), **kinds)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`[B, M, D]` to `[B, M, D]`, with a float32 softmax; the bias is `[B, H, M, M]`."""
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
        """`[B, M, D]` to `[B, M, D]`."""
        hidden = self.activation(self.fc1(x))
        return self.fc2(hidden * self.gate(x) if self.gated else hidden)


def relative_buckets(distance: np.ndarray, buckets: int, farthest: int) -> np.ndarray:
    """The bucket of every distance from a query to a key (arXiv 1910.10683, section 2.1), in the shape of `distance`.

    One half of the buckets is for keys before the query, the other for keys after it. In either half, the first half of
    the buckets is for one distance each; the others cover ranges that grow with the logarithm of the distance, up to
    `farthest`.
    """
    side = buckets // 2
    exact = side // 2
    away = np.abs(distance)
    # In float32, as in the code that trained the public weights: its rounding decides the bucket of exact powers.
    scale = np.float32(np.log(farthest / exact))
    log = np.log(np.maximum(away, exact).astype(np.float32) / np.float32(exact)) / scale
    far = exact + (log * np.float32(side - exact)).astype(np.int64)
    return np.where(distance > 0, side, 0) + np.where(away < exact, away, np.minimum(far, side - 1))


def activation(name: str) -> Activation:
    """The activation of this name in config.json; raises ConfigError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"text.activation {name!r} must be one of {', '.join(ACTIVATIONS)}{closest(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _split_text(text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token numbers `[B, M]` and their mask; the first token is always there, so that no text is empty."""
    chex.assert_rank(text, 2)
    mask = (text != 0) | (jnp.arange(text.shape[1]) == 0)
    return jnp.maximum(text - 1, 0), mask


def _check_public_sizes(config: TextConfig) -> None:
    """Raises ConfigError unless the config has the sizes that only weights give."""
    if not (config.vocabulary_size and config.mlp_width):
        raise ConfigError(
            f"text.tower={config.tower} needs text.vocabulary_size and text.mlp_width, the sizes of its weights; "
            "como_jax.weights.text.text_config_of reads them from text.weights."
        )


def _layer_norm(config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


def _rms_norm(config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
