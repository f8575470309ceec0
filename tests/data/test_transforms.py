"""Decoding, cropping, resizing, shifting."""

import io

import numpy as np
import pytest
from PIL import Image

from como_jax.data import transforms


def encode(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=95, subsampling=0)
    return file.getvalue()


@pytest.fixture
def striped() -> np.ndarray:
    """48 x 96: red left half and blue right half of the central square, green to its sides."""
    image = np.zeros((48, 96, 3), np.uint8)
    image[:, :, 1] = 255
    image[:, 24:48] = (255, 0, 0)
    image[:, 48:72] = (0, 0, 255)
    return image


@pytest.mark.parametrize("size", [16, 48, 96])
def test_a_jpeg_becomes_the_central_square_in_rgb(striped: np.ndarray, size: int) -> None:
    decoded = transforms.decode_jpeg(encode(striped), size)
    assert decoded.shape == (size, size, 3)
    assert decoded.dtype == np.uint8
    half, edge = size // 2, size // 8
    for columns, colour in ((slice(edge, half - edge), (255, 0, 0)), (slice(half + edge, size - edge), (0, 0, 255))):
        assert np.abs(decoded[:, columns].astype(int) - colour).max() < 12


def test_a_jpeg_of_the_wanted_size_keeps_its_pixels() -> None:
    smooth = np.indices((32, 32)).sum(0)[..., None] * np.array([3, 2, 1])
    decoded = transforms.decode_jpeg(encode(smooth.astype(np.uint8)), 32)
    assert np.abs(decoded.astype(int) - smooth).max() < 8


def test_a_file_that_is_no_jpeg_is_refused() -> None:
    with pytest.raises(ValueError):
        transforms.decode_jpeg(b"not a picture", 16)


def test_the_central_square_of_a_tall_picture_leaves_out_top_and_bottom() -> None:
    image = np.arange(6)[:, None, None] * np.ones((1, 2, 3))
    np.testing.assert_array_equal(transforms.center_square(image)[:, 0, 0], [2, 3])


def test_shrinking_averages_areas() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    expected = image.reshape(3, 4, 3, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(transforms.resize(image, 3), expected, atol=0.51)


def test_a_shift_equals_a_loop_over_pixels_and_is_the_same_for_all_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    shifted = transforms.random_shift(frames, 2, np.random.default_rng(5))
    down, right = np.random.default_rng(5).integers(-2, 3, size=2)
    assert (down, right) != (0, 0)
    expected = np.empty_like(frames)
    for frame in range(3):
        for row in range(6):
            for column in range(8):
                source = min(max(row + down, 0), 5), min(max(column + right, 0), 7)
                expected[frame, row, column] = frames[frame][source]
    np.testing.assert_array_equal(shifted, expected)


def test_shifts_reach_every_offset_up_to_the_limit() -> None:
    frames, rng = np.arange(49, dtype=np.uint8).reshape(1, 7, 7, 1), np.random.default_rng(0)
    centres = {int(transforms.random_shift(frames, 1, rng)[0, 3, 3, 0]) for _ in range(200)}
    assert centres == {3 * 7 + 3 + 7 * down + right for down in (-1, 0, 1) for right in (-1, 0, 1)}


def test_no_shift_leaves_frames_as_they_are() -> None:
    frames = np.ones((2, 4, 4, 3), np.uint8)
    assert transforms.random_shift(frames, 0, np.random.default_rng(0)) is frames
