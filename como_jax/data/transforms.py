"""Pure NumPy transforms of frames; every frame of a clip gets the same one."""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg


def decode_jpeg(data: bytes, size: int) -> np.ndarray:
    """Decodes to uint8 RGB `[size, size, 3]`: central square, then an area resize.

    Pictures more than twice as large are halved while decoding, which is cheaper and free of aliasing.

    Raises:
      ValueError: not a JPEG.
    """
    image = simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size)
    return resize(center_square(image), size)


def center_square(image: np.ndarray) -> np.ndarray:
    """The central square of `[H, W, C]`."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """A square `[S, S, C]` to `[size, size, C]`, without aliasing when it shrinks."""
    if image.shape[0] == size:
        return image
    interpolation = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=interpolation)


def random_shift(frames: np.ndarray, max_shift: int, rng: np.random.Generator) -> np.ndarray:
    """Shifts all frames `[T, H, W, C]` by one random offset of up to `max_shift` pixels, repeating the border."""
    if not max_shift:
        return frames
    down, right = rng.integers(-max_shift, max_shift + 1, size=2)
    height, width = frames.shape[1:3]
    rows = np.clip(np.arange(height) + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    return frames[:, rows[:, None], columns]
