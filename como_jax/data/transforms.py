"""JPEGs to square frames, with the random crops and shifts of training, in NumPy, OpenCV and libjpeg-turbo."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from como_jax.spec.images import FITS, fitting_part, resize


class Crop(NamedTuple):
    """The part of an image that becomes a frame, and its shift; all frames of a clip have the same crop.

    Attributes:
      fit: one of `como_jax.spec.images.FITS`.
      scale: side of the part, as a share of the side of what `fit` keeps of the image.
      top, left: where the part lies, as shares of the room that `scale` leaves.
      down, right: shift in pixels of the frame; the border's pixels are repeated where the shift leaves a gap.
    """

    fit: str = FITS[0]
    scale: float = 1.0
    top: float = 0.5
    left: float = 0.5
    down: int = 0
    right: int = 0


WHOLE = Crop()


class FrameDecoder:
    """Decodes JPEGs to frames. It keeps its working memory, so each thread needs a decoder of its own."""

    def __init__(self) -> None:
        self._pixels = np.empty(0, np.uint8)
        self._frame = np.empty(0, np.uint8)

    def __call__(self, data: bytes, frame: np.ndarray, crop: Crop = WHOLE) -> None:
        """Fills `frame`, uint8 RGB `[S, S, 3]`, with the part of an image that `crop` names.

        Images more than twice as large are halved while decoding, which is cheaper and free of aliasing.

        Raises:
          ValueError: not a JPEG.
        """
        size = len(frame)
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if self._pixels.size < height * width * 3:
            self._pixels = np.empty(height * width * 3, np.uint8)
        needed = round(size / crop.scale)
        # Fresh memory for every image would cost a third of the decoding.
        image = simplejpeg.decode_jpeg(
            data, "RGB", min_height=needed, min_width=needed, min_factor=2, buffer=self._pixels
        )
        part = cut(image, crop)
        if crop.down or crop.right:
            if self._frame.shape != frame.shape:
                self._frame = np.empty(frame.shape, np.uint8)
            resize(part, self._frame)
            shift(self._frame, crop.down, crop.right, frame)
        else:
            resize(part, frame)


def decode_jpeg(data: bytes, size: int, crop: Crop = WHOLE) -> np.ndarray:
    """One image as a frame, uint8 RGB `[size, size, 3]`; see `FrameDecoder`.

    Raises:
      ValueError: not a JPEG.
    """
    frame = np.empty((size, size, 3), np.uint8)
    FrameDecoder()(data, frame, crop)
    return frame


def cut(image: np.ndarray, crop: Crop) -> np.ndarray:
    """The part of an image `[H, W, C]` that a crop names, without its shift."""
    whole = fitting_part(image, crop.fit)
    height, width = whole.shape[:2]
    rows, columns = max(1, round(height * crop.scale)), max(1, round(width * crop.scale))
    top, left = round((height - rows) * crop.top), round((width - columns) * crop.left)
    return whole[top : top + rows, left : left + columns]


def shift(source: np.ndarray, down: int, right: int, frame: np.ndarray) -> None:
    """Fills `frame` so that `frame[y, x]` is `source[y + down, x + right]`, or the nearest pixel of the source."""
    height, width = source.shape[:2]
    inner = source[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
    borders = max(0, -down), max(0, down), max(0, -right), max(0, right)
    cv2.copyMakeBorder(inner, *borders, cv2.BORDER_REPLICATE, dst=frame)
