"""Images of any size become the frames that a model sees."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from como_jax.spec.images import fit_frames, fitting_part, resize


@pytest.mark.parametrize(("height", "width"), [(480, 641), (63, 40), (70, 90), (20, 31), (1, 500)])
def test_frames_are_the_central_square_or_the_whole_image_resized(height: int, width: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 2, height, width, 3), dtype=np.uint8)
    side = min(height, width)
    rows, columns = (slice((size - side) // 2, (size - side) // 2 + side) for size in (height, width))
    for fit, parts in (("crop", images[:, :, rows, columns]), ("stretch", images)):
        frames = fit_frames(images, 64, fit)
        wanted = np.empty_like(frames)
        for index in np.ndindex(2, 2):
            np.testing.assert_array_equal(fitting_part(images[index], fit), parts[index])
            resize(parts[index], wanted[index])
        np.testing.assert_array_equal(frames, wanted, strict=True)


def test_images_of_the_wanted_size_keep_their_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_frames(images, 64, "crop"), images)
    np.testing.assert_array_equal(fit_frames(np.pad(images, ((0, 0), (0, 0), (8, 8), (0, 0))), 64, "crop"), images)


def test_reversed_images_are_read_as_they_are() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)[..., ::-1]
    np.testing.assert_array_equal(fit_frames(images, 16, "crop"), fit_frames(np.ascontiguousarray(images), 16, "crop"))


def test_shrinking_averages_areas() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    expected, frame = image.reshape(3, 4, 3, 4, 3).mean(axis=(1, 3)), np.empty((3, 3, 3), np.uint8)
    resize(image, frame)
    np.testing.assert_allclose(frame, expected, atol=0.51)


def test_shrinking_a_little_is_close_to_averaging_areas() -> None:
    """Images have little at the finest scale; there the cheaper filter must not differ visibly."""
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8), (0, 0), 1.5)
    frame = np.empty((224, 224, 3), np.uint8)
    resize(image, frame)
    exact = cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA)
    assert cv2.PSNR(frame, exact) > 40
