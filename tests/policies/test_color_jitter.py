"""Random changes of colour."""

import colorsys

import jax
import numpy as np

from como_jax.policies.vla import jitter_colors

IMAGES = np.random.default_rng(0).integers(60, 180, (64, 2, 6, 6, 3), dtype=np.uint8)
jitter = jax.jit(jitter_colors, static_argnums=2)


def test_no_strength_changes_nothing() -> None:
    np.testing.assert_allclose(jitter(IMAGES, jax.random.key(0), 0.0), IMAGES, atol=1)


def test_images_of_a_sample_change_alike_and_those_of_two_do_not() -> None:
    images = np.repeat(IMAGES[:, :1], 2, axis=1)
    images[1] = images[0]
    found = np.asarray(jitter(images, jax.random.key(0), 1.0))
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    assert np.abs(found[0].astype(int) - found[1]).max() > 3


def test_changes_stay_within_their_limits() -> None:
    """One flat colour, whose hue, as the circle of HSV has it, turns by about 5 %, and whose light changes by 20 %."""
    color = np.array([150, 90, 60], np.uint8)
    images = np.broadcast_to(color, (256, 4, 4, 3))
    found = np.asarray(jitter(images, jax.random.key(1), 1.0))[:, 0, 0] / 255
    luma = np.array([0.299, 0.587, 0.114])
    change = found @ luma - color / 255 @ luma
    assert 0.17 < change.max() <= 0.21 and -0.21 <= change.min() < -0.17
    hues = np.array([colorsys.rgb_to_hsv(*rgb)[0] for rgb in found])
    turns = (hues - colorsys.rgb_to_hsv(*(color / 255))[0] + 0.5) % 1 - 0.5
    assert 0.02 < turns.max() < 0.08 and -0.08 < turns.min() < -0.02
