"""Motion of one video applied to the picture of another."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from como_jax.types import Array, LatentMotionModel


def transfer_motion(model: LatentMotionModel, source_frames: Array, first_frame: Array) -> jax.Array:
    """Videos that begin with `first_frame` and move as the source does.

    The source is encoded once. Every frame after the first is predicted from the one before it, as uint8 like all
    frames that a model sees, so errors add up.

    Args:
      model: of any family.
      source_frames: uint8 `[B, T, H, W, 3]`, T at least 2, one gap apart.
      first_frame: uint8 `[B, H, W, 3]`.

    Returns:
      float32 `[B, T, H, W, 3]` in [0, 1], whose element 0 is `first_frame`.
    """
    chex.assert_rank(source_frames, 5)
    chex.assert_axis_dimension_gt(source_frames, 1, 1)
    chex.assert_shape(first_frame, (source_frames.shape[0], *source_frames.shape[2:]))
    chex.assert_type([source_frames, first_frame], jnp.uint8)

    def step(frame: jax.Array, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        predicted = model.predict(frame, latent)
        return jnp.rint(predicted * 255.0).astype(jnp.uint8), predicted

    latents = jnp.moveaxis(model.encode(source_frames), 1, 0)
    _, predicted = jax.lax.scan(step, jnp.asarray(first_frame), latents)
    first = jnp.asarray(first_frame, jnp.float32) / 255.0
    return jnp.concatenate([first[:, None], jnp.moveaxis(predicted, 0, 1)], axis=1)
