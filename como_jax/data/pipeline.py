"""The input pipeline: mixture, shuffle, host shard, decode, augment, batch, prefetch, all in Grain.

Every element is a function of the seed and its position alone, so that any number of hosts and threads reads
the same stream and a checkpoint of the iterator resumes it exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from como_jax.data import transforms
from como_jax.data.clips import ClipConfig, ClipIndex, draw_gap, draw_offset, index_clips
from como_jax.data.flow import optical_flow
from como_jax.data.labels import Labels
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError
from como_jax.types import FramePairs


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One dataset and its share of the samples, relative to the other weights."""

    directory: str
    weight: float = 1.0


def parse_mixture(text: str) -> tuple[MixtureEntry, ...]:
    """Parses `DIR[=WEIGHT],DIR[=WEIGHT],...`.

    Raises:
      DatasetError: nothing is named, or a weight is not a positive number.
    """
    entries = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        directory, _, weight = item.rpartition("=") if "=" in item else (item, "", "1")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise DatasetError(f"{item!r}: the weight after '=' must be a positive number.")
        entries.append(MixtureEntry(directory, value))
    if not entries:
        raise DatasetError("No dataset is named; pass --data DIR[=WEIGHT],DIR[=WEIGHT].")
    return tuple(entries)


class ClipLoader(grain.transforms.RandomMap):
    """Reads, decodes and augments the frames of one clip, given `(dataset, clip)` numbers."""

    def __init__(
        self,
        sources: Sequence[EpisodeSource],
        indices: Sequence[ClipIndex],
        config: ClipConfig,
        image_size: int,
        random_shift: int = 0,
        *,
        actions: bool = False,
        flow: bool = False,
        labels: Labels | None = None,
    ):
        """Chooses what a sample holds.

        Args:
          sources, indices: datasets and their clips.
          config: which instants of a clip are read.
          image_size: side of the square frames.
          random_shift: largest shift in pixels.
          actions: whether a sample has `action` `[P, A]`, the mean of the true actions taken between the two frames
            of a pair, in the units of the dataset, where the dataset has any.
          flow: whether a sample has optical flow.
          labels: of a few episodes.
        """
        self._sources, self._indices, self._config = sources, indices, config
        self._image_size, self._random_shift = image_size, random_shift
        self._actions, self._flow, self._labels = actions, flow, labels

    def random_map(self, element: tuple[int, int], rng: np.random.Generator) -> dict[str, Any]:
        """The arrays of `FramePairs`, without the batch axis."""
        dataset, clip = element
        source, index = self._sources[dataset], self._indices[dataset]
        episode = int(index.episode[clip])
        gap = draw_gap(int(index.gap[episode]), self._config.min_gap_fraction, rng)
        records = int(index.first[clip]) + gap * np.arange(self._config.instants)
        offsets: list[int] = []
        if self._config.offset_frames:
            offsets = [draw_offset(int(future), gap, int(index.last[episode]), rng) for future in records[1:]]
        frames = np.stack([self._frame(source, record) for record in [*records.tolist(), *offsets]])
        frames = transforms.random_shift(frames, self._random_shift, rng)
        frames, offset_frames = frames[: len(records)], frames[len(records) :]
        sample: dict[str, Any] = {
            "frames": frames,
            "dataset": np.int32(dataset),
            "episode": np.int32(episode),
            "gap": np.float32(gap / source.control_rate[episode] / self._config.gap_seconds),
        }
        if offsets:
            sample["offset_frames"] = offset_frames
        if self._actions and source.action is not None:
            sample["action"] = np.stack([source.action[t : t + gap].mean(axis=0) for t in records[:-1]])
        if self._flow:
            sample["flow"] = np.stack([optical_flow(*pair) for pair in itertools.pairwise(frames)])
        if self._labels is not None:
            sample |= self._labels(dataset, episode, records[:-1], gap)
        return sample

    def _frame(self, source: EpisodeSource, record: int) -> np.ndarray:
        try:
            return transforms.decode_jpeg(source.read_jpeg(record), self._image_size)
        except ValueError as error:
            raise DatasetError(
                f"{source.directory} ({source.split}): record {record}, camera {source.camera!r}, "
                f"cannot be decoded: {error}"
            ) from error


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Opened sources with the clips they offer and their weights."""

    sources: tuple[EpisodeSource, ...]
    indices: tuple[ClipIndex, ...]
    weights: tuple[float, ...]

    @property
    def num_clips(self) -> int:
        """Clips of all sources together."""
        return sum(len(index) for index in self.indices)

    def describe(self) -> list[str]:
        """One line a dataset: what is in it and what was left out."""
        total = sum(self.weights)
        lines = []
        for source, index, weight in zip(self.sources, self.indices, self.weights, strict=True):
            seconds = np.unique(np.round(index.gap / source.control_rate, 3))
            gaps = "-".join(f"{value:g}" for value in sorted({seconds[0], seconds[-1]}))
            lines.append(
                f"{source.name} [{source.split}]: {weight / total:.0%} of samples, {len(source.length)} episodes, "
                f"{len(source)} steps, {len(index)} clips, gap {gaps} s, camera {source.camera}; left out: "
                f"{index.short_episodes} short episodes, {index.filtered_clips} clips by motion"
            )
        return lines


def open_mixture(entries: Sequence[MixtureEntry], split: str, config: ClipConfig, camera: str = "") -> Mixture:
    """Opens every dataset of a mixture.

    Raises:
      DatasetError: a dataset is missing, damaged or offers no clip.
    """
    sources = tuple(EpisodeSource(entry.directory, split, camera) for entry in entries)
    indices = tuple(index_clips(source, config) for source in sources)
    return Mixture(sources, indices, tuple(entry.weight for entry in entries))


def has_split(entry: MixtureEntry, split: str) -> bool:
    """Whether the dataset has any episode in the split."""
    return any(epath.Path(entry.directory).glob(f"episodes-{split}-*.parquet"))


def train_batches(
    mixture: Mixture,
    loader: ClipLoader,
    *,
    batch_size: int,
    seed: int,
    num_threads: int,
    num_workers: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """An endless stream of this host's part of every batch, as dictionaries of `FramePairs` arrays.

    Args:
      mixture: where clips come from.
      loader: how a clip is read.
      batch_size: of this host.
      seed: fixes order and augmentation.
      num_threads: decoding threads of a process.
      num_workers: decoding processes; 0 decodes in threads of this one.
      process_index, process_count: the host's place in the job.
    """
    datasets = []
    for number, index in enumerate(mixture.indices):
        dataset = grain.MapDataset.range(len(index)).seed(seed + number).shuffle().repeat()
        datasets.append(dataset.map(functools.partial(_tag, number)))
    mixed = grain.MapDataset.mix(datasets, mixture.weights)
    # The host takes its slice last, so that the randomness of a sample does not depend on the number of hosts.
    samples = mixed.seed(seed).random_map(loader)[process_index::process_count]
    read_options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * max(1, num_threads))
    stream = samples.to_iter_dataset(read_options)
    if num_workers:
        # Batching comes last: workers that made whole batches would each fill them with every other sample.
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return stream.batch(batch_size, drop_remainder=True)


def evaluation_batches(
    index: ClipIndex,
    loader: ClipLoader,
    *,
    num_clips: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """This host's part of batches over clips spread evenly over one source, and each batch's count of clips.

    The last batch is filled up by repeating its last clip; only the first `count` rows of the global batch count.
    """
    chosen = np.unique(np.linspace(0, len(index) - 1, min(num_clips, len(index))).astype(np.int64))
    local = batch_size // process_count
    for begin in range(0, len(chosen), batch_size):
        clips = chosen[begin : begin + batch_size]
        padded = np.pad(clips, (0, batch_size - len(clips)), mode="edge")
        part = padded[process_index * local : (process_index + 1) * local]
        samples = [loader.random_map((0, int(clip)), np.random.default_rng(int(clip))) for clip in part]
        yield {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}, len(clips)


def to_frame_pairs(batch: dict[str, Any]) -> FramePairs:
    """Names the arrays of a batch."""
    optional = ("offset_frames", "gap", "flow", "labels", "labelled")
    return FramePairs(
        frames=batch["frames"],
        dataset=batch["dataset"],
        episode=batch["episode"],
        **{name: batch.get(name) for name in optional},
    )


def _tag(number: int, clip: int) -> tuple[int, int]:
    return number, clip
