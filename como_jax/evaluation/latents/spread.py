"""The shape of a cloud of latents: how many directions it uses, and which. Axes: N latents, D latent size."""

from __future__ import annotations

import chex
import numpy as np


def effective_rank(latent: np.ndarray) -> float:
    """Exponential of the entropy of the normalised singular values of centred latents (Roy and Vetterli, 2007).

    From 1, all on a line, to D, evenly spread. Latents that are all equal, to rounding, have 0.

    Args:
      latent: `[N, D]`.
    """
    values = np.linalg.svd(_center(latent), compute_uv=False)
    if not values.sum() > 0.0:
        return 0.0
    shares = values[values > 0.0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def principal_components(latent: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Latents on the axes of largest variance, whose signs are such that their largest entry is positive.

    Args:
      latent: `[N, D]`.
      count: axes; those that the data does not have are zero.

    Returns:
      Coordinates `[N, count]`, and the shares `[count]` of the variance that each axis has.
    """
    left, values, axes = np.linalg.svd(_center(latent), full_matrices=False)
    largest = np.take_along_axis(axes, np.argmax(np.abs(axes), axis=1)[:, None], axis=1)[:, 0]
    coordinates = left * values * np.where(largest < 0, -1.0, 1.0)
    shares = np.square(values) / max(np.sum(np.square(values)), np.finfo(np.float64).tiny)
    missing = max(0, count - len(values))
    return np.pad(coordinates, ((0, 0), (0, missing)))[:, :count], np.pad(shares, (0, missing))[:count]


def cosine_similarity_matrix(latent: np.ndarray) -> np.ndarray:
    """Cosines `[N, N]` of all pairs of latents `[N, D]`; 0 where one is zero."""
    chex.assert_rank(latent, 2)
    latent = np.asarray(latent, np.float64)
    unit = latent / np.maximum(np.linalg.norm(latent, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def _center(latent: np.ndarray) -> np.ndarray:
    """Latents less their mean, in float64; exactly zero where they differ by rounding alone."""
    chex.assert_rank(latent, 2)
    latent = np.asarray(latent)
    rounding = np.finfo(latent.dtype).eps if np.issubdtype(latent.dtype, np.floating) else 0.0
    latent = latent.astype(np.float64)
    # Latents that are equal cancel exactly against one of them, but not against their mean.
    centered = latent - latent[0]
    centered -= centered.mean(axis=0)
    return centered if np.linalg.norm(centered) > rounding * np.linalg.norm(latent) else np.zeros_like(centered)
