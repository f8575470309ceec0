"""Actions, states and latents on a common scale: affine maps from the statistics of a conversion, or quantiles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import chex
import numpy as np
from etils import epath

from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError, closest

AFFINE_KINDS = ("none", "mean_std", "quantile", "min_max")
"""Nothing; mean 0 and deviation 1; 1st to 99th percentile to [-1, 1]; smallest to largest to [-1, 1]."""

KINDS = (*AFFINE_KINDS, "uniform")
"""The last spreads what there is evenly over [-1, 1], see `UniformNormalizer`."""

NUM_BINS = 256
"""Between the quantiles that `UniformNormalizer` keeps, as in LAPA (arXiv 2410.11758)."""

_LIMITS = {"quantile": ("q01", "q99"), "min_max": ("min", "max")}
_NEGLIGIBLE = 1e-6


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
        """Values `[..., size]` in the units of the dataset, float32."""

    def to_json(self) -> dict[str, list[Any]]:
        """What `normalizer_from_json` needs, as lists of numbers."""


class AffineNormalizer:
    """A shift and a scale. Nothing is clipped: with `quantile`, 2 % of the values lie outside [-1, 1]."""

    def __init__(self, kind: str, statistics: Mapping[str, Sequence[float]]):
        """Takes what the kind needs of `mean`, `std`, `q01`, `q99`, `min` and `max`, each of one number a dimension.

        Raises:
          ConfigError: not one of `AFFINE_KINDS`.
        """
        _check_kind(kind, AFFINE_KINDS)
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

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[Any]]) -> AffineNormalizer:
        """See `normalizer_from_json`."""
        normalizer = cls.__new__(cls)
        normalizer._offset = np.asarray(values["offset"], np.float64)
        normalizer._scale = np.asarray(values["scale"], np.float64)
        normalizer._varies = np.asarray(values["varies"], bool)
        shapes = {array.shape for array in (normalizer._offset, normalizer._scale, normalizer._varies)}
        if len(shapes) != 1 or normalizer._offset.ndim != 1:
            raise ValueError(f"offset, scale and varies must be equally long lists, not of shapes {shapes}")
        return normalizer

    def to_json(self) -> dict[str, list[Any]]:
        """See `Normalizer`."""
        return {"offset": self._offset.tolist(), "scale": self._scale.tolist(), "varies": self._varies.tolist()}

    @property
    def size(self) -> int:
        """See `Normalizer`."""
        return len(self._offset)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """See `Normalizer`."""
        scaled = (values - self._offset) / self._scale
        return np.where(self._varies, scaled, 0.0).astype(np.float32)

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """See `Normalizer`."""
        return (np.where(self._varies, scaled, 0.0) * self._scale + self._offset).astype(np.float32)


class UniformNormalizer:
    """Each dimension through its empirical distribution function, so that values are spread evenly over [-1, 1].

    The function is linear between quantiles, so that `NUM_BINS` equal bins of [-1, 1] hold equally many values each
    and the middle of a bin is the middle of its two edges, as LAPA has it (arXiv 2410.11758). A value of which there
    are more than a bin holds goes to the middle of all its bins, whose inverse is that value. What is smaller or
    larger than all values goes to -1 or 1.
    """

    def __init__(self, values: np.ndarray):
        """Takes values `[n, size]`, at least one."""
        edges = np.quantile(np.asarray(values, np.float64), np.linspace(0, 1, NUM_BINS + 1), axis=0).T
        middle = edges[:, NUM_BINS // 2]
        varies = edges[:, -1] - edges[:, 0] > _NEGLIGIBLE * np.maximum(1.0, np.abs(middle))
        self._edges = np.where(varies[:, None], edges, middle[:, None])

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[Any]]) -> UniformNormalizer:
        """See `normalizer_from_json`."""
        normalizer = cls.__new__(cls)
        normalizer._edges = np.asarray(values["edges"], np.float64)
        shape = normalizer._edges.shape
        if shape != (len(normalizer._edges), NUM_BINS + 1) or not np.all(np.diff(normalizer._edges) >= 0):
            raise ValueError(f"edges must be lists of {NUM_BINS + 1} numbers in order")
        return normalizer

    def to_json(self) -> dict[str, list[Any]]:
        """See `Normalizer`."""
        return {"edges": self._edges.tolist()}

    @property
    def size(self) -> int:
        """See `Normalizer`."""
        return len(self._edges)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """See `Normalizer`."""
        chex.assert_axis_dimension(values, -1, self.size)
        columns = zip(np.moveaxis(np.asarray(values, np.float64), -1, 0), self._edges, strict=True)
        return np.stack([_distribution(column, edges) for column, edges in columns], axis=-1).astype(np.float32)

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """See `Normalizer`; beyond -1 and 1 it gives the smallest and the largest value."""
        chex.assert_axis_dimension(scaled, -1, self.size)
        columns = zip(np.moveaxis(np.asarray(scaled, np.float64), -1, 0), self._edges, strict=True)
        levels = np.linspace(-1, 1, NUM_BINS + 1)
        return np.stack([np.interp(column, levels, edges) for column, edges in columns], axis=-1).astype(np.float32)


def load_normalizer(directory: epath.PathLike, field: str, kind: str) -> Normalizer:
    """The normalizer of a dataset's `action`, `state` or `latent_motion`, as its training episodes have it.

    Raises:
      DatasetError: the dataset does not tell of the field.
      ConfigError: not one of `KINDS`.
    """
    _check_kind(kind, KINDS)
    if kind == "uniform":
        return UniformNormalizer(_training_values(directory, field))
    statistics = _read_statistics(epath.Path(directory)).get(field)
    if statistics is None:
        raise DatasetError(f"{directory}/statistics.json has no statistics of any {field}.")
    return AffineNormalizer(kind, statistics)


def normalizer_from_json(values: Mapping[str, Sequence[Any]]) -> Normalizer:
    """The normalizer that `to_json` described.

    Raises:
      ValueError, KeyError, TypeError: it is not what `to_json` gives.
    """
    return UniformNormalizer.from_json(values) if "edges" in values else AffineNormalizer.from_json(values)


def _distribution(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Values `[...]` to [-1, 1] by the edges of one dimension."""
    if edges[0] == edges[-1]:
        return np.zeros_like(values)
    # Of the edges that equal the value; where there are none, the last is before the first.
    first, last = np.searchsorted(edges, values, "left"), np.searchsorted(edges, values, "right") - 1
    between = np.interp(values, edges, np.linspace(-1, 1, NUM_BINS + 1))
    return np.where(first <= last, (first + last) / NUM_BINS - 1, between)


def _check_kind(kind: str, known: Sequence[str]) -> None:
    if kind not in known:
        raise ConfigError(f"normalization {kind!r} must be one of {', '.join(known)}{closest(kind, known)}")


def _training_values(directory: epath.PathLike, field: str) -> np.ndarray:
    """`[n, size]`, of all steps of training episodes that have the field."""
    source = EpisodeSource(directory, "train")
    values = getattr(source, field)
    if field == "latent_motion" and values is not None:
        values = values[source.latent_valid]
    if values is None or not len(values):
        raise DatasetError(f"{directory} has no {field} in its training episodes, of which normalization=uniform is.")
    return values


def _read_statistics(directory: epath.Path) -> dict[str, Any]:
    path = directory / "statistics.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read; convert the dataset again: {error}") from error
