"""The input pipeline: numbers of batches, what is in them, their frames, prefetched, in Grain.

A batch is a function of the seed and its number alone, so that any number of hosts and threads reads the same stream
and a checkpoint of the iterator, which is that number, resumes it exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from como_jax.data.frames import FrameReader
from como_jax.data.mixture import MixturePart
from como_jax.data.samples import ALL_ROWS, Rows, draw_samples
from como_jax.types import FramePairs

_BATCHES_AHEAD = 2


class _SampleSource:
    """Batches by their number as an endless random-access source of Grain."""

    def __init__(self, samples: Callable[[int], Any]):
        self._samples = samples

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: Any) -> Any:
        return self._samples(int(number))


def train_batches(
    samples: Callable[[int], Any], reader: grain.transforms.Map, *, num_workers: int = 0
) -> grain.IterDataset:
    """An endless stream of this host's part of every batch, as dictionaries of arrays.

    Args:
      samples: what is in a batch, by its number.
      reader: how it is read, on how many threads of each process.
      num_workers: reading processes; 0 reads in threads of this one.
    """
    batches = grain.MapDataset.source(_SampleSource(samples)).map(reader)
    # One thread here, since the reader shares out a batch among its own: fewer batches lie in memory.
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD))
    if num_workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1))
    return stream


def read_clips(part: MixturePart, reader: FrameReader, clips: np.ndarray) -> dict[str, np.ndarray]:
    """Clips `[B]` of the one dataset of a reader, without augmentation."""
    return reader.map(draw_samples([part], np.zeros(len(clips), np.int64), clips, np.random.default_rng(0)))


def evaluation_batches(
    part: MixturePart,
    reader: FrameReader,
    *,
    num_clips: int,
    batch_size: int,
    rows: Rows = ALL_ROWS,
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Some rows of batches over clips spread evenly over one source, and each batch's count of clips.

    The last batch is filled up by repeating its last clip; only the first `count` rows of the global batch count.
    """
    chosen = np.unique(np.linspace(0, len(part.index) - 1, min(num_clips, len(part.index))).astype(np.int64))
    for begin in range(0, len(chosen), batch_size):
        clips = chosen[begin : begin + batch_size]
        padded = np.pad(clips, (0, batch_size - len(clips)), mode="edge")
        yield read_clips(part, reader, padded[rows]), len(clips)


def to_frame_pairs(batch: dict[str, Any]) -> FramePairs:
    """Names the arrays of a batch."""
    optional = ("offset_frames", "gap", "flow", "labels", "labelled")
    return FramePairs(
        frames=batch["frames"],
        dataset=batch["dataset"],
        episode=batch["episode"],
        **{name: batch.get(name) for name in optional},
    )
