"""From a config to the stream of batches that a run trains on."""

from __future__ import annotations

from typing import NamedTuple

import grain
from ml_collections import ConfigDict

from como_jax.data.clips import ClipConfig
from como_jax.data.frames import FrameReader
from como_jax.data.labels import Labels
from como_jax.data.mixture import Mixture, parse_mixture
from como_jax.data.pipeline import train_batches
from como_jax.data.samples import ALL_ROWS, Augmentation, Rows, TrainingSamples


class TrainingData(NamedTuple):
    """The mixture, this host's stream of batches, and labels of a few episodes where a loss term reads them."""

    mixture: Mixture
    batches: grain.IterDataset
    labels: Labels | None

    def describe(self) -> list[str]:
        """One line a dataset, and one for the labels."""
        return self.mixture.describe() + ([] if self.labels is None else [self.labels.describe()])

    def sizes(self) -> dict[str, int]:
        """Sizes of the config that follow from the data, by the field's full name."""
        return {} if self.labels is None else {"model.label_size": self.labels.size}


def build_training_data(config: ConfigDict, rows: Rows = ALL_ROWS) -> TrainingData:
    """The data of a pretraining config: it holds what the loss terms need that are on, and nothing else.

    Args:
      config: of configs/pretrain_*.py.
      rows: of every batch, those that this host reads.

    Raises:
      DatasetError: a dataset is missing, damaged, or lacks what a loss term needs.
    """
    data, model = config.data, config.model
    clips = ClipConfig(
        gap_seconds=data.gap_seconds,
        instants=data.instants,
        pair_span=data.pair_span,
        offset_frames=bool(model.get("tcl_weight")),
        min_motion=data.min_motion,
        max_motion=data.max_motion,
        min_gap_fraction=data.min_gap_fraction,
    )
    mixture = Mixture.open(parse_mixture(data.mixture), "train", clips, data.camera)
    labels = None
    if model.get("label_weight"):
        kinds = [kind.strip() for kind in data.labels.split(",") if kind.strip()]
        labels = Labels(mixture.parts, kinds, data.labelled_fraction)
    samples = TrainingSamples(
        mixture,
        Augmentation(data.random_shift, data.min_crop_fraction),
        batch_size=data.batch_size,
        seed=config.seed,
        rows=rows,
    )
    reader = FrameReader(
        mixture,
        data.image_size,
        num_threads=data.num_threads,
        fit=data.fit,
        flow=bool(model.get("flow_weight")),
        labels=labels,
    )
    return TrainingData(mixture, train_batches(samples, reader, num_workers=data.num_workers), labels)
