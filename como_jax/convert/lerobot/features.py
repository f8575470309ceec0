"""Choice of features in a LeRobot dataset: cameras, actions, states."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from como_jax.convert.lerobot.metadata import Feature
from como_jax.errors import ConversionError

ACTION_KEYS = ("action", "actions")
STATE_KEYS = ("observation.state", "state")
# The name that states have beside the cameras of a step.
_STATE = "state"
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Features that a conversion reads.

    Attributes:
      cameras: key by the name that it gets in the steps, the main camera first.
      actions: keys, joined in this order; empty for none.
      states: keys, joined in this order; empty for none.
    """

    cameras: Mapping[str, str]
    actions: tuple[str, ...]
    states: tuple[str, ...]


def select_cameras(available: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """Key of every chosen camera by its name in the steps; all of them if none is asked for.

    Args:
      available: keys of the cameras, of which there is at least one.
      wanted: keys, or names such as `top` for `observation.images.top`; empty for all.

    Raises:
      ConversionError: there is no such camera.
    """
    names = {key: _camera_name(key) for key in available}
    if len(set(names.values())) < len(names) or _STATE in names.values():
        names = {key: _identifier(key) for key in available}
    if len(set(names.values())) < len(names) or _STATE in names.values():
        names = {key: f"camera_{index}" for index, key in enumerate(available)}
    keys = {name: key for key, name in names.items()} | {key: key for key in available}
    for name in wanted:
        if name not in keys:
            raise ConversionError(f"no camera {name!r} in this dataset; there are: {', '.join(names.values())}")
    return {names[key]: key for key in [keys[name] for name in wanted] or available}


def select_numbers(
    features: Mapping[str, Feature], kind: str, wanted: Sequence[str] | None, defaults: Sequence[str]
) -> tuple[str, ...]:
    """Checks the keys of actions or states.

    Args:
      features: what the steps hold.
      kind: for error messages.
      wanted: keys; None for the first of `defaults` that there is.
      defaults: usual keys.

    Raises:
      ConversionError: there is no such key, or no numbers behind it.
    """
    available = [key for key, feature in features.items() if _is_number(feature) and key not in _BOOKKEEPING]
    if wanted is None:
        return tuple(key for key in defaults if key in available)[:1]
    for key in wanted:
        if key not in available:
            names = ", ".join(available) or "none"
            raise ConversionError(f"no {kind} key {key!r} with numbers in this dataset; there are: {names}")
    return tuple(wanted)


def size(features: Mapping[str, Feature], keys: Sequence[str]) -> int | None:
    """Number of values in the joined keys, or None without keys.

    Raises:
      ConversionError: the shape of one is not known.
    """
    shapes = {key: features[key].shape for key in keys}
    for key, shape in shapes.items():
        if shape is None:
            raise ConversionError(f"meta/info.json: shape of {key!r} must be a list of positive whole numbers")
    return sum(math.prod(shape) for shape in shapes.values() if shape is not None) if keys else None


def _camera_name(key: str) -> str:
    short = key.removeprefix("observation.").removeprefix("images.")
    return _identifier(short or key)


def _identifier(key: str) -> str:
    return re.sub(r"\W", "_", key, flags=re.ASCII)


def _is_number(feature: Feature) -> bool:
    try:
        return np.dtype(feature.dtype).kind in "biuf"
    except (SyntaxError, TypeError, ValueError):
        return False
