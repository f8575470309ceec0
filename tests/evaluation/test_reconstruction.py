"""PSNR and pictures."""

import numpy as np
import pytest

from como_jax.evaluation.reconstruction import comparison_grid, error_map, psnr


@pytest.mark.parametrize(("mse", "expected"), [(1.0, 0.0), (0.01, 20.0), (np.array([0.0, 0.002]), 30.0), (0.0, 100.0)])
def test_psnr_is_in_decibels_of_the_mean_error(mse: float | np.ndarray, expected: float) -> None:
    assert psnr(mse) == pytest.approx(expected)


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
