"""Builder for RLDS datasets: TFDS directories with one record an episode."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError

from como_jax.data.schema import Episode, Step
from tools.datasets import images
from tools.datasets.builder import (
    ConversionError,
    EpisodeBuilder,
    LeftOut,
    Settings,
    StepLayout,
    Warned,
    check_control_rate,
)
from tools.datasets.rlds import features
from tools.datasets.rlds.records import read_records
from tools.datasets.sources import Source

VALIDATION_SPLITS = ("val", "valid", "validation", "eval", "test")
_BLACK = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RldsSettings(Settings):
    """Settings of `Rlds`.

    Attributes:
      source: TFDS directory, or a folder that holds just one, up to two levels down.
      control_rate: steps per second (Hz), which RLDS does not record.
      camera: observation keys, the main camera first; empty to take the only one.
      action: step keys, joined in this order; None for `action` if there is one, empty for none.
      state: step keys, joined in this order; None for `observation/state` if there is one, empty for none.
      language: step key; None for the first usual one, '' for none.
    """

    source: str
    control_rate: float = dataclasses.field(metadata={"help": "RLDS does not record how many steps a second has"})
    camera: tuple[str, ...] = ()
    action: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_control_rate(self.control_rate)


class Rlds(EpisodeBuilder):
    """The episodes of an RLDS dataset. Their bounds are those of its records, whatever `is_last` says."""

    settings_class = RldsSettings
    settings: RldsSettings
    decoder_errors = (OSError, ValueError, DecodeError)
    # The files of the source are large enough, and one file a shard converts in parallel.
    max_sources_per_shard = 1

    @functools.cached_property
    def layout(self) -> StepLayout:
        """The chosen cameras, states and actions."""
        return StepLayout(
            cameras=tuple(_camera_name(key) for key in self._selection.cameras),
            state_size=features.size(self._steps, self._selection.states),
            action_size=features.size(self._steps, self._selection.actions),
        )

    def sources(self) -> list[Source]:
        """One source a file; too few files without a validation split are cut in two by records."""
        splits = self._dataset.info.splits
        has_validation = any(split in VALIDATION_SPLITS for split in splits)
        num_files = sum(len(info.shard_lengths) for info in splits.values())
        fraction = self.settings.validation_fraction
        cut = not has_validation and fraction * num_files < 1
        sources = []
        for split, info in sorted(splits.items()):
            for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
                if cut:
                    sources += _cut(path.name, length, fraction)
                elif has_validation:
                    sources.append(Source(path.name, _target_split(split), (0, length)))
                else:
                    sources.append(Source(path.name, None, (0, length)))
        return sources

    def warnings(self) -> list[str]:
        """What is missing from the dataset."""
        missing = {
            "action": not self._selection.actions,
            "state": not self._selection.states,
            "language": self._selection.language is None,
        }
        return [f"no {kind} was converted" for kind, is_missing in missing.items() if is_missing]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The episodes of some records of one file."""
        assert source.records is not None
        start, stop = source.records
        for index, record in enumerate(read_records(self._directory / source.path, start, stop), start):
            try:
                episode, thumbnails = self._episode(source, index, record)
            except self.decoder_errors as error:
                yield LeftOut(f"record {index}: {error}")
                continue
            for camera, frames in thumbnails.items():
                if max(frame.max() for frame in frames) < _BLACK:
                    yield Warned(f"camera {camera!r} is black over a whole episode")
            yield episode

    def _episode(self, source: Source, index: int, record: bytes) -> tuple[Episode, dict[str, list[np.ndarray]]]:
        """One record as an episode, and the thumbnails of its cameras."""
        selection = self._selection
        example = self._episode_features.deserialize_example_np(record, decoders=self._decoders)
        thumbnails: dict[str, list[np.ndarray]] = {camera: [] for camera in self.layout.cameras}
        steps, language = [], ""
        for values in example["steps"]:
            pictures = {}
            for key in selection.cameras:
                jpeg, thumbnail = self._picture(features.lookup(values, key))
                pictures[_camera_name(key)] = jpeg
                thumbnails[_camera_name(key)].append(thumbnail)
            steps.append(Step(pictures, _join(values, selection.states), _join(values, selection.actions)))
            if selection.language is not None and not language:
                language = _text(features.lookup(values, selection.language))
        if not steps:
            raise ValueError("holds no steps")
        episode = Episode(
            episode_id=f"{source.path}/{index:06d}",
            source_file=source.path,
            control_rate=self.settings.control_rate,
            steps=steps,
            motion=images.motion(thumbnails[self.layout.cameras[0]]),
            language_instruction=language,
        )
        return episode, thumbnails

    def _picture(self, stored: bytes | np.ndarray) -> tuple[bytes, np.ndarray]:
        """A stored picture as JPEG, untouched if it is one of the right kind and size, and its thumbnail."""
        image = stored if isinstance(stored, np.ndarray) else images.decode_image(stored)
        small = images.shrink(image, self.settings.image_size)
        if small is image and isinstance(stored, bytes) and images.is_colour_jpeg(stored):
            return stored, images.thumbnail(image)
        return images.encode_jpeg(small), images.thumbnail(small)

    @functools.cached_property
    def _directory(self) -> epath.Path:
        return find_dataset(epath.Path(self.settings.source))

    @functools.cached_property
    def _dataset(self) -> tfds.core.DatasetBuilder:
        try:
            return tfds.builder_from_directory(self._directory)
        except (OSError, ValueError, KeyError) as error:
            raise ConversionError(f"{self._directory} cannot be read as an RLDS dataset: {error}") from error

    @functools.cached_property
    def _steps(self) -> Mapping[str, Any]:
        """Features of a step."""
        episode_features = self._dataset.info.features
        if "steps" not in episode_features:
            raise ConversionError(f"{self._directory} is not an RLDS dataset: its records have no `steps`")
        return episode_features["steps"].feature

    @functools.cached_property
    def _selection(self) -> features.Selection:
        settings = self.settings
        return features.select(self._steps, settings.camera, settings.action, settings.state, settings.language)

    @functools.cached_property
    def _episode_features(self) -> tfds.features.FeaturesDict:
        return features.subset(self._steps, self._selection.keys)

    @functools.cached_property
    def _decoders(self) -> dict[str, Any]:
        return features.encoded_images(self._steps, self._selection.cameras)


def find_dataset(folder: epath.Path) -> epath.Path:
    """The TFDS directory in a folder.

    Raises:
      ConversionError: there is none, or more than one.
    """
    if not folder.is_dir():
        raise ConversionError(f"source folder {folder} does not exist")
    depths = ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json")
    found = sorted({path.parent for pattern in depths for path in folder.glob(pattern)})
    if not found:
        raise ConversionError(f"source folder {folder} holds no RLDS dataset (no dataset_info.json)")
    if folder in found:
        return folder
    if len(found) > 1:
        raise ConversionError(f"choose one of the datasets in {folder}: {', '.join(map(str, found))}")
    return found[0]


def _target_split(split: str) -> str:
    return "val" if split in VALIDATION_SPLITS else "train"


def _cut(path: str, length: int, fraction: float) -> list[Source]:
    """A file as its first records for training and its last ones for validation."""
    num_validation = max(1, round(fraction * length)) if length > 1 and fraction > 0 else 0
    bound = length - num_validation
    parts = [Source(path, "train", (0, bound)), Source(path, "val", (bound, length))]
    return parts if num_validation else parts[:1]


def _camera_name(key: str) -> str:
    return key.rpartition("/")[2]


def _join(step: Mapping[str, Any], keys: tuple[str, ...]) -> np.ndarray | None:
    if not keys:
        return None
    return np.concatenate([np.ravel(np.asarray(features.lookup(step, key), np.float32)) for key in keys])


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else str(value).strip()
