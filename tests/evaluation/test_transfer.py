"""Motion transfer against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from como_jax.evaluation.latents.transfer import transfer_motion


class Brightness:
    """A model whose latent is the change of the mean brightness, which it adds to a frame."""

    def encode(self, frames):
        mean = jnp.mean(jnp.asarray(frames, jnp.float32) / 255.0, axis=(2, 3, 4))
        return jnp.diff(mean, axis=1)[..., None, None]

    def predict(self, frame, latent):
        return jnp.clip(jnp.asarray(frame, jnp.float32) / 255.0 + latent[:, :, :, None], 0.0, 1.0)


def test_the_motion_of_the_source_moves_the_first_frame():
    levels = np.array([[100, 120, 90, 90], [10, 20, 30, 255]], np.uint8)
    source = np.broadcast_to(levels[:, :, None, None, None], (2, 4, 5, 6, 3))
    first = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    video = jax.jit(lambda *frames: transfer_motion(Brightness(), *frames))(source, first)
    assert video.shape == (2, 4, 5, 6, 3) and video.dtype == jnp.float32
    expected = [first.astype(float)]
    for change in np.diff(levels.astype(float)).T:
        expected.append(np.clip(expected[-1] + change[:, None, None, None], 0, 255))
    np.testing.assert_allclose(video, np.stack(expected, axis=1) / 255.0, atol=1e-5)


def test_transfer_equals_a_loop_over_frames_for_a_real_model(make_como, como_params):
    model, rng = make_como(), np.random.default_rng(0)
    source, first = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((2, 4, 16, 16, 3), (2, 16, 16, 3)))
    video = jax.jit(lambda p, s, f: transfer_motion(model.bind(p), s, f))(como_params, source, first)
    latent = jax.jit(lambda p, s: model.bind(p).encode(s))(como_params, source)
    predict = jax.jit(lambda p, f, z: model.bind(p).predict(f, z))
    frame = first
    np.testing.assert_allclose(video[:, 0], first / 255.0, atol=1e-6)
    for t in range(3):
        predicted = np.asarray(predict(como_params, frame, latent[:, t]))
        np.testing.assert_allclose(video[:, t + 1], predicted, atol=2e-3)
        frame = np.rint(255 * predicted).astype(np.uint8)


def test_the_source_acts_through_its_latents_alone():
    source = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4, 3), dtype=np.uint8)
    still, first = np.repeat(source[:, :1], 3, axis=1), np.full((1, 4, 4, 3), 77, np.uint8)
    video = transfer_motion(Brightness(), still, first)
    np.testing.assert_allclose(video, 77 / 255.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("source", "first"),
    [
        (np.zeros((2, 1, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)),
        (np.zeros((2, 3, 4, 4, 3), np.uint8), np.zeros((2, 5, 4, 3), np.uint8)),
        (np.zeros((2, 3, 4, 4, 3), np.float32), np.zeros((2, 4, 4, 3), np.float32)),
    ],
)
def test_frames_that_do_not_fit_are_refused(source, first):
    with pytest.raises(AssertionError):
        transfer_motion(Brightness(), source, first)
