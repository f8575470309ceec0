"""Pictures of RLDS steps on their way to JPEG."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from como_jax.convert import images

# More than any camera of a robot has, and few enough for every process of a conversion to hold some.
MAX_PIXELS = 2**25


class Picture(NamedTuple):
    """A picture as JPEG, its height and width, and its thumbnail."""

    jpeg: bytes
    size: tuple[int, int]
    thumbnail: np.ndarray


def convert_picture(stored: bytes | np.ndarray, shorter_side: int) -> Picture:
    """A stored picture as JPEG; colour JPEGs that are small enough stay as they are.

    Args:
      stored: an encoded picture, or uint8 `[H, W, C]` with 1, 3 or 4 channels (grey, RGB, RGBA).
      shorter_side: larger pictures are scaled down to this.

    Raises:
      ValueError: the picture is empty, damaged, larger than `MAX_PIXELS`, or no picture at all.
    """
    image = _decode(stored) if isinstance(stored, bytes) else _to_rgb(stored)
    small = images.shrink(image, shorter_side)
    if small is image and isinstance(stored, bytes) and images.is_colour_jpeg(stored):
        jpeg = stored
    else:
        jpeg = images.encode_jpeg(small)
    return Picture(jpeg, small.shape[:2], images.thumbnail(small))


def _decode(data: bytes) -> np.ndarray:
    if not data:
        raise ValueError("the picture is empty")
    _check_size(*_encoded_size(data))
    return images.decode_image(data)


def _to_rgb(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"a picture has shape {image.shape} and type {image.dtype}")
    if not image.size:
        raise ValueError("the picture is empty")
    _check_size(*image.shape[:2])
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else np.ascontiguousarray(image[..., :3])


def _encoded_size(data: bytes) -> tuple[int, int]:
    """Height and width as the file says, without decoding it."""
    if images.is_jpeg(data):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return height, width
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                return picture.height, picture.width
    except (OSError, SyntaxError, EOFError) as error:
        # The message may hold the address of the bytes, which differs from run to run.
        raise ValueError("the picture cannot be decoded") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture has more than {MAX_PIXELS} pixels") from error


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"the picture has {width} x {height} pixels, more than {MAX_PIXELS}")
