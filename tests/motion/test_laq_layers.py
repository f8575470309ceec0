"""Layers of LAQ against plain NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf, softmax

from como_jax.motion.laq import (
    CosineAttention,
    GatedMlp,
    PositionBias,
    PositionGenerator,
    SpatialBlock,
    TemporalBlock,
)

SHAPE = (2, 3, 4, 5, 6)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def generator(causal: bool) -> PositionGenerator:
    peg = PositionGenerator(SHAPE[-1], causal=causal, dtype=jnp.float32, rngs=nnx.Rngs(0))
    peg.bias[...] = jnp.asarray(normal(SHAPE[-1], seed=3))
    return peg


@pytest.mark.parametrize("causal", [False, True])
def test_peg_is_a_depthwise_convolution(causal: bool) -> None:
    peg, x = generator(causal), normal(*SHAPE)
    padded = np.pad(x, ((0, 0), (2, 0) if causal else (1, 1), (1, 1), (1, 1), (0, 0)))
    kernel, expected = np.asarray(peg.kernel[...]), np.zeros(SHAPE)
    for t, i, j in itertools.product(range(3), repeat=3):
        expected += padded[:, t : t + SHAPE[1], i : i + SHAPE[2], j : j + SHAPE[3]] * kernel[t, i, j]
    np.testing.assert_allclose(jax.jit(peg)(x), expected + np.asarray(peg.bias[...]), atol=1e-5)


def test_peg_spreads_one_patch_to_its_neighbours_and_a_causal_one_to_no_earlier_frame() -> None:
    impulse = np.zeros(SHAPE, np.float32)
    impulse[0, 1, 2, 2, 4] = 1.0
    reached = np.asarray(jax.jit(generator(True))(impulse) - jax.jit(generator(True))(0 * impulse))
    where = np.argwhere(np.abs(reached) > 1e-6)
    assert {tuple(place[[0, 4]]) for place in where} == {(0, 4)}
    assert {tuple(place[1:4]) for place in where} == set(itertools.product((1, 2), (1, 2, 3), (1, 2, 3)))


@pytest.mark.parametrize("num_null", [0, 2])
def test_attention_compares_directions(num_null: int) -> None:
    attention = CosineAttention(6, 2, 4, num_null=num_null, dtype=jnp.float32, rngs=nnx.Rngs(0))
    attention.q_scale[...], attention.k_scale[...] = jnp.asarray(normal(2, 4, seed=5))
    x, context, bias = normal(3, 5, 6), normal(3, 7, 6, seed=1), normal(2, 5, 7 + num_null, seed=2)
    q = np.einsum("bnd,dhk->bnhk", x, attention.q.kernel[...])
    k, v = np.einsum("bmd,dphk->pbmhk", context, attention.kv.kernel[...])
    if num_null:
        null = np.broadcast_to(np.asarray(attention.null_kv[...])[:, None], (2, 3, num_null, 2, 4))
        k, v = np.concatenate([null[0], k], 1), np.concatenate([null[1], v], 1)
    q, k = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
    q, k = q * np.asarray(attention.q_scale[...]), k * np.asarray(attention.k_scale[...])
    weights = softmax(8 * np.einsum("bnhk,bmhk->bhnm", q, k) + bias, axis=-1)
    expected = np.einsum("bhnm,bmhk,hkd->bnd", weights, v, attention.proj.kernel[...])
    np.testing.assert_allclose(jax.jit(attention)(x, context, bias), expected, atol=1e-4)


def test_the_mlp_is_gated() -> None:
    mlp, x = GatedMlp(6, dtype=jnp.float32, rngs=nnx.Rngs(0)), normal(4, 6)
    value, gate = np.split(x @ np.asarray(mlp.fc1.kernel[...]), 2, axis=-1)
    expected = (value * gate * 0.5 * (1 + erf(gate / np.sqrt(2)))) @ np.asarray(mlp.fc2.kernel[...])
    assert value.shape[-1] == 16
    np.testing.assert_allclose(jax.jit(mlp)(x), expected, atol=1e-5)


def test_the_position_bias_depends_on_relative_positions_alone() -> None:
    module = PositionBias(8, 2, rngs=nnx.Rngs(0))
    bias = np.asarray(module(3, 4)).reshape(2, 3, 4, 3, 4)
    np.testing.assert_allclose(bias[:, 0, 0, 1, 2], bias[:, 1, 1, 2, 3], atol=1e-6)
    assert np.abs(bias[:, 0, 0, 1, 2] - bias[:, 1, 2, 0, 0]).max() > 1e-3
    x = np.log(2.0), -np.log(3.0)
    for layer in (module.fc1, module.fc2):
        x = x @ np.asarray(layer.kernel[...])
        x = np.where(x > 0, x, 0.1 * x)
    # The place of the query less that of the key.
    np.testing.assert_allclose(bias[:, 2, 0, 1, 2], x @ np.asarray(module.out.kernel[...]), atol=1e-5)


def test_a_spatial_block_keeps_frames_apart_but_for_the_position_generator() -> None:
    block = SpatialBlock(6, 2, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    block.peg.kernel[...] = block.peg.kernel[...].at[jnp.array([0, 2])].set(0.0)
    x, bias = normal(*SHAPE), normal(2, 20, 20)
    changed = x.copy()
    changed[:, 1] += 1.0
    run = jax.jit(block)
    difference = np.abs(np.asarray(run(x, bias) - run(changed, bias))).max(axis=(0, 2, 3, 4))
    assert difference[1] > 0.1
    np.testing.assert_allclose(difference[[0, 2]], 0.0, atol=1e-6)


def test_a_temporal_block_looks_back_at_the_same_patch_only() -> None:
    block = TemporalBlock(6, 2, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    block.peg.kernel[...] = jnp.zeros_like(block.peg.kernel[...])
    x = normal(*SHAPE)
    changed = x.copy()
    changed[:, 1, 2, 3, ::2] += 1.0
    run = jax.jit(block)
    difference = np.abs(np.asarray(run(x) - run(changed))).max(axis=(0, 4))
    reached = {tuple(int(n) for n in place) for place in np.argwhere(difference > 1e-5)}
    assert reached == {(1, 2, 3), (2, 2, 3)}
