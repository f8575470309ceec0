"""Reading CALVIN's step files (npz)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath

CAMERAS = ("rgb_static", "rgb_gripper")
ACTIONS = {"rel_actions": 7, "actions": 7}
STATES = {"robot_obs": 15, "scene_obs": 24}
# File names have seven digits.
MAX_STEPS = 10**7


class StepError(Exception):
    """One step cannot be used; the message gives the reason without its number."""


def step_name(number: int) -> str:
    """File name of a step."""
    return f"episode_{number:07d}.npz"


def read_step(path: epath.Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Some arrays of one step: pictures uint8 `[H, W, 3]`, numbers float32 `[size]`.

    Raises:
      StepError: the file is missing or damaged, or an array is missing, of another kind, or not finite.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in keys if key in stored}
    except FileNotFoundError:
        raise StepError("the file is missing") from None
    except Exception as error:  # A damaged archive may raise anything.
        raise StepError("the file is damaged") from error
    for key in keys:
        if key not in arrays:
            raise StepError(f"the file has no {key}")
    return {key: _picture(key, array) if key in CAMERAS else _numbers(key, array) for key, array in arrays.items()}


def _picture(key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise StepError(f"{key} has shape {array.shape} and type {array.dtype}, not a picture")
    return array


def _numbers(key: str, array: np.ndarray) -> np.ndarray:
    size = (ACTIONS | STATES)[key]
    if array.dtype.kind not in "fiu" or array.shape != (size,):
        raise StepError(f"{key} has shape {array.shape} and type {array.dtype}, not {size} numbers")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise StepError(f"{key} is not finite")
    return numbers
