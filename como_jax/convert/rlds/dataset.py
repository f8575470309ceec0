"""Opens a TFDS directory and its description of the steps, without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format

from como_jax.errors import ConversionError

# What TFDS raises for files that are not what their names say.
_BAD_FILES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, json_format.Error)
_FORMATS = ("tfrecord", "array_record")


def open_dataset(directory: epath.Path) -> tfds.core.DatasetBuilder:
    """The dataset in a TFDS directory.

    Raises:
      ConversionError: the directory does not describe a dataset of TFRecord or ArrayRecord files.
    """
    try:
        dataset = tfds.builder_from_directory(directory)
        splits, _, file_format = dataset.info.splits, dataset.info.features, dataset.info.file_format.value
    except _BAD_FILES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(f"{directory} cannot be read as an RLDS dataset: {reason}") from error
    if file_format not in _FORMATS:
        raise ConversionError(f"{directory} holds {file_format} files; only {' and '.join(_FORMATS)} can be read")
    if not splits:
        raise ConversionError(f"{directory} has no splits in its dataset_info.json")
    return dataset


def step_features(dataset: tfds.core.DatasetBuilder) -> Mapping[str, Any]:
    """Features of a step.

    Raises:
      ConversionError: the records are no episodes.
    """
    features = dataset.info.features
    has_steps = isinstance(features, tfds.features.FeaturesDict) and "steps" in features
    steps = features["steps"] if has_steps else None
    if not isinstance(steps, tfds.features.Dataset) or not isinstance(steps.feature, tfds.features.FeaturesDict):
        raise ConversionError(f"{dataset.data_dir} is not an RLDS dataset: its records have no `steps`")
    return steps.feature


def dataset_names(dataset: tfds.core.DatasetBuilder) -> list[str]:
    """What a dataset may be called: as its files say, and as its folders say, which differ for some (`droid`)."""
    directory = epath.Path(dataset.data_dir)
    return list(dict.fromkeys([dataset.name, directory.parent.name, directory.name]))
