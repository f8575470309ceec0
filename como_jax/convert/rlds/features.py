"""Choice of step features in an RLDS dataset: cameras, actions, states, language."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from como_jax.errors import ConversionError

LANGUAGE_KEYS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "observation/language_instruction",
    "natural_language_instruction",
    "instruction",
)
_OBSERVATION = "observation/"


@dataclasses.dataclass(frozen=True)
class Selection:
    """Step keys that a conversion reads, as paths such as `observation/state`.

    Attributes:
      cameras: the main camera first.
      actions: joined in this order; empty for none.
      states: joined in this order; empty for none.
      language: None for none.
    """

    cameras: tuple[str, ...]
    actions: tuple[str, ...]
    states: tuple[str, ...]
    language: str | None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys."""
        language = () if self.language is None else (self.language,)
        return (*self.cameras, *self.actions, *self.states, *language)


def leaves(features: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key path and feature of everything in a features dict."""
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from leaves(feature, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def select(
    steps: Mapping[str, Any],
    cameras: Sequence[str],
    actions: Sequence[str] | None,
    states: Sequence[str] | None,
    language: str | None,
) -> Selection:
    """Checks the keys that were asked for and chooses the others.

    Args:
      steps: features of a step.
      cameras: observation keys; empty to take the only camera.
      actions: step keys; None to take `action` if there is one.
      states: step keys; None to take `observation/state` if there is one.
      language: step key; None to take the first usual one, '' for none.

    Raises:
      ConversionError: there is no such key, or several cameras to choose from.
    """
    available = dict(sorted(leaves(steps)))
    if language is None:
        language = next((key for key in LANGUAGE_KEYS if key in available), "")
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
    if selection.language is not None:
        _check_key(available, "language", selection.language)
        if not _is_text(available[selection.language]):
            raise ConversionError(f"language key {selection.language!r} is not text")
    return selection


def subset(steps: Mapping[str, Any], keys: Sequence[str]) -> tfds.features.FeaturesDict:
    """Features of an episode with only some keys of its steps, so that nothing else is parsed."""
    available = dict(leaves(steps))
    chosen = _nest({key: available[key] for key in keys})
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(tfds.features.FeaturesDict(chosen))})


def encoded_images(steps: Mapping[str, Any], cameras: Sequence[str]) -> dict[str, Any]:
    """TFDS decoders that hand over the pictures of the cameras as the bytes that are stored."""
    available = dict(leaves(steps))
    encoded = [key for key in cameras if isinstance(available[key], tfds.features.Image)]
    return {"steps": _nest({key: tfds.decode.SkipDecoding() for key in encoded})}


def size(steps: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Number of values in the joined keys, or None without keys."""
    available = dict(leaves(steps))
    return sum(int(np.prod(available[key].shape)) for key in keys) if keys else None


def camera_name(key: str) -> str:
    """What a camera is called in the converted dataset."""
    return key.rpartition("/")[2]


def lookup(step: Mapping[str, Any], key: str) -> Any:
    """The value at a key path."""
    value: Any = step
    for part in key.split("/"):
        value = value[part]
    return value


def _select_cameras(available: Mapping[str, Any], wanted: Sequence[str]) -> tuple[str, ...]:
    cameras = [key for key, feature in available.items() if _is_picture(key, feature)]
    names = ", ".join(key.removeprefix(_OBSERVATION) for key in cameras) or "none"
    if not wanted and len(cameras) != 1:
        raise ConversionError(f"--camera must choose one of the cameras of this dataset: {names}")
    chosen = [_OBSERVATION + name.removeprefix(_OBSERVATION) for name in wanted] or cameras
    for key in chosen:
        if key not in cameras:
            raise ConversionError(f"no camera {key.removeprefix(_OBSERVATION)!r} in this dataset; there are: {names}")
    chosen = list(dict.fromkeys(chosen))
    if len({camera_name(key) for key in chosen}) < len(chosen):
        raise ConversionError(f"cameras must differ in the last part of their names: {', '.join(chosen)}")
    return tuple(chosen)


def _is_picture(key: str, feature: Any) -> bool:
    """Whether a feature is a camera: grey and RGBA count too, but a single channel may also be depth."""
    shape = feature.shape
    if not key.startswith(_OBSERVATION) or len(shape) != 3 or feature.np_dtype != np.uint8:
        return False
    return shape[-1] in (3, 4, None) or (shape[-1] == 1 and "depth" not in key)


def _is_text(feature: Any) -> bool:
    """Whether a feature is text, or the padded code points of one, as in Language-Table."""
    is_code_points = len(feature.shape) == 1 and np.issubdtype(feature.np_dtype, np.integer)
    return is_code_points or (not feature.shape and feature.np_dtype == np.object_)


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
