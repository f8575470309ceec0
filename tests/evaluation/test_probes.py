"""The linear probes against scikit-learn, and what their numbers mean."""

import dataclasses

import jax
import numpy as np
import pytest
from sklearn import linear_model, metrics, preprocessing

from como_jax.evaluation.latents import probes
from como_jax.evaluation.latents.probes import ProbeError, linear_probe, linear_probe_accuracy
from como_jax.training import sharding

EPISODE = np.repeat(np.arange(10), 10)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def linear_data(rng: np.random.Generator, count: int, noise: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[count, 6]` of unlike scales, and actions `[count, 2]` that depend on them."""
    mixing = np.random.default_rng(1).normal(size=(6, 2))
    latent = rng.normal(size=(count, 6))
    return latent * np.logspace(-2, 2, 6) + 30.0, latent @ mixing + noise * rng.normal(size=(count, 2)) + 2.0


def choice_data(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[count, 4]`, and labels of three classes that overlap."""
    label = rng.integers(0, 3, count)
    return np.random.default_rng(2).normal(size=(3, 4))[label] * 1.5 + rng.normal(size=(count, 4)) + 5.0, label


@pytest.mark.parametrize("strength", [1e-4, 1.0, 100.0])
def test_errors_and_r2_equal_those_of_scikit_learn(rng, monkeypatch, strength: float):
    (latent, action), (test_latent, test_action) = linear_data(rng, 100), linear_data(rng, 40)
    monkeypatch.setattr(probes, "STRENGTHS", (strength,))
    result = linear_probe(latent, action, EPISODE, test_latent, test_action)
    scaler = preprocessing.StandardScaler().fit(latent)
    guess = linear_model.Ridge(strength).fit(scaler.transform(latent), action).predict(scaler.transform(test_latent))
    np.testing.assert_allclose(result.per_dimension, np.mean((guess - test_action) ** 2, axis=0), rtol=1e-4)
    each = metrics.r2_score(test_action, guess, multioutput="raw_values")
    np.testing.assert_allclose(result.per_dimension_r2, each, rtol=1e-4)
    assert result.r2 == pytest.approx(metrics.r2_score(test_action, guess), rel=1e-4)
    assert result.strength == strength


def test_the_strength_is_the_best_on_every_fifth_episode(rng):
    chosen = set()
    for noise in (0.1, 3.0, 30.0):
        latent, action = linear_data(rng, 100, noise)
        held_out, errors = EPISODE % 5 == 0, {}
        scaler = preprocessing.StandardScaler().fit(latent[~held_out])
        for strength in probes.STRENGTHS:
            probe = linear_model.Ridge(strength).fit(scaler.transform(latent[~held_out]), action[~held_out])
            errors[strength] = np.mean((probe.predict(scaler.transform(latent[held_out])) - action[held_out]) ** 2)
        chosen.add(linear_probe(latent, action, EPISODE, latent, action).strength)
        assert linear_probe(latent, action, EPISODE, latent, action).strength == min(errors, key=errors.get)
    assert len(chosen) > 1


def test_a_latent_that_is_a_linear_map_of_the_action_is_read_out_exactly(rng):
    action, test_action, mixing = rng.normal(1, 2, (100, 3)), rng.normal(1, 2, (30, 3)), rng.normal(size=(3, 8))
    result = linear_probe(action @ mixing + 5, action, EPISODE, test_action @ mixing + 5, test_action)
    assert result.lp_mse < 1e-6 and result.r2 == pytest.approx(1.0, abs=1e-6)
    expected = np.mean((test_action - action.mean(axis=0)) ** 2, axis=0)
    np.testing.assert_allclose(result.per_dimension_mean_action, expected, rtol=1e-5)
    assert result.lp_mse_mean_action == pytest.approx(expected.mean(), rel=1e-5)


def test_the_error_is_given_for_every_dimension_of_the_action(rng):
    action, test_action = rng.normal(size=(100, 2)), rng.normal(size=(50, 2))
    result = linear_probe(action[:, :1], action, EPISODE, test_action[:, :1], test_action)
    assert result.per_dimension[0] < 1e-6 and result.per_dimension_r2[0] > 0.999
    assert result.per_dimension[1] > 0.5 and result.per_dimension_r2[1] < 0.1
    assert result.lp_mse == pytest.approx(result.per_dimension.mean())


def test_a_latent_of_noise_is_regularised_to_about_the_mean_action(rng):
    action, test_action = rng.normal(size=(100, 2)), rng.normal(size=(100, 2))
    latent, test_latent = rng.normal(size=(100, 60)), rng.normal(size=(100, 60))
    result = linear_probe(latent, action, EPISODE, test_latent, test_action)
    assert result.lp_mse < 1.1 * result.lp_mse_mean_action


@pytest.mark.parametrize("value", [0.0, 7.3, 1e-8])
def test_a_latent_dimension_that_is_constant_while_fitting_counts_for_nothing(rng, value: float):
    (latent, action), (test_latent, test_action) = linear_data(rng, 100), linear_data(rng, 40)
    plain = linear_probe(latent, action, EPISODE, test_latent, test_action)
    wide, test_wide = np.insert(latent, 2, value, axis=1), np.insert(test_latent, 2, rng.normal(size=40), axis=1)
    result = linear_probe(wide, action, EPISODE, test_wide, test_action)
    assert result.lp_mse == pytest.approx(plain.lp_mse, rel=1e-4)


def test_a_constant_action_dimension_has_no_r2_and_does_not_count_in_the_mean(rng):
    (latent, action), (test_latent, test_action) = linear_data(rng, 100), linear_data(rng, 40)
    plain = linear_probe(latent, action, EPISODE, test_latent, test_action)
    action, test_action = (np.insert(values, 1, 0.3, axis=1) for values in (action, test_action))
    result = linear_probe(latent, action, EPISODE, test_latent, test_action)
    assert np.isnan(result.per_dimension_r2).tolist() == [False, True, False]
    assert result.per_dimension[1] == pytest.approx(0.0, abs=1e-10)
    assert result.r2 == pytest.approx(plain.r2, rel=1e-4)
    still = linear_probe(latent, action[:, 1:2], EPISODE, test_latent, test_action[:, 1:2])
    assert np.isnan(still.r2) and still.lp_mse == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("strength", [1e-4, 1.0])
def test_more_dimensions_than_transitions_give_what_scikit_learn_gives(rng, monkeypatch, strength: float):
    mixing = rng.normal(size=(3, 150))
    latent, test_latent = (
        rng.normal(size=(count, 3)) @ mixing + 0.1 * rng.normal(size=(count, 150)) for count in (100, 40)
    )
    action, test_action = latent[:, :2] + rng.normal(size=(100, 2)), test_latent[:, :2]
    monkeypatch.setattr(probes, "STRENGTHS", (strength,))
    result = linear_probe(latent, action, EPISODE, test_latent, test_action)
    scaler = preprocessing.StandardScaler().fit(latent)
    guess = linear_model.Ridge(strength).fit(scaler.transform(latent), action).predict(scaler.transform(test_latent))
    assert result.lp_mse == pytest.approx(np.mean((guess - test_action) ** 2), rel=1e-2)


def test_an_action_in_directions_of_small_variance_is_read_out(rng):
    hidden, rotation = rng.normal(size=(140, 40)), np.linalg.qr(rng.normal(size=(40, 40)))[0]
    latent, action = np.float32(hidden * np.logspace(0, -3, 40) @ rotation), hidden[:, -2:]
    result = linear_probe(latent[:100], action[:100], EPISODE, latent[100:], action[100:])
    scaler = preprocessing.StandardScaler().fit(np.float64(latent[:100]))
    scaled = scaler.transform(np.float64(latent))
    guess = linear_model.Ridge(1e-4).fit(scaled[:100], action[:100]).predict(scaled[100:])
    assert result.lp_mse == pytest.approx(np.mean((guess - action[100:]) ** 2), rel=0.01)
    assert result.lp_mse < 0.1 * result.lp_mse_mean_action


def test_latents_that_are_all_equal_predict_the_mean_action(rng):
    _, action = linear_data(rng, 100)
    result = linear_probe(np.full((100, 5), 0.1), action, EPISODE, rng.normal(size=(100, 5)), action)
    assert result.lp_mse == pytest.approx(result.lp_mse_mean_action, rel=1e-6)
    assert result.r2 == pytest.approx(0.0, abs=1e-5)


def shard(*arrays: np.ndarray) -> list[jax.Array]:
    """Rows spread over eight devices."""
    arrays = [values.astype(np.int32 if values.dtype.kind == "i" else np.float32) for values in arrays]
    return sharding.shard_batch(arrays, sharding.make_mesh(8, devices=jax.devices()))


def test_errors_of_arrays_on_eight_devices_are_those_on_one(rng):
    fitted, test, episode = linear_data(rng, 80), linear_data(rng, 40), EPISODE[:80]
    plain, spread = linear_probe(*fitted, episode, *test), linear_probe(*shard(*fitted), episode, *shard(*test))
    for name, value in dataclasses.asdict(plain).items():
        np.testing.assert_allclose(getattr(spread, name), value, rtol=1e-4, err_msg=name)


def test_accuracy_of_arrays_on_eight_devices_is_that_on_one(rng, monkeypatch):
    monkeypatch.setattr(probes, "STRENGTHS", (1.0,))
    fitted, test, episode = choice_data(rng, 80), choice_data(rng, 40), EPISODE[:80]
    plain = linear_probe_accuracy(*fitted, episode, *test)
    spread = linear_probe_accuracy(*shard(*fitted), episode, *shard(*test))
    # One transition on the border may fall to either side.
    assert spread.accuracy == pytest.approx(plain.accuracy, abs=1 / 39)
    assert spread.majority_accuracy == plain.majority_accuracy


@pytest.mark.parametrize("probe", [linear_probe, linear_probe_accuracy])
@pytest.mark.parametrize(("episode", "num_test", "found"), [(np.zeros(4), 2, "1 and 2"), (np.arange(4), 0, "4 and 0")])
def test_too_little_to_fit_or_test_is_refused_with_what_is_needed(probe, episode, num_test: int, found: str):
    shape, dtype = ((2,), np.float32) if probe is linear_probe else ((), np.int32)
    target, test_target = np.ones((4, *shape), dtype), np.ones((num_test, *shape), dtype)
    with pytest.raises(ProbeError, match=f"needs 2 episodes to fit and 1 transition to test; there are {found}"):
        probe(np.ones((4, 3)), target, episode, np.ones((num_test, 3)), test_target)


@pytest.mark.parametrize("place", ["fitted", "test"])
@pytest.mark.parametrize("probe", [linear_probe, linear_probe_accuracy])
def test_latents_that_are_not_finite_are_refused(rng, probe, place: str):
    latent, target = (linear_data if probe is linear_probe else choice_data)(rng, 100)
    spoilt = np.where(np.arange(100)[:, None] == 3, np.nan, latent)
    latents = (spoilt, latent) if place == "fitted" else (latent, spoilt)
    with pytest.raises(ProbeError, match="needs finite latents"):
        probe(latents[0], target, EPISODE, latents[1], target)


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_accuracy_equals_that_of_scikit_learn(rng, monkeypatch, strength: float):
    (latent, label), (test_latent, test_label) = choice_data(rng, 100), choice_data(rng, 200)
    monkeypatch.setattr(probes, "STRENGTHS", (strength,))
    result = linear_probe_accuracy(latent, label, EPISODE, test_latent, test_label)
    scaler = preprocessing.StandardScaler().fit(latent)
    reference = linear_model.LogisticRegression(C=1.0 / strength, tol=1e-8).fit(scaler.transform(latent), label)
    assert result.accuracy == pytest.approx(reference.score(scaler.transform(test_latent), test_label), abs=0.006)
    assert 0.5 < result.accuracy < 1.0
    majority = np.bincount(label).argmax()
    assert result.majority_accuracy == pytest.approx(np.mean(test_label == majority))


def test_classes_that_separate_are_told_apart_without_error(rng):
    label = rng.integers(0, 4, 100)
    latent = np.concatenate([10 * np.eye(4)[label] + rng.normal(size=(100, 4)), np.ones((100, 1))], axis=1)
    result = linear_probe_accuracy(latent[:60], label[:60], EPISODE[:60], latent[60:], label[60:], num_classes=6)
    assert result.accuracy == 1.0 and result.majority_accuracy < 0.6


def test_accuracy_of_latents_that_are_all_equal_is_that_of_the_commonest_class(rng):
    label = np.where(rng.random(100) < 0.7, 1, 0)
    result = linear_probe_accuracy(np.full((100, 3), 0.1), label, EPISODE, rng.normal(size=(100, 3)), label)
    assert result.accuracy == result.majority_accuracy == np.mean(label == 1)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_refused(rng, label: int):
    latent, labels = choice_data(rng, 100)
    labels[5] = label
    with pytest.raises(ProbeError, match="labels of 3 classes are 0 to 2"):
        linear_probe_accuracy(latent, labels, EPISODE, latent, labels, num_classes=3)
