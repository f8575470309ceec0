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
    """A batch of clips, each of several evenly spaced instants.

    Two neighbouring instants are a pair of frames; with a `data.pair_span` over 1, instants further apart are pairs
    too. Every instant is encoded once, however many pairs it belongs to. Axes: B batch, K instants, P = K - 1 pairs of
    neighbours, H and W pixels, S numbers of true motion.

    Attributes:
      frames: uint8 RGB `[B, K, H, W, 3]`; pair k of neighbours is `frames[:, k]`, `O_t`, and `frames[:, k + 1]`,
        `O_{t+n}`.
      dataset: int32 `[B]`, the position of the dataset in the mixture.
      episode: int32 `[B]`, the episode's row in its dataset.
      offset_frames: uint8 RGB `[B, P, H, W, 3]`, `O_{t+n+d}` of all instants but the first, or None.
      gap: float32 `[B]`, time between two neighbours as a share of `data.gap_seconds`, or None.
      flow: float32 `[B, P, H / 4, W / 4, 2]`, optical flow from the first to the second frame of a pair, right and
        down, as shares of the image's width, or None.
      supervision: float32 `[B, P, S]`, what little is known of the true motion of a pair (see
        `como_jax.data.supervision`), or None.
      has_supervision: float32 `[B, P, S]`, 1 where `supervision` holds a number and 0 where it is unknown, or None.
    """

    frames: Array
    dataset: Array
    episode: Array
    offset_frames: Array | None = None
    gap: Array | None = None
    flow: Array | None = None
    supervision: Array | None = None
    has_supervision: Array | None = None

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
        if self.supervision is not None:
            chex.assert_shape(self.supervision, (batch, instants - 1, None))
            chex.assert_equal_shape([self.supervision, self.has_supervision])
        chex.assert_shape([self.dataset, self.episode, *([] if self.gap is None else [self.gap])], (batch,))


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """Which optional fields of `FramePairs` the loss of a model reads; the data prepares no others."""

    offset_frames: bool = False
    flow: bool = False
    supervision: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
    """What a policy sees. Axes: B batch, T instants of history, C cameras, H and W pixels, S state, M text tokens.

    Attributes:
      images: uint8 RGB `[B, T, C, H, W, 3]`; the last instant is now.
      has_camera: float32 `[B, C]`, 0 where the dataset lacks the camera and its image is black.
      state: float32 `[B, T, S]`, normalised proprioception, or None when the policy has none.
      has_state: float32 `[B]`, 0 where the dataset has no state, or None.
      text: int32 `[B, M]`, ids of the instruction's tokens plus one, 0 after its end, or None.
      text_embedding: float32 `[B, E]`, a precomputed embedding of the instruction, or None.
    """

    images: Array
    has_camera: Array
    state: Array | None = None
    has_state: Array | None = None
    text: Array | None = None
    text_embedding: Array | None = None

    def check_shapes(self) -> None:
        """Raises AssertionError unless all shapes and dtypes agree."""
        batch, instants, cameras, height, width, _ = self.images.shape
        chex.assert_shape(self.images, (batch, instants, cameras, height, width, 3))
        chex.assert_type(self.images, np.uint8)
        chex.assert_shape(self.has_camera, (batch, cameras))
        if self.state is not None:
            chex.assert_shape(self.state, (batch, instants, None))
            chex.assert_shape(self.has_state, (batch,))
        if self.text is not None:
            chex.assert_shape(self.text, (batch, None))
        if self.text_embedding is not None:
            chex.assert_shape(self.text_embedding, (batch, None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Observations and what followed: true actions, latent motion, or both.

    The targets cover every step from the first instant of the history to the end of the chunk that starts now. With
    T instants, `stride` steps apart, and chunks of H steps they are `W = (T - 1) * stride + H` steps, and the chunk
    that starts at instant i is `[i * stride : i * stride + H]`. Axes: A action, Q latent tokens, L size of one.

    Attributes:
      observation: what is seen.
      action: float32 `[B, W, A]`, normalised by dataset.
      has_action: float32 `[B, W, A]`, 0 past the end of the episode, in dimensions that the dataset's actions lack,
        and everywhere in data without actions.
      latent: float32 `[B, W, Q * L]`, the normalised motion from a step to the step one gap later, or None when no
        dataset is labelled.
      has_latent: float32 `[B, W]`, 0 where a step has no label, or None.
      codes: int32 `[B, W, Q]`, the numbers of the latent's codes where labels are discrete, or None.
      dataset: int32 `[B]`, the position of the dataset in the mixture.
      episode: int32 `[B]`, the episode's row in its dataset.
    """

    observation: Observation
    action: Array
    has_action: Array
    latent: Array | None
    has_latent: Array | None
    codes: Array | None
    dataset: Array
    episode: Array

    def check_shapes(self) -> None:
        """Raises AssertionError unless all shapes agree."""
        self.observation.check_shapes()
        batch, window, _ = self.action.shape
        chex.assert_equal_shape([self.action, self.has_action])
        if self.latent is not None:
            chex.assert_shape(self.latent, (batch, window, None))
            chex.assert_shape(self.has_latent, (batch, window))
        if self.codes is not None:
            chex.assert_shape(self.codes, (batch, window, None))
        chex.assert_shape([self.dataset, self.episode], (batch,))


class LossOutput(NamedTuple):
    """The result of a model's loss.

    Attributes:
      total: scalar to minimise.
      terms: scalars for a dashboard.
      statistics: batch statistics that `update_codebook` reads after the update, such as the usage of each code. They
        are means over the batch, so that those of microbatches average to those of the batch. Empty for most models.
    """

    total: jax.Array
    terms: dict[str, jax.Array]
    statistics: dict[str, Any] = {}


class EncodedPair(NamedTuple):
    """Latent motion of pairs of frames, `[B, Q, L]`, and the numbers of its codes if it is discrete, int32 `[B, Q]`."""

    latent: jax.Array
    codes: jax.Array | None


class LatentMotionModel(Protocol):
    """What metrics, labelling, reports and exports may assume of a latent motion model of any family."""

    def encode(self, frames: Array) -> jax.Array:
        """Latent motion `[B, T - 1, Q, L]` between consecutive frames of uint8 `[B, T, H, W, 3]`."""

    def encode_frame(self, frames: Array) -> Any:
        """The part of `encode` that needs one frame alone: a tree of arrays `[B, ...]` from uint8 `[B, H, W, 3]`.

        So each frame is encoded once, however many pairs it belongs to.
        """

    def encode_pair(self, source: Any, target: Any) -> EncodedPair:
        """The motion from each source to its target, both as `encode_frame` gives them."""

    def predict(self, frame: Array, latent: Array) -> jax.Array:
        """The frame, float32 in [0, 1] `[B, H, W, 3]`, that follows uint8 `frame` under `latent` `[B, Q, L]`."""

    def loss(self, batch: FramePairs, key: jax.Array) -> LossOutput:
        """The loss of a batch; the key draws what training draws."""

    def update_codebook(
        self, statistics: dict[str, Any], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Updates the codebook after a step of the optimiser; called only if `loss` gave statistics.

        Args:
          statistics: those of `loss`, averaged over the whole batch.
          step: int32 scalar, updates done.
          key: draws the replacements of codes.

        Returns:
          Parameters that replace the model's own, nested by module name, and scalars for a dashboard.
        """


class Policy(Protocol):
    """What training, rollouts and exports may assume of a policy of any family."""

    def loss(self, batch: PolicyBatch, key: jax.Array) -> LossOutput:
        """The loss of a batch; the key draws what training draws."""

    def sample_actions(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """Chunks of normalised actions, float32 `[B, H, A]`; the first action is for the current step.

        Args:
          observation: of B independent samples.
          keys: `[B]`, one for each sample, so that its actions do not depend on the rest of the batch.
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
        supervision=None if label_size is None else normal(batch, pairs, label_size),
        has_supervision=None if label_size is None else np.ones((batch, pairs, label_size), np.float32),
    )


def fake_policy_batch(
    batch: int = 4,
    *,
    instants: int = 1,
    stride: int = 1,
    cameras: int = 1,
    image_size: int = 16,
    chunk: int = 4,
    action_size: int = 3,
    state_size: int | None = 2,
    text_length: int = 8,
    latent_shape: tuple[int, int] | None = (2, 3),
    codebook_size: int | None = None,
) -> PolicyBatch:
    """Random numbers of the right shapes: the first half has actions, the second half latent motion."""
    rng = np.random.default_rng(0)
    window = (instants - 1) * stride + chunk

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    is_robot = (np.arange(batch) < (batch + 1) // 2).astype(np.float32)
    text = rng.integers(1, 256, (batch, text_length), dtype=np.int32)
    text[:, text_length // 2 :] *= (np.arange(batch) % 2)[:, None]
    observation = Observation(
        images=rng.integers(0, 256, (batch, instants, cameras, image_size, image_size, 3), dtype=np.uint8),
        has_camera=np.ones((batch, cameras), np.float32),
        state=None if state_size is None else normal(batch, instants, state_size) * is_robot[:, None, None],
        has_state=None if state_size is None else is_robot,
        text=text,
    )
    queries, size = latent_shape or (0, 0)
    return PolicyBatch(
        observation=observation,
        action=normal(batch, window, action_size) * is_robot[:, None, None],
        has_action=np.broadcast_to(is_robot[:, None, None], (batch, window, action_size)).copy(),
        latent=None if latent_shape is None else normal(batch, window, queries * size),
        has_latent=None if latent_shape is None else np.repeat(1 - is_robot[:, None], window, axis=1),
        codes=None if codebook_size is None else rng.integers(0, codebook_size, (batch, window, queries), np.int32),
        dataset=(1 - is_robot).astype(np.int32),
        episode=np.arange(batch, dtype=np.int32),
    )
