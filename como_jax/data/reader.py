"""Reads samples: decodes their images on several threads, and lets a filler add the rest of the batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grain
import numpy as np
from ml_collections import ConfigDict

from como_jax.data.frame_cache import FrameCache, open_caches
from como_jax.data.mixture import MixtureEntry
from como_jax.data.sampler import Samples, SampleSet
from como_jax.data.sources import EpisodeSource
from como_jax.data.transforms import Crop, FrameDecoder, shift
from como_jax.errors import ConfigError, DatasetError, closest
from como_jax.spec.images import FITS

Batch = dict[str, np.ndarray]

_ROWS_AT_ONCE = 16
"""Samples that a thread takes at once: few enough to share a batch out evenly."""


class Part(Protocol):
    """One opened dataset of a mixture.

    Attributes:
      entry: what the mixture says of it.
      source: its episodes.
      cameras: for every image of an instant, the dataset's camera, or "" where the dataset has none.
    """

    @property
    def entry(self) -> MixtureEntry: ...

    @property
    def source(self) -> EpisodeSource: ...

    @property
    def cameras(self) -> Sequence[str]: ...


class Filler(SampleSet, Protocol):
    """Says which samples a mixture has and what a batch holds beside images; see `ClipFiller` and `ChunkFiller`."""

    @property
    def parts(self) -> Sequence[Part]:
        """The datasets, all with equally many cameras."""

    def fill(self, samples: Samples, images: np.ndarray, offset_images: np.ndarray) -> Batch:
        """The arrays of a batch.

        Args:
          samples: B of them.
          images: uint8 RGB `[B, K, C, S, S, 3]`, of K instants and C cameras.
          offset_images: uint8 RGB `[B, P, C, S, S, 3]`, of P offset frames.
        """


class BatchReader(grain.transforms.Map):
    """Makes a batch, a dictionary of arrays, of `Samples`."""

    def __init__(
        self, filler: Filler, image_size: int, *, fit: str = "crop", num_threads: int = 1, cache_bytes: int = 0
    ):
        """A reader for the datasets of a filler.

        Args:
          filler: of clips or of chunks.
          image_size: side of the square images, in pixels.
          fit: how images become square, where a dataset's entry does not say; see `como_jax.spec.images.FITS`.
          num_threads: threads that decode.
          cache_bytes: decoded frames of datasets are kept that fit into so many bytes together.

        Raises:
          ConfigError: an unknown fit.
        """
        if fit not in FITS:
            raise ConfigError(f"data.fit {fit!r} must be one of {', '.join(FITS)}{closest(fit, FITS)}")
        self.filler, self._image_size, self._num_threads = filler, image_size, max(1, num_threads)
        self._fits = [part.entry.fit or fit for part in filler.parts]
        self._cache_bytes = cache_bytes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return self._image_size, self._image_size, 3

    def map(self, element: Samples) -> Batch:
        """Reads samples.

        Raises:
          DatasetError: an image cannot be decoded.
        """
        return self.filler.fill(element, *self.decode(element))

    def read(self, numbers: np.ndarray, dataset: int = 0) -> Batch:
        """Reads the samples of these numbers of one dataset, without augmentation."""
        datasets = np.full(len(numbers), dataset)
        return self.map(self.filler.draw(datasets, np.asarray(numbers), np.random.default_rng(0)))

    def decode(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        """The images of samples alone, as `Filler.fill` gets them; black where a dataset lacks a camera.

        Raises:
          DatasetError: an image cannot be decoded.
        """
        cameras = len(self.filler.parts[0].cameras)
        images, offset_images = (
            np.zeros((*records.shape, cameras, *self.image_shape), np.uint8)
            for records in (samples.records, samples.offsets)
        )
        decode = functools.partial(self._decode_rows, samples, images, offset_images, self._caches)
        rows = [range(len(samples))[begin : begin + _ROWS_AT_ONCE] for begin in range(0, len(samples), _ROWS_AT_ONCE)]
        # Exhausting the results raises what a thread raised.
        list((map if self._num_threads == 1 else self._threads.map)(decode, rows))
        return images, offset_images

    def _decode_rows(
        self,
        samples: Samples,
        images: np.ndarray,
        offset_images: np.ndarray,
        caches: Sequence[FrameCache | None],
        rows: range,
    ) -> None:
        """Decodes the images of some samples into their places."""
        decoder = FrameDecoder()
        for row in rows:
            dataset = int(samples.dataset[row])
            crop = Crop(self._fits[dataset], *samples.crop[row].tolist(), *samples.shift[row].tolist())
            cache = caches[dataset] if crop.scale == 1 else None
            records = [*samples.records[row].tolist(), *samples.offsets[row].tolist()]
            for record, frames in zip(records, itertools.chain(images[row], offset_images[row]), strict=True):
                if cache is None:
                    self._decode(decoder, dataset, record, self._slots[dataset], frames, crop)
                else:
                    self._look_up(cache, decoder, dataset, record, frames, crop)

    def _look_up(
        self, cache: FrameCache, decoder: FrameDecoder, dataset: int, record: int, frames: np.ndarray, crop: Crop
    ) -> None:
        """Fills the frames `[C, S, S, 3]` of a record from a cache, and that with what it lacks."""
        slots = self._slots[dataset]
        kept = [cache.get(record, number) for number in range(len(slots))]
        whole = [frame for frame in kept if frame is not None]
        if len(whole) < len(slots):
            decoded = np.empty_like(frames)
            self._decode(decoder, dataset, record, slots, decoded, crop._replace(down=0, right=0))
            whole = [decoded[slot] for slot in slots]
            for number, frame in enumerate(whole):
                cache.put(record, number, frame)
        for slot, frame in zip(slots, whole, strict=True):
            shift(frame, crop.down, crop.right, frames[slot])

    def _decode(
        self, decoder: FrameDecoder, dataset: int, record: int, slots: Sequence[int], frames: np.ndarray, crop: Crop
    ) -> None:
        """Decodes the images of a record into its frames `[C, S, S, 3]`, of which slots are those that are there."""
        part = self.filler.parts[dataset]
        [jpegs] = part.source.read_cameras([record], [part.cameras[slot] for slot in slots])
        for slot, jpeg in zip(slots, jpegs, strict=True):
            try:
                decoder(jpeg, frames[slot], crop)
            except ValueError as error:
                raise DatasetError(
                    f"{part.source.directory} ({part.source.split}): record {record}, camera {part.cameras[slot]!r}, "
                    f"cannot be decoded: {error}. Convert the dataset again."
                ) from error

    @functools.cached_property
    def _slots(self) -> list[list[int]]:
        """Of every dataset, which of the images of an instant it has."""
        return [[slot for slot, camera in enumerate(part.cameras) if camera] for part in self.filler.parts]

    @functools.cached_property
    def _caches(self) -> list[FrameCache | None]:
        if not self._cache_bytes:
            return [None] * len(self.filler.parts)
        cameras = [[camera for camera in part.cameras if camera] for part in self.filler.parts]
        sources = [part.source for part in self.filler.parts]
        return open_caches(sources, cameras, self._image_size, self._fits, self._cache_bytes)

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")

    def __getstate__(self) -> dict[str, Any]:
        # Threads cannot be pickled for a worker process, which starts its own.
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}


def open_reader(filler: Filler, data: ConfigDict) -> BatchReader:
    """The reader of a recipe's section `data`. Where images are cut at random, no frame comes twice, and none is kept.

    Raises:
      ConfigError: a negative `data.frame_cache_gib`, or an unknown fit.
    """
    cache_gib = data.get("frame_cache_gib", 0.0)  # Runs of earlier versions lack it.
    if cache_gib < 0:
        raise ConfigError(f"data.frame_cache_gib must not be negative, not {cache_gib}.")
    cache_bytes = int(cache_gib * 2**30) if data.min_crop_fraction == 1 else 0
    return BatchReader(filler, data.image_size, fit=data.fit, num_threads=data.num_threads, cache_bytes=cache_bytes)
