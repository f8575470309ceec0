"""Images on their way into a dataset: decoding, scaling, JPEG, and how much they change from step to step."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
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


GREY = "the images are grey: their one channel became red, green and blue"
TRANSPARENT = "the images are partly transparent: their colours were taken, and the transparency was left out"
_ORIENTATION_TAG = 0x0112
# What is done to an image as it is stored, by its EXIF orientation.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}


class NotRgbError(ValueError):
    """An image is neither RGB nor grey with 8 bits a channel, so it may be a depth map."""


class Decoded(NamedTuple):
    """An upright RGB image, uint8 `[H, W, 3]`.

    Attributes:
      image: the image.
      note: what the user should know of how it became RGB, or ''.
    """

    image: np.ndarray
    note: str = ""


class Frame(NamedTuple):
    """An image of an episode as it is stored.

    Attributes:
      jpeg: the encoded image.
      size: height and width.
      thumbnail: see `thumbnail`.
      note: see `Decoded`.
    """

    jpeg: bytes
    size: tuple[int, int]
    thumbnail: np.ndarray
    note: str = ""


def make_frame(image: np.ndarray, shorter_side: int, note: str = "") -> Frame:
    """Scales an RGB image, uint8 `[H, W, 3]`, down until its shorter side fits, and encodes it."""
    small = shrink(image, shorter_side)
    return Frame(encode_jpeg(small), small.shape[:2], thumbnail(small), note)


def convert_stored(stored: bytes | np.ndarray, shorter_side: int) -> Frame:
    """Converts an encoded image, or uint8 `[H, W, C]` with 1, 3 or 4 channels (grey, RGB, RGBA).

    Colour JPEGs that are upright, and whose shorter side is small enough, are kept byte for byte.

    Raises:
      ValueError: the image is empty, damaged, larger than `MAX_STORED_PIXELS`, or has not 8 bits a channel.
    """
    if not isinstance(stored, bytes):
        image, note = to_rgb(stored, MAX_STORED_PIXELS)
        return make_frame(image, shorter_side, note)
    image, note = decode(stored, MAX_STORED_PIXELS)
    if min(image.shape[:2]) <= shorter_side and _is_colour_jpeg(stored) and _orientation(stored) == 1:
        return Frame(stored, image.shape[:2], thumbnail(image), note)
    return make_frame(image, shorter_side, note)


def make_episode(
    episode_id: str,
    source_file: str,
    control_rate: float,
    frames: Mapping[str, Sequence[Frame]],
    states: Sequence[np.ndarray] | None = None,
    actions: Sequence[np.ndarray] | None = None,
    language: str | Sequence[str] = "",
) -> Episode:
    """Builds an episode of T steps from T frames of every camera, and T states and actions, or None.

    `language` is the instruction, or all the instructions that there are for the same episode. Motion is measured on
    the first camera. See `schema.Episode` for the other fields.
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
    changes = motion([frame.thumbnail for frame in main])
    texts = [language] if isinstance(language, str) else language
    first, *others = dict.fromkeys(text.strip() for text in texts if text.strip()) or [""]
    return Episode(episode_id, source_file, control_rate, steps, changes, first, tuple(others), notes=_notes(frames))


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
    """Decodes an image as `decode` does, and returns only the image."""
    return decode(data, max_pixels).image


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decodes a JPEG, a PNG or another format that OpenCV reads, and turns it upright as its EXIF data ask.

    Raises:
      ValueError: the image is empty, damaged, of an unknown format, has more than `max_pixels` pixels, or has not
        8 bits a channel.
    """
    if not data:
        raise ValueError("the image is empty")
    _check_pixels(*_encoded_size(data), max_pixels)
    if _is_jpeg(data):
        is_grey = simplejpeg.decode_jpeg_header(data)[2] == "Gray"
        decoded = Decoded(simplejpeg.decode_jpeg(data, colorspace="RGB"), GREY if is_grey else "")
    else:
        try:
            stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            stored = None
        if stored is None:
            raise ValueError("an image cannot be decoded")
        # OpenCV puts blue first, and leaves out the last axis of a single channel.
        stored = stored[..., None] if stored.ndim == 2 else stored[..., [2, 1, 0, *range(3, stored.shape[2])]]
        decoded = to_rgb(stored, max_pixels)
    return Decoded(turn_upright(decoded.image, data), decoded.note)


def turn_upright(image: np.ndarray, data: bytes) -> np.ndarray:
    """Turns and mirrors an image as the EXIF data in its file ask."""
    turn = _TURNS.get(_orientation(data))
    return image if turn is None else np.ascontiguousarray(turn(image))


def to_rgb(image: np.ndarray, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Makes RGB of uint8 `[H, W, C]` with 1, 3 or 4 channels (grey, RGB, RGBA).

    Raises:
      NotRgbError: the array has another shape or another type, such as that of a depth map.
      ValueError: it is empty, or has too many pixels.
    """
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[-1] not in (1, 3, 4):
        what = f"an image has shape {image.shape} and type {image.dtype}"
        raise NotRgbError(f"{what}; images are [H, W, 3] and uint8, and others, such as depth maps, are not converted")
    if not image.size:
        raise ValueError("the image is empty")
    _check_pixels(*image.shape[:2], max_pixels)
    if image.shape[-1] == 1:
        return Decoded(np.repeat(image, 3, axis=-1), GREY)
    is_transparent = image.shape[-1] == 4 and image[..., 3].min() < np.iinfo(np.uint8).max
    return Decoded(np.ascontiguousarray(image[..., :3]), TRANSPARENT if is_transparent else "")


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Scales an image to uint8 `[32, 32, 3]` with an area filter, so that noise and compression average out."""
    return cv2.resize(image, (THUMBNAIL_SIZE, THUMBNAIL_SIZE), interpolation=cv2.INTER_AREA)


def motion(thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """Mean absolute difference of each thumbnail from the one before, float32 `[T]` in [0, 1]; the first is 0."""
    frames = np.stack(thumbnails).astype(np.float32) / 255
    differences = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    return np.concatenate([np.zeros(1, np.float32), differences])


def _notes(frames: Mapping[str, Sequence[Frame]]) -> tuple[str, ...]:
    """What the user should know of the images of an episode, by camera."""
    found = ((camera, frame.note) for camera, shown in frames.items() for frame in shown if frame.note)
    return tuple(f"camera {camera!r}: {note}" for camera, note in dict.fromkeys(found))


def _orientation(data: bytes) -> int:
    """Returns the EXIF orientation of an encoded image as OpenCV and simplejpeg decode it: 1 is upright."""
    # Those decoders turn a TIFF by themselves. Of the usual formats, most images have no such data at all.
    marks = {b"\xff\xd8": b"Exif\0\0", b"\x89P": b"eXIf", b"II": None, b"MM": None, b"BM": None, b"GI": None}
    mark = marks.get(data[:2], b"")
    if mark is None or mark not in data:
        return 1
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            return image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, EOFError, ValueError, struct.error, Image.DecompressionBombError):
        return 1


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
