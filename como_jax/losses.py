"""Every loss term, each a pure function of arrays."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def cosine_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine along the last axis, float32; 0 where either vector is 0, with a finite gradient."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squared_norms = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(squared_norms, 1e-16))


def pixel_mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of two images of one shape, in float32."""
    chex.assert_equal_shape([prediction, target])
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))


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
