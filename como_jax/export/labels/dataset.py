"""Reads a labelled dataset episode by episode, for the writers of other formats."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from como_jax.data import schema
from como_jax.data.episode_table import read_episode_table
from como_jax.data.sources import EpisodeSource
from como_jax.data.values import Values
from como_jax.errors import DatasetError

INSTRUCTION = "language_instruction"
_SOMETIMES_MISSING = ("state", "action", "latent_codes")


@dataclasses.dataclass(frozen=True)
class LabelledEpisode:
    """One episode of T steps.

    Attributes:
      episode_id, source_file, control_rate: see `schema.Episode`.
      instructions: a text for every key of `LabelledDataset.instruction_keys`, '' where the episode has fewer.
      images: the T JPEG images of every camera.
      state, action: float32 `[T, size]`, or None.
      latent_motion, latent_valid: float32 `[T, D]` and bool `[T]`, see `schema.EPISODE_TABLE_SCHEMA`.
      latent_codes: int32 `[T, Q]`, or None for a model without codes.
    """

    episode_id: str
    source_file: str
    instructions: Mapping[str, str]
    control_rate: float
    images: Mapping[str, Sequence[bytes]]
    state: np.ndarray | None
    action: np.ndarray | None
    latent_motion: np.ndarray
    latent_valid: np.ndarray
    latent_codes: np.ndarray | None

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.latent_valid)


class LabelledDataset:
    """All splits of a labelled dataset.

    Attributes:
      directory, name: of the dataset.
      cameras: their names, the main camera first.
      splits: the episodes of every split, `train` first.
      sizes: length of one step's `state`, `action`, `latent_motion` and `latent_codes`, of those that exist.
    """

    def __init__(self, directory: epath.PathLike):
        """Reads everything except the images.

        Raises:
          DatasetError: the directory is no dataset, is damaged, or has episodes without labels.
        """
        self.directory = epath.Path(directory)
        if not (self.directory / "dataset_info.json").exists():
            raise DatasetError(f"{self.directory} is not a dataset directory (it has no dataset_info.json)")
        info = tfds.builder_from_directory(self.directory).info
        self.name = info.name
        self.splits = {split: EpisodeSource(self.directory, split) for split in schema.SPLITS if split in info.splits}
        if not self.splits:
            raise DatasetError(f"{self.directory} has neither of the splits {', '.join(schema.SPLITS)}")
        self.cameras = _cameras(info, next(iter(self.splits.values())).camera)
        self._source_files: dict[str, Sequence[str]] = {}
        for split, source in self.splits.items():
            _check(f"{self.directory}, split {split!r}", source)
            self._source_files[split] = Values(
                read_episode_table(self.directory, split, ["source_file"])["source_file"]
            )
        self.sizes = self._sizes()

    @property
    def num_steps(self) -> int:
        """Number of steps of all splits."""
        return sum(map(len, self.splits.values()))

    def lengths(self, split: str) -> list[int]:
        """Number of steps of every episode of a split."""
        return self.splits[split].length.tolist()

    @property
    def instruction_keys(self) -> tuple[str, ...]:
        """Names of the texts of an episode, as DROID has them: the first has no number, the second `_2`."""
        others = max(len(texts) for source in self.splits.values() for texts in source.other_instructions)
        return (INSTRUCTION, *(f"{INSTRUCTION}_{number}" for number in range(2, others + 2)))

    def steps(self, field: str) -> np.ndarray:
        """A field of `EpisodeSource` that has one row per step, over all splits."""
        return np.concatenate([getattr(source, field) for source in self.splits.values()])

    def episodes(self, split: str) -> Iterator[LabelledEpisode]:
        """Yields the episodes of a split in order; only one is in memory at a time."""
        source = self.splits[split]
        keys = self.instruction_keys
        views = {camera: _view(source, camera) for camera in self.cameras}
        for row, (start, length) in enumerate(zip(source.start.tolist(), source.length.tolist(), strict=True)):
            steps = slice(start, start + length)
            fields = {
                field: None if getattr(source, field) is None else getattr(source, field)[steps]
                for field in ("state", "action", "latent_motion", "latent_valid", "latent_codes")
            }
            texts = [source.instruction[row], *source.other_instructions[row]]
            yield LabelledEpisode(
                episode_id=source.episode_id[row],
                source_file=self._source_files[split][row],
                instructions=dict.fromkeys(keys, "") | dict(zip(keys, texts, strict=False)),
                control_rate=float(source.control_rate[row]),
                images={camera: view.read_jpegs(range(start, start + length)) for camera, view in views.items()},
                **fields,
            )

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for field in ("state", "action", "latent_motion", "latent_codes"):
            values = {split: getattr(source, field) for split, source in self.splits.items()}
            found = {split: None if value is None else value.shape[1] for split, value in values.items()}
            if len(set(found.values())) > 1:
                raise DatasetError(f"{self.directory}: the size of {field} differs between the splits: {found}")
            size = next(iter(found.values()))
            if size is not None:
                sizes[field] = size
        return sizes


def file_numbers(lengths: Sequence[int], max_steps: int) -> list[int]:
    """The number of the file of every episode, where files are filled in order with at most `max_steps` steps.

    An episode longer than that gets a file of its own.
    """
    numbers, number, filled = [], 0, 0
    for length in lengths:
        if filled and filled + length > max_steps:
            number, filled = number + 1, 0
        numbers.append(number)
        filled += length
    return numbers


def _cameras(info: tfds.core.DatasetInfo, first: str) -> tuple[str, ...]:
    observation = info.features["observation"]
    images = [key for key, feature in observation.items() if isinstance(feature, tfds.features.Image)]
    order = (info.metadata or {}).get("cameras") or [first]
    return tuple(dict.fromkeys([*order, *images]))


def _view(source: EpisodeSource, camera: str) -> EpisodeSource:
    """The same episodes seen by another camera; the arrays are shared."""
    view = copy.copy(source)
    view.camera = camera
    return view


def _check(name: str, source: EpisodeSource) -> None:
    """Raises DatasetError unless every step of a split is labelled."""
    fields, episodes = ("latent_motion", *_SOMETIMES_MISSING), len(source.length)
    missing = dict.fromkeys(fields, 0)
    for table in source.table.read(fields):
        missing = {field: count + table[field].null_count for field, count in missing.items()}
    if missing["latent_motion"]:
        raise DatasetError(
            f"{name} is not labelled: {missing['latent_motion']} of {episodes} episodes have no latent_motion"
        )
    for field in _SOMETIMES_MISSING:
        if missing[field] not in (0, episodes):
            raise DatasetError(
                f"{name} is damaged: {missing[field]} of {episodes} episodes have no {field}, the others do"
            )
    # Reading them counts their steps.
    for field in ("latent_motion", "latent_valid", *_SOMETIMES_MISSING):
        getattr(source, field)
    if not np.isfinite(source.latent_motion[source.latent_valid]).all():
        raise DatasetError(f"{name} has latent_motion that is not finite at steps with latent_valid")
