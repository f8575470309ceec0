"""Figures of a report: what latents look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MAX_LABEL = 42


def action_figure(coordinates: np.ndarray, shares: np.ndarray, action: np.ndarray, titles: Sequence[str]) -> Figure:
    """Latents on their principal components, in one panel per shown dimension of the action, which gives the colours.

    Args:
      coordinates: `[N, 2]`.
      shares: `[2]`, share of the variance along each component.
      action: `[N, K]`, the shown dimensions.
      titles: of the K panels.
    """
    figure = Figure(figsize=(3.6 * len(titles), 3.2), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, values, title in zip(panels, action.T, titles, strict=True):
        # Without these limits rare extremes would leave all other points in one colour.
        low, high = np.percentile(values, (2, 98))
        points = axes.scatter(*coordinates.T, c=values, s=6, cmap="viridis", vmin=low, vmax=high, linewidths=0)
        figure.colorbar(points, ax=axes, shrink=0.85)
        axes.set_title(title, fontsize="medium")
        _label_components(axes, shares)
    return figure


def dataset_figure(coordinates: np.ndarray, shares: np.ndarray, dataset: np.ndarray, names: Sequence[str]) -> Figure:
    """Latents of all datasets on their common principal components; `dataset` `[N]` has positions in `names`."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    # In random order, so that no dataset hides another.
    order = np.random.default_rng(0).permutation(len(dataset))
    colors = [f"C{number % 10}" for number in range(len(names))]
    axes.scatter(*coordinates[order].T, c=[colors[number] for number in dataset[order]], s=6, linewidths=0)
    for name, color in zip(names, colors, strict=True):
        axes.scatter([], [], color=color, s=24, label=name)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _label_components(axes, shares)
    return figure


def similarity_figure(matrix: np.ndarray, labels: Sequence[str], groups: Sequence[str]) -> Figure:
    """Cosine similarities `[E, E]` between episodes; lines separate the groups, whose episodes are neighbours."""
    side = max(4.0, 0.125 * len(labels) + 1.0)
    figure = Figure(figsize=(side + 3.0, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=-1.0, vmax=1.0, cmap="RdBu_r", interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.7, label="cosine")
    axes.set_yticks(range(len(labels)), [_shorten(label) for label in labels], fontsize=6)
    axes.set_xticks([])
    for row in np.flatnonzero([before != after for before, after in zip(groups[:-1], groups[1:], strict=True)]):
        axes.axhline(row + 0.5, color="black", linewidth=0.8)
        axes.axvline(row + 0.5, color="black", linewidth=0.8)
    return figure


def similarity_histogram(similarities: Mapping[str, np.ndarray]) -> Figure:
    """Distribution of the past-to-future cosines `[N]` of every dataset, with its mean, which is S-PCFC."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    low = min(0.0, *(float(values.min()) for values in similarities.values()))
    bins = np.linspace(np.floor(10 * low) / 10, 1.0, 41)
    for number, (name, values) in enumerate(similarities.items()):
        color, mean = f"C{number % 10}", float(values.mean())
        weights = np.full(len(values), 1.0 / len(values))
        axes.hist(np.clip(values, bins[0], 1.0), bins, weights=weights, histtype="stepfilled", color=color, alpha=0.35)
        axes.axvline(mean, color=color, linestyle="--", label=f"{name}: mean {mean:.3f}")
    axes.set(xlabel="cosine of past-to-current and future-to-current", ylabel="share of clips")
    axes.legend(fontsize="small", loc="upper left")
    return figure


def _label_components(axes: Axes, shares: np.ndarray) -> None:
    axes.set_xlabel(f"component 1 ({shares[0]:.0%} of variance)", fontsize="small")
    axes.set_ylabel(f"component 2 ({shares[1]:.0%})", fontsize="small")
    axes.tick_params(labelsize="x-small")


def _shorten(text: str) -> str:
    # A dollar sign would start a formula.
    text = text.replace("$", r"\$")
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"
