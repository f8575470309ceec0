"""Maps of heights: what the searches for grasps and places look at."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy import ndimage


@dataclasses.dataclass(frozen=True)
class HeightMap:
    """Heights over a rectangle of the ground, in metres, float64 `[N, M]`; -inf where there is nothing.

    Attributes:
      corner: position `[2]` of the first cell.
      cell: distance between cells.
      heights: along x in rows and along y in columns.
    """

    corner: np.ndarray
    cell: float
    heights: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        """Heights at points `[..., 2]` or `[..., 3]`; -inf outside of the map."""
        index = np.rint((points[..., :2] - self.corner) / self.cell).astype(int)
        inside = np.all((index >= 0) & (index < self.heights.shape), axis=-1)
        index = np.where(inside[..., None], index, 0)
        return np.where(inside, self.heights[index[..., 0], index[..., 1]], -np.inf)

    def points(self) -> np.ndarray:
        """Points `[K, 3]` of all cells that hold something."""
        rows, columns = np.nonzero(np.isfinite(self.heights))
        ground = self.corner + self.cell * np.stack([rows, columns], axis=-1)
        return np.column_stack([ground, self.heights[rows, columns]])

    @functools.cached_property
    def widened(self) -> HeightMap:
        """The greatest heights within two cells: no thin wall is missed between points that are three apart."""
        return dataclasses.replace(self, heights=ndimage.maximum_filter(self.heights, size=5))
