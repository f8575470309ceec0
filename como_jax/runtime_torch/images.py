"""Pictures of any size to the square frames that a model was trained on, with the filters of training."""

from __future__ import annotations

import cv2
import numpy as np

# Below this ratio training shrinks by a bilinear filter, above it by the mean of an area.
_MAX_BILINEAR_RATIO = 1.5


def fit_frames(frames: np.ndarray, size: int, fit: str) -> np.ndarray:
    """uint8 pictures `[..., H, W, 3]` as frames `[..., size, size, 3]`, as training makes them of decoded pictures.

    The central square of a picture becomes a frame ("crop"), or all of it, distorted ("stretch").

    Training also halves JPEGs that are more than twice as large while it decodes them, with the decoder's own filter.
    """
    if frames.shape[-3:] == (size, size, 3):
        return frames
    pictures = frames.reshape(-1, *frames.shape[-3:])
    fitted = np.empty((len(pictures), size, size, 3), np.uint8)
    for picture, frame in zip(pictures, fitted, strict=True):
        _fit(picture, frame, fit)
    return fitted.reshape(*frames.shape[:-3], size, size, 3)


def _fit(picture: np.ndarray, frame: np.ndarray, fit: str) -> None:
    """Fills `frame` `[S, S, 3]`."""
    size, (height, width) = len(frame), picture.shape[:2]
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        picture = picture[top : top + side, left : left + side]
    ratio = max(picture.shape[:2]) / size
    interpolation = cv2.INTER_LINEAR if ratio < _MAX_BILINEAR_RATIO else cv2.INTER_AREA
    cv2.resize(np.ascontiguousarray(picture), (size, size), dst=frame, interpolation=interpolation)
