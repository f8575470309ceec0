"""Reads a policy's samples: pictures of all cameras and instants, states, instructions, and what followed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from como_jax.data.chunks import ChunkConfig, PolicyPart, PolicySamples
from como_jax.data.transforms import FrameDecoder, View
from como_jax.errors import ConfigError, DatasetError, closest
from como_jax.spec.images import FITS
from como_jax.spec.normalization import Normalizer
from como_jax.types import Observation, PolicyBatch

_CHUNK = 16
"""Samples that a thread takes at once."""


class PolicyReader(grain.transforms.Map):
    """Makes a batch of `PolicySamples`: a dictionary of the arrays of `Observation` and `PolicyBatch`."""

    def __init__(
        self,
        parts: Sequence[PolicyPart],
        chunks: ChunkConfig,
        image_size: int,
        *,
        action_size: int = 0,
        state_size: int = 0,
        num_threads: int = 1,
        fit: str = "crop",
    ):
        """Sizes of states, actions and latents are the largest of any dataset.

        Args:
          parts: the datasets.
          chunks: the window of steps around a sample.
          image_size: side of the square pictures.
          action_size, state_size: least sizes.
          num_threads: that decode.
          fit: how pictures become square, where a dataset's entry does not say; see `como_jax.spec.images.FITS`.

        Raises:
          ConfigError: an unknown fit.
        """
        if fit not in FITS:
            raise ConfigError(f"data.fit {fit!r} must be one of {', '.join(FITS)}{closest(fit, FITS)}")
        self._parts, self._chunks = tuple(parts), chunks
        self._image_size, self._num_threads = image_size, max(1, num_threads)
        self._fits = [part.entry.fit or fit for part in parts]
        self._values = [_Values(part, chunks) for part in parts]
        self.action_size = max([action_size, *(part.action.size for part in parts if part.action)])
        self.state_size = max([state_size, *(part.state.size for part in parts if part.state)])
        self.latent_size = max((part.latent.size for part in parts if part.latent), default=0)
        self.num_codes = max((part.codes.shape[1] for part in parts if part.codes is not None), default=0)

    def map(self, element: PolicySamples) -> dict[str, np.ndarray]:
        """Reads samples `[B]`."""
        found = self._make_arrays(len(element))
        found["dataset"][:], found["episode"][:] = element.dataset, element.episode
        rows = [slice(begin, begin + _CHUNK) for begin in range(0, len(element), _CHUNK)]
        fill = functools.partial(self._fill_images, element, found["images"])
        if self._num_threads == 1:
            for chunk in rows:
                fill(chunk)
        else:
            # Exhausting the results raises what a thread raised.
            list(self._threads.map(fill, rows))
        for dataset in np.unique(element.dataset):
            self._values[dataset].fill(element, np.flatnonzero(element.dataset == dataset), found)
        return found

    def _make_arrays(self, batch: int) -> dict[str, np.ndarray]:
        """Every array of a batch: what nobody fills is absent."""
        chunks, size, cameras = self._chunks, self._image_size, len(self._parts[0].cameras)
        shapes: dict[str, tuple[int, ...]] = {
            "has_camera": (cameras,),
            "action": (chunks.window, self.action_size),
            "has_action": (chunks.window, self.action_size),
        }
        if self.state_size:
            shapes |= {"state": (chunks.instants, self.state_size), "has_state": ()}
        if self.latent_size:
            shapes |= {"latent": (chunks.window, self.latent_size), "has_latent": (chunks.window,)}
        found = {name: np.zeros((batch, *shape), np.float32) for name, shape in shapes.items()}
        found["images"] = np.zeros((batch, chunks.instants, cameras, size, size, 3), np.uint8)
        found |= {name: np.zeros(batch, np.int32) for name in ("dataset", "episode")}
        if self.num_codes:
            found["codes"] = np.zeros((batch, chunks.window, self.num_codes), np.int32)
        table = self._parts[0].instructions
        found[table.key] = np.zeros((batch, table.rows.shape[1]), table.rows.dtype)
        return found

    def _fill_images(self, samples: PolicySamples, images: np.ndarray, rows: slice) -> None:
        """Decodes the pictures of some rows."""
        part, decoder = samples[rows], FrameDecoder()
        for row in range(len(part)):
            number = int(part.dataset[row])
            source, cameras = self._parts[number].source, self._parts[number].cameras
            view = View(self._fits[number], *part.crop[row].tolist(), *part.shift[row].tolist())
            records = self._values[number].history(part.record[row : row + 1], part.episode[row : row + 1])[0]
            present = [slot for slot, camera in enumerate(cameras) if camera]
            pictures = source.read_cameras(records.tolist(), [cameras[slot] for slot in present])
            for instant, record in enumerate(records.tolist()):
                for slot, jpeg in zip(present, pictures[instant], strict=True):
                    try:
                        decoder(jpeg, images[rows][row, instant, slot], view)
                    except ValueError as error:
                        raise DatasetError(
                            f"{source.directory} ({source.split}): record {record}, camera {cameras[slot]!r}, "
                            f"cannot be decoded: {error}"
                        ) from error

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")

    def __getstate__(self) -> dict[str, Any]:
        # Threads do not travel to worker processes.
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}


class _Values:
    """The numbers of one dataset, normalised once."""

    def __init__(self, part: PolicyPart, chunks: ChunkConfig):
        source = part.source
        self._part, self._chunks = part, chunks
        self._action = _normalize(part.action, source.action)
        self._state = _normalize(part.state, source.state)
        self._latent = _normalize(part.latent, source.latent_motion)
        self._has_camera = np.array([bool(camera) for camera in part.cameras], np.float32)

    def history(self, record: np.ndarray, episode: np.ndarray) -> np.ndarray:
        """Steps `[B, T]` of the pictures; before the start of the episode its first one is repeated."""
        chunks = self._chunks
        steps = record[:, None] + chunks.stride * np.arange(1 - chunks.instants, 1)
        return np.maximum(steps, self._part.source.start[episode][:, None])

    def fill(self, samples: PolicySamples, rows: np.ndarray, found: dict[str, np.ndarray]) -> None:
        """Fills rows `[R]`, which are this dataset's, of every array but the pictures."""
        part, source, chunks = self._part, self._part.source, self._chunks
        record, episode = samples.record[rows], samples.episode[rows]
        first = source.start[episode][:, None]
        window = record[:, None] + np.arange(-chunks.history, chunks.chunk)
        clipped = np.clip(window, first, first + source.length[episode][:, None] - 1)
        inside = (window == clipped).astype(np.float32)
        found["has_camera"][rows] = self._has_camera
        if self._state is not None:
            found["state"][rows, :, : self._state.shape[1]] = self._state[self.history(record, episode)]
            found["has_state"][rows] = 1
        if self._action is not None:
            size = self._action.shape[1]
            found["action"][rows, :, :size] = self._action[clipped] * inside[..., None]
            found["has_action"][rows, :, :size] = inside[..., None]
        if self._latent is not None:
            valid = inside * part.labelled[clipped]
            found["latent"][rows] = self._latent[clipped] * valid[..., None]
            found["has_latent"][rows] = valid
            if part.codes is not None:
                found["codes"][rows] = np.where(valid[..., None] > 0, part.codes[clipped], 0)
        found[part.instructions.key][rows] = part.instructions.rows[episode]


def _normalize(normalizer: Normalizer | None, values: np.ndarray | None) -> np.ndarray | None:
    """What is used of a dataset: whatever has a normalizer."""
    return None if normalizer is None or values is None else normalizer(values)


_OBSERVATION = ("images", "has_camera", "state", "has_state", "text", "text_embedding")


def to_policy_batch(batch: dict[str, Any]) -> PolicyBatch:
    """Names the arrays of a batch."""
    optional: dict[str, Any] = {name: batch.get(name) for name in ("latent", "has_latent", "codes")}
    seen: dict[str, Any] = {name: batch.get(name) for name in _OBSERVATION}
    return PolicyBatch(
        observation=Observation(**seen),
        **optional,
        **{name: batch[name] for name in ("action", "has_action", "dataset", "episode")},
    )
