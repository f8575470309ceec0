"""Reading LIBERO's demonstration files (HDF5)."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterator

import h5py
import numpy as np
from etils import epath

from como_jax.convert.builder import SourceError

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
ACTION_SIZE = 7
# Where a state lies in a demonstration, and how many numbers it has.
STATES = {
    "ee_states": ("obs/ee_states", 6),
    "ee_pos": ("obs/ee_pos", 3),
    "ee_ori": ("obs/ee_ori", 3),
    "gripper_states": ("obs/gripper_states", 2),
    "joint_states": ("obs/joint_states", 7),
    "robot_states": ("robot_states", 9),
}
_BLOCK = 32


@contextlib.contextmanager
def open_demonstrations(path: epath.PathLike) -> Iterator[h5py.Group]:
    """Opens the group `data` of a file, which holds the demonstrations.

    Raises:
      SourceError: the file is damaged or holds something else.
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
    """Names of all demonstrations, by their number, so that demo_10 comes after demo_9."""
    with _hdf5_errors():
        return sorted((name.encode("utf-8", "backslashreplace").decode() for name in data), key=_by_number)


def announced_number(data: h5py.Group) -> int | None:
    """How many demonstrations the attributes say there are, or None if they do not say."""
    try:
        return operator.index(data.attrs["num_demos"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


class Demonstration:
    """One demonstration of an open file; pictures and states are read when they are asked for.

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
        """One of `STATES`, float32 `[T, size]`."""
        return self._numbers(*STATES[key])

    def pictures(self, camera: str, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yields some pictures of a camera as they are stored, uint8 `[H, W, 3]`; `indices` ascend."""
        path = f"obs/{camera}"
        stored = self._array(path)
        if stored.dtype != np.uint8 or stored.ndim != 4 or stored.shape[3] != 3 or 0 in stored.shape[1:]:
            raise SourceError(f"{path} has shape {stored.shape} and type {stored.dtype}, not pictures")
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
        raise SourceError(f"has no {what} {path}")
    return member


@contextlib.contextmanager
def _hdf5_errors() -> Iterator[None]:
    """Turns whatever h5py raises for damaged files into a SourceError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"cannot be read as HDF5: {reason}") from error


def _by_number(name: str) -> tuple[bool, int, str]:
    match = re.fullmatch(r"demo_(\d+)", name, re.ASCII)
    return match is None, int(match[1]) if match else 0, name
