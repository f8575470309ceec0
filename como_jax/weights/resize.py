"""Positions of one grid of patches for another grid, as the projects that the weights come from resize them.

Axes: N patches of a square grid, row by row, D width.
"""

from __future__ import annotations

import numpy as np

PLAIN = -0.75
ANTIALIASED = -0.5
"""Of the cubic kernel (Keys, 1981), as PyTorch has it without and with antialiasing."""


def resize_positions(positions: np.ndarray, size: int, *, antialias: bool) -> np.ndarray:
    """Positions `[N, D]` by bicubic interpolation for a grid of `size` rows and columns.

    Without antialiasing as MAE's programs do it, with it as timm's do; both take the corners of the outer pixels, not
    their centres, as the same places.
    """
    old = int(np.sqrt(len(positions)))
    matrix = cubic_matrix(old, size, antialias=antialias)
    grid = positions.astype(np.float64).reshape(old, old, -1)
    resized = np.einsum("ai,bj,ijd->abd", matrix, matrix, grid)
    return resized.reshape(size * size, -1).astype(np.float32)


def cubic_matrix(old: int, new: int, *, antialias: bool) -> np.ndarray:
    """What each of `new` samples takes from each of `old` ones, `[new, old]`."""
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5
    if antialias:
        # Shrinking widens the kernel, and what lies outside is left out.
        stretch = max(scale, 1.0)
        weights = _cubic((np.arange(old) - centre[:, None]) / stretch, ANTIALIASED)
        return weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    first = np.floor(centre).astype(int)
    for offset in range(-1, 3):
        # What lies outside is what lies at the edge.
        place = np.clip(first + offset, 0, old - 1)
        np.add.at(matrix, (np.arange(new), place), _cubic(centre - first - offset, PLAIN))
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
