"""Passes over a dataset, and the numbers that come out of them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from como_jax.data.mixture import MixtureEntry
from como_jax.errors import DatasetError, RunError
from como_jax.evaluation.latents.measures import ssim
from como_jax.evaluation.latents.probes import ProbeError
from como_jax.evaluation.latents.transitions import (
    DatasetResult,
    EvaluationSet,
    TransitionRunner,
    Transitions,
    measure,
    summarize,
)
from como_jax.training import sharding

OPTIONS = {"gap_seconds": 0.3, "image_size": 16, "camera": ""}


@pytest.fixture(scope="module")
def sets(tabletop_dataset: Path) -> list[EvaluationSet]:
    return EvaluationSet.open_all([MixtureEntry(str(tabletop_dataset))], **OPTIONS, repeats=False)


@pytest.fixture(scope="module")
def train(sets, make_como, como_params) -> Transitions:
    runner = TransitionRunner(make_como(), sharding.make_mesh(), batch_size=16, with_ssim=True)
    return runner(como_params, sets[0], num_clips=40, num_images=3)


def made_up(count: int = 24, action: np.ndarray | None = None, seed: int = 0) -> Transitions:
    """Transitions whose latents are the two numbers that their actions are sums of, four clips an episode."""
    rng = np.random.default_rng(seed)
    past, future, back = rng.normal(size=(3, count, 2, 1)).astype(np.float32)
    exact = np.stack([past.sum(axis=(1, 2)), future.sum(axis=(1, 2))], axis=1)[..., None]
    one = np.full(count, 0.01, np.float32)
    action = exact if action is None else action
    return Transitions(past, future, back, one, 2 * one, one, one, np.arange(count) // 4, action, [])


def starts(item: EvaluationSet) -> list[int]:
    """The records at which the transitions of all clips begin."""
    gap = item.index.gap[item.index.episode]
    return [*item.index.first, *(item.index.first + gap)]


def test_no_transition_is_measured_twice(sets, tabletop_dataset: Path):
    repeated = EvaluationSet.open_all([MixtureEntry(str(tabletop_dataset))], **OPTIONS)
    for with_repeats, without in zip(repeated, sets, strict=True):
        assert len(starts(with_repeats)) > len(set(starts(with_repeats)))
        assert len(starts(without)) == len(set(starts(without)))
        assert set(starts(without)) <= set(starts(with_repeats))
        # At most one gap an episode is left over at its end.
        lost = len(set(starts(with_repeats))) - len(set(starts(without)))
        assert lost <= without.index.gap.sum()


def test_latents_keep_their_tokens_and_line_up_with_actions_and_episodes(sets, train):
    assert train.past_to_current.shape == train.future_to_current.shape == (40, 2, 3)
    np.testing.assert_array_equal(train.latent[40:], train.current_to_future.reshape(40, 6))
    np.testing.assert_array_equal(train.latent_action[:40], train.action[:, 0])
    np.testing.assert_array_equal(train.latent_action[40:], train.action[:, 1])
    np.testing.assert_array_equal(train.latent_episode[40:], train.episode)
    assert [len(row) for row in train.images] == [4, 4, 4]


def test_ssim_is_computed_when_asked_for_alone(sets, train, make_como, como_params):
    runner = TransitionRunner(make_como(), sharding.make_mesh(), batch_size=16)
    assert runner(como_params, sets[0], num_clips=4).ssim is None
    frames = np.stack([image for row in train.images for image in row[:3]]).astype(np.float32)
    current, predicted, future = (jnp.asarray(frames[k::3]) for k in range(3))
    rows = np.linspace(0, 39, 3).astype(int)
    np.testing.assert_allclose(train.ssim[rows], jax.jit(ssim)(predicted, future), atol=1e-4)
    np.testing.assert_allclose(train.copy_ssim[rows], jax.jit(ssim)(current, future), atol=1e-4)


def test_clips_of_another_length_come_from_the_same_episodes(sets):
    longer = sets[0].recut(5)
    frames = longer.read([0])["frames"][0]
    shorter = sets[0].recut(3).read([0])["frames"][0]
    assert frames.shape == (5, 16, 16, 3)
    np.testing.assert_array_equal(frames[:3], shorter)


def test_what_cannot_be_opened_is_an_error_and_what_is_left_out_is_told(tabletop_dataset: Path):
    with pytest.raises(DatasetError, match="/nowhere is not a dataset directory"):
        EvaluationSet.open_all([MixtureEntry("/nowhere")], **OPTIONS)
    told: list[str] = []
    options = {**OPTIONS, "gap_seconds": 50.0}
    assert EvaluationSet.open_all([MixtureEntry(str(tabletop_dataset))], **options, warn=told.append) == []
    assert len(told) == 2 and all(str(tabletop_dataset) in line for line in told)


def test_a_probe_of_other_episodes_reads_what_the_latent_holds(sets):
    result = measure(sets[1], made_up(seed=1), made_up(seed=2))
    metrics = result.metrics
    assert metrics["lp_mse"] < 1e-4 < metrics["lp_mse_mean_action"] and metrics["lp_r2"] == pytest.approx(1, abs=1e-3)
    assert metrics["lp_mse/0"] == pytest.approx(metrics["lp_mse"])
    assert metrics["transitions"] == 48 and metrics["psnr_gain"] == pytest.approx(10 * np.log10(2))
    assert "lp_accuracy" not in metrics


@pytest.mark.parametrize("one_hot", [False, True])
def test_an_action_that_is_a_choice_is_classified_too(sets, one_hot):
    def choices(seed: int) -> Transitions:
        exact = made_up(seed=seed)
        chosen = (exact.action > 0).astype(np.float32)
        return dataclasses.replace(exact, action=np.concatenate([chosen, 1 - chosen], -1) if one_hot else chosen)

    metrics = measure(sets[1], choices(2), choices(1)).metrics
    assert metrics["lp_accuracy"] > 0.85 > metrics["lp_accuracy_majority"]
    mixed = dataclasses.replace(choices(2), action=np.full((24, 2, 2), 0.5, np.float32))
    assert not one_hot or "lp_accuracy" not in measure(sets[1], mixed, choices(1)).metrics


def test_without_fitting_episodes_there_is_no_probe(sets):
    result = measure(sets[1], made_up(), None)
    assert result.probe is None and not any(name.startswith("lp_") for name in result.metrics)


def test_an_action_that_never_changes_has_no_r2(sets):
    constant = np.ones((24, 2, 1), np.float32)
    metrics = measure(sets[1], made_up(action=constant), made_up(action=constant, seed=2)).metrics
    assert "lp_r2" not in metrics and metrics["lp_mse"] == pytest.approx(0, abs=1e-6)


def test_too_few_episodes_and_numbers_that_are_not_finite_are_errors(sets):
    one_episode = dataclasses.replace(made_up(), episode=np.zeros(24, int))
    with pytest.raises(ProbeError, match=f"{sets[1].source.directory}: the linear probe needs 2 episodes"):
        measure(sets[1], made_up(), one_episode)
    broken = dataclasses.replace(made_up(), mse=np.full(24, np.nan, np.float32))
    with pytest.raises(RunError, match=r"tabletop \(val\): .* not finite"):
        measure(sets[1], broken, None)


def test_datasets_are_averaged_and_transitions_are_added(sets):
    def result(name: str, **metrics: float) -> DatasetResult:
        return DatasetResult(dataclasses.replace(sets[1], name=name), made_up(), metrics)

    first = result("a", psnr=20.0, transitions=30, **{"lp_mse": 0.5, "lp_mse/0": 0.5})
    second = result("b", psnr=30.0, transitions=10)
    assert summarize([first]) == {"psnr": 20.0, "transitions": 30, "lp_mse": 0.5, "lp_mse/0": 0.5}
    metrics = summarize([first, second])
    assert metrics["psnr"] == 25.0 and metrics["transitions"] == 40 and metrics["lp_mse"] == 0.5
    assert metrics["a/lp_mse/0"] == 0.5 and metrics["b/psnr"] == 30.0 and metrics["lp_mse/0"] == 0.5
    # Dimension 0 is another thing in every dataset.
    both = [first, dataclasses.replace(first, item=dataclasses.replace(sets[1], name="b"))]
    assert "lp_mse/0" not in summarize(both) and summarize(both)["b/lp_mse/0"] == 0.5
