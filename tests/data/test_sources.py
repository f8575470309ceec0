"""Normalizers are fitted to the training episodes of a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from como_jax.data.sources import EpisodeSource, load_normalizer
from como_jax.errors import ConfigError, DatasetError
from como_jax.spec.normalization import UniformNormalizer


def test_a_dataset_brings_its_statistics(tabletop_dataset: Path, tmp_path: Path) -> None:
    assert load_normalizer(tabletop_dataset, "action", "quantile").size == 4
    with pytest.raises(ConfigError, match="'quantil' must be one of none, .*, uniform; did you mean quantile?"):
        load_normalizer(tabletop_dataset, "action", "quantil")
    with pytest.raises(DatasetError, match="statistics.json cannot be read"):
        load_normalizer(tmp_path, "action", "quantile")
    (tmp_path / "statistics.json").write_text('{"action": null}')
    with pytest.raises(DatasetError, match="has no statistics of any action"):
        load_normalizer(tmp_path, "action", "quantile")


def test_a_uniform_scale_is_of_the_training_episodes(arm: Path, coded_clips: Path) -> None:
    train = EpisodeSource(arm, "train")
    for field in ("action", "state"):
        values = getattr(train, field)
        expected = UniformNormalizer.fit(values)(values)
        np.testing.assert_array_equal(load_normalizer(arm, field, "uniform")(values), expected)
    labelled = EpisodeSource(coded_clips, "train")
    latents = labelled.latent_motion[labelled.latent_valid]
    found = load_normalizer(coded_clips, "latent_motion", "uniform")
    np.testing.assert_array_equal(found(latents), UniformNormalizer.fit(latents)(latents))
    with pytest.raises(DatasetError, match=f"{coded_clips} has no action in the episodes of train"):
        load_normalizer(coded_clips, "action", "uniform")
