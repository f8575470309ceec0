"""Pictures to square frames: decode, crop, resize, shift, in plain NumPy, OpenCV and libjpeg-turbo."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

FITS = ("crop", "stretch")
"""How a picture becomes square: its central square, or all of it, distorted."""

# Below this ratio a bilinear filter of two by two pixels misses none of them by much, and costs a fifth of area's.
_MAX_BILINEAR_RATIO = 1.5


class View(NamedTuple):
    """The part of a picture that becomes a frame; all frames of a clip have the same.

    Attributes:
      fit: one of `FITS`.
      scale: side of the part, as a share of the fitted picture's.
      top, left: where the part lies, as shares of the room that `scale` leaves.
      down, right: shift in pixels of the frame; what comes in at the border repeats it.
    """

    fit: str = FITS[0]
    scale: float = 1.0
    top: float = 0.5
    left: float = 0.5
    down: int = 0
    right: int = 0


WHOLE = View()


class FrameDecoder:
    """Decodes JPEGs to frames. Keeps its working memory, so each thread needs a decoder of its own."""

    def __init__(self) -> None:
        self._pixels = np.empty(0, np.uint8)
        self._frame = np.empty(0, np.uint8)

    def __call__(self, data: bytes, frame: np.ndarray, view: View = WHOLE) -> None:
        """Fills `frame`, uint8 RGB `[S, S, 3]`, with the part of a picture that `view` names.

        Pictures more than twice as large are halved while decoding, which is cheaper and free of aliasing.

        Raises:
          ValueError: not a JPEG.
        """
        size = len(frame)
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if self._pixels.size < height * width * 3:
            self._pixels = np.empty(height * width * 3, np.uint8)
        needed = round(size / view.scale)
        # Fresh memory for every picture would cost a third of the decoding.
        picture = simplejpeg.decode_jpeg(
            data, "RGB", min_height=needed, min_width=needed, min_factor=2, buffer=self._pixels
        )
        part = cut(picture, view)
        if view.down or view.right:
            if self._frame.shape != frame.shape:
                self._frame = np.empty(frame.shape, np.uint8)
            resize(part, self._frame)
            shift(self._frame, view.down, view.right, frame)
        else:
            resize(part, frame)


def decode_jpeg(data: bytes, size: int, view: View = WHOLE) -> np.ndarray:
    """One picture as a frame, uint8 RGB `[size, size, 3]`; see `FrameDecoder`.

    Raises:
      ValueError: not a JPEG.
    """
    frame = np.empty((size, size, 3), np.uint8)
    FrameDecoder()(data, frame, view)
    return frame


def cut(picture: np.ndarray, view: View) -> np.ndarray:
    """The part of `[H, W, C]` that a view names, without its shift."""
    height, width = picture.shape[:2]
    if view.fit == "crop":
        height = width = min(height, width)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    rows, columns = max(1, round(height * view.scale)), max(1, round(width * view.scale))
    top, left = top + round((height - rows) * view.top), left + round((width - columns) * view.left)
    return picture[top : top + rows, left : left + columns]


def resize(picture: np.ndarray, frame: np.ndarray) -> None:
    """Fills `frame` `[S, S, C]` with all of `[H, W, C]`, without aliasing when it shrinks."""
    size = len(frame)
    if picture.shape == frame.shape:
        np.copyto(frame, picture)
        return
    ratio = max(picture.shape[:2]) / size
    interpolation = cv2.INTER_LINEAR if ratio < _MAX_BILINEAR_RATIO else cv2.INTER_AREA
    cv2.resize(picture, (size, size), dst=frame, interpolation=interpolation)


def shift(source: np.ndarray, down: int, right: int, frame: np.ndarray) -> None:
    """Fills `frame` so that `frame[y, x]` is `source[y + down, x + right]`, or the nearest pixel there is."""
    height, width = source.shape[:2]
    inner = source[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
    borders = max(0, -down), max(0, down), max(0, -right), max(0, right)
    cv2.copyMakeBorder(inner, *borders, cv2.BORDER_REPLICATE, dst=frame)
