"""What motion models are trained on: clips of evenly spaced frames, and what their loss terms need beside them."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Sequence
from typing import Any

import chex
import cv2
import numpy as np
from ml_collections import ConfigDict

from como_jax.data.clips import ClipConfig, draw_gaps, draw_offsets
from como_jax.data.identity import Identity, identify
from como_jax.data.mixture import Mixture, MixturePart, parse_mixture
from como_jax.data.reader import Batch, BatchReader, open_reader
from como_jax.data.sampler import NO_AUGMENTATION, Augmentation, Samples
from como_jax.data.sources import load_normalizer
from como_jax.data.supervision import Supervision
from como_jax.spec.normalization import Normalizer, Scales
from como_jax.types import FLOW_STRIDE, BatchParts, FramePairs


class ClipFiller:
    """Samples are clips: frames, and the optional arrays of `FramePairs` that are asked for."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        actions: bool = False,
        normalization: str = "none",
        flow: bool = False,
        supervision: Supervision | None = None,
    ):
        """Chooses what a batch holds beside frames.

        Args:
          mixture: datasets and their clips.
          actions: whether a batch has `action` `[B, P, A]`, the mean of the true actions taken between the two frames
            of a pair, and `has_action` `[B, P, A]`, which is 0 where the dataset has no action or a shorter one.
          normalization: of actions, where a dataset's entry does not say; "none" leaves the dataset's units.
          flow: whether a batch has optical flow.
          supervision: true motion of a few episodes.
        """
        self.parts: Sequence[MixturePart] = mixture.parts
        self.weights: Sequence[float] = mixture.weights.tolist()
        self.num_samples = [len(part.index) for part in mixture.parts]
        self._clips = mixture.parts[0].clips
        self._actions = [_recorded_actions(part, normalization) if actions else None for part in mixture.parts]
        self._action_size = max((found[0].shape[1] for found in self._actions if found), default=0)
        self._flow, self._supervision = flow, supervision

    def draw(
        self,
        datasets: np.ndarray,
        numbers: np.ndarray,
        rng: np.random.Generator,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> Samples:
        """Clips `numbers` `[B]` of datasets `[B]`; draws gaps, offset frames and augmentation."""
        config, size = self._clips, len(datasets)
        for_gap, for_offset = rng.random(size), rng.random((size, config.instants - 1))
        crop, shift = augmentation.draw(rng, size)
        first, episode, full_gap, last = self._look_up(datasets, numbers)
        gap = full_gap if config.pair_span > 1 else draw_gaps(full_gap, config.min_gap_fraction, for_gap)
        records = first[:, None] + gap[:, None] * np.arange(config.instants)
        offsets = draw_offsets(records[:, 1:], gap, last, for_offset) if config.offset_frames else records[:, :0]
        return Samples(datasets, episode, gap, records, offsets, crop, shift, np.zeros(size))

    def fill(self, samples: Samples, images: np.ndarray, offset_images: np.ndarray) -> Batch:
        """The arrays of `FramePairs`, and the actions if asked for."""
        batch = {
            "frames": images[:, :, 0],
            "dataset": samples.dataset.astype(np.int32),
            "episode": samples.episode.astype(np.int32),
            "gap": self._gap_share(samples),
        }
        if samples.offsets.shape[1]:
            batch["offset_frames"] = offset_images[:, :, 0]
        if self._action_size:
            batch["action"], batch["has_action"] = self._mean_actions(samples)
        if self._flow:
            clips = [[optical_flow(*pair) for pair in itertools.pairwise(clip)] for clip in batch["frames"]]
            batch["flow"] = np.array(clips)
        if self._supervision is not None:
            rows = zip(samples.dataset.tolist(), samples.episode.tolist(), samples.records, samples.gap, strict=True)
            found = [self._supervision(dataset, episode, t[:-1], int(gap)) for dataset, episode, t, gap in rows]
            batch["supervision"], batch["has_supervision"] = map(np.stack, zip(*found, strict=True))
        return batch

    def _look_up(self, datasets: np.ndarray, clips: np.ndarray) -> list[np.ndarray]:
        """First record, episode, full gap and last record of the episode, int64 `[B]` each."""
        found = [np.empty(len(datasets), np.int64) for _ in range(4)]
        for dataset in np.unique(datasets):
            index, rows = self.parts[dataset].index, datasets == dataset
            first, episode = index.look_up(clips[rows])
            values = first, episode, index.gap[episode], index.last[episode]
            for column, value in zip(found, values, strict=True):
                column[rows] = value
        return found

    def _gap_share(self, samples: Samples) -> np.ndarray:
        """Gaps as shares of each dataset's full gap in seconds, float32 `[B]`."""
        shares = np.empty(len(samples), np.float32)
        for dataset in np.unique(samples.dataset):
            part, rows = self.parts[dataset], samples.dataset == dataset
            rate = part.source.control_rate[samples.episode[rows]]
            shares[rows] = samples.gap[rows] / rate / part.clips.gap_seconds
        return shares

    def _mean_actions(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        """Mean actions of every pair and whether there are any, float32 `[B, P, A]` both."""
        shape = (len(samples), samples.records.shape[1] - 1, self._action_size)
        mean, known = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for row, (dataset, gap) in enumerate(zip(samples.dataset.tolist(), samples.gap.tolist(), strict=True)):
            if self._actions[dataset] is not None:
                action, normalizer = self._actions[dataset]
                found = np.stack([action[first : first + gap].mean(axis=0) for first in samples.records[row, :-1]])
                mean[row, :, : action.shape[1]] = found if normalizer is None else normalizer(found)
                known[row, :, : action.shape[1]] = 1
        return mean, known


@dataclasses.dataclass(frozen=True)
class MotionData:
    """What a motion model is trained on: datasets and their reader, and true motion where a loss term needs it."""

    mixture: Mixture
    reader: BatchReader
    supervision: Supervision | None

    def describe(self) -> list[str]:
        """One line a dataset, and one for the true motion."""
        return self.mixture.describe() + ([] if self.supervision is None else [self.supervision.describe()])

    def identify(self) -> dict[str, Identity]:
        """The identity of every dataset, by its directory."""
        sources = [part.source for part in self.mixture.parts]
        return {str(source.directory): identify(source.directory, [source]) for source in sources}

    def scales(self) -> Scales:
        """What standardises the true motion of every dataset, by its name."""
        return {} if self.supervision is None else self.supervision.scales()

    def sizes(self) -> dict[str, int]:
        """Sizes of the config that follow from the data, by the field's full name."""
        return {} if self.supervision is None else {"model.label_size": self.supervision.size}


def open_motion_data(config: ConfigDict, needs: BatchParts, scales: Scales = types.MappingProxyType({})) -> MotionData:
    """Opens the training episodes of the datasets of a pretraining config.

    Args:
      config: of configs/pretrain_*.py.
      needs: the optional parts of a batch that the model's loss reads.
      scales: of the first start of a run, which stay; others follow from the datasets.

    Raises:
      DatasetError: a dataset is missing, damaged, or lacks what is needed.
      ConfigError: a value of the config's section `data` makes no clips.
    """
    data = config.data
    clips = ClipConfig(
        gap_seconds=data.gap_seconds,
        instants=data.instants,
        pair_span=data.pair_span,
        offset_frames=needs.offset_frames,
        min_motion=data.min_motion,
        max_motion=data.max_motion,
        min_gap_fraction=data.min_gap_fraction,
    )
    mixture = Mixture.open(parse_mixture(data.mixture), "train", clips, data.camera)
    supervision = None
    if needs.supervision:
        kinds = [kind.strip() for kind in data.labels.split(",") if kind.strip()]
        supervision = Supervision(mixture.parts, kinds, data.labelled_fraction, scales)
    filler = ClipFiller(mixture, flow=needs.flow, supervision=supervision)
    reader = open_reader(filler, data)
    return MotionData(mixture, reader, supervision)


def to_frame_pairs(batch: dict[str, Any]) -> FramePairs:
    """Names the arrays of a batch; what it does not hold is None."""
    fields: dict[str, Any] = {field.name: batch.get(field.name) for field in dataclasses.fields(FramePairs)}
    return FramePairs(**fields)


def optical_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dense optical flow of a frame pair, by dense inverse search (DIS, arXiv 1603.03590).

    Args:
      first, second: uint8 RGB `[S, S, 3]`, S a multiple of `FLOW_STRIDE`.

    Returns:
      float32 `[S / 4, S / 4, 2]`, the mean displacement of every cell from `first` to `second`, right and down, as
      shares of the image's width.
    """
    chex.assert_equal_shape([first, second])
    size = first.shape[0]
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    # A new estimator every time: it keeps buffers, which the threads of a reader must not share.
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = estimator.calc(gray[0], gray[1], np.zeros((size, size, 2), np.float32))
    cells = flow.reshape(size // FLOW_STRIDE, FLOW_STRIDE, size // FLOW_STRIDE, FLOW_STRIDE, 2)
    return (cells.mean(axis=(1, 3)) / size).astype(np.float32)


def _recorded_actions(part: MixturePart, normalization: str) -> tuple[np.ndarray, Normalizer | None] | None:
    """The actions of a dataset, float32 `[S, A]`, and what normalises them; None where there are none."""
    if part.source.action is None:
        return None
    kind = part.entry.normalization or normalization
    return part.source.action, None if kind == "none" else load_normalizer(
        part.source.directory, "action", kind, part.entry.split
    )
