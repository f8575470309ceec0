"""Pictures on their way into a dataset: scaling, JPEG, and how much they move."""

import struct

import cv2
import numpy as np
import simplejpeg

JPEG_QUALITY = 95
THUMBNAIL_SIZE = 32
# As for videos: a header can claim any size.
_MAX_PIXELS = 2**26


def shrink(image: np.ndarray, shorter_side: int) -> np.ndarray:
    """Scales uint8 `[H, W, 3]` down with an area filter until its shorter side fits; never scales up."""
    height, width = image.shape[:2]
    scale = shorter_side / min(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encode_jpeg(image: np.ndarray) -> bytes:
    """JPEG of an RGB picture, uint8 `[H, W, 3]`, without colour subsampling."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"
    )


def decode_image(data: bytes) -> np.ndarray:
    """RGB uint8 `[H, W, 3]` of a JPEG, PNG or whatever else OpenCV reads.

    Raises:
      ValueError: the picture is damaged, of an unknown format, or larger than 2**26 pixels.
    """
    if is_jpeg(data):
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        _check_pixels(width, height)
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        _check_pixels(*struct.unpack(">II", data[16:24]))
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error:
        bgr = None
    if bgr is None:
        raise ValueError("a picture cannot be decoded")
    return np.ascontiguousarray(bgr[..., ::-1])


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise ValueError(f"a picture of {width}x{height} pixels, which are more than the {_MAX_PIXELS} that are read")


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes start like a JPEG file."""
    return data[:3] == b"\xff\xd8\xff"


def is_colour_jpeg(data: bytes) -> bool:
    """Whether the bytes are a JPEG with three colour channels, neither grey nor CMYK."""
    return is_jpeg(data) and simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "RGB")


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The picture as uint8 `[32, 32, 3]`, area-filtered, so that noise and compression average out."""
    return cv2.resize(image, (THUMBNAIL_SIZE, THUMBNAIL_SIZE), interpolation=cv2.INTER_AREA)


def motion(thumbnails: list[np.ndarray]) -> np.ndarray:
    """Mean absolute difference from the thumbnail before, float32 `[T]` in [0, 1]; the first is 0."""
    frames = np.stack(thumbnails).astype(np.float32) / 255
    differences = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    return np.concatenate([np.zeros(1, np.float32), differences])
