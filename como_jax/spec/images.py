"""Images of any size to the square frames that a model sees; robots and training use the same filters."""

from __future__ import annotations

import cv2
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Statistics of ImageNet's RGB values in [0, 1], with which MAE and CoMo normalise pixels."""

FITS = ("crop", "stretch")
"""How an image becomes square: "crop" takes its central square, "stretch" takes all of it and distorts it."""

# Below this ratio a bilinear filter of two by two pixels misses hardly any of them, and costs a fifth of averaging.
_MAX_BILINEAR_RATIO = 1.5


def fit_frames(images: np.ndarray, size: int, fit: str) -> np.ndarray:
    """uint8 images `[..., H, W, 3]` as frames `[..., size, size, 3]`.

    Training also halves JPEGs that are more than twice as large while it decodes them, with the decoder's own filter.

    Args:
      images: of one size; returned as they are where they have the wanted size already.
      size: side of the frames.
      fit: one of `FITS`.
    """
    if images.shape[-3:] == (size, size, 3):
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    frames = np.empty((len(flat), size, size, 3), np.uint8)
    for image, frame in zip(flat, frames, strict=True):
        resize(fitting_part(image, fit), frame)
    return frames.reshape(*images.shape[:-3], size, size, 3)


def fitting_part(image: np.ndarray, fit: str) -> np.ndarray:
    """The part of an image `[H, W, C]` that becomes a frame; `fit` is one of `FITS`."""
    if fit == "stretch":
        return image
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def resize(image: np.ndarray, frame: np.ndarray) -> None:
    """Fills `frame` `[S, S, C]` with all of the image `[H, W, C]`, without aliasing where it shrinks."""
    if image.shape == frame.shape:
        np.copyto(frame, image)
        return
    size = len(frame)
    ratio = max(image.shape[:2]) / size
    interpolation = cv2.INTER_LINEAR if ratio < _MAX_BILINEAR_RATIO else cv2.INTER_AREA
    # OpenCV takes no negative strides, which reversed images of cameras have.
    cv2.resize(np.ascontiguousarray(image), (size, size), dst=frame, interpolation=interpolation)
