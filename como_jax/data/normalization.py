"""Normalisation of a dataset's actions, states and latents, from what its conversion or its episodes hold."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError
from como_jax.spec.normalization import AffineNormalizer, Normalizer, UniformNormalizer, check_kind


def load_normalizer(directory: epath.PathLike, field: str, kind: str) -> Normalizer:
    """The normalizer of a dataset's `action`, `state` or `latent_motion`, fitted to its training episodes.

    Raises:
      DatasetError: the dataset does not have the field.
      ConfigError: an unknown kind.
    """
    check_kind(kind)
    if kind == "uniform":
        return UniformNormalizer.fit(_training_values(directory, field))
    statistics = _read_statistics(epath.Path(directory)).get(field)
    if statistics is None:
        raise DatasetError(f"{directory}/statistics.json has no statistics of any {field}.")
    return AffineNormalizer.fit(kind, statistics)


def _training_values(directory: epath.PathLike, field: str) -> np.ndarray:
    """The values `[n, size]` of all steps of training episodes that have the field."""
    source = EpisodeSource(directory, "train")
    values = getattr(source, field)
    if field == "latent_motion" and values is not None:
        values = values[source.latent_valid]
    if values is None or not len(values):
        raise DatasetError(f"{directory} has no {field} in its training episodes, which normalization=uniform needs.")
    return values


def _read_statistics(directory: epath.Path) -> dict[str, Any]:
    path = directory / "statistics.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read; convert the dataset again: {error}") from error
