"""The data contract: what a batch holds, with shapes, dtypes and units."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import chex
import jax
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FramePairs:
    """Several instants of one clip for every batch element.

    Consecutive instants are one gap apart, so that `instants` K give K - 1 frame pairs whose frames are each
    encoded once. Axes: B batch, K instants, P = K - 1 pairs, H and W pixels, A action.

    Attributes:
      frames: uint8 RGB `[B, K, H, W, 3]`; `frames[:, k]` is `O_t` and `frames[:, k + 1]` is `O_{t+n}` of pair k.
      offset_frames: uint8 RGB `[B, P, H, W, 3]`, `O_{t+n+d}` of every pair, or None when nothing needs it.
      action: float32 `[B, P, A]`, the mean of the true actions taken between the two frames of a pair, in the
        units of the dataset, or None.
      dataset: int32 `[B]`, the position of the dataset in the mixture.
      episode: int32 `[B]`, the episode's row in its dataset.
    """

    frames: Array
    offset_frames: Array | None
    action: Array | None
    dataset: Array
    episode: Array

    def check_shapes(self) -> None:
        """Raises AssertionError unless all shapes and dtypes agree."""
        batch, instants, height, width, _ = self.frames.shape
        chex.assert_shape(self.frames, (batch, instants, height, width, 3))
        chex.assert_type(self.frames, np.uint8)
        if self.offset_frames is not None:
            chex.assert_shape(self.offset_frames, (batch, instants - 1, height, width, 3))
            chex.assert_type(self.offset_frames, np.uint8)
        if self.action is not None:
            chex.assert_shape(self.action, (batch, instants - 1, None))
        chex.assert_shape([self.dataset, self.episode], (batch,))


class LatentMotionModel(Protocol):
    """What metrics, labels, reports and policies may assume of a latent-motion model of any family."""

    def encode(self, frames: Array) -> jax.Array:
        """Latent motion `[B, T - 1, Q, L]` between consecutive frames of uint8 `[B, T, H, W, 3]`."""

    def predict(self, frame: Array, latent: Array) -> jax.Array:
        """The frame, float32 in [0, 1] `[B, H, W, 3]`, that follows uint8 `frame` under `latent` `[B, Q, L]`."""

    def loss(self, batch: FramePairs, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and its terms, each a scalar, for a dashboard."""


def fake_frame_pairs(
    batch: int = 4, instants: int = 2, image_size: int = 16, action_size: int | None = None, offset: bool = True
) -> FramePairs:
    """Random frames of the right shapes, for tests and compilation."""
    rng = np.random.default_rng(0)

    def frames(count: int) -> np.ndarray:
        return rng.integers(0, 256, (batch, count, image_size, image_size, 3), dtype=np.uint8)

    pairs = instants - 1
    return FramePairs(
        frames=frames(instants),
        offset_frames=frames(pairs) if offset else None,
        action=None if action_size is None else rng.normal(size=(batch, pairs, action_size)).astype(np.float32),
        dataset=np.zeros(batch, np.int32),
        episode=np.arange(batch, dtype=np.int32),
    )
