"""Random changes of colour, computed where the model is, which costs the loader nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# At strength 1, as policies on robot data are commonly trained (OpenVLA, arXiv 2406.09246, and LAPA).
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.2, 0.2, 0.2, 0.05
# Luma and the two colour differences of NTSC; a turn of the latter changes the hue.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)


def jitter_colors(images: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast, saturation and hue, in the same way for all pictures of a sample.

    Args:
      images: uint8 `[B, ..., H, W, 3]`.
      key: of the draws.
      strength: 1 for changes of up to 20 %, and of the hue by 5 % of the circle; 0 for none.
    """
    draws = strength * jax.random.uniform(key, (4, len(images)), minval=-1.0, maxval=1.0)
    draws = draws.reshape(4, len(images), *(1,) * (images.ndim - 1))
    brightness, contrast, saturation = _BRIGHTNESS * draws[0], 1 + _CONTRAST * draws[1], 1 + _SATURATION * draws[2]
    angle = 2 * np.pi * _HUE * draws[3, ..., 0]
    x = images.astype(jnp.float32) / 255 + brightness
    mean = x.mean(axis=(-3, -2), keepdims=True)
    x = (x - mean) * contrast + mean
    yiq = jnp.einsum("...c,dc->...d", x, _TO_YIQ, precision="highest")
    luma, first, second = yiq[..., 0], yiq[..., 1] * saturation[..., 0], yiq[..., 2] * saturation[..., 0]
    turned = (first * jnp.cos(angle) - second * jnp.sin(angle), first * jnp.sin(angle) + second * jnp.cos(angle))
    x = jnp.einsum("...c,dc->...d", jnp.stack([luma, *turned], axis=-1), np.linalg.inv(_TO_YIQ), precision="highest")
    return jnp.rint(jnp.clip(x, 0, 1) * 255).astype(jnp.uint8)
