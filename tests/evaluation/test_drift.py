"""Statistics of latents, and what they say of data that training did not have."""

import json

import numpy as np
import pytest
from scipy import linalg
from sklearn.covariance import OAS

from como_jax.evaluation.latents import statistics as latent_statistics
from como_jax.evaluation.latents.drift import FAR, LIKE, SHIFTED, UNKNOWN, compare, components, drift_figure
from como_jax.evaluation.latents.measures import effective_rank, principal_components
from como_jax.evaluation.latents.statistics import DriftError, LatentStatistics, LatentSums

SIZE = 6
MIX = np.random.default_rng(7).normal(size=(SIZE, SIZE))
AXES = np.linalg.eigh(MIX.T @ MIX)[1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def training(rng) -> np.ndarray:
    return (rng.normal(size=(6000, SIZE)) @ MIX + 2.0).astype(np.float32)


@pytest.fixture
def new(rng) -> np.ndarray:
    return (rng.normal(size=(2000, SIZE)) @ MIX + 2.0).astype(np.float32)


def test_moments_are_those_of_numpy(training):
    statistics = LatentStatistics.measure(training, 0.8)
    double = training.astype(np.float64)
    np.testing.assert_allclose(statistics.moments.mean, double.mean(0))
    np.testing.assert_allclose(statistics.moments.covariance, np.cov(double.T, bias=True))
    np.testing.assert_allclose(statistics.std, double.std(0))
    np.testing.assert_array_equal(statistics.maximum, training.max(0))
    np.testing.assert_allclose(statistics.low, np.quantile(double, 0.001, axis=0))
    assert statistics.effective_rank == pytest.approx(effective_rank(double))


def test_shards_in_any_number_and_order_give_the_same_statistics(training, rng, monkeypatch):
    monkeypatch.setattr(latent_statistics, "MAX_SAMPLE", 500)
    records, shuffled = np.arange(len(training)), rng.permutation(len(training))
    whole = LatentSums.of(training)
    for count in (2, 9):
        shards = [LatentSums.of(training[part], records[part]) for part in np.array_split(shuffled, count)]
        combined = LatentSums.combine(shards[::-1])
        np.testing.assert_array_equal(combined.sample, whole.sample)
        first, second = LatentStatistics.measure(whole), LatentStatistics.measure(combined)
        np.testing.assert_allclose(second.moments.covariance, first.moments.covariance, rtol=1e-10)
        np.testing.assert_allclose(second.mean_error, first.mean_error, rtol=1e-6)
        assert second.distance == pytest.approx(first.distance, rel=1e-9)
        assert LatentSums.combine(shards).moments.scatter.tobytes() == combined.moments.scatter.tobytes()


def test_the_sample_is_bounded_and_fair(monkeypatch):
    monkeypatch.setattr(latent_statistics, "MAX_SAMPLE", 1000)
    sums = LatentSums.of(np.arange(20000.0)[:, None])
    assert len(sums.sample) == 1000 and abs(sums.sample.mean() - 10000.0) < 4 * 20000 / np.sqrt(12 * 1000)


def test_shrunk_covariance_and_distances_are_those_of_scikit_learn(rng):
    for count in (4, 300):
        latents = rng.normal(size=(count, SIZE)) @ MIX
        oas, moments = OAS().fit(latents), LatentStatistics.measure(latents).moments
        assert moments.shrinkage == pytest.approx(oas.shrinkage_)
        np.testing.assert_allclose(moments.shrunk_covariance, oas.covariance_, atol=1e-10)
        np.testing.assert_allclose(np.square(moments.distances(latents)), oas.mahalanobis(latents), rtol=1e-8)


def test_frechet_distance_is_that_of_the_matrix_square_root(training, rng):
    other = rng.normal(size=(900, SIZE)) @ rng.normal(size=(SIZE, SIZE))
    drift = compare(LatentStatistics.measure(training), other)
    a, b = (np.cov(latents.astype(np.float64).T, bias=True) for latents in (training, other))
    part = np.trace(a + b - 2.0 * linalg.sqrtm(a @ b).real)
    whole = part + np.sum(np.square(training.mean(0, np.float64) - other.mean(0)))
    assert drift.covariance_distance == pytest.approx(part / np.trace(a))
    assert drift.frechet_distance == pytest.approx(whole / np.trace(a))


def test_data_is_like_itself(training, new):
    drift = compare(LatentStatistics.measure(training, 0.8), new, 0.85)
    assert drift.verdict == LIKE
    assert drift.share_outside == pytest.approx(0.01, abs=0.008)
    assert drift.share_outside_range == pytest.approx(0.002, abs=0.002)
    assert (drift.training_s_pcfc, drift.s_pcfc) == (0.8, 0.85)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda z: z + 0.5 * z.std(0), SHIFTED),
        (lambda z: z + 2.0 * z.std(0), FAR),
        (lambda z: (z - 2.0) * 1.5 + 2.0, SHIFTED),
        (lambda z: (z - 2.0) * 2.0 + 2.0, FAR),
        (lambda z: z * 0.0 + 2.0 + 1e-3 * np.sin(np.arange(z.size)).reshape(z.shape), FAR),
        (lambda z: (z - 2.0) @ AXES @ AXES[:, ::-1].T + 2.0, FAR),
    ],
)
def test_verdict_follows_the_change(training, new, change, verdict):
    drift = compare(LatentStatistics.measure(training), change(new))
    assert drift.verdict == verdict and drift.advice


def test_a_rise_of_s_pcfc_is_a_shift(training, new):
    reference = LatentStatistics.measure(training, 0.6)
    assert compare(reference, new, 0.7).verdict == LIKE
    assert compare(reference, new, 0.9).verdict == SHIFTED
    assert compare(reference, new, 0.3).verdict == LIKE


def test_episodes_that_are_few_but_long_expect_more_chance(rng):
    def episodes(count: int) -> LatentSums:
        latents = rng.normal(size=(count, 1, SIZE)) + 0.3 * rng.normal(size=(count, 100, SIZE))
        return LatentSums.of(latents.reshape(-1, SIZE), episodes=np.repeat(np.arange(count), 100))

    reference = LatentStatistics.measure(episodes(400))
    assert compare(reference, episodes(200)).verdict == LIKE
    few = compare(reference, episodes(10))
    assert few.expected_mean_shift > 0.25 and few.verdict == UNKNOWN
    assert compare(reference, episodes(4)).expected_mean_shift is None


def test_one_latent_and_fewer_than_dimensions_are_compared_but_not_judged(training, new):
    reference = LatentStatistics.measure(training)
    for count in (1, 4):
        drift = compare(reference, new[:count])
        assert drift.verdict == UNKNOWN and np.isfinite(drift.frechet_distance)
        assert "too few" in drift.advice


def test_fewer_training_latents_than_dimensions_give_held_out_distances(rng):
    reference = LatentStatistics.measure(LatentSums.of(rng.normal(size=(200, 300)), episodes=np.arange(200)))
    assert compare(reference, rng.normal(size=(1000, 300))).share_outside < 0.1


def test_one_dimension(rng):
    reference = LatentStatistics.measure(rng.normal(size=(4000, 1)))
    assert reference.distance == pytest.approx(2.576, abs=0.15) and reference.effective_rank == pytest.approx(1.0)
    assert compare(reference, rng.normal(size=(2000, 1))).verdict == LIKE
    assert compare(reference, rng.normal(size=(2000, 1)) + 3.0).verdict == FAR


def test_dead_dimensions_decide_nothing(training, new, rng):
    dead = [np.concatenate([z, np.full((len(z), 2), 0.1, np.float32)], 1) for z in (training, new)]
    drift = compare(LatentStatistics.measure(dead[0]), dead[1] + 1e-8 * rng.normal(size=dead[1].shape))
    assert drift.verdict == LIKE and drift.share_outside_range < 0.004


def test_constant_training_latents_are_refused_and_constant_new_ones_are_not(training):
    constant = np.full((2000, SIZE), 0.1, np.float32)
    reference = LatentStatistics.measure(constant)
    assert reference.effective_rank == 0.0 and not reference.moments.scatter.any()
    with pytest.raises(DriftError, match="all its latents are equal"):
        compare(reference, training)
    with pytest.raises(DriftError, match="too few episodes"):
        compare(LatentStatistics.measure(training[:100]), training)
    drift = compare(LatentStatistics.measure(training), constant)
    assert drift.effective_rank == 0.0 and drift.covariance_distance == pytest.approx(1.0)


def test_what_cannot_be_measured_is_said(training):
    broken = training[:10].copy()
    broken[3, 1] = np.nan
    with pytest.raises(DriftError, match="1 of 10 latents are NaN or infinite, the first of record 103"):
        LatentSums.of(broken, np.arange(100, 110))
    with pytest.raises(DriftError, match="non-empty"):
        LatentSums.of(training[:0])
    with pytest.raises(DriftError, match="records must be 10 integers"):
        LatentSums.of(training[:10], np.arange(9))
    with pytest.raises(DriftError, match="same records"):
        LatentSums.combine([LatentSums.of(training), LatentSums.of(training)])
    with pytest.raises(DriftError, match="there must be shards"):
        LatentSums.combine([])
    with pytest.raises(DriftError, match="mean cosine"):
        LatentStatistics.measure(training, float("nan"))
    with pytest.raises(DriftError, match="the new latents have size 2, those of training 6"):
        compare(LatentStatistics.measure(training), training[:, :2])


@pytest.mark.parametrize("count", [1, 3000])
def test_json_keeps_everything(training, new, count):
    statistics = LatentStatistics.measure(training[:count], 0.5)
    text = statistics.to_json()
    restored = LatentStatistics.from_json(text)
    assert restored.to_json() == text
    if count > 1:
        assert compare(restored, new) == compare(statistics, new)


def test_json_of_something_else_is_refused(training):
    fields = json.loads(LatentStatistics.measure(training).to_json())
    for change, message in (
        ({"low": fields["low"][:2]}, "shape"),
        ({"distance": float("nan")}, "NaN is not JSON"),
        ({"count": 0}, "count of 0"),
        ({"mean": 3}, "measure them again"),
    ):
        with pytest.raises(DriftError, match=message):
            LatentStatistics.from_json(json.dumps(fields | change))
    del fields["distance"]
    with pytest.raises(DriftError, match="has no 'distance'"):
        LatentStatistics.from_json(json.dumps(fields))
    with pytest.raises(DriftError, match="not a file of latent statistics"):
        LatentStatistics.from_json("[]")


def test_figure_shows_new_latents_on_the_components_of_training(training, new):
    reference = LatentStatistics.measure(training)
    axes, variances = components(reference)
    coordinates, shares = principal_components(training)
    np.testing.assert_allclose((training - reference.moments.mean) @ axes, coordinates, atol=1e-6)
    np.testing.assert_allclose(variances / np.trace(reference.moments.covariance), shares)
    figure = drift_figure(reference, new + np.eye(SIZE, dtype=np.float32)[2] * reference.std[2], training=training)
    cloud, bars = figure.axes
    assert len(cloud.collections) == 2 and len(cloud.collections[1].get_offsets()) == 2000
    assert [round(bar.get_height()) for bar in bars.patches] == [0, 0, 1, 0, 0, 0]
    figure.canvas.draw()


def test_figure_of_one_dimension_can_be_drawn(rng):
    drift_figure(LatentStatistics.measure(rng.normal(size=(2000, 1))), rng.normal(size=(50, 1))).canvas.draw()
