"""S-PCFC."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import paired_cosine_distances

from como_jax.evaluation.latents.similarity import (
    past_future_similarities,
    past_future_similarity,
    past_future_similarity_by_token,
)


@pytest.fixture
def latents() -> np.ndarray:
    """Past and future latents `[2, N, Q, L]`, whose tokens have unlike norms."""
    return np.random.default_rng(0).normal(0.3, 1.0, size=(2, 9, 4, 5)) * np.array([0.1, 1.0, 5.0, 30.0])[:, None]


def test_similarity_is_the_cosine_of_paired_latents_as_one_vector(latents):
    past, future = latents
    expected = 1 - paired_cosine_distances(past.reshape(9, 20), future.reshape(9, 20))
    np.testing.assert_allclose(past_future_similarities(past, future), expected)
    np.testing.assert_allclose(past_future_similarities(past.reshape(9, 20), future.reshape(9, 20)), expected)
    assert past_future_similarity(past, future) == pytest.approx(expected.mean())


def test_by_token_every_token_counts_the_same(latents):
    past, future = latents
    expected = np.mean(1 - paired_cosine_distances(past.reshape(36, 5), future.reshape(36, 5)))
    assert past_future_similarity_by_token(past, future) == pytest.approx(expected)
    assert expected != pytest.approx(past_future_similarity(past, future), abs=0.01)
    scaled = future * np.array([3.0, 0.2, 1.0, 7.0])[:, None]
    assert past_future_similarity_by_token(past, scaled) == pytest.approx(expected)


def test_by_token_needs_tokens(latents):
    with pytest.raises(AssertionError):
        past_future_similarity_by_token(*latents.reshape(2, 9, 20))


@pytest.mark.parametrize("similarity", [past_future_similarity, past_future_similarity_by_token])
def test_a_static_latent_scores_one_and_a_reversing_one_minus_one(latents, similarity):
    latent = latents[0]
    assert similarity(latent, 3 * latent) == pytest.approx(1.0)
    assert similarity(latent, -latent) == pytest.approx(-1.0)


@pytest.mark.parametrize("similarity", [past_future_similarity, past_future_similarity_by_token])
def test_a_zero_latent_counts_as_dissimilar(similarity):
    assert similarity(np.zeros((2, 3, 2)), np.ones((2, 3, 2))) == 0.0
