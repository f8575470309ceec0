"""The linear probe against scikit-learn, and what its numbers mean."""

import numpy as np
import pytest
from sklearn import linear_model, preprocessing

from como_jax.evaluation.probes import Ridge, linear_probe


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("strength", [1e-4, 1.0, 100.0])
def test_ridge_equals_that_of_scikit_learn_on_standardised_inputs(rng: np.random.Generator, strength: float) -> None:
    inputs, targets, test = rng.normal(3, 5, (40, 6)), rng.normal(2, 1, (40, 2)), rng.normal(3, 5, (7, 6))
    scaler = preprocessing.StandardScaler().fit(inputs)
    reference = linear_model.Ridge(strength).fit(scaler.transform(inputs), targets)
    np.testing.assert_allclose(
        Ridge(inputs, targets, strength)(test), reference.predict(scaler.transform(test)), rtol=1e-8
    )


def test_ridge_ignores_an_input_that_never_changes(rng: np.random.Generator) -> None:
    inputs, targets = rng.normal(size=(20, 2)), rng.normal(size=(20, 1))
    constant = np.concatenate([inputs, np.full((20, 1), 7.0)], axis=1)
    np.testing.assert_allclose(Ridge(constant, targets, 1.0)(constant), Ridge(inputs, targets, 1.0)(inputs))


def test_a_latent_that_is_a_linear_map_of_the_action_is_read_out_exactly(rng: np.random.Generator) -> None:
    action, episode = rng.normal(1, 2, (100, 3)), np.repeat(np.arange(10), 10)
    test_action = rng.normal(1, 2, (30, 3))
    mixing = rng.normal(size=(3, 8))
    result = linear_probe(action @ mixing + 5, action, episode, test_action @ mixing + 5, test_action)
    assert result.lp_mse < 1e-6
    expected = np.mean((test_action - action.mean(axis=0)) ** 2, axis=0)
    np.testing.assert_allclose(result.per_dimension_mean_action, expected)
    assert result.lp_mse_mean_action == pytest.approx(expected.mean())


def test_the_error_is_given_for_every_dimension_of_the_action(rng: np.random.Generator) -> None:
    action, test_action = rng.normal(size=(100, 2)), rng.normal(size=(50, 2))
    result = linear_probe(action[:, :1], action, np.repeat(np.arange(10), 10), test_action[:, :1], test_action)
    assert result.per_dimension[0] < 1e-6
    assert result.per_dimension[1] > 0.5
    assert result.lp_mse == pytest.approx(result.per_dimension.mean())


def test_a_latent_of_noise_is_regularised_to_about_the_mean_action(rng: np.random.Generator) -> None:
    action, test_action = rng.normal(size=(100, 2)), rng.normal(size=(100, 2))
    latent, test_latent = rng.normal(size=(100, 60)), rng.normal(size=(100, 60))
    result = linear_probe(latent, action, np.repeat(np.arange(10), 10), test_latent, test_action)
    assert result.lp_mse < 1.1 * result.lp_mse_mean_action


@pytest.mark.parametrize(("episode", "num_test"), [(np.zeros(4), 2), (np.arange(4), 0)])
def test_too_little_to_fit_or_test_is_refused(episode: np.ndarray, num_test: int) -> None:
    with pytest.raises(ValueError, match="needs two episodes to fit and one transition to test"):
        linear_probe(np.ones((4, 3)), np.ones((4, 2)), episode, np.ones((num_test, 3)), np.ones((num_test, 2)))
