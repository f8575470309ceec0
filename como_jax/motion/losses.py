"""Every loss term, each a pure function of arrays."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax


def cosine_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine along the last axis, float32; 0 where either vector is 0, with a finite gradient."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squared_norms = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(squared_norms, 1e-16))


def mean_squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of two arrays of one shape, in float32."""
    chex.assert_equal_shape([prediction, target])
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))


def masked_mse(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error where `mask` is 1, and 0 if it is 1 nowhere. All arguments have one shape."""
    chex.assert_equal_shape([prediction, target, mask])
    # Unknown targets may be NaN, which must not reach the gradient.
    error = jnp.square(prediction - jnp.where(mask > 0, target, 0.0)) * mask
    return jnp.sum(error) / jnp.maximum(jnp.sum(mask), 1.0)


def flow_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean Huber loss of optical flow `[B, h, w, 2]`, because estimated flow has outliers that would dominate squares.

    Args:
      prediction: displacements in cells of the flow map.
      target: displacements as shares of the map's width.
    """
    chex.assert_equal_shape([prediction, target])
    return jnp.mean(optax.losses.huber_loss(prediction, target * target.shape[2], delta=1.0))


def temporal_contrastive(forward: jax.Array, offset: jax.Array, reverse: jax.Array, temperature: float) -> jax.Array:
    """Temporal contrastive loss (Tcl) of CoMo (arXiv 2505.17006): InfoNCE over three cosine similarities.

    Args:
      forward: `z(t, t+n)`, `[B, D]`.
      offset: `z(t, t+n+d)`, `[B, D]`: nearly the same motion, the positive.
      reverse: `z(t+n, t)`, `[B, D]`: the opposite motion over the same scene, the negative.
      temperature: divides the similarities.

    Returns:
      The mean of `-log(e^positive / (e^positive + e^negative_1 + e^negative_2))`.
    """
    chex.assert_equal_shape([forward, offset, reverse])
    positive = cosine_similarity(offset, forward)
    negatives = [cosine_similarity(offset, reverse), cosine_similarity(forward, reverse)]
    logits = jnp.stack([positive, *negatives], axis=-1) / temperature
    return -jnp.mean(jax.nn.log_softmax(logits, axis=-1)[..., 0])
