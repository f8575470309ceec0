"""Histograms of the doctor's report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from como_jax.doctor.survey import Thresholds

_BINS = 40
_LEAST_MOTION = 1e-5


def length_histogram(lengths: Sequence[int]) -> Figure:
    """Lengths of episodes in steps."""
    figure = Figure(figsize=(5.6, 2.8), layout="constrained")
    axes = figure.subplots()
    low, high = min(lengths), max(lengths)
    # Whole steps, or bars of unequal numbers of lengths would differ for no reason.
    width = max(1, -(-(high - low + 1) // _BINS))
    axes.hist(lengths, np.arange(low, high + width + 1, width) - 0.5, color="C0")
    axes.set(xlabel="steps", ylabel="episodes")
    axes.set_xlim(low - width - 0.5, high + width + 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure


def motion_histogram(motion: np.ndarray, thresholds: Thresholds) -> Figure:
    """Motion of single steps `[N]`, with the two thresholds."""
    figure = Figure(figsize=(5.6, 2.8), layout="constrained")
    axes = figure.subplots()
    high = max(float(motion.max()), thresholds.cut, 2 * _LEAST_MOTION) * 1.2
    bins = np.geomspace(min(_LEAST_MOTION, thresholds.still or _LEAST_MOTION), high, _BINS + 1)
    weights = np.full(len(motion), 1.0 / len(motion))
    axes.hist(np.clip(motion, bins[0], bins[-1]), bins, weights=weights, color="C0")
    axes.set_xscale("log")
    axes.axvline(thresholds.still, color="C1", linestyle="--", label=f"still below {thresholds.still:g}")
    axes.axvline(thresholds.cut, color="C3", linestyle="--", label=f"hard cut above {thresholds.cut:g}")
    axes.set(xlabel="mean absolute change of a step, in [0, 1]", ylabel="share of steps")
    axes.legend(fontsize="small")
    return figure


def range_figure(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> Figure:
    """For every dimension, the range of all values and that of the middle 98 %, `rows` `[N, size]`."""
    size = rows.shape[1]
    figure = Figure(figsize=(max(5.6, 0.18 * size + 1), 2.8), layout="constrained")
    axes = figure.subplots()
    q01, q99 = np.quantile(rows, (0.01, 0.99), axis=0)
    axes.vlines(np.arange(size), low, high, color="C0", linewidth=1, label="all values")
    axes.vlines(np.arange(size), q01, q99, color="C0", linewidth=5, label="1st to 99th percentile")
    axes.scatter(np.arange(size), rows.mean(axis=0), color="C3", s=8, zorder=3, label="mean")
    axes.set(xlabel="dimension", ylabel="value")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
