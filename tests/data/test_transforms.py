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
        transforms.decode_jpeg(b"not an image", 16)


def test_the_central_square_of_a_tall_image_leaves_out_top_and_bottom() -> None:
    image = np.arange(6)[:, None, None] * np.ones((1, 2, 3))
    np.testing.assert_array_equal(transforms.cut(image, transforms.Crop())[:, 0, 0], [2, 3])


def test_a_stretched_image_keeps_its_sides(striped: np.ndarray) -> None:
    decoded = transforms.decode_jpeg(encode(striped), 48, transforms.Crop("stretch")).astype(int)
    for columns, colour in ((slice(2, 10), (0, 255, 0)), (slice(14, 22), (255, 0, 0)), (slice(26, 34), (0, 0, 255))):
        assert np.abs(decoded[:, columns] - colour).max() < 12


@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (1.0, 0.5), (0.5, 1.0)])
def test_a_part_is_cut_out_where_the_view_says(top: float, left: float) -> None:
    image = np.arange(10)[:, None] * 100 + np.arange(16)[None]
    part = transforms.cut(image[..., None], transforms.Crop("crop", 0.6, top, left))[..., 0]
    rows, columns = round(4 * top), 3 + round(4 * left)
    np.testing.assert_array_equal(part, image[rows : rows + 6, columns : columns + 6])


def test_a_shift_equals_a_loop_over_pixels() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    for down, right in ((2, -1), (-2, 1), (0, 2), (-1, 0), (0, 0)):
        shifted, expected = np.empty_like(frame), np.empty_like(frame)
        transforms.shift(frame, down, right, shifted)
        for row in range(6):
            for column in range(8):
                expected[row, column] = frame[min(max(row + down, 0), 5), min(max(column + right, 0), 7)]
        np.testing.assert_array_equal(shifted, expected)


def test_a_decoder_reuses_its_memory_for_images_of_any_size(striped: np.ndarray) -> None:
    decoder, images = transforms.FrameDecoder(), [encode(striped), encode(striped[:16, 20:70]), encode(striped)]
    for crop in (transforms.Crop(), transforms.Crop("stretch", 0.5, 0.2, 0.8, 2, -1)):
        for data in images:
            frame = np.empty((24, 24, 3), np.uint8)
            decoder(data, frame, crop)
            np.testing.assert_array_equal(frame, transforms.decode_jpeg(data, 24, crop))
