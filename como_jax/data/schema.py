"""The on-disk contract between the dataset builders, the labeller and the input pipeline.

A dataset is a TFDS builder directory in which one record is one *step*, in episode order, so that any frame can be
read at random without touching its neighbours. Beside the records of a split lies its episode table, a Parquet file
with one row an episode, which holds everything that is small: identity, control rate, language, actions, states and the
motion of every step. The input pipeline plans its samples from the tables alone and reads records only for the frames
that it uses.

    DIR/dataset_info.json, features.json, metadata.json     TFDS metadata
    DIR/NAME-train.array_record-00000-of-00002              steps (see `step_features`)
    DIR/episodes-train.parquet                              episodes (see `EPISODE_TABLE_SCHEMA`, `episode_table`)
    DIR/statistics.json, conversion_report.json
    DIR/labels.json                                         only of labelled datasets (see `LabelInfo`)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from etils import epath

from como_jax.errors import DatasetError

SPLITS = ("train", "val")

LABELS_NAME = "labels.json"

# `motion[t]` is the mean absolute pixel difference, in [0, 1], between steps t - 1 and t; `motion[0]` is 0.
EPISODE_TABLE_SCHEMA = pa.schema(
    [
        pa.field("episode_id", pa.string(), nullable=False),
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("language_instruction", pa.string(), nullable=False),
        # Further instructions for the same episode, of which one of all is drawn in training.
        pa.field("other_instructions", pa.list_(pa.string())),
        pa.field("control_rate", pa.float64(), nullable=False),
        pa.field("num_steps", pa.int64(), nullable=False),
        pa.field("motion", pa.list_(pa.float32()), nullable=False),
        pa.field("action", pa.list_(pa.list_(pa.float32()))),
        pa.field("state", pa.list_(pa.list_(pa.float32()))),
        # Only in labelled datasets, see `como_jax.labelling`: the latent motion from step t to the step one gap later,
        # flattened; whether the episode has that step; and the codes' numbers, where the model has a codebook.
        pa.field("latent_motion", pa.list_(pa.list_(pa.float32()))),
        pa.field("latent_valid", pa.list_(pa.bool_())),
        pa.field("latent_codes", pa.list_(pa.list_(pa.int32()))),
    ]
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One control step.

    Attributes:
      images: JPEG bytes of an RGB image for every camera.
      state: proprioception, float32 `[state_size]`, or None.
      action: the action taken after this observation, float32 `[action_size]`, or None.
    """

    images: Mapping[str, bytes]
    state: np.ndarray | None = None
    action: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Episode:
    """One uninterrupted recording; every frame pair stays inside one episode.

    Attributes:
      episode_id: unique within the dataset and independent of conversion order.
      source_file: where the episode came from, for reports.
      control_rate: steps per second (Hz), which need not be the frame rate of a video container.
      steps: in temporal order.
      motion: float32 `[len(steps)]`, see `EPISODE_TABLE_SCHEMA`.
      language_instruction: empty when unknown.
      other_instructions: further instructions for the same episode; in training one of all is drawn.
      notes: what the user should know of how it was converted; for the report, and not stored.
    """

    episode_id: str
    source_file: str
    control_rate: float
    steps: Sequence[Step]
    motion: np.ndarray
    language_instruction: str = ""
    other_instructions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def step_features(
    cameras: Sequence[str], state_size: int | None = None, action_size: int | None = None
) -> tfds.features.FeaturesDict:
    """TFDS features of the record of a step; a size of None leaves the field out."""
    observation: dict[str, Any] = {
        camera: tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg") for camera in cameras
    }
    if state_size is not None:
        observation["state"] = tfds.features.Tensor(shape=(state_size,), dtype=np.float32)
    features = {
        "observation": observation,
        "language_instruction": tfds.features.Text(),
        "episode_id": tfds.features.Text(),
        "step_index": np.int32,
        "control_rate": np.float32,
        "is_first": np.bool_,
        "is_last": np.bool_,
    }
    if action_size is not None:
        features["action"] = tfds.features.Tensor(shape=(action_size,), dtype=np.float32)
    return tfds.features.FeaturesDict(features)


def step_examples(episode: Episode) -> list[dict[str, Any]]:
    """The records of an episode's steps, in the structure of `step_features`."""
    last = len(episode.steps) - 1
    examples = []
    for index, step in enumerate(episode.steps):
        observation: dict[str, Any] = dict(step.images)
        if step.state is not None:
            observation["state"] = np.asarray(step.state, np.float32)
        example = {
            "observation": observation,
            "language_instruction": episode.language_instruction,
            "episode_id": episode.episode_id,
            "step_index": index,
            "control_rate": episode.control_rate,
            "is_first": index == 0,
            "is_last": index == last,
        }
        if step.action is not None:
            example["action"] = np.asarray(step.action, np.float32)
        examples.append(example)
    return examples


def episode_row(episode: Episode) -> dict[str, Any]:
    """The row of an episode in the table, in the structure of `EPISODE_TABLE_SCHEMA`."""

    def column(values: list[np.ndarray | None]) -> list[list[float]] | None:
        present = [np.asarray(value, np.float32).tolist() for value in values if value is not None]
        return present if present else None

    return {
        "episode_id": episode.episode_id,
        "source_file": episode.source_file,
        "language_instruction": episode.language_instruction,
        "other_instructions": list(episode.other_instructions),
        "control_rate": float(episode.control_rate),
        "num_steps": len(episode.steps),
        "motion": np.asarray(episode.motion, np.float32).tolist(),
        "action": column([step.action for step in episode.steps]),
        "state": column([step.state for step in episode.steps]),
    }


class LabelInfo(NamedTuple):
    """What the pipeline reads of labels.json, in which the labeller tells how it made the labels of a dataset.

    Attributes:
      parameters: digest of the parameters of the model that made the labels.
      latent_shape: latent tokens of a transition, and numbers in each.
      codebook_size: codes that a token chooses from; 0 where latents are continuous.
    """

    parameters: str
    latent_shape: tuple[int, int]
    codebook_size: int

    @classmethod
    def read(cls, directory: epath.PathLike) -> LabelInfo:
        """Reads the file of a labelled dataset.

        Raises:
          DatasetError: the file is missing or damaged.
        """
        path = epath.Path(directory) / LABELS_NAME
        try:
            found = json.loads(path.read_text())
            tokens, size = found["latent_shape"]
            return cls(found["parameters"], (tokens, size), found["codebook_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path} cannot be read, so it is unknown what the labels mean; label the dataset again with "
                f"`python -m experiments.extract_labels`: {error!r}"
            ) from error
