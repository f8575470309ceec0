"""Writes a labelled dataset as RLDS: one record per episode, in TFRecord files.

TFDS gives a `tf.data.Dataset`, by which other programs read RLDS, for TFRecord and not for ArrayRecord. The layout is
defined by https://github.com/google-research/rlds. Rewards, discounts and terminal states, which a recording does not
contain, are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_info, file_adapters

from como_jax.convert.rlds.records import write_tfrecords
from como_jax.convert.shards import StableSerializer
from como_jax.data.schema import LABELS_NAME
from como_jax.export.labels.dataset import LabelledDataset, LabelledEpisode, file_numbers

# About half a gigabyte of images at the default size.
_MAX_STEPS_PER_FILE = 16384
_VERSION = "1.0.0"
_FORMAT = file_adapters.FileFormat.TFRECORD


def write_rlds(
    dataset: LabelledDataset,
    folder: epath.Path,
    on_episode: Callable[[], object] = lambda: None,
    max_steps_per_file: int = _MAX_STEPS_PER_FILE,
) -> None:
    """Writes a TFDS directory.

    Args:
      dataset: the dataset to write.
      folder: an empty folder.
      on_episode: is called after every episode.
      max_steps_per_file: maximum length of a file; only a longer episode, in a file of its own, exceeds it.

    Raises:
      OSError: the folder cannot be written to.
    """
    features = episode_features(dataset)
    serializer = StableSerializer(features.get_serialized_info())
    splits = []
    for split in dataset.splits:
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=dataset.name, split=split, filetype_suffix=_FORMAT.file_suffix
        )
        numbers = file_numbers(dataset.lengths(split), max_steps_per_file)
        lengths = np.bincount(numbers).tolist()
        paths = [template.sharded_filepath(shard_index=i, num_shards=len(lengths)) for i in range(len(lengths))]
        episodes = dataset.episodes(split)
        for path, length in zip(paths, lengths, strict=True):
            write_tfrecords(path, _records(itertools.islice(episodes, length), features, serializer, on_episode))
        num_bytes = sum(path.stat().length for path in paths)
        splits.append(tfds.core.SplitInfo(split, lengths, num_bytes, filename_template=template))
    _write_info(dataset, features, splits, folder)
    labels = dataset.directory / LABELS_NAME
    if labels.exists():
        labels.copy(folder / LABELS_NAME)


def episode_features(dataset: LabelledDataset) -> tfds.features.FeaturesDict:
    """TFDS features of one episode."""
    f, sizes = tfds.features, dataset.sizes
    observation: dict[str, Any] = {
        camera: f.Image(shape=(None, None, 3), encoding_format="jpeg") for camera in dataset.cameras
    }
    step: dict[str, Any] = {
        "observation": observation,
        **{key: f.Text() for key in dataset.instruction_keys},
        "is_first": np.bool_,
        "is_last": np.bool_,
        "latent_motion": f.Tensor(shape=(sizes["latent_motion"],), dtype=np.float32),
        "latent_valid": np.bool_,
    }
    if "state" in sizes:
        observation["state"] = f.Tensor(shape=(sizes["state"],), dtype=np.float32)
    if "action" in sizes:
        step["action"] = f.Tensor(shape=(sizes["action"],), dtype=np.float32)
    if "latent_codes" in sizes:
        step["latent_codes"] = f.Tensor(shape=(sizes["latent_codes"],), dtype=np.int32)
    metadata = {"episode_id": f.Text(), "file_path": f.Text(), "control_rate": np.float32}
    return f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": metadata})


def _records(
    episodes: Iterable[LabelledEpisode],
    features: tfds.features.FeaturesDict,
    serializer: StableSerializer,
    on_episode: Callable[[], object],
) -> Iterator[bytes]:
    for episode in episodes:
        yield serializer.serialize_example(features.encode_example(_example(episode)))
        on_episode()


def _example(episode: LabelledEpisode) -> dict[str, Any]:
    """An episode in the structure of `episode_features`."""
    steps = []
    for t in range(len(episode)):
        observation: dict[str, Any] = {camera: jpegs[t] for camera, jpegs in episode.images.items()}
        step: dict[str, Any] = {
            "observation": observation,
            **episode.instructions,
            "is_first": t == 0,
            "is_last": t == len(episode) - 1,
            "latent_motion": episode.latent_motion[t],
            "latent_valid": episode.latent_valid[t],
        }
        if episode.state is not None:
            observation["state"] = episode.state[t]
        if episode.action is not None:
            step["action"] = episode.action[t]
        if episode.latent_codes is not None:
            step["latent_codes"] = episode.latent_codes[t]
        steps.append(step)
    metadata = {
        "episode_id": episode.episode_id,
        "file_path": episode.source_file,
        "control_rate": episode.control_rate,
    }
    return {"steps": steps, "episode_metadata": metadata}


def _write_info(
    dataset: LabelledDataset,
    features: tfds.features.FeaturesDict,
    splits: list[tfds.core.SplitInfo],
    folder: epath.Path,
) -> None:
    identity = dataset_info.DatasetIdentity(
        name=dataset.name, version=tfds.core.Version(_VERSION), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Episodes with labels of latent motion, one record an episode.",
        features=features,
        metadata=tfds.core.MetadataDict(cameras=list(dataset.cameras)),
    )
    info.set_file_format(_FORMAT)
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)
