"""A picture of drift: where new latents lie among those of training, and which dimensions moved."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from como_jax.evaluation.latents.drift import compare, mean_shifts
from como_jax.evaluation.latents.statistics import LatentStatistics, LatentSums, as_sums

MAX_POINTS = 2000
# Of a Gaussian in two dimensions, ellipses of these many standard deviations hold 50 % and 99 %.
ELLIPSES = {"50 %": 1.177, "99 %": 3.035}


def drift_figure(
    reference: LatentStatistics,
    new: np.ndarray | LatentSums,
    s_pcfc: float | None = None,
    training: np.ndarray | LatentSums | None = None,
) -> Figure:
    """New latents on the first two principal components of training, and the mean shift of every dimension.

    Args:
      reference: of training.
      new: latents `[N, D]` or their sums.
      s_pcfc: of the new latents, which is part of the verdict.
      training: latents of training or their sums, to be drawn too; training's Gaussian is drawn in any case.

    Raises:
      DriftError: see `como_jax.evaluation.latents.drift.compare`.
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

    Signs are those of `como_jax.evaluation.latents.spread.principal_components`.
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
            # The sample is in the order of its hashes, so its beginning is a fair share of it.
            points = (sums.sample[:MAX_POINTS].astype(np.float64) - reference.moments.mean) @ directions
            axes.scatter(*points.T, s=6, color=color, alpha=0.5, linewidths=0, label=name)
    for (name, radius), style in zip(ELLIPSES.items(), ("-", "--"), strict=True):
        width, height = 2.0 * radius * np.sqrt(variances)
        axes.add_patch(
            Ellipse((0, 0), width, height, fill=False, color="black", linestyle=style, label=f"{name} of training")
        )
    axes.autoscale_view()
    shares = variances / np.trace(reference.moments.covariance)
    axes.set_xlabel(f"training's component 1 ({shares[0]:.0%} of variance)", fontsize="small")
    axes.set_ylabel(f"component 2 ({shares[1]:.0%})", fontsize="small")
    axes.tick_params(labelsize="x-small")
    axes.legend(fontsize="x-small")


def _draw_shifts(axes: Axes, shifts: np.ndarray) -> None:
    axes.bar(np.arange(len(shifts)), shifts, width=1.0, color="C1")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("latent dimension", fontsize="small")
    axes.set_ylabel("mean shift in training's standard deviations", fontsize="small")
    axes.tick_params(labelsize="x-small")
