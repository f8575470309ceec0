"""Runs a latent-motion model over all frames of consecutive episodes: every frame is decoded and encoded once.

Frames come in batches of one size, across the borders of episodes. The encodings of the last few frames stay on the
device, since the motion that leads to a frame starts from one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from como_jax.data.reader import BatchReader
from como_jax.data.sampler import Samples
from como_jax.data.sources import READ_ERRORS
from como_jax.nn.model_def import ModelDef, Params
from como_jax.training import sharding
from como_jax.types import EncodedPair


@dataclasses.dataclass(frozen=True)
class StepLabels:
    """Labels of consecutive steps. Axes: S steps, Q latent tokens of L numbers.

    Attributes:
      latent: float32 `[S, Q, L]`, the motion from step t to the step one gap later; 0 where there is none.
      codes: int32 `[S, Q]`, -1 where there is none; None for models without codes.
      valid: bool `[S]`, whether the episode has a step one gap later and both frames can be read.
      unreadable: int64, the records whose image cannot be read.
    """

    latent: np.ndarray
    codes: np.ndarray | None
    valid: np.ndarray
    unreadable: np.ndarray


def steps_back(length: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """How many steps before each step starts the motion that leads to it, int64 `[S]`; 0 where there is none.

    Args:
      length: `[E]`, numbers of steps of consecutive episodes.
      gap: `[E]`, steps between the two frames of a pair.
    """
    within = np.concatenate([np.arange(steps) for steps in length])
    gaps = np.repeat(gap, length)
    return np.where(within >= gaps, gaps, 0)


class StreamLabeller:
    """Labels sequences of records; compiled once for all of them.

    The labels of a sequence do not depend on what was labelled before it.
    """

    def __init__(self, model: ModelDef, params: Params, mesh: Mesh, *, batch_size: int, max_gap: int):
        """Prepares the program.

        Args:
          model: any that is a `EncodedPairModel`.
          params: on the mesh.
          mesh: of this host's devices.
          batch_size: frames per batch; rounded up to a multiple of the mesh's batch axes.
          max_gap: the largest number of steps between two frames of a pair.
        """
        self._params, self._mesh, self._max_gap = params, mesh, max_gap
        parts = sharding.batch_shards(mesh)
        self.batch_size = -(-batch_size // parts) * parts
        whole = NamedSharding(mesh, PartitionSpec())
        self._step = sharding.jit_once(
            _step, mesh, model, max_gap, mesh, donate_argnums=1, out_shardings=(whole, whole)
        )
        self._embed = lambda params, frames: model.bind(params).encode_frame(frames)

    def __call__(self, reader: BatchReader, episode: np.ndarray, records: np.ndarray, back: np.ndarray) -> StepLabels:
        """Labels consecutive records `[S]` of the one dataset of a reader.

        Args:
          reader: decodes frames.
          episode: rows `[S]` of the records' episodes.
          records: `[S]`, consecutive.
          back: `[S]`, see `steps_back`.
        """
        chex.assert_equal_shape([episode, records, back])
        found: list[EncodedPair] = []
        readable: list[np.ndarray] = []
        carry, pending = self._no_frames(reader), None
        for frames, is_readable, part in self._batches(reader, episode, records, back):
            carry, label = self._step(self._params, carry, *self._place(frames, part))
            readable.append(is_readable)
            # Results are fetched one batch later, so that the devices do not wait for this host.
            if pending is not None:
                found.append(jax.tree.map(np.asarray, pending))
            pending = label
        found.append(jax.tree.map(np.asarray, pending))
        labels = jax.tree.map(lambda *batches: np.concatenate(batches)[: len(records)], *found)
        return _at_sources(labels, np.concatenate(readable)[: len(records)], records, back)

    def _place(self, frames: np.ndarray, back: np.ndarray) -> tuple[jax.Array, jax.Array]:
        rows = NamedSharding(self._mesh, sharding.BATCH_SPEC)
        return jax.device_put(np.ascontiguousarray(frames), rows), jax.device_put(back, rows)

    def _batches(
        self, reader: BatchReader, episode: np.ndarray, records: np.ndarray, back: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Frames, whether they are readable, and `back`, in batches of one size, decoded one batch ahead.

        The last batch is filled up by repeating its last frame, which is not decoded again.
        """
        size = self.batch_size
        back = back.astype(np.int32)

        def read(begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            rows = slice(begin, begin + size)
            frames, readable = read_frames(reader, single_frames(episode[rows], records[rows]))
            missing = size - len(frames)
            frames = np.pad(frames, [(0, missing), (0, 0), (0, 0), (0, 0)], mode="edge") if missing else frames
            return frames, np.pad(readable, (0, missing)), np.pad(back[rows], (0, missing))

        with ThreadPoolExecutor(1, thread_name_prefix="read") as ahead:
            waiting = [ahead.submit(read, 0)]
            for begin in range(0, len(records), size):
                if begin + size < len(records):
                    waiting.append(ahead.submit(read, begin + size))
                yield waiting.pop(0).result()

    def _no_frames(self, reader: BatchReader) -> Any:
        """The carry before the first frame; no label depends on it."""
        frames = jax.ShapeDtypeStruct((self._max_gap, *reader.image_shape), jnp.uint8)
        shapes = jax.eval_shape(self._embed, self._params, frames)
        whole = NamedSharding(self._mesh, PartitionSpec())
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=whole), shapes)


def _step(
    model: ModelDef, max_gap: int, mesh: Mesh, params: Params, carry: Any, frames: jax.Array, back: jax.Array
) -> tuple[Any, EncodedPair]:
    """The embedded frames that the next batch looks back at, and the motion that leads to each frame `[B]`."""
    rows, whole = NamedSharding(mesh, sharding.BATCH_SPEC), NamedSharding(mesh, PartitionSpec())
    motion = model.bind(params)
    embedded = motion.encode_frame(frames)
    window = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), carry, embedded)
    window = jax.lax.with_sharding_constraint(window, whole)
    source = jax.tree.map(lambda x: x[max_gap + jnp.arange(len(frames)) - back], window)
    label = motion.encode_pair(jax.lax.with_sharding_constraint(source, rows), embedded)
    return jax.tree.map(lambda x: x[len(frames) :], window), label


def read_frames(reader: BatchReader, frames: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[B, H, W, 3]` of `single_frames`, black where unreadable; and which are readable, bool `[B]`."""
    try:
        return reader.decode(frames)[0][:, 0, 0], np.ones(len(frames), bool)
    except READ_ERRORS:
        images, readable = np.zeros((len(frames), *reader.image_shape), np.uint8), np.zeros(len(frames), bool)
        for row in range(len(frames)):
            with contextlib.suppress(*READ_ERRORS):
                images[row] = reader.decode(frames[row : row + 1])[0][0, 0, 0]
                readable[row] = True
        return images, readable


def single_frames(episode: np.ndarray, records: np.ndarray) -> Samples:
    """Samples of one frame each, from records `[B]` of the first dataset, without augmentation."""
    count = len(records)
    return Samples(
        dataset=np.zeros(count, np.int64),
        episode=episode,
        gap=np.ones(count, np.int64),
        records=records[:, None],
        offsets=np.empty((count, 0), np.int64),
        crop=np.tile([1.0, 0.5, 0.5], (count, 1)),
        shift=np.zeros((count, 2), np.int64),
        text=np.zeros(count),
    )


def _at_sources(label: EncodedPair, readable: np.ndarray, records: np.ndarray, back: np.ndarray) -> StepLabels:
    """Moves every label from the step at which its motion ends to the step at which it starts."""
    targets = np.flatnonzero(back)
    targets = targets[readable[targets] & readable[targets - back[targets]]]
    sources = targets - back[targets]
    valid = np.zeros(len(back), bool)
    valid[sources] = True
    latent = np.zeros(label.latent.shape, np.float32)
    latent[sources] = label.latent[targets]
    codes = None
    if label.codes is not None:
        codes = np.full(label.codes.shape, -1, np.int32)
        codes[sources] = label.codes[targets]
    return StepLabels(latent, codes, valid, records[~readable])
