"""Actions on a common scale and back."""

import json
from typing import Any

import numpy as np
import pytest

from como_jax.errors import ConfigError
from como_jax.spec.normalization import (
    KINDS,
    NUM_BINS,
    AffineNormalizer,
    Normalizer,
    UniformNormalizer,
    describe_values,
    far_dimensions,
    lost_dimensions,
    normalizer_from_json,
)

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


def make(kind: str, values: np.ndarray) -> Normalizer:
    return UniformNormalizer.fit(values) if kind == "uniform" else AffineNormalizer.fit(kind, statistics(values))


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_gives_the_values_back(kind: str) -> None:
    normalizer = make(kind, VALUES)
    np.testing.assert_allclose(normalizer.inverse(normalizer(VALUES)), VALUES, rtol=1e-4, atol=1e-4)
    assert normalizer(VALUES).dtype == np.float32 and normalizer.size == 3


def test_each_kind_gives_its_scale() -> None:
    scaled = {kind: make(kind, VALUES)(VALUES) for kind in KINDS}
    np.testing.assert_allclose(scaled["none"], VALUES, rtol=1e-6)
    np.testing.assert_allclose(scaled["mean_std"].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled["mean_std"].std(0), 1, atol=1e-4)
    np.testing.assert_allclose([scaled["min_max"].min(0), scaled["min_max"].max(0)], [[-1] * 3, [1] * 3], atol=1e-4)
    np.testing.assert_allclose((np.abs(scaled["quantile"]) > 1).mean(0), 0.02, atol=0.002)
    ranks = VALUES.argsort(0).argsort(0) / (len(VALUES) - 1)
    np.testing.assert_allclose(scaled["uniform"], 2 * ranks - 1, atol=2 / NUM_BINS)


def test_what_a_scale_takes_away_is_known() -> None:
    values = VALUES.copy()
    # One dimension that moves in one step of a hundred and fifty, and one that hardly moves but for one step.
    values[:, 1], values[:, 2] = 0.0, 1e-3 * VALUES[:, 0]
    values[::150, 1], values[7, 2] = 0.3, 5.0
    low, high = values.min(0), values.max(0)
    assert lost_dimensions(make("quantile", values), low, high) == [1]
    assert far_dimensions(make("quantile", values), low, high) == [2]
    for kind in ("min_max", "mean_std", "uniform"):
        assert lost_dimensions(make(kind, values), low, high) == [], kind
    assert far_dimensions(make("min_max", values), low, high) == []
    # A dimension that never moves is not lost.
    assert lost_dimensions(make("quantile", 0 * values), 0 * low, 0 * high) == []


def test_values_are_described_as_statistics_are() -> None:
    described = describe_values(VALUES)
    for name, expected in statistics(VALUES).items():
        if name != "count":
            np.testing.assert_allclose(described[name], expected)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_constant_dimension_becomes_zero_and_comes_back(kind: str) -> None:
    values = VALUES.copy()
    values[:, 1] = 7.0
    normalizer = make(kind, values)
    scaled = normalizer(values)
    np.testing.assert_array_equal(scaled[:, 1], 0)
    assert np.isfinite(scaled).all()
    np.testing.assert_allclose(normalizer.inverse(scaled + [0, 9, 0])[:, 1], 7.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_written_down_is_the_same_scale(kind: str) -> None:
    values = VALUES.copy()
    values[:, 1] = 7.0
    normalizer = make(kind, values)
    again = normalizer_from_json(json.loads(json.dumps(normalizer.to_json())))
    np.testing.assert_array_equal(again(values), normalizer(values))
    np.testing.assert_array_equal(again.inverse(values), normalizer.inverse(values))
    assert again.size == 3 and again.to_json() == normalizer.to_json()


@pytest.mark.parametrize("changes", [{"offset": None}, {"scale": [1, 2]}, {"varies": True}])
def test_a_damaged_scale_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="offset, scale and varies must be equally long lists"):
        normalizer_from_json({**AffineNormalizer.fit("mean_std", statistics(VALUES)).to_json(), **changes})


def test_equal_bins_of_a_uniform_scale_are_quantile_bins() -> None:
    values = VALUES.astype(np.float32)
    edges = np.stack([np.quantile(column.astype(np.float64), np.arange(257) / 256) for column in values.T], axis=-1)
    normalizer = UniformNormalizer.fit(values)
    bins = np.clip(np.floor((normalizer(values) + 1) / 2 * 256), 0, 255).astype(int)
    for dimension in range(3):
        inner = edges[1:-1, dimension]
        np.testing.assert_array_equal(bins[:, dimension], np.searchsorted(inner, values[:, dimension], "right"))
        np.testing.assert_allclose(np.bincount(bins[:, dimension]), len(values) / 256, atol=1.5)
    middles = np.repeat(((np.arange(256) + 0.5) / 128 - 1)[:, None], 3, axis=1).astype(np.float32)
    np.testing.assert_allclose(normalizer.inverse(middles), (edges[1:] + edges[:-1]) / 2, rtol=1e-6)
    ends = normalizer.inverse(np.float32([[-1] * 3, [1] * 3, [-2] * 3, [2] * 3]))
    np.testing.assert_allclose(ends, edges[[0, -1, 0, -1]], rtol=1e-6)


def test_values_that_are_frequent_go_to_the_middle_of_their_share_and_come_back_exactly() -> None:
    rng = np.random.default_rng(1)
    gripper = np.where(np.arange(1000) < 300, 0.0, 0.085)
    still = np.where(np.arange(1000) < 500, 0.0, rng.normal(size=1000) / 3)
    values = rng.permutation(np.stack([gripper, still], axis=1)).astype(np.float32)
    normalizer = UniformNormalizer.fit(values)
    scaled = normalizer(values)
    is_open = values[:, 0] == 0
    assert np.unique(scaled[:, 0]).size == 2
    np.testing.assert_allclose(scaled[is_open, 0], 0.3 - 1, atol=2 / NUM_BINS)
    np.testing.assert_allclose(scaled[~is_open, 0], 0.3, atol=2 / NUM_BINS)
    np.testing.assert_array_equal(normalizer.inverse(scaled)[:, 0], values[:, 0])
    # As many are below 0 as above it.
    zero = values[:, 1] == 0
    below = np.mean(values[:, 1] < 0)
    np.testing.assert_allclose(scaled[zero, 1], 2 * (below + 0.25) - 1, atol=2 / NUM_BINS)
    np.testing.assert_array_equal(normalizer.inverse(scaled)[zero, 1], 0)
    # The middle of the bin that the value is in has it too.
    middle = (np.floor((scaled + 1) / 2 * NUM_BINS) + 0.5) / NUM_BINS * 2 - 1
    np.testing.assert_array_equal(normalizer.inverse(middle)[zero, 1], 0)
    np.testing.assert_array_equal(normalizer.inverse(middle)[:, 0], values[:, 0])


def test_values_beyond_those_of_training_go_to_the_ends() -> None:
    # The largest value is frequent, and what is larger is not taken for it.
    normalizer = UniformNormalizer.fit(np.array([[0.0], [0.5], [1.0], [1.0], [1.0]]))
    assert normalizer(np.array([-0.1, 1.1])[:, None]).ravel().tolist() == [-1, 1]
    assert 0 < normalizer(np.array([1.0])) < 1
    assert np.isnan(normalizer(np.array([np.nan]))) and np.isnan(normalizer.inverse(np.array([np.nan])))


@pytest.mark.parametrize("edges", [None, [], [[0.0]], [[0.0] * 257, [0.0]], [[1.0] + [0.0] * 256], [["a"] * 257]])
def test_a_damaged_uniform_scale_is_refused(edges: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        normalizer_from_json({"edges": edges})


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'uniform' must be one of none, mean_std, quantile, min_max"):
        AffineNormalizer.fit("uniform", {})
    with pytest.raises(ConfigError, match="did you mean min_max"):
        AffineNormalizer.fit("min_ma", {})
