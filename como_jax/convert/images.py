"""Images on their way into a dataset: decoding, scaling, JPEG, and how much they change from step to step."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from como_jax.data.schema import Episode, Step

JPEG_QUALITY = 95
THUMBNAIL_SIZE = 32
# The same limit as for videos: a header can claim any size.
MAX_PIXELS = 2**26
# RLDS images: more than any camera of a robot has, and few enough for every process of a conversion to hold some.
MAX_STORED_PIXELS = 2**25


class Frame(NamedTuple):
    """An image of an episode as it is stored: JPEG, height and width, and thumbnail (see `thumbnail`)."""

    jpeg: bytes
    size: tuple[int, int]
    thumbnail: np.ndarray


def make_frame(image: np.ndarray, shorter_side: int) -> Frame:
    """Scales an RGB image, uint8 `[H, W, 3]`, down until its shorter side fits, and encodes it."""
    small = shrink(image, shorter_side)
    return Frame(encode_jpeg(small), small.shape[:2], thumbnail(small))


def convert_stored(stored: bytes | np.ndarray, shorter_side: int) -> Frame:
    """Converts an encoded image, or uint8 `[H, W, C]` with 1, 3 or 4 channels (grey, RGB, RGBA).

    Colour JPEGs whose shorter side is small enough are kept byte for byte.

    Raises:
      ValueError: the image is empty, damaged, larger than `MAX_STORED_PIXELS`, or not an image.
    """
    image = decode_image(stored, MAX_STORED_PIXELS) if isinstance(stored, bytes) else _to_rgb(stored)
    small = shrink(image, shorter_side)
    is_kept = small is image and isinstance(stored, bytes) and _is_colour_jpeg(stored)
    return Frame(stored if is_kept else encode_jpeg(small), small.shape[:2], thumbnail(small))


def make_episode(
    episode_id: str,
    source_file: str,
    control_rate: float,
    frames: Mapping[str, Sequence[Frame]],
    states: Sequence[np.ndarray] | None = None,
    actions: Sequence[np.ndarray] | None = None,
    language: str = "",
) -> Episode:
    """Builds an episode of T steps from T frames of every camera, and T states and actions, or None.

    Motion is measured on the first camera. See `schema.Episode` for the other fields.
    """
    main = next(iter(frames.values()))
    steps = [
        Step(
            {camera: each[index].jpeg for camera, each in frames.items()},
            None if states is None else states[index],
            None if actions is None else actions[index],
        )
        for index in range(len(main))
    ]
    return Episode(episode_id, source_file, control_rate, steps, motion([frame.thumbnail for frame in main]), language)


def shrink(image: np.ndarray, shorter_side: int) -> np.ndarray:
    """Scales uint8 `[H, W, 3]` down with an area filter until its shorter side fits; never scales up."""
    height, width = image.shape[:2]
    scale = shorter_side / min(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encodes an RGB image, uint8 `[H, W, 3]`, as JPEG without colour subsampling."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"
    )


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes a JPEG, a PNG or another format that OpenCV reads to RGB, uint8 `[H, W, 3]`.

    Raises:
      ValueError: the image is empty, damaged, of an unknown format, or has more than `max_pixels` pixels.
    """
    if not data:
        raise ValueError("the image is empty")
    _check_pixels(*_encoded_size(data), max_pixels)
    if _is_jpeg(data):
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        bgr = None
    if bgr is None:
        raise ValueError("an image cannot be decoded")
    return np.ascontiguousarray(bgr[..., ::-1])


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Scales an image to uint8 `[32, 32, 3]` with an area filter, so that noise and compression average out."""
    return cv2.resize(image, (THUMBNAIL_SIZE, THUMBNAIL_SIZE), interpolation=cv2.INTER_AREA)


def motion(thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """Mean absolute difference of each thumbnail from the one before, float32 `[T]` in [0, 1]; the first is 0."""
    frames = np.stack(thumbnails).astype(np.float32) / 255
    differences = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    return np.concatenate([np.zeros(1, np.float32), differences])


def _to_rgb(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image has shape {image.shape} and type {image.dtype}")
    if not image.size:
        raise ValueError("the image is empty")
    _check_pixels(*image.shape[:2], MAX_STORED_PIXELS)
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else np.ascontiguousarray(image[..., :3])


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _is_colour_jpeg(data: bytes) -> bool:
    """Whether the bytes are a JPEG with three colour channels, neither grey nor CMYK."""
    return _is_jpeg(data) and simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "RGB")


def _encoded_size(data: bytes) -> tuple[int, int]:
    """Reads height and width from the header, without decoding the image."""
    if _is_jpeg(data):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return height, width
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return image.height, image.width
    except (OSError, SyntaxError, EOFError) as error:
        # The message may hold the address of the bytes, which differs from run to run.
        raise ValueError("an image cannot be decoded") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"an image has more than {MAX_PIXELS} pixels") from error


def _check_pixels(height: int, width: int, limit: int) -> None:
    if height * width > limit:
        raise ValueError(f"an image of {width}x{height} pixels, which are more than the {limit} that are read")
