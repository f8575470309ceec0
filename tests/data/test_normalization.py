"""Actions on a common scale and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from como_jax.data.normalization import KINDS, Normalizer
from como_jax.errors import ConfigError, DatasetError

VALUES = np.random.default_rng(0).normal([0, 5, -3], [1, 0.01, 100], (2000, 3))


def statistics(values: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(values),
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
        "q01": np.quantile(values, 0.01, 0),
        "q99": np.quantile(values, 0.99, 0),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_gives_the_values_back(kind: str) -> None:
    normalizer = Normalizer(kind, statistics(VALUES))
    np.testing.assert_allclose(normalizer.inverse(normalizer(VALUES)), VALUES, rtol=1e-4, atol=1e-4)
    assert normalizer(VALUES).dtype == np.float32 and normalizer.size == 3


def test_each_kind_gives_its_scale() -> None:
    scaled = {kind: Normalizer(kind, statistics(VALUES))(VALUES) for kind in KINDS}
    np.testing.assert_allclose(scaled["none"], VALUES, rtol=1e-6)
    np.testing.assert_allclose(scaled["mean_std"].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled["mean_std"].std(0), 1, atol=1e-4)
    np.testing.assert_allclose([scaled["min_max"].min(0), scaled["min_max"].max(0)], [[-1] * 3, [1] * 3], atol=1e-4)
    np.testing.assert_allclose((np.abs(scaled["quantile"]) > 1).mean(0), 0.02, atol=0.002)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_constant_dimension_becomes_zero_and_comes_back(kind: str) -> None:
    values = VALUES.copy()
    values[:, 1] = 7.0
    normalizer = Normalizer(kind, statistics(values))
    scaled = normalizer(values)
    np.testing.assert_array_equal(scaled[:, 1], 0)
    assert np.isfinite(scaled).all()
    np.testing.assert_allclose(normalizer.inverse(scaled + [0, 9, 0])[:, 1], 7.0)


def test_a_dataset_brings_its_statistics(tabletop_dataset: Path, tmp_path: Path) -> None:
    assert Normalizer.load(tabletop_dataset, "action", "quantile").size == 4
    with pytest.raises(ConfigError, match="'quantil' must be one of none, .*; did you mean quantile?"):
        Normalizer.load(tabletop_dataset, "action", "quantil")
    with pytest.raises(DatasetError, match="statistics.json cannot be read"):
        Normalizer.load(tmp_path, "action", "quantile")
    (tmp_path / "statistics.json").write_text('{"action": null}')
    with pytest.raises(DatasetError, match="has no statistics of any action"):
        Normalizer.load(tmp_path, "action", "quantile")


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_written_down_is_the_same_scale(kind: str) -> None:
    values = VALUES.copy()
    values[:, 1] = 7.0
    normalizer = Normalizer(kind, statistics(values))
    again = Normalizer.from_json(json.loads(json.dumps(normalizer.to_json())))
    np.testing.assert_array_equal(again(values), normalizer(values))
    np.testing.assert_array_equal(again.inverse(values), normalizer.inverse(values))
    assert again.size == 3 and again.to_json() == normalizer.to_json()


@pytest.mark.parametrize("changes", [{"offset": None}, {"scale": [1, 2]}, {"varies": True}])
def test_a_damaged_scale_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="offset, scale and varies must be equally long lists"):
        Normalizer.from_json({**Normalizer("mean_std", statistics(VALUES)).to_json(), **changes})
