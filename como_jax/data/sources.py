"""Opens a dataset directory: everything small in memory, frames read at random, and normalisation of its numbers."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from como_jax.data import schema
from como_jax.data.records import RecordFiles
from como_jax.errors import DatasetError
from como_jax.spec.normalization import AffineNormalizer, Normalizer, UniformNormalizer, check_kind, describe_values

READ_ERRORS = (DatasetError, DecodeError, OSError, ValueError, IndexError, RuntimeError)
"""What ArrayRecord, protobuf and the JPEG decoder raise for a damaged record."""


class EpisodeSource:
    """One split of a dataset in the schema of `como_jax.data.schema`.

    Axes: E episodes, S steps of all episodes together, which are also record numbers.

    Attributes:
      directory, split, name: of the dataset.
      cameras: all observations that are images.
      camera: the camera that `read_jpegs` reads.
      environment: family and settings of the environment that it was made in; empty where it is not known.
      start, length: int64 `[E]`, first record and number of steps of every episode.
      control_rate: float64 `[E]`, Hz.
      motion: float32 `[S]`, see `schema.EPISODE_TABLE_SCHEMA`.
      action, state: float32 `[S, size]`, or None when the dataset has none.
      latent_motion, latent_valid, latent_codes: float32 `[S, Q * L]`, bool `[S]` and int32 `[S, Q]`, see
        `schema.EPISODE_TABLE_SCHEMA`; None when the dataset is not labelled, or the labels have no codes.
      episode_id, instruction: one string an episode.
      other_instructions: further texts of every episode, which mean the same.
    """

    def __init__(self, directory: epath.PathLike, split: str, camera: str = ""):
        """Reads the episode tables.

        Args:
          directory: the dataset directory.
          split: "train" or "val".
          camera: observation key; empty for the dataset's first camera.

        Raises:
          DatasetError: the directory is not a dataset, is damaged, or has no such split or camera.
        """
        self.directory = epath.Path(directory)
        self.split = split
        if not (self.directory / "dataset_info.json").exists():
            folder, _, ending = os.fspath(self.directory).rpartition(":")
            raise DatasetError(
                f"{self.directory} is not a dataset directory (it has no dataset_info.json); "
                "make one with `python -m tools.datasets.build`."
                if not (epath.Path(folder) / "dataset_info.json").exists()
                else f"{folder} has no split {ending!r} to train on; a split is one of {', '.join(schema.SPLITS)}."
            )
        info = self._builder.info
        self.name = info.name
        self.cameras = _cameras(info)
        self.environment: dict[str, str] = (info.metadata or {}).get("environment") or {}
        self.camera = camera or _first_camera(self.directory, info)
        if self.camera not in self.cameras:
            raise DatasetError(f"{self.directory} has no camera {self.camera!r}; it has: {', '.join(self.cameras)}.")
        if split not in info.splits or not info.splits[split].num_examples:
            other = next((name for name in schema.SPLITS if name in info.splits), None)
            remedy = f" To train on {other!r}, write {self.directory}:{other} in `data`." if split == "train" else ""
            raise DatasetError(
                f"{self.directory} has no split {split!r}; it has: {', '.join(info.splits)}.{remedy if other else ''}"
            )
        self._read_tables()

    def __len__(self) -> int:
        """Number of steps."""
        return int(self.length.sum())

    @property
    def record_files(self) -> list[str]:
        """Files of the split's records, in order."""
        return [os.fspath(path) for path in self._builder.info.splits[self.split].filepaths]

    def read_jpegs(self, records: Sequence[int]) -> list[bytes]:
        """The JPEG bytes of some steps' images; may be called from several threads."""
        return [images[0] for images in self.read_cameras(records, [self.camera])]

    def read_cameras(self, records: Sequence[int], cameras: Sequence[str]) -> list[list[bytes]]:
        """The JPEG bytes of several cameras for every step; may be called from several threads."""
        return [_images(self._records[record], cameras) for record in records]

    def _read_tables(self) -> None:
        table = schema.read_episode_table(self.directory, self.split)
        self.length = table["num_steps"].to_numpy()
        self.start = np.concatenate([[0], np.cumsum(self.length)[:-1]]).astype(np.int64)
        self.control_rate = table["control_rate"].to_numpy()
        self.episode_id: list[str] = table["episode_id"].to_pylist()
        self.instruction: list[str] = table["language_instruction"].to_pylist()
        self.other_instructions: list[list[str]] = [each or [] for each in table["other_instructions"].to_pylist()]
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
    def _records(self) -> RecordFiles:
        files = self.record_files
        here = {path.name for path in self.directory.iterdir()}
        missing = [path for path in files if os.path.basename(path) not in here]
        if missing:
            others = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise DatasetError(f"{missing[0]}{others} is missing; the dataset is damaged, convert it again.")
        return RecordFiles(files, self._builder.info.splits[self.split].shard_lengths)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes, each of which opens its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_builder", "_records")}


def load_normalizer(directory: epath.PathLike, field: str, kind: str, split: str = "train") -> Normalizer:
    """The normalizer of a dataset's `action`, `state` or `latent_motion`, fitted to the episodes that are trained on.

    Raises:
      DatasetError: the dataset does not have the field.
      ConfigError: an unknown kind.
    """
    check_kind(kind)
    if kind == "uniform":
        return UniformNormalizer.fit(_values(directory, field, split))
    if split != "train":
        return AffineNormalizer.fit(kind, describe_values(_values(directory, field, split)))
    statistics = _read_statistics(epath.Path(directory)).get(field)
    if statistics is None:
        raise DatasetError(f"{directory}/statistics.json has no statistics of any {field}.")
    return AffineNormalizer.fit(kind, statistics)


def _images(record: bytes, cameras: Sequence[str]) -> list[bytes]:
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
    """A column that holds a list of numbers an episode, as one array `[S]`."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(dtype)


def _flatten_vectors(column: pa.ChunkedArray, dtype: type = np.float32) -> np.ndarray | None:
    """A column that holds a list of vectors an episode, as one array `[S, size]`; None when an episode has none."""
    if column.null_count:
        return None
    steps = column.combine_chunks().flatten()
    return steps.flatten().to_numpy(zero_copy_only=False).astype(dtype).reshape(len(steps), -1)


def _values(directory: epath.PathLike, field: str, split: str) -> np.ndarray:
    """The values `[n, size]` of all steps of a split that have the field."""
    source = EpisodeSource(directory, split)
    values = getattr(source, field)
    if field == "latent_motion" and values is not None:
        values = values[source.latent_valid]
    if values is None or not len(values):
        raise DatasetError(f"{directory} has no {field} in the episodes of {split}, so that it cannot be normalised.")
    return values


def _read_statistics(directory: epath.Path) -> dict[str, Any]:
    path = directory / "statistics.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read; convert the dataset again: {error}") from error
