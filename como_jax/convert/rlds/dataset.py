"""Finds an RLDS dataset by folder, bucket or TFDS name, and opens it without TensorFlow."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format

from como_jax.convert.rlds.language import leaves
from como_jax.convert.selection import nearest
from como_jax.errors import ConversionError, one_line

# What TFDS raises for files that do not hold what their names say.
_BAD_FILES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, json_format.Error)
_FORMATS = ("tfrecord", "array_record")
_INFO = "dataset_info.json"
_DEPTHS = (f"*/{_INFO}", f"*/*/{_INFO}")
_NAME = re.compile(r"(?P<name>[a-zA-Z]\w*)(/(?P<config>[\w.-]+))?(:(?P<version>\d+\.\d+\.\d+))?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_MAX_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a dataset is: the folder with `dataset_info.json`.

    Attributes:
      note: what was chosen without being asked for, or ''.
      is_named: whether the dataset was given by its TFDS name.
    """

    directory: epath.Path
    note: str = ""
    is_named: bool = False


def locate(source: str, data_dir: str = "") -> Location:
    """Finds the dataset that a source names.

    Args:
      source: a TFDS directory, a folder that holds one up to two levels down, or a TFDS name with or without
        config and version: `NAME`, `NAME:1.0.0`, `NAME/CONFIG:1.0.0`.
      data_dir: the folder of datasets that are given by name; '' for the folder of TFDS.

    Raises:
      ConversionError: there is none, or more than one to choose from, or the file system cannot be reached.
    """
    folder = epath.Path(source).expanduser()
    try:
        if folder.is_dir():
            return _in_folder(folder)
        match = _NAME.fullmatch(source)
        if match is None:
            raise ConversionError(f"source folder {source} does not exist")
        found = _named(source, match, epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser())
        return dataclasses.replace(found, is_named=True)
    except (OSError, ImportError, ValueError) as error:
        # Backends of remote file systems are optional; their own messages say what is missing.
        raise ConversionError(f"source {source} cannot be reached: {error}") from error


def find_dataset(folder: epath.Path) -> epath.Path:
    """Finds the TFDS directory in a folder; of several versions, the newest.

    Raises:
      ConversionError: there is none, or more than one to choose from.
    """
    return _in_folder(folder).directory


def _named(source: str, match: re.Match[str], data_dir: epath.Path) -> Location:
    name, config, version = match["name"], match["config"], match["version"]
    if not data_dir.is_dir():
        raise ConversionError(
            f"source {source} is no folder, and there is no {data_dir} to look for a dataset of this name; "
            "`data_dir` names another place"
        )
    folder = data_dir / name
    if not folder.is_dir():
        known = sorted(path.name for path in data_dir.iterdir() if path.is_dir())
        raise ConversionError(
            f"source {source} is neither a folder nor a dataset in {data_dir}{nearest(name, known[:_MAX_LISTED])}"
        )
    folder = folder / config if config else folder
    if version is None:
        return _in_folder(folder)
    if not (folder / version / _INFO).exists():
        known = sorted(path.parent.name for path in folder.glob(f"*/{_INFO}"))
        raise ConversionError(f"{folder} has no version {version}; there are {', '.join(known) or 'none'}")
    return Location(folder / version)


def _in_folder(folder: epath.Path) -> Location:
    if (folder / _INFO).exists():
        return Location(folder)
    found = sorted({path.parent for pattern in _DEPTHS for path in folder.glob(pattern)})
    if not found:
        raise ConversionError(f"source folder {folder} holds no RLDS dataset (no {_INFO})")
    if len(found) == 1:
        return Location(found[0])
    are_versions = all(_VERSION.fullmatch(path.name) for path in found)
    if not are_versions or len({path.parent for path in found}) > 1:
        raise ConversionError(f"choose one of the datasets in {folder}: {', '.join(map(str, found))}")
    found.sort(key=lambda path: tfds.core.Version(path.name))
    versions = ", ".join(path.name for path in found)
    return Location(found[-1], f"took version {found[-1].name} of {found[-1].parent}, the newest of {versions}")


def open_dataset(directory: epath.Path) -> tfds.core.DatasetBuilder:
    """Opens the dataset in a TFDS directory.

    Raises:
      ConversionError: the directory does not describe a dataset of TFRecord or ArrayRecord files.
    """
    try:
        dataset = tfds.builder_from_directory(directory)
        splits, _, file_format = dataset.info.splits, dataset.info.features, dataset.info.file_format.value
    except _BAD_FILES as error:
        raise ConversionError(f"{directory} cannot be read as an RLDS dataset: {one_line(error)}") from error
    if file_format not in _FORMATS:
        raise ConversionError(f"{directory} holds {file_format} files; only {' and '.join(_FORMATS)} can be read")
    if not splits:
        raise ConversionError(f"{directory} has no splits in its dataset_info.json")
    return dataset


def step_features(dataset: tfds.core.DatasetBuilder) -> Mapping[str, Any]:
    """Returns the features of a step.

    Raises:
      ConversionError: the records are not episodes.
    """
    features = dataset.info.features
    has_steps = isinstance(features, tfds.features.FeaturesDict) and "steps" in features
    steps = features["steps"] if has_steps else None
    if not isinstance(steps, tfds.features.Dataset) or not isinstance(steps.feature, tfds.features.FeaturesDict):
        raise ConversionError(f"{dataset.data_dir} is not an RLDS dataset: its records have no `steps`")
    return steps.feature


def episode_features(dataset: tfds.core.DatasetBuilder) -> dict[str, Any]:
    """Returns the features that a record has beside its steps, such as `episode_metadata/file_path`, by key."""
    return dict(leaves({name: feature for name, feature in dataset.info.features.items() if name != "steps"}))


def dataset_names(dataset: tfds.core.DatasetBuilder) -> list[str]:
    """Returns possible names of a dataset: that in its files and those of its folders, which may differ (`droid`)."""
    directory = epath.Path(dataset.data_dir)
    return list(dict.fromkeys([dataset.name, directory.parent.name, directory.name]))
