"""S-PCFC."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import paired_cosine_distances

from como_jax.evaluation.similarity import past_future_similarity


def test_similarity_is_the_mean_cosine_of_paired_latents() -> None:
    past, future = np.random.default_rng(0).normal(size=(2, 9, 5))
    expected = np.mean(1 - paired_cosine_distances(past, future))
    assert past_future_similarity(past, future) == pytest.approx(expected)


def test_a_static_latent_scores_one_and_a_reversing_one_minus_one() -> None:
    latent = np.random.default_rng(0).normal(size=(4, 5))
    assert past_future_similarity(latent, 3 * latent) == pytest.approx(1.0)
    assert past_future_similarity(latent, -latent) == pytest.approx(-1.0)


def test_a_zero_latent_counts_as_dissimilar() -> None:
    assert past_future_similarity(np.zeros((2, 3)), np.ones((2, 3))) == 0.0
