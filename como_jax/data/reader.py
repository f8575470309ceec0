"""Reads samples: decodes their images on several threads, and lets a filler add the rest of the batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grain
import numpy as np

from como_jax.data.mixture import MixtureEntry
from como_jax.data.sampler import Samples, SampleSet
from como_jax.data.sources import EpisodeSource
from como_jax.data.transforms import Crop, FrameDecoder
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

    def __init__(self, filler: Filler, image_size: int, *, fit: str = "crop", num_threads: int = 1):
        """A reader for the datasets of a filler.

        Args:
          filler: of clips or of chunks.
          image_size: side of the square images, in pixels.
          fit: how images become square, where a dataset's entry does not say; see `como_jax.spec.images.FITS`.
          num_threads: threads that decode.

        Raises:
          ConfigError: an unknown fit.
        """
        if fit not in FITS:
            raise ConfigError(f"data.fit {fit!r} must be one of {', '.join(FITS)}{closest(fit, FITS)}")
        self.filler, self._image_size, self._num_threads = filler, image_size, max(1, num_threads)
        self._fits = [part.entry.fit or fit for part in filler.parts]

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
        decode = functools.partial(self._decode_rows, samples, images, offset_images)
        rows = [range(len(samples))[begin : begin + _ROWS_AT_ONCE] for begin in range(0, len(samples), _ROWS_AT_ONCE)]
        # Exhausting the results raises what a thread raised.
        list((map if self._num_threads == 1 else self._threads.map)(decode, rows))
        return images, offset_images

    def _decode_rows(self, samples: Samples, images: np.ndarray, offset_images: np.ndarray, rows: range) -> None:
        """Decodes the images of some samples into their places."""
        decoder = FrameDecoder()
        for row in rows:
            dataset = int(samples.dataset[row])
            part = self.filler.parts[dataset]
            crop = Crop(self._fits[dataset], *samples.crop[row].tolist(), *samples.shift[row].tolist())
            slots = [slot for slot, camera in enumerate(part.cameras) if camera]
            records = [*samples.records[row].tolist(), *samples.offsets[row].tolist()]
            recorded = part.source.read_cameras(records, [part.cameras[slot] for slot in slots])
            targets = itertools.chain(images[row], offset_images[row])
            for record, jpegs, target in zip(records, recorded, targets, strict=True):
                for slot, jpeg in zip(slots, jpegs, strict=True):
                    try:
                        decoder(jpeg, target[slot], crop)
                    except ValueError as error:
                        raise DatasetError(
                            f"{part.source.directory} ({part.source.split}): record {record}, camera "
                            f"{part.cameras[slot]!r}, cannot be decoded: {error}. Convert the dataset again."
                        ) from error

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")

    def __getstate__(self) -> dict[str, Any]:
        # Threads cannot be pickled for a worker process, which starts its own.
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}
