"""Reads LIBERO's demonstration files (HDF5)."""

from __future__ import annotations

import contextlib
import json
import operator
import re
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from etils import epath

from como_jax.convert.builder import SourceError
from como_jax.errors import one_line

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
ACTION_SIZE = 7
# The path of each state in a demonstration, and how many numbers it has.
STATES = {
    "ee_states": ("obs/ee_states", 6),
    "ee_pos": ("obs/ee_pos", 3),
    "ee_ori": ("obs/ee_ori", 3),
    "gripper_states": ("obs/gripper_states", 2),
    "joint_states": ("obs/joint_states", 7),
    "robot_states": ("robot_states", 9),
}
_BLOCK = 32
_MAX_NAMED = 12
_IMAGE_AXES = 4
_REPLAY = "replay them to have images, as dataset_states_to_obs.py of robomimic and create_dataset.py of LIBERO do"


@contextlib.contextmanager
def open_demonstrations(path: epath.PathLike) -> Iterator[h5py.Group]:
    """Opens the group `data` of a file, which holds the demonstrations.

    Raises:
      SourceError: the file is damaged, or has no such group.
      OSError: the file is missing.
    """
    path = epath.Path(path)
    if path.exists() and not path.is_file():
        raise SourceError("is not a regular file")
    with path.open("rb") as content:
        with _hdf5_errors():
            file = h5py.File(content, "r")
        with file:
            yield _member(file, "data", h5py.Group)


def demonstration_names(data: h5py.Group) -> list[str]:
    """Returns the names of all demonstrations in the order of their numbers, so that demo_10 follows demo_9."""
    with _hdf5_errors():
        return sorted((name.encode("utf-8", "backslashreplace").decode() for name in data), key=_by_number)


def announced_number(data: h5py.Group) -> int | None:
    """Returns the number of demonstrations according to the attributes, or None if they do not say."""
    try:
        return operator.index(data.attrs["num_demos"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


class Demonstration:
    """One demonstration of an open file; images and states are read on demand.

    Attributes:
      actions: float32 `[T, 7]`, as stored.
    """

    def __init__(self, data: h5py.Group, name: str):
        """Finds a demonstration and reads its actions.

        Raises:
          SourceError: there is no such demonstration, or it has no actions of the right kind.
        """
        self._group = _member(data, name, h5py.Group)
        self.actions = self._numbers("actions", ACTION_SIZE)

    def state(self, key: str) -> np.ndarray:
        """Reads one of `STATES`, float32 `[T, size]`."""
        return self._numbers(*STATES[key])

    def images(self, camera: str, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the images of a camera at some steps as they are stored, uint8 `[H, W, 3]`; `indices` ascend."""
        path = f"obs/{camera}"
        stored = self._array(path)
        if stored.dtype != np.uint8 or stored.ndim != 4 or stored.shape[3] != 3 or 0 in stored.shape[1:]:
            raise SourceError(f"{path} has shape {stored.shape} and type {stored.dtype}, not images")
        for start in range(0, len(stored), _BLOCK):
            with _hdf5_errors():
                block = stored[start : start + _BLOCK]
            yield from block[indices[(indices >= start) & (indices < start + _BLOCK)] - start]

    def _numbers(self, path: str, size: int) -> np.ndarray:
        stored = self._array(path)
        if stored.dtype.kind not in "fiu" or stored.ndim != 2 or stored.shape[1] != size:
            raise SourceError(f"{path} has shape {stored.shape} and type {stored.dtype}, not {size} numbers a step")
        with _hdf5_errors(), np.errstate(over="ignore"):
            return stored[()].astype(np.float32)

    def _array(self, path: str) -> h5py.Dataset:
        stored = _member(self._group, path, h5py.Dataset)
        if stored.ndim == 0 or (path != "actions" and len(stored) != len(self.actions)):
            steps = len(stored) if stored.ndim else "no"
            raise SourceError(f"{path} has {steps} steps, and actions {len(self.actions)}")
        return stored


def _member(group: h5py.Group, path: str, kind: type[h5py.HLObject]) -> h5py.Group | h5py.Dataset:
    with _hdf5_errors():
        member = group.get(path)
    if not isinstance(member, kind):
        what = "group" if kind is h5py.Group else "array"
        raise SourceError(f"has no {what} {path}; {_describe(group)}")
    return member


def _describe(group: h5py.Group) -> str:
    """Says which arrays a group holds, and what can be done with a file that is not LIBERO's."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, member: h5py.HLObject) -> None:
        if isinstance(member, h5py.Dataset):
            shapes[name] = member.shape or ()

    try:
        with _hdf5_errors():
            group.visititems(note)
    except SourceError:
        return "what it holds cannot be listed"
    named = [f"{name} {list(shape)}" for name, shape in list(shapes.items())[:_MAX_NAMED]]
    more = f" and {len(shapes) - len(named)} more" if len(shapes) > len(named) else ""
    holds = f"it holds {', '.join(named) or 'no array'}{more}"
    has_images = any(len(shape) == _IMAGE_AXES for shape in shapes.values())
    if {"actions", "states"} <= shapes.keys() and not has_images:
        return f"{holds}: states of the simulator without images; {_REPLAY}"
    known = [camera for camera in CAMERAS if f"obs/{camera}" in shapes]
    if known:
        return f"{holds}; `camera` and `state` choose what is read"
    return (
        f"{holds}; these are not LIBERO's names: save the arrays as .npz, for the builder npz" if has_images else holds
    )


@contextlib.contextmanager
def _hdf5_errors() -> Iterator[None]:
    """Turns everything that h5py raises for damaged files into a SourceError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        raise SourceError(f"cannot be read as HDF5: {one_line(error)}") from error


def _by_number(name: str) -> tuple[bool, int, str]:
    match = re.fullmatch(r"demo_(\d+)", name, re.ASCII)
    return match is None, int(match[1]) if match else 0, name


def stored_instruction(data: h5py.Group) -> str:
    """Returns `language_instruction` of the attribute `problem_info`, or an empty text if it is missing or no text."""
    text = attribute_text(data, "problem_info")
    try:
        problem = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    instruction = problem.get("language_instruction") if isinstance(problem, dict) else None
    if isinstance(instruction, list):
        instruction = " ".join(map(str, instruction))
    return _valid(instruction).strip().strip('"').strip()


def named_instruction(file_name: str) -> str:
    """Returns the instruction in a file name such as `KITCHEN_SCENE10_close_the_top_drawer_demo.hdf5`."""
    task = file_name.rpartition(".")[0].removesuffix("_demo")
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", task).replace("_", " ").strip()


def attribute_text(data: h5py.Group, name: str) -> str:
    """Returns an attribute, or an empty text if it is missing or no valid text."""
    try:
        return _valid(data.attrs.get(name))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return ""


def _valid(text: Any) -> str:
    """Returns the text if it can be written as UTF-8, or an empty text."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return text if isinstance(text, str) and text.encode() else ""
    except UnicodeError:
        return ""
