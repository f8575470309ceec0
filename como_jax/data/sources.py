"""Opens one split of one dataset directory: everything small in memory, frames read at random."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from como_jax.data import schema
from como_jax.errors import DatasetError

READ_ERRORS = (DatasetError, DecodeError, OSError, ValueError, IndexError, RuntimeError)
"""What ArrayRecord, protobuf and the JPEG decoder raise for a damaged record."""


class EpisodeSource:
    """One split of a dataset written by `tools.datasets`.

    Axes: E episodes, S steps of all episodes together, which are also record numbers.

    Attributes:
      name: name of the dataset.
      cameras: all observations that are pictures.
      camera: the one of them that `read_jpegs` returns.
      start, length: int64 `[E]`, first record and number of steps of every episode.
      control_rate: float64 `[E]`, Hz.
      motion: float32 `[S]`, see `schema.EPISODE_TABLE_SCHEMA`.
      action, state: float32 `[S, size]`, or None when the dataset has none.
      latent_motion, latent_valid, latent_codes: float32 `[S, Q * L]`, bool `[S]` and int32 `[S, Q]`, see
        `schema.EPISODE_TABLE_SCHEMA`; None when the dataset is not labelled, or the labels have no codes.
      episode_id, instruction: one string an episode.
    """

    def __init__(self, directory: epath.PathLike, split: str, camera: str = ""):
        """Reads the episode tables.

        Args:
          directory: the dataset directory.
          split: "train" or "val".
          camera: observation key; empty for the dataset's first camera.

        Raises:
          DatasetError: not a dataset, no such split or camera.
        """
        self.directory = epath.Path(directory)
        self.split = split
        if not (self.directory / "dataset_info.json").exists():
            raise DatasetError(
                f"{self.directory} is not a dataset directory (it has no dataset_info.json); "
                "make one with `python -m tools.datasets.build`."
            )
        info = self._builder.info
        self.name = info.name
        self.cameras = _cameras(info)
        self.camera = camera or _first_camera(self.directory, info)
        if self.camera not in self.cameras:
            raise DatasetError(f"{self.directory} has no camera {self.camera!r}; it has: {', '.join(self.cameras)}.")
        if split not in info.splits or not info.splits[split].num_examples:
            raise DatasetError(f"{self.directory} has no split {split!r}; it has: {', '.join(info.splits)}.")
        self._read_tables()

    def __len__(self) -> int:
        """Number of steps."""
        return int(self.length.sum())

    @property
    def record_files(self) -> list[str]:
        """Files of the split's records, in order."""
        return [os.fspath(path) for path in self._builder.info.splits[self.split].filepaths]

    def read_jpegs(self, records: Sequence[int]) -> list[bytes]:
        """The JPEG bytes of some steps' pictures; may be called from several threads."""
        return [pictures[0] for pictures in self.read_cameras(records, [self.camera])]

    def read_cameras(self, records: Sequence[int], cameras: Sequence[str]) -> list[list[bytes]]:
        """The same of several cameras, for every step."""
        # One by one: its reading of many at once starts threads, at twice the cost of a picture in the page cache.
        return [_pictures(self._records[record], cameras) for record in records]

    def _read_tables(self) -> None:
        table = schema.read_episode_table(self.directory, self.split)
        self.length = table["num_steps"].to_numpy()
        self.start = np.concatenate([[0], np.cumsum(self.length)[:-1]]).astype(np.int64)
        self.control_rate = table["control_rate"].to_numpy()
        self.episode_id: list[str] = table["episode_id"].to_pylist()
        self.instruction: list[str] = table["language_instruction"].to_pylist()
        self.motion = _flatten(table["motion"])
        self.action = _flatten_vectors(table["action"])
        self.state = _flatten_vectors(table["state"])
        self.latent_motion = _flatten_vectors(table["latent_motion"])
        self.latent_codes = _flatten_vectors(table["latent_codes"], np.int32)
        labelled = self.latent_motion is not None
        self.latent_valid = _flatten(table["latent_valid"], np.bool_) if labelled else None
        records = self._builder.info.splits[self.split].num_examples
        if records != len(self):
            raise DatasetError(
                f"{self.directory}: the episode tables of split {self.split!r} list {len(self)} steps but "
                f"there are {records} records; the dataset is damaged, convert it again."
            )

    @functools.cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        return tfds.builder_from_directory(self.directory)

    @functools.cached_property
    def _records(self) -> ArrayRecordDataSource:
        return ArrayRecordDataSource(self.record_files)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes, each of which opens its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_builder", "_records")}


def _pictures(record: bytes, cameras: Sequence[str]) -> list[bytes]:
    # Only these features: the general parser of TFDS takes four times as long.
    features = tf_example_pb2.Example.FromString(record).features.feature
    return [features[f"observation/{camera}"].bytes_list.value[0] for camera in cameras]


def _cameras(info: tfds.core.DatasetInfo) -> list[str]:
    observation = info.features["observation"]
    return [key for key, feature in observation.items() if isinstance(feature, tfds.features.Image)]


def _first_camera(directory: epath.Path, info: tfds.core.DatasetInfo) -> str:
    cameras = (info.metadata or {}).get("cameras") or _cameras(info)
    if not cameras:
        raise DatasetError(f"{directory} has no camera: none of its observations is an image.")
    return cameras[0]


def _flatten(column: pa.ChunkedArray, dtype: type = np.float32) -> np.ndarray:
    """A column of one list of numbers an episode, as `[S]`."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(dtype)


def _flatten_vectors(column: pa.ChunkedArray, dtype: type = np.float32) -> np.ndarray | None:
    """A column of one list of vectors an episode, as `[S, size]`; None when an episode has none."""
    if column.null_count:
        return None
    steps = column.combine_chunks().flatten()
    return steps.flatten().to_numpy(zero_copy_only=False).astype(dtype).reshape(len(steps), -1)
