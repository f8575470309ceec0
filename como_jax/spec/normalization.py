"""Maps of actions, states and latents to a common scale and back: affine maps, or maps to equal shares of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from como_jax.errors import ConfigError, closest

AFFINE_KINDS = ("none", "mean_std", "quantile", "min_max")
"""No change; mean 0 and standard deviation 1; 1st and 99th percentile at -1 and 1; smallest and largest at -1 and 1."""

KINDS = (*AFFINE_KINDS, "uniform")
"""The last one spreads the data evenly over [-1, 1], see `UniformNormalizer`."""

NUM_BINS = 256
"""Bins between the quantiles that a fitted `UniformNormalizer` keeps, as in LAPA (arXiv 2410.11758)."""

_LIMITS = {"quantile": ("q01", "q99"), "min_max": ("min", "max")}
_NEGLIGIBLE = 1e-6

FAR = 20.0
"""A normalised value beyond this outweighs all others in the loss."""


class Normalizer(Protocol):
    """A map that treats every dimension of a vector by itself, and its inverse.

    A dimension that is constant in the data becomes 0, and the inverse gives its constant value.
    """

    @property
    def size(self) -> int:
        """Dimensions of the vector."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values `[..., size]` on the common scale, float32."""

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """Values `[..., size]` in the units of the dataset or robot, float32."""

    def to_json(self) -> dict[str, list[Any]]:
        """Lists of numbers, from which `normalizer_from_json` makes the same map again."""


Scales = Mapping[str, Mapping[str, Normalizer | None]]
"""By the names of datasets, what normalises their `action`, `state`, `latent_motion` or true motion."""


class AffineNormalizer:
    """A shift and a scale. Nothing is clipped: with `quantile`, 2 % of the values lie outside [-1, 1]."""

    def __init__(self, offset: np.ndarray, scale: np.ndarray, varies: np.ndarray):
        """Takes arrays `[size]`: `(values - offset) / scale` where `varies`, and 0 elsewhere.

        Raises:
          ValueError: the arrays differ in length, an offset is not finite, or a scale is not positive.
        """
        if not offset.shape == scale.shape == varies.shape or offset.ndim != 1 or not len(offset):
            raise ValueError("offset, scale and varies must be equally long lists")
        if not np.isfinite(offset).all() or not np.isfinite(scale).all() or not (scale > 0).all():
            raise ValueError("offset must be finite, and scale finite and positive")
        self._offset, self._scale, self._varies = offset, scale, varies

    @classmethod
    def fit(cls, kind: str, statistics: Mapping[str, Sequence[float]]) -> AffineNormalizer:
        """The map of some data.

        Args:
          kind: one of `AFFINE_KINDS`.
          statistics: as far as the kind needs them `mean`, `std`, `q01`, `q99`, `min` and `max`, each with one number
            for every dimension.

        Raises:
          ConfigError: an unknown kind.
        """
        check_kind(kind, AFFINE_KINDS)
        values = {name: np.asarray(value, np.float64) for name, value in statistics.items() if name != "count"}
        if kind == "none":
            offset, scale = np.zeros_like(values["mean"]), np.ones_like(values["mean"])
        elif kind == "mean_std":
            offset, scale = values["mean"], values["std"]
        else:
            low, high = (values[name] for name in _LIMITS[kind])
            offset, scale = (low + high) / 2, (high - low) / 2
        varies = scale > _NEGLIGIBLE * np.maximum(1.0, np.abs(offset))
        return cls(offset, np.where(varies, scale, 1.0), varies)

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

    def to_json(self) -> dict[str, list[Any]]:
        """See `Normalizer`."""
        return {"offset": self._offset.tolist(), "scale": self._scale.tolist(), "varies": self._varies.tolist()}


class UniformNormalizer:
    """Each dimension through its empirical distribution function, so that values are spread evenly over [-1, 1].

    The function is linear between quantiles. A fitted one has `NUM_BINS` + 1 of them, so that `NUM_BINS` equal bins of
    [-1, 1] hold equally many values each, and the middle of a bin maps to the middle of its two edges, as in LAPA
    (arXiv 2410.11758). A value that fills more than one bin goes to the middle of all its bins, and the inverse of that
    is the value again. Values beyond the outermost edges go to -1 and 1.
    """

    def __init__(self, edges: np.ndarray):
        """Takes the edges of the bins, `[size, bins + 1]`.

        Raises:
          ValueError: there are none, they are not finite, or those of one dimension decrease.
        """
        if edges.ndim != 2 or not len(edges) or edges.shape[1] < 2:
            raise ValueError("edges must be equally long lists of numbers")
        if not np.isfinite(edges).all() or (np.diff(edges) < 0).any():
            raise ValueError("edges must be finite and in order")
        self._edges, self._levels = edges, np.linspace(-1, 1, edges.shape[1])

    @classmethod
    def fit(cls, values: np.ndarray) -> UniformNormalizer:
        """The map of values `[n, size]`, at least one."""
        edges = np.quantile(np.asarray(values, np.float64), np.linspace(0, 1, NUM_BINS + 1), axis=0).T
        middle = edges[:, NUM_BINS // 2]
        varies = edges[:, -1] - edges[:, 0] > _NEGLIGIBLE * np.maximum(1.0, np.abs(middle))
        return cls(np.where(varies[:, None], edges, middle[:, None]))

    @property
    def size(self) -> int:
        """See `Normalizer`."""
        return len(self._edges)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """See `Normalizer`."""
        columns = np.moveaxis(np.asarray(values, np.float64), -1, 0)
        scaled = [self._distribution(column, edges) for column, edges in zip(columns, self._edges, strict=True)]
        return np.stack(scaled, axis=-1).astype(np.float32)

    def inverse(self, scaled: np.ndarray) -> np.ndarray:
        """See `Normalizer`; beyond -1 and 1 it gives the outermost edges."""
        columns = np.moveaxis(np.asarray(scaled, np.float64), -1, 0)
        values = [np.interp(column, self._levels, edges) for column, edges in zip(columns, self._edges, strict=True)]
        return np.stack(values, axis=-1).astype(np.float32)

    def to_json(self) -> dict[str, list[Any]]:
        """See `Normalizer`."""
        return {"edges": self._edges.tolist()}

    def _distribution(self, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Values `[...]` of one dimension to [-1, 1]."""
        if edges[0] == edges[-1]:
            return np.zeros_like(values)
        # First and last edge that equal the value; where no edge does, `last` comes before `first`.
        first, last = np.searchsorted(edges, values, "left"), np.searchsorted(edges, values, "right") - 1
        middle = (first + last) / (len(edges) - 1) - 1
        return np.where(first <= last, middle, np.interp(values, edges, self._levels))


def describe_values(values: np.ndarray) -> dict[str, list[float]]:
    """The statistics that `AffineNormalizer.fit` reads, of values `[n, size]`, at least one."""
    values = np.asarray(values, np.float64)
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    found = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    return {name: value.tolist() for name, value in {**found, "q01": low, "q99": high}.items()}


def lost_dimensions(normalizer: Normalizer, low: np.ndarray, high: np.ndarray) -> list[int]:
    """Dimensions that a normalizer makes constant, although the data go from `low` to `high` `[size]` there.

    Quantiles do so with a motion that is in hardly any step.
    """
    return np.flatnonzero((high > low) & (normalizer(low) == normalizer(high))).tolist()


def far_dimensions(normalizer: Normalizer, low: np.ndarray, high: np.ndarray) -> list[int]:
    """Dimensions that go from `low` to `high` `[size]`, more than `FAR` beyond the common scale."""
    return np.flatnonzero(np.maximum(np.abs(normalizer(low)), np.abs(normalizer(high))) > FAR).tolist()


def normalizer_from_json(values: Mapping[str, Sequence[Any]]) -> Normalizer:
    """The map that `Normalizer.to_json` described.

    Raises:
      ValueError, KeyError, TypeError: it is not what `to_json` gives.
    """
    if "edges" in values:
        return UniformNormalizer(np.asarray(values["edges"], np.float64))
    offset, scale = (np.asarray(values[name], np.float64) for name in ("offset", "scale"))
    return AffineNormalizer(offset, scale, np.asarray(values["varies"], bool))


def check_kind(kind: str, known: Sequence[str] = KINDS) -> None:
    """Raises ConfigError unless the kind of normalisation is a known one."""
    if kind not in known:
        raise ConfigError(f"normalization {kind!r} must be one of {', '.join(known)}{closest(kind, known)}")
