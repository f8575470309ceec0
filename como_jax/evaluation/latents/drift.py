"""How far new data is from what a model was trained on, told from latents alone, while they are being made.

A model labels whatever it is shown, also what it knows nothing of; its latents then lie where training had none. Axes:
N latents, D latent size.

The thresholds of the verdict come from Gaussians of 8 to 512 dimensions whose standard deviations span a factor of 30,
20,000 latents of training and 2,000 new ones, and from autoregressive episodes (200 of 128 steps, correlation 0.8, 30 %
of the variance fixed within an episode):

| new data | mean shift, less chance | covariance, less chance | share outside | verdict |
|---|---|---|---|---|
| same, 1000 or 5000 latents | under 0.02 | under 0.01 | 0.01 to 0.03 | like |
| 50 or 200 other episodes | under 0.1 | under 0.05 | 0.00 to 0.01 | like |
| all scaled by 0.8 | under 0.05 | 0.04 | 0.00 | like |
| all scaled by 1.25 / 1.5 | under 0.05 | 0.05 to 0.07 / 0.23 to 0.26 | 0.12 to 1 / 0.35 to 1 | shifted |
| all scaled by 0.5 / 2 | under 0.1 | 0.25 / 1 | 0 / 0.76 to 1 | shifted / far |
| mean moved 0.25 / 0.5 / 2 deviations | 0.25 / 0.5 / 2 | 0 | 0.43 to 1 | shifted / shifted / far |
| pairs of dimensions turned by 30 degrees | under 0.1 | 0.16 to 0.22 | 0.88 to 1 | shifted |
| a quarter of the dimensions exchanged | under 0.1 | 0.13 to 0.33 | 0.75 to 1 | shifted |
| a random rotation | under 0.1 | 0.77 to 0.83 | 0.94 to 1 | far |
| heavier tails (Student, 5 degrees) | under 0.05 | under 0.01 | 0.06 to 0.23 | like to shifted |

The share outside alone sees what is small in every dimension (0.1 deviations in each of 512 put 57 % outside): it may
say "shifted" but never "far".
"""

from __future__ import annotations

import dataclasses

import numpy as np

from como_jax.evaluation.latents.statistics import (
    DriftError,
    LatentStatistics,
    LatentSums,
    as_sums,
    covariance_distance,
)

LIKE, SHIFTED, FAR, UNKNOWN = "like the training data", "shifted", "far", "too few to tell"
# Far: the clouds' centres are further apart than training is wide, or the latents use directions as unlike those of
# training as a random rotation or a doubled scale makes them.
FAR_MEAN_SHIFT = 1.0
FAR_COVARIANCE = 0.5
# Shifted: clearly more than other episodes of the same data ever gave (see above).
SHIFTED_MEAN_SHIFT = 0.25
SHIFTED_COVARIANCE = 0.1
SHIFTED_SHARE_OUTSIDE = 0.1
# More than the 0.125 that S-PCFC differs between the LIBERO suites for one method (CARE, arXiv 2601.22467).
SHIFTED_S_PCFC = 0.15
# Of the latents' root mean square deviation.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class Drift:
    """New data against training data, as `compare` measures it.

    Distances are 0 for data of the training distribution but for what chance makes of so few latents, which the
    `expected` ones tell; that is measured between parts of the data that have no episode in common.

    Attributes:
      count: N, of new latents.
      mean_shift: root mean square over the dimensions of the means' difference, in training standard deviations.
      expected_mean_shift: by chance; None where there are too few episodes to tell.
      frechet_distance: squared, between two Gaussians, `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson and
        Landau, 1982), over the training trace `tr(C1)`.
      covariance_distance: the part of it that is not the means' difference.
      expected_covariance_distance: by chance; None likewise.
      share_outside: of new latents beyond the 99 % quantile of training's Mahalanobis distances; 0.01 when alike.
      share_outside_range: of new values outside the middle 99.8 % of their dimension in training; 0.002 when alike.
      training_s_pcfc, s_pcfc: of both, None where unknown.
      training_effective_rank, effective_rank: of both.
    """

    count: int
    mean_shift: float
    expected_mean_shift: float | None
    frechet_distance: float
    covariance_distance: float
    expected_covariance_distance: float | None
    share_outside: float
    share_outside_range: float
    training_s_pcfc: float | None
    s_pcfc: float | None
    training_effective_rank: float
    effective_rank: float

    @property
    def verdict(self) -> str:
        """`LIKE`, `SHIFTED`, `FAR`, or `UNKNOWN` when chance alone may reach what would be a shift."""
        if self.expected_mean_shift is None or self.expected_covariance_distance is None:
            return UNKNOWN
        mean_shift = np.sqrt(max(0.0, self.mean_shift**2 - self.expected_mean_shift**2))
        covariance = self.covariance_distance - self.expected_covariance_distance
        if mean_shift > FAR_MEAN_SHIFT or covariance > FAR_COVARIANCE:
            return FAR
        if self.expected_mean_shift > SHIFTED_MEAN_SHIFT or self.expected_covariance_distance > SHIFTED_COVARIANCE:
            return UNKNOWN
        shifted = (
            mean_shift > SHIFTED_MEAN_SHIFT
            or covariance > SHIFTED_COVARIANCE
            or self.share_outside > SHIFTED_SHARE_OUTSIDE
            or self._s_pcfc_rise > SHIFTED_S_PCFC
        )
        return SHIFTED if shifted else LIKE

    @property
    def advice(self) -> str:
        """One sentence for who is labelling the data."""
        return {
            LIKE: "The new latents lie where those of training do: use the labels as they are.",
            SHIFTED: "The new latents differ from those of training: look at motion transfer and at a probe on this "
            "data before its labels are used, or add some of it to training.",
            FAR: "The new latents lie where training had none, so the labels are likely to mean nothing: train on some "
            "of this data first.",
            UNKNOWN: f"{self.count} latents are too few, or from too few episodes, to tell: label more and ask again.",
        }[self.verdict]

    @property
    def _s_pcfc_rise(self) -> float:
        unknown = self.s_pcfc is None or self.training_s_pcfc is None
        return 0.0 if unknown else self.s_pcfc - self.training_s_pcfc


def compare(reference: LatentStatistics, new: np.ndarray | LatentSums, s_pcfc: float | None = None) -> Drift:
    """Compares new latents `[N, D]`, or their sums, with those of a training run.

    Raises:
      DriftError: another latent size, training statistics without spread or of too few episodes, or new latents that
        have no statistics.
    """
    sums = as_sums(new)
    new_statistics, trained, moments = LatentStatistics.measure(sums, s_pcfc), reference.moments, sums.moments
    if len(moments.mean) != len(trained.mean):
        raise DriftError(
            f"the new latents have size {len(moments.mean)}, those of training {len(trained.mean)}; "
            "compare labels with the run whose model made them."
        )
    if reference.distance is None:
        reason = "all its latents are equal" if trained.collapsed else "they are of too few episodes"
        raise DriftError(
            f"nothing can be compared with the training statistics ({trained.count} latents), since {reason}; "
            "measure them on more data, or choose a model that has not collapsed."
        )
    trace, difference = np.trace(trained.covariance), moments.mean - trained.mean
    distance = covariance_distance(trained.covariance, moments.covariance) / trace
    return Drift(
        count=moments.count,
        mean_shift=float(np.sqrt(np.mean(np.square(mean_shifts(reference, sums))))),
        expected_mean_shift=_expected_mean_shift(reference, new_statistics),
        frechet_distance=float(difference @ difference / trace + distance),
        covariance_distance=float(distance),
        expected_covariance_distance=_expected_covariance_distance(reference, new_statistics),
        share_outside=float(np.mean(trained.distances(sums.sample) > reference.distance)),
        share_outside_range=_share_outside_range(reference, sums.sample),
        training_s_pcfc=reference.s_pcfc,
        s_pcfc=new_statistics.s_pcfc,
        training_effective_rank=reference.effective_rank,
        effective_rank=new_statistics.effective_rank,
    )


def mean_shifts(reference: LatentStatistics, new: LatentSums) -> np.ndarray:
    """Differences of the means `[D]` in standard deviations of training, by its shrunk covariance."""
    return (new.moments.mean - reference.moments.mean) / np.sqrt(np.diag(reference.moments.shrunk_covariance))


def _expected_mean_shift(reference: LatentStatistics, new: LatentStatistics) -> float | None:
    if new.mean_error is None:
        return None
    variances = (reference.mean_error + new.mean_error) / np.diag(reference.moments.shrunk_covariance)
    return float(np.sqrt(np.mean(variances)))


def _expected_covariance_distance(reference: LatentStatistics, new: LatentStatistics) -> float | None:
    if new.covariance_error is None:
        return None
    return float((reference.covariance_error + new.covariance_error) / np.trace(reference.moments.covariance))


def _share_outside_range(reference: LatentStatistics, sample: np.ndarray) -> float:
    # A dead dimension has no range but that of rounding, which differs with the batch and the device.
    rounding = ROUNDING * np.sqrt(np.mean(np.square(reference.std)))
    return float(np.mean((sample < reference.low - rounding) | (sample > reference.high + rounding)))
