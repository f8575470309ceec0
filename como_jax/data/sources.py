"""Opens a dataset directory: what is small is read when it is used, frames are read at random; normalises numbers."""

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
from como_jax.data.episode_table import EpisodeTable
from como_jax.data.records import RecordFiles
from como_jax.data.values import ShardPaths, Values
from como_jax.errors import DatasetError
from como_jax.files import names_in
from como_jax.spec.normalization import AffineNormalizer, Normalizer, UniformNormalizer, check_kind, describe_values

READ_ERRORS = (DatasetError, DecodeError, OSError, ValueError, IndexError, RuntimeError)
"""What ArrayRecord, protobuf and the JPEG decoder raise for a damaged record."""


def _texts(name: str, missing: Any = None) -> functools.cached_property[Values]:
    """A column of texts, kept as bytes until one is asked for."""
    return functools.cached_property(lambda source: Values(source._read_together([name])[name], missing))


def _numbers(name: str, dtype: type) -> functools.cached_property[Any]:
    """A column of a number or a vector a step, `[S]` or `[S, size]`; None where an episode has none."""
    return functools.cached_property(lambda source: source._read_numbers(name, dtype))


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
      table: the episode table, of which this reads a column when it is used.
      episode_id, instruction: one text an episode, kept as bytes until it is asked for.
      other_instructions: further texts of every episode, which mean the same.
    """

    # Columns of the episode table, each read when it is first used.
    episode_id = _texts("episode_id")
    instruction = _texts("language_instruction")
    other_instructions = _texts("other_instructions", missing=())
    motion = _numbers("motion", np.float32)
    action = _numbers("action", np.float32)
    state = _numbers("state", np.float32)
    latent_motion = _numbers("latent_motion", np.float32)
    latent_valid = _numbers("latent_valid", np.bool_)
    latent_codes = _numbers("latent_codes", np.int32)

    def __init__(self, directory: epath.PathLike, split: str, camera: str = ""):
        """Reads the lengths of the episodes; everything else is read when it is used.

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
        self.table = EpisodeTable(self.directory, split)
        numbers = self._read_together(["num_steps", "control_rate"])
        self.length = numbers["num_steps"].to_numpy()
        self.start = np.concatenate([[0], np.cumsum(self.length)[:-1]]).astype(np.int64)
        self.control_rate = numbers["control_rate"].to_numpy()
        self._check_shards()

    def __len__(self) -> int:
        """Number of steps."""
        return int(self.length.sum())

    @functools.cached_property
    def record_files(self) -> Sequence[str]:
        """Files of the split's records, in order."""
        return ShardPaths(self._builder.info.splits[self.split])

    def read_jpegs(self, records: Sequence[int]) -> list[bytes]:
        """The JPEG bytes of some steps' images; may be called from several threads."""
        return [images[0] for images in self.read_cameras(records, [self.camera])]

    def read_cameras(self, records: Sequence[int], cameras: Sequence[str]) -> list[list[bytes]]:
        """The JPEG bytes of several cameras for every step; may be called from several threads."""
        return [_images(self._records[record], cameras) for record in records]

    def _read_together(self, names: Sequence[str]) -> pa.Table:
        return pa.concat_tables(self.table.read(names))

    def _read_numbers(self, name: str, dtype: type) -> Any:
        """A column of a number or a vector a step, `[S]` or `[S, size]`; None where an episode has none."""
        parts: list[np.ndarray] = []
        for table in self.table.read([name]):
            if table[name].null_count:
                return None
            parts.append(flatten_steps(table[name]).astype(dtype, copy=False))
        try:
            values = np.concatenate(parts)
        except ValueError as error:
            raise DatasetError(f"{self.directory} ({self.split}): {name} has no single size: {error}") from error
        if len(values) != len(self):
            raise DatasetError(
                f"{self.directory}, split {self.split!r} is damaged: {len(values)} steps have {name}, of {len(self)}"
            )
        return values

    def _check_shards(self) -> None:
        """Raises DatasetError unless the episode table was made for the records that the dataset has."""
        info, known = self._builder.info.splits[self.split], self.table.shards
        lengths, remedy = np.asarray(info.shard_lengths, np.int64), "the dataset is damaged, convert it again."
        if known is not None and not np.array_equal(known.records, lengths):
            if len(known.records) != len(lengths):
                what = f"{len(known.records)} files of records, and there are {len(lengths)}"
            else:
                number = int(np.flatnonzero(known.records != lengths)[0])
                path = self.record_files[number]
                what = f"{known.records[number]} records in {path}, where dataset_info.json says {lengths[number]}"
            raise DatasetError(f"{self.directory}: the episode table of {self.split!r} was made for {what}; {remedy}")
        if info.num_examples != len(self):
            raise DatasetError(
                f"{self.directory}: the episode table of split {self.split!r} lists {len(self)} steps but "
                f"there are {info.num_examples} records; {remedy}"
            )

    @functools.cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        return tfds.builder_from_directory(self.directory)

    def check_files(self) -> list[str]:
        """What is wrong with the files of records by their names and sizes: missing, of another size, or not known."""
        here, sizes = names_in(self.directory), {}
        if self.table.shards is not None:
            sizes = dict(zip(self.record_files, self.table.shards.num_bytes.tolist(), strict=True))
        problems, expected = [], set()
        for path in self.record_files:
            expected.add(name := os.path.basename(path))
            if name not in here:
                problems.append(f"{path} is missing")
            elif path in sizes and (size := epath.Path(path).stat().length) != sizes[path]:
                problems.append(f"{path} has {size} bytes where the episode table was made for {sizes[path]}")
        mine = f"-{self.split}.array_record-"
        others = sorted(name for name in here - expected if mine in name and not name.startswith("."))
        return problems + [f"{self.directory / name} is not one of the files of dataset_info.json" for name in others]

    @functools.cached_property
    def _records(self) -> RecordFiles:
        here = names_in(self.directory)
        missing = [path for path in self.record_files if os.path.basename(path) not in here]
        if missing:
            others = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise DatasetError(f"{missing[0]}{others} is missing; the dataset is damaged, convert it again.")
        lengths = self._builder.info.splits[self.split].shard_lengths
        return RecordFiles(
            self.record_files, lengths, None if self.table.shards is None else self.table.shards.num_bytes
        )

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes, each of which opens its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_builder", "_records", "record_files")}


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


def flatten_steps(column: pa.ChunkedArray) -> np.ndarray:
    """A column of a list of numbers or of vectors an episode, as one array `[S]` or `[S, size]`."""
    blocks = []
    for chunk in column.chunks:
        steps = chunk.flatten()
        is_vector = pa.types.is_list(steps.type)
        numbers = (steps.flatten() if is_vector else steps).to_numpy(zero_copy_only=False)
        blocks.append(numbers.reshape(len(steps), -1) if is_vector and len(steps) else numbers)
    return np.concatenate([block for block in blocks if len(block)] or blocks)


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
