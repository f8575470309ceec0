"""Optical flow against images whose motion is known."""

import cv2
import numpy as np
import pytest

from como_jax.data.motion_data import optical_flow


@pytest.fixture(scope="module")
def texture() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (0, -2), (2, 4)])
def test_a_shifted_image_flows_by_the_shift(texture: np.ndarray, right: int, down: int) -> None:
    first, second = texture[16:80, 16:80], texture[16 - down : 80 - down, 16 - right : 80 - right]
    flow = optical_flow(np.ascontiguousarray(first), np.ascontiguousarray(second))
    assert flow.shape == (16, 16, 2) and flow.dtype == np.float32
    np.testing.assert_allclose(np.median(64 * flow, axis=(0, 1)), [right, down], atol=0.1)


def test_only_what_moves_flows(texture: np.ndarray) -> None:
    background = np.ascontiguousarray(texture[:64, :64])
    first, second = background.copy(), background.copy()
    patch = 255 - texture[30:46, 30:46]
    first[8:24, 8:24], second[8:24, 11:27] = patch, patch
    flow = 64 * optical_flow(first, second)
    np.testing.assert_allclose(np.median(flow[3:5, 3:5], axis=(0, 1)), [3, 0], atol=1.0)
    np.testing.assert_allclose(flow[10:, 10:], 0, atol=0.1)
