"""Loss terms against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cosine
from scipy.special import softmax

from como_jax.motion import losses


@pytest.fixture
def latents() -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32))


def test_temporal_contrast_is_the_cross_entropy_of_three_cosines(latents: list[np.ndarray]) -> None:
    expected = []
    for forward, offset, reverse in zip(*latents, strict=True):
        similarities = [1 - cosine(offset, forward), 1 - cosine(offset, reverse), 1 - cosine(forward, reverse)]
        expected.append(-np.log(softmax(np.array(similarities) / 0.1)[0]))
    np.testing.assert_allclose(losses.temporal_contrastive(*latents, 0.1), np.mean(expected), rtol=1e-5)


def test_temporal_contrast_is_least_where_only_the_reversed_motion_points_elsewhere() -> None:
    z = jnp.ones((1, 4))
    opposite = losses.temporal_contrastive(z, z, -z, 0.1)
    collapsed = losses.temporal_contrastive(z, z, z, 0.1)
    np.testing.assert_allclose(collapsed, np.log(3), rtol=1e-6)
    assert opposite < 1e-6


def test_temporal_contrast_has_finite_gradients_at_zero_vectors() -> None:
    zeros = jnp.zeros((2, 4))
    gradients = jax.grad(losses.temporal_contrastive, argnums=(0, 1, 2))(zeros, zeros, zeros, 0.1)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_cosine_of_a_zero_vector_is_zero(latents: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(losses.cosine_similarity(jnp.zeros((5, 7)), latents[0]), 0.0)


def test_the_mean_squared_error_is_the_mean_squared_difference(latents: list[np.ndarray]) -> None:
    np.testing.assert_allclose(
        losses.mean_squared_error(latents[0], latents[1]), np.mean((latents[0] - latents[1]) ** 2), rtol=1e-6
    )


def test_the_mean_squared_error_refuses_to_broadcast() -> None:
    with pytest.raises(AssertionError):
        losses.mean_squared_error(jnp.zeros((2, 4, 4, 3)), jnp.zeros((4, 4, 3)))
