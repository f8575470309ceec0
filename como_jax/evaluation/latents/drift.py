"""How far new data is from what a model was trained on, judged from latents alone, while they are being made.

A model labels whatever it is shown, also what it knows nothing of; its latents then lie where those of training do not.
Axes: N latents, D numbers of a latent.

The thresholds of the verdict come from two kinds of synthetic data: Gaussians of 8 to 512 dimensions whose standard
deviations span a factor of 30, with 20,000 latents of training and 2,000 new ones; and autoregressive episodes (200 of
128 steps, correlation 0.8, 30 % of the variance fixed within an episode). "Less chance" means: minus what is expected
by chance.

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

Only the share outside sees a change that is small in every dimension (0.1 deviations in each of 512 dimensions put 57 %
outside): it may lead to "shifted" but never to "far".
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from como_jax.data.mixture import MixtureEntry, parse_mixture
from como_jax.data.sources import READ_ERRORS
from como_jax.errors import DatasetError
from como_jax.evaluation.latents.measures import past_future_similarity
from como_jax.evaluation.latents.statistics import (
    DriftError,
    LatentStatistics,
    LatentSums,
    as_sums,
    covariance_distance,
)
from como_jax.evaluation.latents.transitions import EvaluationSet, set_batches
from como_jax.files import write_text
from como_jax.nn.model_def import ModelDef, Params
from como_jax.training.run import Run
from como_jax.training.run_data import changed_since

logger = logging.getLogger(__name__)

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
# Share of the latents' root mean square deviation that a value may lie outside its range by rounding.
ROUNDING = 1e-4
FIGURE_NAME = "drift.png"
MAX_POINTS = 2000
# Ellipses of this many standard deviations hold 50 % and 99 % of a Gaussian in two dimensions.
ELLIPSES = {"50 %": 1.177, "99 %": 3.035}
_REFERENCE_CLIPS, _SIMILARITY_CLIPS, _BATCH = 2048, 256, 32


@dataclasses.dataclass(frozen=True)
class Drift:
    """New data compared with training data, as `compare` measures it.

    For data of the training distribution all distances are 0, apart from what chance makes of so few latents. The
    `expected` values estimate that from parts of the data that have no episode in common.

    Attributes:
      count: number N of new latents.
      mean_shift: root mean square over the dimensions of the difference of the means, in training standard deviations.
      expected_mean_shift: the same by chance; None where there are too few episodes to tell.
      frechet_distance: squared, between two Gaussians, `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson and
        Landau, 1982), divided by the training trace `tr(C1)`.
      covariance_distance: the part of it that does not come from the difference of the means.
      expected_covariance_distance: the same by chance; None where there are too few episodes to tell.
      share_outside: share of new latents beyond the 99 % quantile of the Mahalanobis distances of training; 0.01 for
        data like training.
      share_outside_range: share of new values outside the middle 99.8 % of their dimension in training; 0.002 for data
        like training.
      training_s_pcfc, s_pcfc: S-PCFC of both; None where unknown.
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
        """`LIKE`, `SHIFTED`, `FAR`, or `UNKNOWN` where chance alone could look like a shift."""
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
        """One sentence of advice for whoever labels the data."""
        return {
            LIKE: "The new latents lie where those of training do: use the labels as they are.",
            SHIFTED: "The new latents differ from those of training: before you use the labels, look at motion "
            "transfer and at a probe on this data, or add some of it to training.",
            FAR: "The new latents lie where training had none, so the labels are likely to mean nothing: train on some "
            "of this data first.",
            UNKNOWN: f"{self.count} latents are too few, or from too few episodes, to tell: label more and ask again.",
        }[self.verdict]

    def as_report(self) -> dict[str, float | str | None]:
        """Numbers, verdict and advice, for a report."""
        return {**dataclasses.asdict(self), "verdict": self.verdict, "advice": self.advice}

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


def reference_statistics(run: Run) -> LatentStatistics:
    """Statistics of the latents of a run's own training data, read from its directory, or measured and kept there.

    Raises:
      DatasetError: they were never measured, and the training data is not here.
    """
    # Of one checkpoint: a run that is trained further has other latents.
    path = run.workdir / f"latent_statistics_{run.step}.json"
    if path.exists():
        return LatentStatistics.from_json(path.read_text())
    if changed := changed_since(run.workdir):
        raise DatasetError(f"the run's own data have changed, so that they are no measure: {' '.join(changed)}")
    data = run.config.data
    entries = parse_mixture(data.mixture)
    sampled = sample_transitions(run, entries, data.gap_seconds, data.camera, data.fit, _REFERENCE_CLIPS)
    statistics = LatentStatistics.measure(sampled.sums, sampled.s_pcfc)
    try:
        write_text(path, statistics.to_json())
    except OSError as error:
        logger.warning("The training statistics cannot be kept and will be measured again next time: %s", error)
    return statistics


def measure_drift(
    run: Run, labelled: epath.Path, new: LatentSums, *, gap_seconds: float, camera: str, fit: str
) -> tuple[LatentStatistics, Drift]:
    """Compares the latents of a labelled dataset with those of training; returns those of training, and the drift.

    S-PCFC needs motions backwards in time, which are no labels, so it is measured on a few hundred clips.

    Args:
      run: whose model made the labels.
      labelled: directory of the labelled dataset.
      new: sums of all its valid latents.
      gap_seconds, camera, fit: as it was labelled.

    Raises:
      DriftError: see `compare`.
      DatasetError: see `reference_statistics`.
    """
    reference = reference_statistics(run)
    try:
        entries = [MixtureEntry(str(labelled))]
        s_pcfc = sample_transitions(run, entries, gap_seconds, camera, fit, _SIMILARITY_CLIPS).s_pcfc
    except READ_ERRORS as error:
        logger.warning("No S-PCFC: %s", error)
        s_pcfc = None
    return reference, compare(reference, new, s_pcfc)


class Sampled(NamedTuple):
    """The latents of transitions that are spread evenly over some datasets."""

    sums: LatentSums
    s_pcfc: float


def sample_transitions(
    run: Run, entries: Sequence[MixtureEntry], gap_seconds: float, camera: str, fit: str, num_clips: int
) -> Sampled:
    """Encodes as many clips of each dataset, of its training episodes, or held-out ones where it has no others.

    Only one host needs to call it.

    Raises:
      DatasetError: a dataset is missing, or none has a clip.
    """
    sets: dict[str, EvaluationSet] = {}
    for item in EvaluationSet.open_all(
        entries, gap_seconds=gap_seconds, image_size=run.config.data.image_size, camera=camera, fit=fit
    ):
        sets.setdefault(item.name, item)
    if not sets:
        raise DatasetError("No dataset has a clip of three frames to take latents from.")
    params = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), run.params)
    sums, past, reverse = [], [], []
    for number, item in enumerate(sets.values()):
        count = max(1, min(num_clips // len(entries), len(item.index)))
        # The clips that `set_batches` chooses.
        clips = np.unique(np.linspace(0, len(item.index) - 1, count).astype(np.int64))
        found = [
            np.asarray(_encode(run.model, params, batch["frames"]))[:size]
            for batch, size in set_batches(item, count, _BATCH)
        ]
        past.append(np.concatenate([latents[:, 0] for latents in found]))
        reverse.append(np.concatenate([latents[:, 2] for latents in found]))
        # Records and episodes of different datasets must not share a number.
        offset = number * 2**40
        records, episodes = (offset + numbers for numbers in item.index.look_up(clips))
        sums.append(LatentSums.of(past[-1].reshape(len(clips), -1), records, episodes))
    s_pcfc = past_future_similarity(np.concatenate(past), np.concatenate(reverse))
    return Sampled(LatentSums.combine(sums), s_pcfc)


def drift_figure(
    reference: LatentStatistics,
    new: np.ndarray | LatentSums,
    s_pcfc: float | None = None,
    training: np.ndarray | LatentSums | None = None,
) -> Figure:
    """New latents on the first two principal components of training, and the mean shift of every dimension.

    Args:
      reference: statistics of training.
      new: latents `[N, D]` or their sums.
      s_pcfc: of the new latents; it is part of the verdict.
      training: latents of training or their sums, if they are to be drawn too; the Gaussian of training always is.

    Raises:
      DriftError: see `compare`.
    """
    sums = as_sums(new)
    drift = compare(reference, sums, s_pcfc)
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    cloud, bars = figure.subplots(1, 2)
    _draw_clouds(cloud, reference, sums, None if training is None else as_sums(training))
    _draw_shifts(bars, mean_shifts(reference, sums))
    figure.suptitle(
        f"{drift.verdict}; {drift.share_outside:.1%} of the new latents outside training", fontsize="medium"
    )
    return figure


def components(reference: LatentStatistics) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal axes of training `[D, 2]` and their variances `[2]`; zero where D is 1.

    Signs are those of `como_jax.evaluation.latents.measures.principal_components`.
    """
    values, axes = np.linalg.eigh(reference.moments.covariance)
    values, axes = np.maximum(values[::-1][:2], 0.0), axes[:, ::-1][:, :2]
    largest = np.take_along_axis(axes, np.argmax(np.abs(axes), axis=0)[None], axis=0)
    axes = axes * np.where(largest < 0, -1.0, 1.0)
    missing = 2 - len(values)
    return np.pad(axes, ((0, 0), (0, missing))), np.pad(values, (0, missing))


def _draw_clouds(axes: Axes, reference: LatentStatistics, new: LatentSums, training: LatentSums | None) -> None:
    directions, variances = components(reference)
    for name, sums, color in (("training", training, "C0"), ("new", new, "C1")):
        if sums is not None:
            # The sample is in the order of its hashes, so its beginning is a random part of it.
            points = (sums.sample[:MAX_POINTS].astype(np.float64) - reference.moments.mean) @ directions
            axes.scatter(*points.T, s=6, color=color, alpha=0.5, linewidths=0, label=name)
    for (name, radius), style in zip(ELLIPSES.items(), ("-", "--"), strict=True):
        width, height = 2.0 * radius * np.sqrt(variances)
        axes.add_patch(
            Ellipse((0, 0), width, height, fill=False, color="black", linestyle=style, label=f"{name} of training")
        )
    axes.autoscale_view()
    shares = variances / np.trace(reference.moments.covariance)
    axes.set_xlabel(f"component 1 of training ({shares[0]:.0%} of variance)", fontsize="small")
    axes.set_ylabel(f"component 2 ({shares[1]:.0%})", fontsize="small")
    axes.tick_params(labelsize="x-small")
    axes.legend(fontsize="x-small")


def _draw_shifts(axes: Axes, shifts: np.ndarray) -> None:
    axes.bar(np.arange(len(shifts)), shifts, width=1.0, color="C1")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("latent dimension", fontsize="small")
    axes.set_ylabel("mean shift in standard deviations of training", fontsize="small")
    axes.tick_params(labelsize="x-small")


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: ModelDef, params: Params, frames: np.ndarray) -> jax.Array:
    """Latents `[B, 3, Q, L]` of clips `[B, 3, H, W, 3]`: past to current, current to future, future to current."""
    return model.bind(params).encode(frames[:, np.array([0, 1, 2, 1])])


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
    # The range of a dead dimension is that of rounding alone, which differs with the batch and the device.
    rounding = ROUNDING * np.sqrt(np.mean(np.square(reference.std)))
    return float(np.mean((sample < reference.low - rounding) | (sample > reference.high + rounding)))
