"""Records of an RLDS dataset as episodes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from como_jax.convert import images
from como_jax.convert.rlds import features
from como_jax.convert.rlds.pictures import Picture, convert_picture
from como_jax.data.schema import Episode, Step

_BLACK = 8
# What TFDS raises for a record that is no example of its features.
_BAD_RECORDS = (
    DecodeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    zlib.error,
)


class EpisodeReader:
    """Reads episodes from the records of one dataset; nothing but the selected keys is parsed."""

    def __init__(
        self, steps: Mapping[str, Any], selection: features.Selection, control_rate: float, image_size: int
    ) -> None:
        """Prepares the parser.

        Args:
          steps: features of a step.
          selection: what to read of them.
          control_rate: steps per second (Hz).
          image_size: larger pictures are scaled down until their shorter side has this many pixels.
        """
        self._selection = selection
        self._control_rate = control_rate
        self._image_size = image_size
        self._features = features.subset(steps, selection.keys)
        self._decoders = features.encoded_images(steps, selection.cameras)

    def read(self, record: bytes, source_file: str, index: int) -> tuple[Episode, list[str]]:
        """Record number `index` of a file as an episode, and what its user should know.

        Raises:
          ValueError: the record is damaged, or holds no steps.
        """
        selection = self._selection
        steps = list(self._parse(record))
        if not steps:
            raise ValueError("holds no steps")
        pictures = [self._pictures(step, number) for number, step in enumerate(steps)]
        language, is_intact = self._language(steps)
        main_camera = features.camera_name(selection.cameras[0])
        episode = Episode(
            episode_id=f"{source_file}/{index:06d}",
            source_file=source_file,
            control_rate=self._control_rate,
            steps=[
                Step(
                    {camera: picture.jpeg for camera, picture in views.items()},
                    _join(step, selection.states),
                    _join(step, selection.actions),
                )
                for step, views in zip(steps, pictures, strict=True)
            ],
            motion=images.motion([views[main_camera].thumbnail for views in pictures]),
            language_instruction=language,
        )
        warnings = [] if is_intact else ["a language instruction is not UTF-8; its bad bytes were replaced by \ufffd"]
        return episode, warnings + _faults(pictures)

    def _parse(self, record: bytes) -> Iterator[Mapping[str, Any]]:
        """The selected values of each step."""
        try:
            yield from self._features.deserialize_example_np(record, decoders=self._decoders)["steps"]
        except _BAD_RECORDS as error:
            if missing := self._missing_keys(record):
                raise ValueError(f"holds no {', '.join(missing)}") from error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"does not hold what the dataset describes: {reason}") from error

    def _missing_keys(self, record: bytes) -> list[str]:
        """Selected keys that a record does not have at all, which TFDS does not say."""
        try:
            stored = tf_example_pb2.Example.FromString(record).features.feature
        except DecodeError:
            return []
        # Ragged values are stored under longer names.
        return [key for key in self._selection.keys if not any(name.startswith(f"steps/{key}") for name in stored)]

    def _pictures(self, step: Mapping[str, Any], number: int) -> dict[str, Picture]:
        pictures = {}
        for key in self._selection.cameras:
            camera = features.camera_name(key)
            try:
                pictures[camera] = convert_picture(features.lookup(step, key), self._image_size)
            except ValueError as error:
                raise ValueError(f"step {number}, camera {camera!r}: {error}") from error
        return pictures

    def _language(self, steps: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
        """The first instruction that is not empty, and whether all of it can be read."""
        if self._selection.language is not None:
            for step in steps:
                text = _to_text(features.lookup(step, self._selection.language))
                if text.strip():
                    return text.strip(), "\ufffd" not in text
        return "", True


def _faults(pictures: Sequence[Mapping[str, Picture]]) -> list[str]:
    """What is odd about the cameras of an episode."""
    faults = []
    for camera in pictures[0]:
        views = [each[camera] for each in pictures]
        if max(view.thumbnail.max() for view in views) < _BLACK:
            faults.append(f"camera {camera!r} is black over a whole episode")
        if len({view.size for view in views}) > 1:
            faults.append(f"pictures of camera {camera!r} change their size within an episode")
    return faults


def _join(step: Mapping[str, Any], keys: tuple[str, ...]) -> np.ndarray | None:
    """The values of some keys, float32 `[D]`, or None without keys."""
    if not keys:
        return None
    return np.concatenate([np.ravel(np.asarray(features.lookup(step, key), np.float32)) for key in keys])


def _to_text(value: Any) -> str:
    """Text from its bytes, or from code points padded with zeros."""
    if isinstance(value, np.ndarray) and value.ndim:
        return "".join(chr(point) if 0 < point < 0x110000 else "\ufffd" for point in _without_padding(value))
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _without_padding(values: np.ndarray) -> list[int]:
    zeros = np.flatnonzero(values == 0)
    return values[: zeros[0]].tolist() if zeros.size else values.tolist()
