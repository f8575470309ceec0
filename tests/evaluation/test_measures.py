"""PSNR, SSIM and grids of images; motion transfer; S-PCFC; rank, principal components of latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import paired_cosine_distances

from como_jax.errors import UsageError
from como_jax.evaluation.latents.measures import (
    comparison_grid,
    effective_rank,
    error_map,
    past_future_similarities,
    past_future_similarity,
    past_future_similarity_by_token,
    principal_components,
    psnr,
    ssim,
    transfer_motion,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


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


def test_ssim_equals_a_plain_computation_for_every_image_and_channel() -> None:
    rng = np.random.default_rng(0)
    target = rng.random((3, 17, 24, 3))
    guess = np.clip(target + rng.normal(size=target.shape) * np.array([0.02, 0.1, 0.5])[:, None, None, None], 0, 1)
    expected = [
        np.mean([plain_ssim(a[..., c], b[..., c]) for c in range(3)]) for a, b in zip(guess, target, strict=True)
    ]
    found = np.asarray(jax.jit(ssim)(guess, target))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] > found[1] > found[2]


def test_ssim_of_a_image_with_itself_is_one_and_with_its_negative_is_negative() -> None:
    image = np.random.default_rng(0).random((2, 11, 11, 3))
    np.testing.assert_allclose(jax.jit(ssim)(image, image), 1.0, atol=1e-5)
    assert np.all(jax.jit(ssim)(image, 1 - image) < 0)


def test_ssim_of_images_smaller_than_its_window_is_refused() -> None:
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


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 3, 3)) / 255.0
    grid = comparison_grid([[image]], min_side=7, border=0)
    np.testing.assert_array_equal(grid, np.rint(255 * image).repeat(3, axis=0).repeat(3, axis=1))


def test_values_outside_the_range_are_clipped() -> None:
    image = np.stack([np.full((2, 2), -1.0), np.full((2, 2), 0.0), np.full((2, 2), 2.0)], axis=-1)
    np.testing.assert_array_equal(comparison_grid([[image]], min_side=2, border=0)[0, 0], [0, 0, 255])


def test_the_error_map_is_black_where_perfect_and_twice_the_error_elsewhere() -> None:
    target = np.array([0.5, 0.5, 0.5, 0.9])
    np.testing.assert_allclose(error_map(np.array([0.5, 0.6, 0.4, 0.1]), target), [0.0, 0.2, 0.2, 1.0])


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


@pytest.fixture
def latents() -> np.ndarray:
    """Past and future latents `[2, N, Q, L]`, whose tokens have unlike norms."""
    return np.random.default_rng(0).normal(0.3, 1.0, size=(2, 9, 4, 5)) * np.array([0.1, 1.0, 5.0, 30.0])[:, None]


def test_similarity_is_the_cosine_of_paired_latents_as_one_vector(latents):
    past, future = latents
    expected = 1 - paired_cosine_distances(past.reshape(9, 20), future.reshape(9, 20))
    np.testing.assert_allclose(past_future_similarities(past, future), expected)
    np.testing.assert_allclose(past_future_similarities(past.reshape(9, 20), future.reshape(9, 20)), expected)
    assert past_future_similarity(past, future) == pytest.approx(expected.mean())


def test_by_token_every_token_counts_the_same(latents):
    past, future = latents
    expected = np.mean(1 - paired_cosine_distances(past.reshape(36, 5), future.reshape(36, 5)))
    assert past_future_similarity_by_token(past, future) == pytest.approx(expected)
    assert expected != pytest.approx(past_future_similarity(past, future), abs=0.01)
    scaled = future * np.array([3.0, 0.2, 1.0, 7.0])[:, None]
    assert past_future_similarity_by_token(past, scaled) == pytest.approx(expected)


def test_by_token_needs_tokens(latents):
    with pytest.raises(AssertionError):
        past_future_similarity_by_token(*latents.reshape(2, 9, 20))


@pytest.mark.parametrize("similarity", [past_future_similarity, past_future_similarity_by_token])
def test_a_static_latent_scores_one_and_a_reversing_one_minus_one(latents, similarity):
    latent = latents[0]
    assert similarity(latent, 3 * latent) == pytest.approx(1.0)
    assert similarity(latent, -latent) == pytest.approx(-1.0)


@pytest.mark.parametrize("similarity", [past_future_similarity, past_future_similarity_by_token])
def test_a_zero_latent_counts_as_dissimilar(similarity):
    assert similarity(np.zeros((2, 3, 2)), np.ones((2, 3, 2))) == 0.0


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values(rng):
    latent = rng.normal(size=(50, 6)) * np.logspace(0, -3, 6) + 4.0
    values = np.sqrt(np.linalg.eigvalsh(np.cov(latent.T)))
    assert effective_rank(latent) == pytest.approx(np.exp(stats.entropy(values / values.sum())))


def test_effective_rank_counts_directions_of_equal_spread(rng):
    directions, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    for rank in (1, 3, 8):
        corners = np.concatenate([directions[:rank], -directions[:rank]]) + 10.0
        assert effective_rank(corners) == pytest.approx(rank, rel=1e-6)
        assert effective_rank(np.tile(corners, (3, 1))) == pytest.approx(rank, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_latents_that_are_all_equal_have_rank_zero_and_no_components(rng, dtype):
    latent = np.tile(rng.normal(size=5), (37, 1)).astype(dtype)
    assert effective_rank(latent) == 0.0
    coordinates, shares = principal_components(latent)
    np.testing.assert_array_equal(coordinates, np.zeros((37, 2)))
    np.testing.assert_array_equal(shares, [0.0, 0.0])


def test_principal_components_equal_those_of_scikit_learn(rng):
    latent = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 3.0
    coordinates, shares = principal_components(latent, 3)
    pca = PCA(3).fit(latent)
    expected = pca.transform(latent)
    np.testing.assert_allclose(np.abs(coordinates), np.abs(expected), atol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(coordinates * expected, 0)), np.sum(expected**2, 0))
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_)


def test_signs_of_components_do_not_depend_on_the_order_of_the_latents(rng):
    latent, order = rng.normal(size=(40, 5)), rng.permutation(40)
    np.testing.assert_allclose(principal_components(latent[order])[0], principal_components(latent)[0][order])


def test_components_that_the_data_does_not_have_are_zero(rng):
    coordinates, shares = principal_components(rng.normal(size=(10, 1)), 3)
    assert coordinates.shape == (10, 3) and np.ptp(coordinates[:, 0]) > 0
    np.testing.assert_array_equal(coordinates[:, 1:], 0.0)
    np.testing.assert_array_equal(shares, [1.0, 0.0, 0.0])
