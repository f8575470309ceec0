"""Actions and states on a common scale, from the statistics that a conversion writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from como_jax.errors import ConfigError, DatasetError, closest

KINDS = ("none", "mean_std", "quantile", "min_max")
"""Nothing; mean 0 and deviation 1; 1st to 99th percentile to [-1, 1]; smallest to largest to [-1, 1]."""

_LIMITS = {"quantile": ("q01", "q99"), "min_max": ("min", "max")}
_NEGLIGIBLE = 1e-6


class Normalizer:
    """An affine map of every dimension of a vector, and its inverse.

    A dimension that never changes becomes 0, and its inverse gives the one value it had. Nothing is clipped: with
    `quantile`, 2 % of the values lie outside [-1, 1].
    """

    def __init__(self, kind: str, statistics: Mapping[str, Sequence[float]]):
        """Takes what the kind needs of `mean`, `std`, `q01`, `q99`, `min` and `max`, each of one number a dimension.

        Raises:
          ConfigError: an unknown kind.
        """
        if kind not in KINDS:
            raise ConfigError(f"normalization {kind!r} must be one of {', '.join(KINDS)}{closest(kind, KINDS)}")
        values = {name: np.asarray(value, np.float64) for name, value in statistics.items() if name != "count"}
        if kind == "none":
            offset, scale = np.zeros_like(values["mean"]), np.ones_like(values["mean"])
        elif kind == "mean_std":
            offset, scale = values["mean"], values["std"]
        else:
            low, high = (values[name] for name in _LIMITS[kind])
            offset, scale = (low + high) / 2, (high - low) / 2
        self._offset, self._varies = offset, scale > _NEGLIGIBLE * np.maximum(1.0, np.abs(offset))
        self._scale = np.where(self._varies, scale, 1.0)

    def to_json(self) -> dict[str, list[Any]]:
        """What `from_json` needs, as lists of numbers."""
        return {"offset": self._offset.tolist(), "scale": self._scale.tolist(), "varies": self._varies.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[Any]]) -> Normalizer:
        """The normalizer that `to_json` described.

        Raises:
          ValueError, KeyError, TypeError: it is not what `to_json` gives.
        """
        normalizer = cls.__new__(cls)
        normalizer._offset = np.asarray(values["offset"], np.float64)
        normalizer._scale = np.asarray(values["scale"], np.float64)
        normalizer._varies = np.asarray(values["varies"], bool)
        shapes = {array.shape for array in (normalizer._offset, normalizer._scale, normalizer._varies)}
        if len(shapes) != 1 or normalizer._offset.ndim != 1:
            raise ValueError(f"offset, scale and varies must be equally long lists, not of shapes {shapes}")
        return normalizer

    @property
    def size(self) -> int:
        """Dimensions of the vector."""
        return len(self._offset)

    @classmethod
    def load(cls, directory: epath.PathLike, field: str, kind: str) -> Normalizer:
        """The normalizer of a dataset's `action` or `state`.

        Raises:
          DatasetError: the dataset has no statistics of the field.
          ConfigError: an unknown kind.
        """
        statistics = _read_statistics(epath.Path(directory)).get(field)
        if statistics is None:
            raise DatasetError(f"{directory}/statistics.json has no statistics of any {field}.")
        return cls(kind, statistics)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values `[..., size]` on the common scale, float32."""
        scaled = (values - self._offset) / self._scale
        return np.where(self._varies, scaled, 0.0).astype(np.float32)

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """Values `[..., size]` in the units of the dataset, float32."""
        return (np.where(self._varies, scaled, 0.0) * self._scale + self._offset).astype(np.float32)


def _read_statistics(directory: epath.Path) -> dict[str, Any]:
    path = directory / "statistics.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read; convert the dataset again: {error}") from error
