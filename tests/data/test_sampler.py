"""The order of samples: shares, epochs, and independence of who asks when."""

import pickle

import numpy as np
import pytest

from como_jax.data.sampler import WeightedSampler


def test_shares_follow_the_weights_evenly_all_along() -> None:
    datasets, _ = WeightedSampler([50, 60, 70], [0.5, 0.3, 0.2], seed=0)(np.arange(40_960))
    for begin in range(0, 40_960, 512):
        shares = np.bincount(datasets[begin : begin + 512], minlength=3) / 512
        np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.01)


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 1e-9, 3], [0.1] * 7, [2.0]])
def test_every_dataset_is_drawn_and_shares_are_exact_to_the_block(weights: list[float]) -> None:
    order = WeightedSampler([5] * len(weights), weights, seed=0)
    datasets, _ = order(np.arange(len(order._dataset)))
    shares = np.bincount(datasets, minlength=len(weights)) / len(datasets)
    np.testing.assert_allclose(shares, np.array(weights) / np.sum(weights), atol=1 / 4096)
    assert shares.min() > 0


def test_an_epoch_holds_every_clip_once_in_a_new_order() -> None:
    datasets, clips = WeightedSampler([7, 100], [1, 1], seed=3)(np.arange(2000))
    for dataset, size in enumerate((7, 100)):
        mine = clips[datasets == dataset]
        epochs = mine[: len(mine) // size * size].reshape(-1, size)
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > len(epochs) * 0.9


def test_places_can_be_asked_for_in_any_order_and_in_a_copy() -> None:
    order, places = WeightedSampler([30, 20], [2, 1], seed=1), np.arange(5000)
    datasets, clips = order(places)
    shuffled = np.random.default_rng(0).permutation(places)
    copy = pickle.loads(pickle.dumps(order))
    np.testing.assert_array_equal(copy(shuffled), [datasets[shuffled], clips[shuffled]])
    far = copy(places + 10**12)
    np.testing.assert_array_equal(order(places + 10**12), far)


def test_seeds_and_datasets_differ() -> None:
    datasets, clips = WeightedSampler([100, 100], [1, 1], seed=0)(np.arange(200))
    assert clips[datasets == 0].tolist() != clips[datasets == 1].tolist()
    assert clips.tolist() != WeightedSampler([100, 100], [1, 1], seed=1)(np.arange(200))[1].tolist()


def test_consecutive_samples_are_spread_over_a_dataset() -> None:
    _, clips = WeightedSampler([10_000], [1], seed=0)(np.arange(256))
    assert np.corrcoef(clips[:-1], clips[1:])[0, 1] < 0.2
    assert np.ptp(clips) > 9000
