"""Actions and states on the common scale of training, and back; NumPy, from the numbers that an export holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Normalizer(Protocol):
    """A map of every dimension of a vector by itself, and its inverse.

    A dimension that never changes becomes 0, and its inverse gives the one value it had.
    """

    @property
    def size(self) -> int:
        """Dimensions of the vector."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values `[..., size]` on the common scale, float32."""

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """Values `[..., size]` in the units of the robot, float32."""


class AffineNormalizer:
    """A shift and a scale of every dimension, of those that change."""

    def __init__(self, offset: np.ndarray, scale: np.ndarray, varies: np.ndarray):
        """Takes arrays `[size]`; raises ValueError unless they are."""
        if not offset.shape == scale.shape == varies.shape or offset.ndim != 1 or not len(offset):
            raise ValueError("offset, scale and varies must be equally long lists")
        if not np.isfinite(offset).all() or not np.isfinite(scale).all() or not (scale > 0).all():
            raise ValueError("offset must be finite, and scale positive")
        self._offset, self._scale, self._varies = offset, scale, varies

    @property
    def size(self) -> int:
        """See `Normalizer`."""
        return len(self._offset)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """See `Normalizer`."""
        return np.where(self._varies, (values - self._offset) / self._scale, 0.0).astype(np.float32)

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """See `Normalizer`."""
        return (np.where(self._varies, scaled, 0.0) * self._scale + self._offset).astype(np.float32)


class UniformNormalizer:
    """Each dimension through its distribution function, by the edges of bins that hold equally many values."""

    def __init__(self, edges: np.ndarray):
        """Takes edges `[size, bins + 1]`; raises ValueError unless they are in order."""
        if edges.ndim != 2 or not len(edges) or edges.shape[1] < 2:
            raise ValueError("edges must be lists of numbers")
        if not np.isfinite(edges).all() or (np.diff(edges) < 0).any():
            raise ValueError("edges must be finite and in order")
        self._edges, self._levels = edges, np.linspace(-1, 1, edges.shape[1])

    @property
    def size(self) -> int:
        """See `Normalizer`."""
        return len(self._edges)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """See `Normalizer`; beyond the outermost edges it gives -1 and 1."""
        columns = np.moveaxis(np.asarray(values, np.float64), -1, 0)
        scaled = [self._scale(column, edges) for column, edges in zip(columns, self._edges, strict=True)]
        return np.stack(scaled, axis=-1).astype(np.float32)

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """See `Normalizer`; beyond -1 and 1 it gives the outermost edges."""
        columns = np.moveaxis(np.asarray(scaled, np.float64), -1, 0)
        values = [np.interp(column, self._levels, edges) for column, edges in zip(columns, self._edges, strict=True)]
        return np.stack(values, axis=-1).astype(np.float32)

    def _scale(self, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
        if edges[0] == edges[-1]:
            return np.zeros_like(values)
        # A value that is an edge, or several, goes to their middle; others have no edge, and the last before the first.
        first, last = np.searchsorted(edges, values, "left"), np.searchsorted(edges, values, "right") - 1
        middle = (first + last) / (len(edges) - 1) - 1
        return np.where(first <= last, middle, np.interp(values, edges, self._levels))


def read_normalizer(content: Mapping[str, Any]) -> Normalizer:
    """The normalizer that `to_json` of `como_jax.data.normalization` described.

    Raises:
      KeyError, TypeError, ValueError: it is not what that gives.
    """
    if "edges" in content:
        return UniformNormalizer(np.asarray(content["edges"], np.float64))
    offset, scale = (np.asarray(content[name], np.float64) for name in ("offset", "scale"))
    return AffineNormalizer(offset, scale, np.asarray(content["varies"], bool))
