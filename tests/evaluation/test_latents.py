"""Rank, principal components and cosines of latents."""

import numpy as np
import pytest
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from como_jax.evaluation.latents.spread import cosine_similarity_matrix, effective_rank, principal_components


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values(rng):
    latent = rng.normal(size=(50, 6)) * np.logspace(0, -3, 6) + 4.0
    values = np.sqrt(np.linalg.eigvalsh(np.cov(latent.T)))
    assert effective_rank(latent) == pytest.approx(np.exp(stats.entropy(values / values.sum())))


def test_effective_rank_counts_directions_of_equal_spread(rng):
    directions, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    for rank in (1, 3, 8):
        corners = np.concatenate([directions[:rank], -directions[:rank]]) + 10.0
        assert effective_rank(corners) == pytest.approx(rank, rel=1e-6)
        assert effective_rank(np.tile(corners, (3, 1))) == pytest.approx(rank, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_latents_that_are_all_equal_have_rank_zero_and_no_components(rng, dtype):
    latent = np.tile(rng.normal(size=5), (37, 1)).astype(dtype)
    assert effective_rank(latent) == 0.0
    coordinates, shares = principal_components(latent)
    np.testing.assert_array_equal(coordinates, np.zeros((37, 2)))
    np.testing.assert_array_equal(shares, [0.0, 0.0])


def test_principal_components_equal_those_of_scikit_learn(rng):
    latent = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 3.0
    coordinates, shares = principal_components(latent, 3)
    pca = PCA(3).fit(latent)
    expected = pca.transform(latent)
    np.testing.assert_allclose(np.abs(coordinates), np.abs(expected), atol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(coordinates * expected, 0)), np.sum(expected**2, 0))
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_)


def test_signs_of_components_do_not_depend_on_the_order_of_the_latents(rng):
    latent, order = rng.normal(size=(40, 5)), rng.permutation(40)
    np.testing.assert_allclose(principal_components(latent[order])[0], principal_components(latent)[0][order])


def test_components_that_the_data_does_not_have_are_zero(rng):
    coordinates, shares = principal_components(rng.normal(size=(10, 1)), 3)
    assert coordinates.shape == (10, 3) and np.ptp(coordinates[:, 0]) > 0
    np.testing.assert_array_equal(coordinates[:, 1:], 0.0)
    np.testing.assert_array_equal(shares, [1.0, 0.0, 0.0])


def test_cosines_of_all_pairs_equal_those_of_scikit_learn(rng):
    latent = rng.normal(size=(7, 4))
    latent[2] = 0.0
    np.testing.assert_allclose(cosine_similarity_matrix(latent), cosine_similarity(latent), atol=1e-12)
