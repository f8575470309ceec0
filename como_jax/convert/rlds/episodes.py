"""Reads episodes from RLDS records: chooses cameras, actions, states and language, and parses only these."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from como_jax.convert import images
from como_jax.convert.images import Frame
from como_jax.convert.rlds.language import is_text, leaves, lookup, read_texts, usual_language
from como_jax.convert.selection import Selection
from como_jax.data.schema import Episode
from como_jax.errors import ConversionError, one_line

_OBSERVATION = "observation/"
_BLACK = 8
# What TFDS raises for a record that does not fit its features.
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
    """Reads episodes from the records of one dataset; only the selected keys are parsed."""

    def __init__(
        self,
        steps: Mapping[str, Any],
        selection: Selection,
        control_rate: float,
        image_size: int,
        episode: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares for records of these features, by key, of their steps and of the episode as a whole."""
        self._selection = selection
        self._control_rate = control_rate
        self._image_size = image_size
        available = {} if episode is None else episode
        self._episode_keys = tuple(key for key in selection.language_keys if key in available)
        language = [key for key in selection.language_keys if key not in available]
        self._keys = (*selection.cameras.values(), *selection.actions, *selection.states, *language)
        self._features = _subset(steps, self._keys, {key: available[key] for key in self._episode_keys})
        self._decoders = _encoded_images(steps, tuple(selection.cameras.values()))

    def read(self, record: bytes, source_file: str, index: int) -> tuple[Episode, list[str]]:
        """Reads record number `index` of a file; returns the episode, and what the user should know of it.

        Raises:
          ValueError: the record is damaged, or has no steps.
        """
        selection = self._selection
        values, steps = self._parse(record)
        if not steps:
            raise ValueError("holds no steps")
        by_step = [self._frames(step, number) for number, step in enumerate(steps)]
        frames = {camera: [each[camera] for each in by_step] for camera in selection.cameras}
        texts, notes = read_texts(selection.language_keys, values, steps)
        episode = images.make_episode(
            f"{source_file}/{index:06d}",
            source_file,
            self._control_rate,
            frames,
            [_join(step, selection.states) for step in steps] if selection.states else None,
            [_join(step, selection.actions) for step in steps] if selection.actions else None,
            texts,
        )
        return episode, notes + _faults(frames)

    def _parse(self, record: bytes) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
        """Returns the selected values of the episode, by key, and of each step."""
        try:
            found = self._features.deserialize_example_np(record, decoders=self._decoders)
            return {key: lookup(found, key) for key in self._episode_keys}, list(found["steps"])
        except _BAD_RECORDS as error:
            if missing := self._missing_keys(record):
                raise ValueError(f"holds no {', '.join(missing)}") from error
            raise ValueError(f"does not hold what the dataset describes: {one_line(error)}") from error

    def _missing_keys(self, record: bytes) -> list[str]:
        """Returns the selected keys that a record does not have at all; TFDS does not say which."""
        try:
            stored = tf_example_pb2.Example.FromString(record).features.feature
        except DecodeError:
            return []
        # Ragged values are stored under longer names.
        paths = {key: f"steps/{key}" for key in self._keys} | {key: key for key in self._episode_keys}
        return [key for key, path in paths.items() if not any(name.startswith(path) for name in stored)]

    def _frames(self, step: Mapping[str, Any], number: int) -> dict[str, Frame]:
        frames = {}
        for camera, key in self._selection.cameras.items():
            try:
                frames[camera] = images.convert_stored(lookup(step, key), self._image_size)
            except ValueError as error:
                raise ValueError(f"step {number}, camera {camera!r}: {error}") from error
        return frames


def _faults(frames: Mapping[str, Sequence[Frame]]) -> list[str]:
    """Returns what is unusual about the cameras of an episode."""
    faults = []
    for camera, shown in frames.items():
        if max(frame.thumbnail.max() for frame in shown) < _BLACK:
            faults.append(f"camera {camera!r} is black over a whole episode")
        if len({frame.size for frame in shown}) > 1:
            faults.append(f"images of camera {camera!r} change their size within an episode")
    return faults


def _join(step: Mapping[str, Any], keys: tuple[str, ...]) -> np.ndarray:
    """Joins the values of some keys to float32 `[D]`."""
    return np.concatenate([np.ravel(np.asarray(lookup(step, key), np.float32)) for key in keys])


def select(
    steps: Mapping[str, Any],
    cameras: Sequence[str],
    actions: Sequence[str] | None,
    states: Sequence[str] | None,
    language: str | None,
    episode: Mapping[str, Any] | None = None,
) -> Selection:
    """Checks the keys of a step that were asked for, and chooses the others; see `RldsSettings` for the keys.

    Raises:
      ConversionError: a key does not exist, or there are several cameras to choose from.
    """
    available = dict(sorted(leaves(steps)))
    beside = {} if episode is None else episode
    if language is None:
        language = usual_language(available, beside)
    selection = Selection(
        cameras=_select_cameras(available, cameras),
        actions=_with_default(available, actions, "action"),
        states=_with_default(available, states, f"{_OBSERVATION}state"),
        language=language or None,
    )
    for kind, keys in (("action", selection.actions), ("state", selection.states)):
        for key in keys:
            _check_key(available, kind, key)
            if None in available[key].shape:
                raise ConversionError(f"{kind} key {key!r} has no fixed size: {available[key].shape}")
            if available[key].np_dtype == np.object_:
                raise ConversionError(f"{kind} key {key!r} holds no numbers")
    for key in selection.language_keys:
        _check_key(available | beside, "language", key)
        if not is_text((available | beside)[key]):
            raise ConversionError(f"language key {key!r} is not text")
    return selection


def _subset(steps: Mapping[str, Any], keys: Sequence[str], episode: Mapping[str, Any]) -> tfds.features.FeaturesDict:
    """Returns features of an episode with only some keys of its steps, so that nothing else is parsed."""
    available = dict(leaves(steps))
    chosen = _nest({key: available[key] for key in keys})
    per_step = tfds.features.Dataset(tfds.features.FeaturesDict(chosen))
    return tfds.features.FeaturesDict({"steps": per_step, **_nest(episode)})


def _encoded_images(steps: Mapping[str, Any], cameras: Sequence[str]) -> dict[str, Any]:
    """Returns TFDS decoders that leave the images of the cameras as the bytes that are stored."""
    available = dict(leaves(steps))
    encoded = [key for key in cameras if isinstance(available[key], tfds.features.Image)]
    return {"steps": _nest({key: tfds.decode.SkipDecoding() for key in encoded})}


def vector_size(steps: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Returns the number of values in the joined keys, or None without keys."""
    available = dict(leaves(steps))
    return sum(int(np.prod(available[key].shape)) for key in keys) if keys else None


def _select_cameras(available: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, str]:
    """Returns the key of every chosen camera by its name, which is the last part of the key."""
    cameras = [key for key, feature in available.items() if _is_image(key, feature)]
    others = [f"{key} has shape {feature.shape}" for key, feature in available.items() if _is_like_image(key, feature)]
    none = f"none ({', '.join(others)}, and images are [H, W, 3])" if others else "none"
    names = ", ".join(key.removeprefix(_OBSERVATION) for key in cameras) or none
    if not wanted and len(cameras) != 1:
        raise ConversionError(f"`camera` must choose one of the cameras of this dataset: {names}")
    chosen = [_OBSERVATION + name.removeprefix(_OBSERVATION) for name in wanted] or cameras
    for key in chosen:
        if key not in cameras:
            raise ConversionError(f"no camera {key.removeprefix(_OBSERVATION)!r} in this dataset; there are: {names}")
    chosen = list(dict.fromkeys(chosen))
    by_name = {key.rpartition("/")[2]: key for key in chosen}
    if len(by_name) < len(chosen):
        raise ConversionError(f"cameras must differ in the last part of their names: {', '.join(chosen)}")
    return by_name


def _is_image(key: str, feature: Any) -> bool:
    """Whether a feature is a camera. Grey and RGBA images count too, but a single channel may also be depth."""
    shape = feature.shape
    if not key.startswith(_OBSERVATION) or len(shape) != 3 or feature.np_dtype != np.uint8:
        return False
    return shape[-1] in (3, 4, None) or (shape[-1] == 1 and "depth" not in key)


def _is_like_image(key: str, feature: Any) -> bool:
    """Whether a feature that is no camera could be taken for one, such as stacked images."""
    return not _is_image(key, feature) and len(feature.shape) > 2 and feature.np_dtype in (np.uint8, np.uint16)


def _with_default(available: Mapping[str, Any], keys: Sequence[str] | None, default: str) -> tuple[str, ...]:
    if keys is not None:
        return tuple(keys)
    present = any(key == default or key.startswith(f"{default}/") for key in available)
    return (default,) if present else ()


def _check_key(available: Mapping[str, Any], kind: str, key: str) -> None:
    inside = [name for name in available if name.startswith(f"{key}/")]
    if inside:
        raise ConversionError(f"{kind} key {key!r} is a group; choose some of {', '.join(inside)}")
    if key not in available:
        raise ConversionError(f"no {kind} key {key!r} in the steps of this dataset; there are: {', '.join(available)}")


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split("/")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return nested
