"""How good predicted frames are, in numbers and in pictures."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from como_jax.errors import UsageError
from como_jax.types import Array

SSIM_TAPS, SSIM_SIGMA = 11, 1.5


def psnr(mse: np.ndarray | float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error over pixels in [0, 1].

    Errors of many images are averaged before the logarithm, since one still clip would otherwise give an infinite
    score to copying the current frame.
    """
    return float(-10.0 * np.log10(max(float(np.mean(mse)), 1e-10)))


def ssim(prediction: Array, target: Array) -> jax.Array:
    """Structural similarity `[N]` of pixels in [0, 1], `[N, H, W, 3]` each (Wang et al. 2004).

    A Gaussian window of 11 pixels with a deviation of 1.5, where it lies within the picture; K1 = 0.01, K2 = 0.03; the
    mean over positions and channels. 1 is perfect.

    Raises:
      UsageError: pictures smaller than the window.
    """
    chex.assert_equal_shape([prediction, target])
    chex.assert_shape(prediction, (None, None, None, 3))
    height, width = prediction.shape[1:3]
    if min(height, width) < SSIM_TAPS:
        raise UsageError(f"SSIM needs pictures of at least {SSIM_TAPS} x {SSIM_TAPS} pixels, not {height} x {width}.")
    x, y = (jnp.asarray(pixels, jnp.float32) for pixels in (prediction, target))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _gaussian_means(jnp.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = mean_xx - mean_x**2 + mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (variances + c2), axis=(1, 2, 3))


def comparison_grid(rows: Sequence[Sequence[np.ndarray]], min_side: int = 128, border: int = 2) -> np.ndarray:
    """Pictures in a grid: uint8 `[height, width, 3]` from rows of float `[H, W, 3]` in [0, 1] of one shape.

    Small pictures are enlarged to at least `min_side` pixels by repeating pixels, so that nothing is smoothed.
    """
    pictures = np.stack([np.stack([np.asarray(picture, np.float32) for picture in row]) for row in rows])
    chex.assert_shape(pictures, (None, None, None, None, 3))
    factor = max(1, -(-min_side // pictures.shape[2]))
    pictures = pictures.repeat(factor, axis=2).repeat(factor, axis=3)
    pictures = np.pad(pictures, ((0, 0), (0, 0), (border, border), (border, border), (0, 0)), constant_values=1.0)
    grid = pictures.transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(grid.shape[0] * grid.shape[1], grid.shape[2] * grid.shape[3], 3)
    return np.rint(np.clip(grid, 0.0, 1.0) * 255.0).astype(np.uint8)


def error_map(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Absolute error, doubled so that faint errors show; black is perfect."""
    return np.clip(2.0 * np.abs(np.asarray(prediction) - np.asarray(target)), 0.0, 1.0)


def _gaussian_means(images: jax.Array) -> jax.Array:
    """Means `[..., H - 10, W - 10, C]` of `[..., H, W, C]` under the window of SSIM.

    Sums of shifted pictures, not a convolution, whose float32 products accelerators round.
    """
    offsets = np.arange(SSIM_TAPS) - SSIM_TAPS // 2
    weights = np.exp(-0.5 * np.square(offsets / SSIM_SIGMA))
    for axis in (-3, -2):
        size = images.shape[axis] - SSIM_TAPS + 1
        shifted = (jax.lax.slice_in_dim(images, tap, tap + size, axis=axis) for tap in range(SSIM_TAPS))
        images = sum(float(weight) * part for weight, part in zip(weights / weights.sum(), shifted, strict=True))
    return images
