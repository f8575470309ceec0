"""Numbers and images that say how good predicted frames are, and what a cloud of latents is like.

Axes: N latents, clips or images; D numbers of a latent; Q latent tokens of L numbers each.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from sklearn.decomposition import PCA

from como_jax.errors import UsageError
from como_jax.types import Array, LatentMotionModel

SSIM_TAPS, SSIM_SIGMA = 11, 1.5


def psnr(mse: np.ndarray | float) -> float:
    """Peak signal-to-noise ratio in dB of mean squared errors over pixels in [0, 1].

    Errors of many images are averaged before the logarithm is taken: otherwise a single clip without motion would give
    an infinite score to copying the current frame.
    """
    return float(-10.0 * np.log10(max(float(np.mean(mse)), 1e-10)))


def ssim(prediction: Array, target: Array) -> jax.Array:
    """Structural similarity `[N]` of images `[N, H, W, 3]` with values in [0, 1] (Wang et al. 2004); 1 is perfect.

    The window is a Gaussian of 11 pixels with a standard deviation of 1.5, at all positions where it lies within the
    image; K1 = 0.01, K2 = 0.03. The result is the mean over positions and channels.

    Raises:
      UsageError: images smaller than the window.
    """
    chex.assert_equal_shape([prediction, target])
    chex.assert_shape(prediction, (None, None, None, 3))
    height, width = prediction.shape[1:3]
    if min(height, width) < SSIM_TAPS:
        raise UsageError(f"SSIM needs images of at least {SSIM_TAPS} x {SSIM_TAPS} pixels, not {height} x {width}.")
    x, y = (jnp.asarray(pixels, jnp.float32) for pixels in (prediction, target))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _gaussian_means(jnp.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = mean_xx - mean_x**2 + mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (variances + c2), axis=(1, 2, 3))


def comparison_grid(rows: Sequence[Sequence[np.ndarray]], min_side: int = 128, border: int = 2) -> np.ndarray:
    """A grid, uint8 `[height, width, 3]`, of rows of images of one shape, float `[H, W, 3]` in [0, 1].

    Small images are enlarged to at least `min_side` pixels by repeating pixels, so that nothing is smoothed.
    """
    images = np.stack([np.stack([np.asarray(image, np.float32) for image in row]) for row in rows])
    chex.assert_shape(images, (None, None, None, None, 3))
    factor = max(1, -(-min_side // images.shape[2]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    images = np.pad(images, ((0, 0), (0, 0), (border, border), (border, border), (0, 0)), constant_values=1.0)
    grid = images.transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(grid.shape[0] * grid.shape[1], grid.shape[2] * grid.shape[3], 3)
    return np.rint(np.clip(grid, 0.0, 1.0) * 255.0).astype(np.uint8)


def error_map(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The absolute error, doubled so that small errors can be seen; black is perfect."""
    return np.clip(2.0 * np.abs(np.asarray(prediction) - np.asarray(target)), 0.0, 1.0)


def transfer_motion(model: LatentMotionModel, source_frames: Array, first_frame: Array) -> jax.Array:
    """Videos that begin with `first_frame` and move as the source does.

    The source is encoded once. Every frame after the first is predicted from the predicted frame before it, rounded to
    uint8 like all frames that a model sees; errors therefore add up.

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


def past_future_similarities(past_to_current: np.ndarray, future_to_current: np.ndarray) -> np.ndarray:
    """Cosines `[N]` of the latents past to current and future to current, `[N, ...]`, each taken as one vector.

    Their mean is S-PCFC (CoMo, section 4), which asks whether a latent holds the motion or the static scene. It
    compares `z(o_{t-n}, o_t)` with `z(o_{t+n}, o_t)`: near 1 the latent describes the current scene, whichever way it
    was reached. Lower is better, but a constant or random latent may be low too: read it beside LP-MSE.
    """
    chex.assert_equal_shape([past_to_current, future_to_current])
    count = len(past_to_current)
    return _cosines(np.reshape(past_to_current, (count, -1)), np.reshape(future_to_current, (count, -1)))


def past_future_similarity(past_to_current: np.ndarray, future_to_current: np.ndarray) -> float:
    """S-PCFC: the mean of `past_future_similarities`."""
    return float(np.mean(past_future_similarities(past_to_current, future_to_current)))


def past_future_similarity_by_token(past_to_current: np.ndarray, future_to_current: np.ndarray) -> float:
    """S-PCFC token by token: the mean of the cosines of single tokens over clips and tokens, `[N, Q, L]` each.

    The paper's formula leaves open how the tokens of a latent are compared, and this is its other reading. Here every
    token counts the same, while in `past_future_similarity` tokens of large norm count most.
    """
    chex.assert_rank([past_to_current, future_to_current], 3)
    chex.assert_equal_shape([past_to_current, future_to_current])
    return float(np.mean(_cosines(past_to_current, future_to_current)))


def effective_rank(latent: np.ndarray) -> float:
    """How many directions latents `[N, D]` use (Roy and Vetterli, 2007).

    It is the exponential of the entropy of the normalised singular values of the centred latents: from 1, all on a
    line, to D, evenly spread. Latents that are all equal up to rounding have 0.
    """
    values = np.linalg.svd(_center(latent), compute_uv=False)
    return float(np.exp(stats.entropy(values))) if values.sum() > 0.0 else 0.0


def principal_components(latent: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[N, D]` on the `count` axes of largest variance; an axis's largest entry is positive.

    Returns:
      Coordinates `[N, count]`, and the share `[count]` of the variance that lies along each axis; both are 0 for axes
      that the data does not have.
    """
    centered = _center(latent)
    coordinates, shares = np.zeros((len(latent), count)), np.zeros(count)
    found = min(count, *centered.shape)
    if centered.any():
        pca = PCA(found, svd_solver="full")
        coordinates[:, :found] = pca.fit_transform(centered)
        shares[:found] = pca.explained_variance_ratio_
    return coordinates, shares


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines along the last axis; 0 where a vector is zero, of which scikit-learn's paired cosines make 1/2."""
    a, b = (np.asarray(z, np.float64) for z in (first, second))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1) / np.maximum(norms, 1e-12)


def _center(latent: np.ndarray) -> np.ndarray:
    """Latents minus their mean, in float64; exactly zero where they differ by rounding alone."""
    chex.assert_rank(latent, 2)
    latent = np.asarray(latent)
    rounding = np.finfo(latent.dtype).eps if np.issubdtype(latent.dtype, np.floating) else 0.0
    latent = latent.astype(np.float64)
    # Equal latents cancel exactly against one of them, but not against their mean.
    centered = latent - latent[0]
    centered -= centered.mean(axis=0)
    return centered if np.linalg.norm(centered) > rounding * np.linalg.norm(latent) else np.zeros_like(centered)


def _gaussian_means(images: jax.Array) -> jax.Array:
    """Means `[..., H - 10, W - 10, C]` of `[..., H, W, C]` under the window of SSIM.

    These are sums of shifted images, not a convolution, whose float32 products accelerators round.
    """
    offsets = np.arange(SSIM_TAPS) - SSIM_TAPS // 2
    weights = np.exp(-0.5 * np.square(offsets / SSIM_SIGMA))
    for axis in (-3, -2):
        size = images.shape[axis] - SSIM_TAPS + 1
        shifted = (jax.lax.slice_in_dim(images, tap, tap + size, axis=axis) for tap in range(SSIM_TAPS))
        images = sum(float(weight) * part for weight, part in zip(weights / weights.sum(), shifted, strict=True))
    return images
