"""Statistics of many latents in bounded memory: moments, range, a sample. Axes: N latents, D numbers of a latent.

Labelling sees latents shard by shard and on many hosts, so everything here can be computed in parts and combined.
scikit-learn's PCA and OAS need all latents in one array, and its incremental scaler has no covariances; the tests
compare with them. Latents are added up in `FOLDS` parts that have no episode in common: how far the parts differ from
the whole tells the error of the statistics, whatever the latents of one episode have in common.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence

import numpy as np
from scipy import stats

from como_jax.errors import UsageError

FOLDS = 5
BLOCK = 128
MAX_SAMPLE = 16384
QUANTILE = 0.99
RANGE = (0.001, 0.999)
# Directions with less than this share of the mean variance, such as dead dimensions, hold rounding errors alone.
MIN_SHRINKAGE = 1e-4


class DriftError(UsageError):
    """Latents, or a file of their statistics, that cannot be compared."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Number, mean `[D]` and scatter `[D, D]` of N latents; the scatter is N times their covariance."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, latents: np.ndarray) -> Moments:
        """Moments of latents `[N, D]` in float64; N may be 0."""
        if not len(latents):
            return cls(0, np.zeros(latents.shape[1]), np.zeros((latents.shape[1],) * 2))
        # Equal latents cancel exactly against one of them, but not against their mean.
        centered = latents.astype(np.float64) - latents[0]
        offset = centered.mean(axis=0)
        centered -= offset
        return cls(len(latents), latents[0] + offset, centered.T @ centered)

    @classmethod
    def combine(cls, parts: Sequence[Moments]) -> Moments:
        """Moments of all parts together (Chan, Golub and LeVeque, 1983)."""
        parts = [part for part in parts if part.count] or list(parts[:1])
        count, first = sum(part.count for part in parts), parts[0].mean
        mean = first + sum(part.count * (part.mean - first) for part in parts) / max(count, 1)
        between = sum(part.count * np.outer(part.mean - mean, part.mean - mean) for part in parts)
        return cls(count, mean, sum(part.scatter for part in parts) + between)

    @property
    def covariance(self) -> np.ndarray:
        """Maximum-likelihood covariance `[D, D]`."""
        return self.scatter / self.count

    @property
    def collapsed(self) -> bool:
        """Whether the latents are all equal, to the rounding of float32."""
        trace = np.trace(self.covariance)
        return bool(trace <= np.square(np.finfo(np.float32).eps) * (trace + np.sum(np.square(self.mean))))

    @functools.cached_property
    def shrinkage(self) -> float:
        """Oracle approximating shrinkage (Chen et al., 2010, equation 23 without its terms in 2/D).

        At least `MIN_SHRINKAGE`.
        """
        size = len(self.mean)
        trace, squares = np.trace(self.covariance) / size, np.mean(np.square(self.covariance))
        excess = (self.count + 1) * (squares - trace**2 / size)
        return float(np.clip((squares + trace**2) / excess, MIN_SHRINKAGE, 1.0)) if excess > 0.0 else 1.0

    @functools.cached_property
    def shrunk_covariance(self) -> np.ndarray:
        """Covariance `[D, D]` mixed with a sphere of the same trace, so that it has an inverse even if N < D."""
        size = len(self.mean)
        sphere = np.eye(size) * np.trace(self.covariance) / size
        return (1.0 - self.shrinkage) * self.covariance + self.shrinkage * sphere

    def distances(self, latents: np.ndarray) -> np.ndarray:
        """Mahalanobis distances `[N]` of latents `[N, D]` from the mean, by the shrunk covariance."""
        centered = np.asarray(latents, np.float64) - self.mean
        whitened = np.linalg.solve(np.linalg.cholesky(self.shrunk_covariance), centered.T)
        return np.sqrt(np.sum(np.square(whitened), axis=0))


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSums:
    """What is kept of latents; `combine` adds those of several shards.

    The sample holds the latents whose record numbers have the smallest hashes, so it does not depend on which host
    read which records, nor on their order.

    Attributes:
      folds: moments of the latents whose episode number is 0, 1, ... modulo `FOLDS`.
      minimum, maximum: float64 `[D]`.
      sample: `[M, D]` with M at most `MAX_SAMPLE`.
      sample_records: uint64 `[M]`, the record numbers of the sample, in order of their hashes.
      sample_folds: int64 `[M]`.
      first_record: smallest record number.
    """

    folds: tuple[Moments, ...]
    minimum: np.ndarray
    maximum: np.ndarray
    sample: np.ndarray
    sample_records: np.ndarray
    sample_folds: np.ndarray
    first_record: int

    @classmethod
    def of(
        cls, latents: np.ndarray, records: np.ndarray | None = None, episodes: np.ndarray | None = None
    ) -> LatentSums:
        """Sums of the latents `[N, D]` of one shard.

        Args:
          latents: floats.
          records: `[N]`, a number from 0 for every latent that no other latent of the same data has; by default they
            are counted from 0, which suits data that comes as a single shard.
          episodes: `[N]`, the number from 0 of each latent's episode; by default every `BLOCK` records are one episode.

        Raises:
          DriftError: no latents, some that are not finite, or numbers that do not fit.
        """
        latents = np.asarray(latents)
        if latents.ndim != 2 or not latents.size:
            raise DriftError(f"latents must be a non-empty [N, D] array, not one of shape {list(latents.shape)}.")
        records = _numbers("records", np.arange(len(latents)) if records is None else records, len(latents))
        episodes = _numbers("episodes", records // BLOCK if episodes is None else episodes, len(latents))
        broken = np.flatnonzero(~np.isfinite(latents).all(axis=1))
        if broken.size:
            raise DriftError(
                f"{broken.size} of {len(latents)} latents are NaN or infinite, the first of record "
                f"{records[broken[0]]}; leave out steps whose label is not valid."
            )
        folds = episodes % FOLDS
        chosen = _smallest_hashes(records)
        return cls(
            folds=tuple(Moments.of(latents[folds == fold]) for fold in range(FOLDS)),
            minimum=latents.min(axis=0).astype(np.float64),
            maximum=latents.max(axis=0).astype(np.float64),
            sample=latents[chosen],
            sample_records=records[chosen].astype(np.uint64),
            sample_folds=folds[chosen],
            first_record=int(records.min()),
        )

    @classmethod
    def combine(cls, shards: Sequence[LatentSums]) -> LatentSums:
        """Sums over all shards, added in the order of their records.

        Raises:
          DriftError: no shards, latents of different sizes, or records that are in two shards.
        """
        sizes = [len(shard.minimum) for shard in shards]
        if len(set(sizes)) != 1:
            raise DriftError(f"there must be shards, with latents of one size; their sizes are {sizes}.")
        shards = sorted(shards, key=lambda shard: shard.first_record)
        records = np.concatenate([shard.sample_records for shard in shards])
        if len(np.unique(records)) < len(records):
            raise DriftError("two shards have the same records; number the records of all shards together.")
        chosen = _smallest_hashes(records)
        return cls(
            folds=tuple(Moments.combine(parts) for parts in zip(*(shard.folds for shard in shards), strict=True)),
            minimum=np.min([shard.minimum for shard in shards], axis=0),
            maximum=np.max([shard.maximum for shard in shards], axis=0),
            sample=np.concatenate([shard.sample for shard in shards])[chosen],
            sample_records=records[chosen],
            sample_folds=np.concatenate([shard.sample_folds for shard in shards])[chosen],
            first_record=shards[0].first_record,
        )

    @functools.cached_property
    def moments(self) -> Moments:
        """Moments of all folds together."""
        return Moments.combine(self.folds)

    @property
    def measurable(self) -> bool:
        """Whether the error of the moments can be estimated: not all latents are equal, and no fold is empty."""
        return all(fold.count for fold in self.folds) and not self.moments.collapsed

    def held_out_distances(self) -> np.ndarray:
        """Mahalanobis distances `[M]` of the sample, each from the moments of the folds without it."""
        distances = np.zeros(len(self.sample))
        for fold in np.unique(self.sample_folds):
            rest = Moments.combine([*self.folds[:fold], *self.folds[fold + 1 :]])
            inside = self.sample_folds == fold
            distances[inside] = rest.distances(self.sample[inside])
        return distances

    def mean_error(self) -> np.ndarray:
        """Variances `[D]` of the mean, estimated from the means of the folds."""
        return sum(np.square(fold.mean - self.moments.mean) for fold in self.folds) / FOLDS / (FOLDS - 1)

    def covariance_error(self) -> float:
        """`covariance_distance` of the covariance from the true one, estimated from the covariances of the folds."""
        # It goes as one over the number of latents: FOLDS / N in a fold and 1 / N in the whole, of which it is a part.
        distances = [covariance_distance(fold.covariance, self.moments.covariance) for fold in self.folds]
        return float(np.mean(distances) / (FOLDS - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Statistics of a training run's latents, small enough to be stored beside it.

    Attributes:
      moments: of the N latents.
      minimum, maximum, low, high: float64 `[D]`, range of every dimension, and its quantiles `RANGE`.
      distance: the quantile `QUANTILE` of the latents' Mahalanobis distances, each from the folds without it, since a
        latent lies closer to statistics that include it than a new one does; None unless the latents are `measurable`.
      mean_error, covariance_error: see `LatentSums`; None unless the latents are `measurable`.
      s_pcfc: see `como_jax.evaluation.latents.measures`; None when it was not measured.
    """

    moments: Moments
    minimum: np.ndarray
    maximum: np.ndarray
    low: np.ndarray
    high: np.ndarray
    distance: float | None
    mean_error: np.ndarray | None
    covariance_error: float | None
    s_pcfc: float | None

    @classmethod
    def measure(cls, latents: np.ndarray | LatentSums, s_pcfc: float | None = None) -> LatentStatistics:
        """Statistics of latents `[N, D]` or of their sums; quantiles are those of at most `MAX_SAMPLE` latents.

        Raises:
          DriftError: see `LatentSums.of`; also an S-PCFC that is not a cosine.
        """
        sums = as_sums(latents)
        if s_pcfc is not None and not abs(s_pcfc) <= 1.0 + 1e-6:
            raise DriftError(f"s_pcfc must be a mean cosine, between -1 and 1, not {s_pcfc}; None where it is unknown.")
        low, high = np.quantile(sums.sample.astype(np.float64), RANGE, axis=0)
        measurable = sums.measurable
        return cls(
            moments=sums.moments,
            minimum=sums.minimum,
            maximum=sums.maximum,
            low=low,
            high=high,
            distance=float(np.quantile(sums.held_out_distances(), QUANTILE)) if measurable else None,
            mean_error=sums.mean_error() if measurable else None,
            covariance_error=sums.covariance_error() if measurable else None,
            s_pcfc=None if s_pcfc is None else float(s_pcfc),
        )

    @property
    def std(self) -> np.ndarray:
        """Standard deviation `[D]`."""
        return np.sqrt(np.diag(self.moments.covariance))

    @property
    def effective_rank(self) -> float:
        """`como_jax.evaluation.latents.measures.effective_rank`, from the covariance."""
        if self.moments.collapsed:
            return 0.0
        return float(np.exp(stats.entropy(np.sqrt(_clear(np.linalg.eigvalsh(self.moments.covariance))))))

    def to_json(self) -> str:
        """All fields as strict JSON; float64 keeps all its digits."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= dataclasses.asdict(fields.pop("moments"))
        lists = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        return json.dumps(lists, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> LatentStatistics:
        """The statistics that `to_json` wrote.

        Raises:
          DriftError: the text is not that.
        """
        try:
            fields = json.loads(text, parse_constant=_refuse_constant)
            mean = _array(fields["mean"], (len(fields["mean"]),))
            size = len(mean)
            moments = Moments(int(fields["count"]), mean, _array(fields["scatter"], (size, size)))
            if moments.count < 1:
                raise ValueError(f"a count of {moments.count}")
            vectors = {name: _array(fields[name], (size,)) for name in ("minimum", "maximum", "low", "high")}
            error = fields["mean_error"]
            numbers = {name: _optional(fields[name]) for name in ("distance", "covariance_error", "s_pcfc")}
            return cls(moments, **vectors, mean_error=None if error is None else _array(error, (size,)), **numbers)
        except KeyError as error:
            raise DriftError(f"not a file of latent statistics: it has no {error}; measure them again.") from error
        except (TypeError, ValueError) as error:
            raise DriftError(f"not a file of latent statistics: {error}; measure them again.") from error


def as_sums(latents: np.ndarray | LatentSums) -> LatentSums:
    """Sums of latents `[N, D]`, or the sums themselves."""
    return latents if isinstance(latents, LatentSums) else LatentSums.of(latents)


def covariance_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The part of the squared Fréchet distance of two Gaussians that comes from their covariances C, `[D, D]`.

    It is `tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson and Landau, 1982), in squared units of the latents.
    """
    # The trace of the root is the sum of singular values of the roots' product.
    root = np.sum(np.linalg.svd(_root(first) @ _root(second), compute_uv=False))
    return float(max(0.0, np.trace(first) + np.trace(second) - 2.0 * root))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root `[D, D]`."""
    values, axes = np.linalg.eigh(covariance)
    return axes * np.sqrt(_clear(values)) @ axes.T


def _clear(values: np.ndarray) -> np.ndarray:
    """Eigenvalues, exactly zero where they are rounding."""
    return np.where(values > len(values) * np.finfo(np.float64).eps * values.max(), values, 0.0)


def _numbers(name: str, numbers: np.ndarray, count: int) -> np.ndarray:
    numbers = np.asarray(numbers)
    if numbers.shape != (count,) or not np.issubdtype(numbers.dtype, np.integer) or numbers.min() < 0:
        raise DriftError(f"{name} must be {count} integers from 0, one for every latent.")
    return numbers


def _smallest_hashes(records: np.ndarray) -> np.ndarray:
    """Positions of the at most `MAX_SAMPLE` records with the smallest hashes, in that order."""
    return np.argsort(_hash(records.astype(np.uint64)), kind="stable")[:MAX_SAMPLE]


def _hash(records: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose values look random: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = records + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _array(values: object, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"an array of shape {list(array.shape)} where finite numbers {list(shape)} belong")
    return array


def _optional(value: float | None) -> float | None:
    return None if value is None else float(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
