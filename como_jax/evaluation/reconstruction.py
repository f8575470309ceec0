"""How good predicted frames are, in numbers and in pictures."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import numpy as np


def psnr(mse: np.ndarray | float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error over pixels in [0, 1].

    Errors of many images are averaged before the logarithm, since one still clip would otherwise give an infinite
    score to copying the current frame.
    """
    return float(-10.0 * np.log10(max(float(np.mean(mse)), 1e-10)))


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
