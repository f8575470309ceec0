"""Reads samples: decodes their frames into the arrays of a batch, on several threads."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from como_jax.data.flow import optical_flow
from como_jax.data.labels import Labels
from como_jax.data.mixture import Mixture, MixturePart
from como_jax.data.normalization import load_normalizer
from como_jax.data.samples import Samples
from como_jax.data.transforms import FrameDecoder, View
from como_jax.errors import DatasetError
from como_jax.spec.normalization import Normalizer

_CHUNK = 16
"""Clips that a thread takes at once: enough to read in one go, few enough to share out evenly."""


class FrameReader(grain.transforms.Map):
    """Makes a batch of `Samples`, a dictionary of the arrays of `FramePairs` and, if asked, of actions."""

    def __init__(
        self,
        mixture: Mixture,
        image_size: int,
        *,
        num_threads: int = 1,
        fit: str = "crop",
        actions: bool = False,
        normalization: str = "none",
        flow: bool = False,
        labels: Labels | None = None,
    ):
        """Chooses what a batch holds.

        Args:
          mixture: datasets and their clips.
          image_size: side of the square frames.
          num_threads: that decode.
          fit: how pictures become square, where a dataset's entry does not say; see `como_jax.spec.images.FITS`.
          actions: whether a batch has `action` `[B, P, A]`, the mean of the true actions taken between the two frames
            of a pair, and `has_action` `[B, P, A]`, which is 0 where the dataset has no action or a shorter one.
          normalization: of actions, where a dataset's entry does not say; "none" leaves the dataset's units.
          flow: whether a batch has optical flow.
          labels: of a few episodes.
        """
        self._parts = mixture.parts
        self._image_size, self._num_threads = image_size, max(1, num_threads)
        self._fits = [part.entry.fit or fit for part in mixture.parts]
        self._actions = [_action_reader(part, normalization) if actions else None for part in mixture.parts]
        self._action_size = max((reader.size for reader in self._actions if reader), default=0)
        self._flow, self._labels = flow, labels

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Of one frame."""
        return self._image_size, self._image_size, 3

    def map(self, element: Samples) -> dict[str, np.ndarray]:
        """Reads samples `[B]`."""
        size, batch = self._image_size, len(element)
        num_offsets = 0 if element.offsets is None else element.offsets.shape[1]
        instants = element.records.shape[1]
        frames = np.empty((batch, instants, size, size, 3), np.uint8)
        offset_frames = np.empty((batch, num_offsets, size, size, 3), np.uint8)
        chunks = [slice(begin, begin + _CHUNK) for begin in range(0, batch, _CHUNK)]
        fill = functools.partial(self._fill, element, frames, offset_frames)
        if self._num_threads == 1:
            for chunk in chunks:
                fill(chunk)
        else:
            # Exhausting the results raises what a thread raised.
            list(self._threads.map(fill, chunks))
        found: dict[str, np.ndarray] = {
            "frames": frames,
            "dataset": element.dataset.astype(np.int32),
            "episode": element.episode.astype(np.int32),
            "gap": self._gap_share(element),
        }
        if num_offsets:
            found["offset_frames"] = offset_frames
        return found | self._optional(element, frames)

    def _fill(self, samples: Samples, frames: np.ndarray, offset_frames: np.ndarray, rows: slice) -> None:
        """Decodes the frames of some rows."""
        part, decoder = samples[rows], FrameDecoder()
        wanted = part.records if part.offsets is None else np.concatenate([part.records, part.offsets], axis=1)
        for dataset in np.unique(part.dataset):
            mine = np.flatnonzero(part.dataset == dataset)
            source, fit = self._parts[dataset].source, self._fits[dataset]
            jpegs = iter(source.read_jpegs(wanted[mine].ravel().tolist()))
            for row in mine:
                view = View(fit, *part.crop[row].tolist(), *part.shift[row].tolist())
                targets = itertools.chain(frames[rows][row], offset_frames[rows][row])
                for record, frame in zip(wanted[row].tolist(), targets, strict=True):
                    try:
                        decoder(next(jpegs), frame, view)
                    except ValueError as error:
                        raise DatasetError(
                            f"{source.directory} ({source.split}): record {record}, camera {source.camera!r}, "
                            f"cannot be decoded: {error}"
                        ) from error

    def _gap_share(self, samples: Samples) -> np.ndarray:
        """Gaps as shares of each dataset's full gap in seconds, float32 `[B]`."""
        shares = np.empty(len(samples), np.float32)
        for dataset in np.unique(samples.dataset):
            part, rows = self._parts[dataset], samples.dataset == dataset
            rate = part.source.control_rate[samples.episode[rows]]
            shares[rows] = samples.gap[rows] / rate / part.clips.gap_seconds
        return shares

    def _optional(self, samples: Samples, frames: np.ndarray) -> dict[str, np.ndarray]:
        """What was asked for beside frames."""
        found: dict[str, np.ndarray] = {}
        if self._action_size:
            found |= self._read_actions(samples)
        if self._flow:
            flow = [[optical_flow(*pair) for pair in itertools.pairwise(clip)] for clip in frames]
            found["flow"] = np.stack([np.stack(clip) for clip in flow])
        if self._labels is not None:
            rows = zip(samples.dataset.tolist(), samples.episode.tolist(), samples.records, samples.gap, strict=True)
            read = [self._labels(dataset, episode, records[:-1], int(gap)) for dataset, episode, records, gap in rows]
            found |= {key: np.stack([labels[key] for labels in read]) for key in read[0]}
        return found

    def _read_actions(self, samples: Samples) -> dict[str, np.ndarray]:
        shape = (len(samples), samples.records.shape[1] - 1, self._action_size)
        action, has_action = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for row, dataset in enumerate(samples.dataset.tolist()):
            reader = self._actions[dataset]
            if reader is not None:
                action[row, :, : reader.size] = reader(samples.records[row, :-1], int(samples.gap[row]))
                has_action[row, :, : reader.size] = 1
        return {"action": action, "has_action": has_action}

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")

    def __getstate__(self) -> dict[str, Any]:
        # Threads do not travel to worker processes.
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}


class _ActionReader:
    """Mean actions of one dataset over a gap."""

    def __init__(self, action: np.ndarray, normalizer: Normalizer | None):
        self._action, self._normalizer = action, normalizer
        self.size = action.shape[1]

    def __call__(self, first: np.ndarray, gap: int) -> np.ndarray:
        mean = np.stack([self._action[record : record + gap].mean(axis=0) for record in first])
        return mean if self._normalizer is None else self._normalizer(mean)


def _action_reader(part: MixturePart, default: str) -> _ActionReader | None:
    if part.source.action is None:
        return None
    kind = part.entry.normalization or default
    normalizer = None if kind == "none" else load_normalizer(part.source.directory, "action", kind)
    return _ActionReader(part.source.action, normalizer)
