"""Patches, positions, normalisation."""

import jax
import numpy as np
import pytest

from como_jax.errors import ConfigError
from como_jax.nn import layers


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


def test_unpatchify_undoes_patchify(image: np.ndarray) -> None:
    patches = layers.patchify(image, 4)
    assert patches.shape == (2, 6, 48)
    np.testing.assert_array_equal(layers.unpatchify(patches, 4, 8, 12), image)


def test_patches_and_a_linear_layer_equal_a_convolution(image: np.ndarray) -> None:
    kernel = np.random.default_rng(1).normal(size=(4, 4, 3, 5)).astype(np.float32)
    convolved = jax.lax.conv_general_dilated(image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    projected = layers.patchify(image, 4) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(projected, convolved.reshape(2, 6, 5), rtol=1e-5, atol=1e-5)


def test_positions_are_all_different_and_tell_rows_from_columns() -> None:
    grid = layers.sincos_position_embedding(3, 4, 16).reshape(3, 4, 16)
    assert len(np.unique(grid.reshape(12, 16), axis=0)) == 12
    # As in MAE, the first half tells the column and the second half the row.
    np.testing.assert_array_equal(grid[0, :, :8], grid[2, :, :8])
    np.testing.assert_array_equal(grid[:, 0, 8:], grid[:, 3, 8:])


def test_positions_are_sines_then_cosines() -> None:
    value = layers.sincos_position_embedding(3, 4, 16)[1 * 4 + 2]
    frequencies = [1.0, 0.1, 0.01, 0.001]
    expected = [f(position * w) for position in (2, 1) for f in (np.sin, np.cos) for w in frequencies]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_width_that_positions_cannot_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 6 must be divisible by 4"):
        layers.sincos_position_embedding(2, 2, 6)


def test_pixels_are_normalized_by_the_statistics_of_their_own_channel() -> None:
    orange = np.array([[255, 128, 0]], np.uint8)
    expected = [(1.0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (0.0 - 0.406) / 0.225]
    np.testing.assert_allclose(layers.normalize_frames(orange)[0], expected, rtol=1e-5)


def test_denormalizing_returns_every_pixel_value() -> None:
    frames = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    back = layers.denormalize_frames(layers.normalize_frames(frames))
    np.testing.assert_allclose(back, frames / 255.0, atol=1e-6)


def test_denormalized_frames_are_clipped_to_the_range_of_images() -> None:
    back = layers.denormalize_frames(np.array([[-9.0, 0.0, 9.0]], np.float32))
    np.testing.assert_allclose(back, [[0.0, 0.456, 1.0]], rtol=1e-6)
