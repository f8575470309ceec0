"""Batches of samples through Grain: training streams, and batches that cover a dataset evenly.

A training batch is a function of the seed and its number alone. So any number of hosts and threads reads the same
stream, and the checkpoint of an iterator, which is that number, resumes it exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from como_jax.data.reader import Batch, BatchReader
from como_jax.data.sampler import ALL_ROWS, Augmentation, BatchSampler, Rows, Samples

_BATCHES_AHEAD = 2


class _NumberedBatches:
    """An endless random-access source of Grain: the samples of every batch, by its number."""

    def __init__(self, sampler: Callable[[int], Samples]):
        self._sampler = sampler

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: Any) -> Samples:
        return self._sampler(int(number))


def training_batches(config: ConfigDict, reader: BatchReader, rows: Rows = ALL_ROWS) -> grain.IterDataset:
    """The training stream of a config.

    Args:
      config: of a recipe; `seed` and the section `data` are used.
      reader: of the config's datasets.
      rows: of every batch, those that this host reads.
    """
    data = config.data
    augmentation = Augmentation(data.random_shift, data.min_crop_fraction)
    sampler = BatchSampler(reader.filler, augmentation, batch_size=data.batch_size, seed=config.seed, rows=rows)
    return stream_batches(sampler, reader, num_workers=data.num_workers)


def stream_batches(
    sampler: Callable[[int], Samples], reader: grain.transforms.Map, *, num_workers: int = 0
) -> grain.IterDataset:
    """An endless stream of batches, dictionaries of arrays.

    Args:
      sampler: gives the samples of a batch by its number.
      reader: makes a batch of samples, on its own threads in each process.
      num_workers: processes that read; with 0 this process reads.
    """
    batches = grain.MapDataset.source(_NumberedBatches(sampler)).map(reader)
    # One thread here, since the reader shares out a batch among its own: fewer batches lie in memory.
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD))
    if num_workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1))
    return stream


def evaluation_batches(
    reader: BatchReader, dataset: int = 0, *, num_samples: int, batch_size: int, rows: Rows = ALL_ROWS
) -> Iterator[tuple[Batch, int]]:
    """Batches of samples spread evenly over one dataset, without augmentation, each with its number of samples.

    The last batch is filled up by repeating its last sample. Only the first `count` rows of the batch of all hosts
    count; of the others the targets `has_action` and `has_latent` are 0.

    Args:
      reader: of one or several datasets.
      dataset: position of the dataset that is read.
      num_samples: all samples are read where there are fewer.
      batch_size: of all hosts together.
      rows: of every batch, those that this host reads.
    """
    available = reader.filler.num_samples[dataset]
    chosen = np.unique(np.linspace(0, available - 1, min(num_samples, available)).astype(np.int64))
    for begin in range(0, len(chosen), batch_size):
        numbers = chosen[begin : begin + batch_size]
        batch = reader.read(np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")[rows], dataset)
        for name in batch.keys() & {"has_action", "has_latent"}:
            batch[name][np.arange(batch_size)[rows] >= len(numbers)] = 0
        yield batch, len(numbers)
