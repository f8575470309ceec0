"""PSNR, SSIM and pictures."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from como_jax.errors import UsageError
from como_jax.evaluation.latents.reconstruction import comparison_grid, error_map, psnr, ssim


@pytest.mark.parametrize(("mse", "expected"), [(1.0, 0.0), (0.01, 20.0), (np.array([0.0, 0.002]), 30.0), (0.0, 100.0)])
def test_psnr_is_in_decibels_of_the_mean_error(mse: float | np.ndarray, expected: float) -> None:
    assert psnr(mse) == pytest.approx(expected)


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two channels `[H, W]` by SciPy's filter, whose window of 3.5 deviations has 11 taps too."""

    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, sigma=1.5, truncate=3.5)[5:-5, 5:-5]

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + 1e-4) * (2 * cov + 9e-4)
    return np.mean(above / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)))


def test_ssim_equals_a_plain_computation_for_every_picture_and_channel() -> None:
    rng = np.random.default_rng(0)
    target = rng.random((3, 17, 24, 3))
    guess = np.clip(target + rng.normal(size=target.shape) * np.array([0.02, 0.1, 0.5])[:, None, None, None], 0, 1)
    expected = [
        np.mean([plain_ssim(a[..., c], b[..., c]) for c in range(3)]) for a, b in zip(guess, target, strict=True)
    ]
    found = np.asarray(jax.jit(ssim)(guess, target))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] > found[1] > found[2]


def test_ssim_of_a_picture_with_itself_is_one_and_with_its_negative_is_negative() -> None:
    picture = np.random.default_rng(0).random((2, 11, 11, 3))
    np.testing.assert_allclose(jax.jit(ssim)(picture, picture), 1.0, atol=1e-5)
    assert np.all(jax.jit(ssim)(picture, 1 - picture) < 0)


def test_ssim_of_pictures_smaller_than_its_window_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 11 x 11 pixels, not 12 x 10"):
        ssim(np.zeros((1, 12, 10, 3)), np.zeros((1, 12, 10, 3)))


def test_a_grid_shows_rows_and_columns_in_order_in_rgb() -> None:
    red, green, blue, grey = (np.broadcast_to(c, (4, 4, 3)) for c in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0.5)))
    grid = comparison_grid([[red, green], [blue, grey]], min_side=4, border=1)
    assert grid.shape == (12, 12, 3)
    assert grid.dtype == np.uint8
    corners = [grid[y, x].tolist() for y in (1, 10) for x in (1, 10)]
    assert corners == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]
    np.testing.assert_array_equal(grid[[0, 5, 6, 11]], 255)
    np.testing.assert_array_equal(grid[:, [0, 5, 6, 11]], 255)


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (3, 3, 3)) / 255.0
    grid = comparison_grid([[picture]], min_side=7, border=0)
    np.testing.assert_array_equal(grid, np.rint(255 * picture).repeat(3, axis=0).repeat(3, axis=1))


def test_values_outside_the_range_are_clipped() -> None:
    picture = np.stack([np.full((2, 2), -1.0), np.full((2, 2), 0.0), np.full((2, 2), 2.0)], axis=-1)
    np.testing.assert_array_equal(comparison_grid([[picture]], min_side=2, border=0)[0, 0], [0, 0, 255])


def test_the_error_map_is_black_where_perfect_and_twice_the_error_elsewhere() -> None:
    target = np.array([0.5, 0.5, 0.5, 0.9])
    np.testing.assert_allclose(error_map(np.array([0.5, 0.6, 0.4, 0.1]), target), [0.0, 0.2, 0.2, 1.0])
