"""The data contract: what a batch holds, with shapes, dtypes and units."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import chex
import jax
import numpy as np

Array = jax.Array | np.ndarray

FLOW_STRIDE = 4
"""Pixels along one side of a cell of a flow map."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FramePairs:
    """Several instants of one clip for every batch element.

    Consecutive instants are one gap apart, so that `instants` K give K - 1 frame pairs whose frames are each
    encoded once. Axes: B batch, K instants, P = K - 1 pairs, H and W pixels, S label.

    Attributes:
      frames: uint8 RGB `[B, K, H, W, 3]`; `frames[:, k]` is `O_t` and `frames[:, k + 1]` is `O_{t+n}` of pair k.
      dataset: int32 `[B]`, the position of the dataset in the mixture.
      episode: int32 `[B]`, the episode's row in its dataset.
      offset_frames: uint8 RGB `[B, P, H, W, 3]`, `O_{t+n+d}` of every pair, or None when nothing needs it.
      gap: float32 `[B]`, time between two instants as a share of `data.gap_seconds`, or None when nothing needs it.
      flow: float32 `[B, P, H / 4, W / 4, 2]`, optical flow from the first to the second frame of a pair, right and
        down, in shares of the picture's width, or None.
      labels: float32 `[B, P, S]`, what little is known of the true motion (see `como_jax.data.labels`), or None.
      labelled: float32 `[B, P, S]`, 1 where `labels` holds a number and 0 where it is unknown, or None.
    """

    frames: Array
    dataset: Array
    episode: Array
    offset_frames: Array | None = None
    gap: Array | None = None
    flow: Array | None = None
    labels: Array | None = None
    labelled: Array | None = None

    def check_shapes(self) -> None:
        """Raises AssertionError unless all shapes and dtypes agree."""
        batch, instants, height, width, _ = self.frames.shape
        chex.assert_shape(self.frames, (batch, instants, height, width, 3))
        chex.assert_type(self.frames, np.uint8)
        if self.offset_frames is not None:
            chex.assert_shape(self.offset_frames, (batch, instants - 1, height, width, 3))
            chex.assert_type(self.offset_frames, np.uint8)
        if self.flow is not None:
            chex.assert_shape(self.flow, (batch, instants - 1, height // FLOW_STRIDE, width // FLOW_STRIDE, 2))
        if self.labels is not None:
            chex.assert_shape(self.labels, (batch, instants - 1, None))
            chex.assert_equal_shape([self.labels, self.labelled])
        chex.assert_shape([self.dataset, self.episode, *([] if self.gap is None else [self.gap])], (batch,))


class LossOutput(NamedTuple):
    """What a model's loss gives.

    Attributes:
      total: scalar, what is minimised.
      terms: scalars for a dashboard.
      statistics: batch statistics that `maintain` reads after the update, such as the usage of a codebook: means over
        the batch, so that those of microbatches average to those of the batch. Empty for most models.
    """

    total: jax.Array
    terms: dict[str, jax.Array]
    statistics: dict[str, Any] = {}


class MotionLabel(NamedTuple):
    """Latent motion `[B, Q, L]`, and where it is discrete the numbers of its codes, int32 `[B, Q]`."""

    latent: jax.Array
    codes: jax.Array | None


class LatentMotionModel(Protocol):
    """What metrics, labels, reports and policies may assume of a latent-motion model of any family."""

    def encode(self, frames: Array) -> jax.Array:
        """Latent motion `[B, T - 1, Q, L]` between consecutive frames of uint8 `[B, T, H, W, 3]`."""

    def embed(self, frames: Array) -> Any:
        """All that can be computed of each frame alone, uint8 `[B, H, W, 3]`: a tree of arrays `[B, ...]`."""

    def label(self, source: Any, target: Any) -> MotionLabel:
        """The motion from each source to its target, both as `embed` gives them."""

    def predict(self, frame: Array, latent: Array) -> jax.Array:
        """The frame, float32 in [0, 1] `[B, H, W, 3]`, that follows uint8 `frame` under `latent` `[B, Q, L]`."""

    def loss(self, batch: FramePairs, key: jax.Array) -> LossOutput:
        """What is minimised, and its terms."""

    def maintain(
        self, statistics: dict[str, Any], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Upkeep after an update, called where `loss` gave statistics.

        Args:
          statistics: of the whole batch.
          step: int32 scalar, updates done.
          key: draws what upkeep draws.

        Returns:
          Parameters to put in place of the model's own, nested by module name, and scalars for a dashboard.
        """


def fake_frame_pairs(
    batch: int = 4,
    instants: int = 2,
    image_size: int = 16,
    *,
    offset: bool = True,
    flow: bool = False,
    label_size: int | None = None,
) -> FramePairs:
    """Random numbers of the right shapes, for tests and compilation."""
    rng = np.random.default_rng(0)

    def frames(count: int) -> np.ndarray:
        return rng.integers(0, 256, (batch, count, image_size, image_size, 3), dtype=np.uint8)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    pairs, cells = instants - 1, image_size // FLOW_STRIDE
    return FramePairs(
        frames=frames(instants),
        offset_frames=frames(pairs) if offset else None,
        dataset=np.zeros(batch, np.int32),
        episode=np.arange(batch, dtype=np.int32),
        gap=np.linspace(0.5, 1.0, batch, dtype=np.float32),
        flow=0.1 * normal(batch, pairs, cells, cells, 2) if flow else None,
        labels=None if label_size is None else normal(batch, pairs, label_size),
        labelled=None if label_size is None else np.ones((batch, pairs, label_size), np.float32),
    )
