"""What a run reports of itself equals a plain computation over the same clips."""

from pathlib import Path

import jax
import numpy as np
import pytest

from como_jax.data.clips import gap_steps
from como_jax.data.mixture import MixtureEntry
from como_jax.data.transforms import decode_jpeg
from como_jax.evaluation.latents.in_loop import EvaluationConfig, MaeEvaluator, MotionEvaluator
from como_jax.evaluation.latents.measures import effective_rank
from como_jax.evaluation.latents.probes import linear_probe
from como_jax.evaluation.latents.transitions import EvaluationSet
from como_jax.motion.mae import Mae
from como_jax.nn.model_def import ModelDef
from como_jax.spec.motion import MaeConfig
from como_jax.spec.towers import VitConfig
from como_jax.training import sharding

GAP_SECONDS, SIZE = 0.3, 16


class Recorder:
    """Keeps what would be written."""

    def __init__(self):
        self.images = {}

    def scalars(self, step, values):
        self.values = values

    def image(self, step, name, image):
        self.images[name] = image


@pytest.fixture(scope="module")
def sets(tabletop_dataset: Path) -> list[EvaluationSet]:
    entries = (MixtureEntry(str(tabletop_dataset)),)
    return EvaluationSet.open_all(entries, gap_seconds=GAP_SECONDS, image_size=SIZE, camera="")


def all_clips(item: EvaluationSet):
    """Frames `[N, 3, H, W, 3]`, mean actions `[N, 2, A]` and episodes of every clip of a split, one by one."""
    source, frames, actions, episodes = item.source, [], [], []
    for episode, (start, length) in enumerate(zip(source.start, source.length, strict=True)):
        gap = int(gap_steps(GAP_SECONDS, source.control_rate[episode]))
        for first in range(start, start + length - 2 * gap):
            instants = (first, first + gap, first + 2 * gap)
            frames.append([decode_jpeg(source.read_jpegs([t])[0], SIZE) for t in instants])
            actions.append([source.action[t : t + gap].mean(axis=0) for t in instants[:2]])
            episodes.append(episode)
    return np.array(frames), np.array(actions), np.array(episodes)


def transitions(model, frames):
    """Past to current, current to future, future to current, `[N, D]` each, and the predicted futures."""
    pairs = [model.encode(frames[:, list(order)])[:, 0] for order in ((0, 1), (1, 2), (2, 1))]
    flat = [np.asarray(z).reshape(len(z), -1) for z in pairs]
    return flat, np.asarray(model.predict(frames[:, 1], pairs[1]))


def test_motion_metrics_equal_a_plain_computation(sets, make_como, como_params):
    model = make_como()
    recorder = Recorder()
    evaluator = MotionEvaluator(model, sets, sharding.make_mesh(), EvaluationConfig(10_000, 2, batch_size=13))
    metrics = evaluator(como_params, 5, recorder)

    found = {}
    for item in sets:
        frames, action, episode = all_clips(item)
        (past, future, back), predicted = transitions(model.bind(como_params), frames)
        true = frames[:, 2] / 255.0
        found[item.split] = np.concatenate([past, future]), np.concatenate([action[:, 0], action[:, 1]]), episode
        for name, guess in {"psnr": predicted, "psnr_copy": frames[:, 1] / 255.0}.items():
            expected = -10 * np.log10(np.mean((guess - true) ** 2))
            assert metrics[f"eval_{item.split}/{name}"] == pytest.approx(expected, abs=1e-3)
        cosine = np.sum(past * back, 1) / np.linalg.norm(past, axis=1) / np.linalg.norm(back, axis=1)
        assert metrics[f"eval_{item.split}/s_pcfc"] == pytest.approx(cosine.mean(), abs=1e-4)

        rank = effective_rank(future)
        assert metrics[f"eval_{item.split}/effective_rank"] == pytest.approx(rank, rel=1e-2)

    latent, action, episode = found["train"]
    probe = linear_probe(latent, action, np.tile(episode, 2), *found["val"][:2])
    assert metrics["eval_val/lp_mse"] == pytest.approx(probe.lp_mse, rel=1e-2)
    assert metrics["eval_val/lp_mse_mean_action"] == pytest.approx(probe.lp_mse_mean_action, rel=1e-5)
    assert metrics["eval_val/lp_r2"] == pytest.approx(probe.r2, abs=1e-2)
    assert recorder.values == metrics and len(recorder.images) == 2


def test_too_few_episodes_for_the_probe_are_a_warning_and_no_number(sets, make_como, como_params, caplog):
    # One clip of the training episodes comes from one episode.
    config = EvaluationConfig(num_clips=1, num_images=1, batch_size=8)
    metrics = MotionEvaluator(make_como(), sets, sharding.make_mesh(), config)(como_params, 0, Recorder())
    assert "the linear probe needs 2 episodes" in caplog.text
    assert "eval_val/psnr" in metrics and "eval_val/lp_mse" not in metrics


def test_a_image_shows_current_predicted_true_and_error(sets, make_como, como_params):
    recorder = Recorder()
    mesh, config = sharding.make_mesh(), EvaluationConfig(num_clips=8, num_images=1, batch_size=8)
    MotionEvaluator(make_como(), sets[:1], mesh, config)(como_params, 0, recorder)
    (image,) = recorder.images.values()
    frames, _, _ = all_clips(sets[0])
    cells = [image[2:-2, x + 2 : x + 130] for x in range(0, image.shape[1], 132)]
    enlarged = frames[0].repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_array_equal(cells[0], enlarged[1])
    np.testing.assert_array_equal(cells[2], enlarged[2])
    error = np.clip(2 * np.abs(cells[1].astype(float) - cells[2]), 0, 255)
    np.testing.assert_allclose(cells[3], error, atol=2)


def test_the_masked_autoencoder_is_judged_on_both_splits(sets):
    config = MaeConfig(decoder_width=8, decoder_depth=1, decoder_heads=1, mask_ratio=0.75)
    vit = VitConfig(SIZE, patch_size=4, width=16, depth=1, num_heads=2)
    model = ModelDef.create(lambda rngs: Mae(vit, config, rngs=rngs))
    params, recorder = jax.jit(model.init)(jax.random.key(0)), Recorder()
    evaluator = MaeEvaluator(model, sets, sharding.make_mesh(), EvaluationConfig(num_images=3, batch_size=8))
    metrics = evaluator(params, 0, recorder)
    assert set(metrics) == {"eval_train/masked_patch_mse", "eval_val/masked_patch_mse"}
    assert all(0.5 < value < 5 for value in metrics.values())
    assert all(image.shape == (3 * 132, 3 * 132, 3) for image in recorder.images.values())


def test_a_dataset_without_long_enough_episodes_is_not_evaluated_but_named(tabletop_dataset: Path, caplog):
    entries = (MixtureEntry(str(tabletop_dataset)),)
    assert EvaluationSet.open_all(entries, gap_seconds=50.0, image_size=SIZE, camera="") == []
    assert "Not evaluated" in caplog.text and str(tabletop_dataset) in caplog.text
