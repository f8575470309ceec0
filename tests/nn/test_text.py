"""The byte-level tower and embeddings made beforehand."""

import functools

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.text_towers import TextFeatures, make_text_tower
from como_jax.spec.tokenizers import ByteTokenizer
from como_jax.spec.towers import TextConfig
from como_jax.types import Observation

CONFIG = TextConfig(max_length=16, width=8, depth=2, num_heads=2)


def observe(**fields: np.ndarray) -> Observation:
    """An observation of which only the instruction matters."""
    batch = len(next(iter(fields.values())))
    images = np.zeros((batch, 1, 1, 1, 1, 3), np.uint8)
    return Observation(images=images, has_camera=np.ones((batch, 1), np.float32), **fields)


@functools.cache
def tower(config: TextConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(make_text_tower(config, dtype=np.float32, rngs=nnx.Rngs(0)))


def read(texts: list[str], length: int) -> TextFeatures:
    """Features of the byte-level tower."""
    graphdef, params = tower(CONFIG)
    return jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, observe(text=ByteTokenizer(length)(texts)))


def test_the_same_text_in_a_longer_field_has_the_same_features() -> None:
    short, long = read(["push it", "go"], 8), read(["push it", "go"], 16)
    np.testing.assert_array_equal(long.mask[:, :8], short.mask)
    assert not long.mask[:, 8:].any()
    mask = np.asarray(short.mask)
    np.testing.assert_allclose(np.asarray(long.tokens)[:, :8][mask], np.asarray(short.tokens)[mask], atol=1e-5)
    np.testing.assert_allclose(long.pooled, short.pooled, atol=1e-5)


def test_positions_after_the_text_change_nothing() -> None:
    graphdef, params = tower(CONFIG)
    text = observe(text=ByteTokenizer(16)(["push it"]))

    def first_feature(pos_embed: jax.Array) -> jax.Array:
        changed = {**nnx.to_pure_dict(params), "pos_embed": pos_embed}
        return nnx.merge(graphdef, changed)(text).pooled[0, 0]

    gradient = jax.jit(jax.grad(first_feature))(params["pos_embed"][...])
    # Seven bytes and the token that ends them.
    np.testing.assert_array_equal((gradient != 0).any(axis=1), np.arange(16) < 8)


def test_an_empty_instruction_is_finite_and_so_is_its_gradient() -> None:
    found = read([""], 8)
    np.testing.assert_array_equal(found.mask[0], np.arange(8) == 0)
    assert all(np.isfinite(x).all() for x in found)
    graphdef, params = tower(CONFIG)
    text = observe(text=np.zeros((1, 8), np.int32))
    gradient = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params)(text).pooled[0, 0]))(params)
    chex.assert_tree_all_finite(gradient)


def test_a_text_that_fills_its_field_is_read_to_its_last_byte() -> None:
    found = read(["abcdefgh", "abcdefgi"], 8)
    assert found.mask.all()
    assert np.abs(found.pooled[0] - found.pooled[1]).max() > 1e-3


def test_an_embedding_becomes_one_token() -> None:
    graphdef, params = tower(TextConfig(tower="embedding", width=8, embedding_size=5))
    embedding = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    found = nnx.merge(graphdef, params)(observe(text_embedding=embedding))
    expected = embedding @ params["proj"]["kernel"][...] + params["proj"]["bias"][...]
    np.testing.assert_allclose(found.pooled, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.tokens[:, 0], found.pooled)
    assert found.mask.shape == (2, 1) and found.mask.all()


def test_towers_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ConfigError, match="text.tower 'bert' is unknown; choose one of bytes, clip"):
        TextConfig(tower="bert")
    with pytest.raises(ConfigError, match="text.embedding_size is 0"):
        make_text_tower(TextConfig(tower="embedding"), dtype=np.float32, rngs=nnx.Rngs(0))
