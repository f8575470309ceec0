"""Dense optical flow of frame pairs, a target that needs no weights and no labels."""

from __future__ import annotations

import chex
import cv2
import numpy as np

from como_jax.types import FLOW_STRIDE


def optical_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Optical flow by dense inverse search (DIS, arXiv 1603.03590).

    Args:
      first, second: uint8 RGB `[S, S, 3]`, S a multiple of `FLOW_STRIDE`.

    Returns:
      float32 `[S / 4, S / 4, 2]`, the mean displacement of every cell from `first` to `second`, right and down, in
      shares of the picture's width.
    """
    chex.assert_equal_shape([first, second])
    size = first.shape[0]
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    # Made anew: an estimator keeps buffers, which the threads of a loader must not share.
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = estimator.calc(gray[0], gray[1], np.zeros((size, size, 2), np.float32))
    cells = flow.reshape(size // FLOW_STRIDE, FLOW_STRIDE, size // FLOW_STRIDE, FLOW_STRIDE, 2)
    return (cells.mean(axis=(1, 3)) / size).astype(np.float32)
