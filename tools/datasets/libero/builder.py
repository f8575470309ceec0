"""Builder for a folder of LIBERO demonstrations (arXiv 2306.03310)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator

import h5py
import numpy as np
from etils import epath

from como_jax.data.schema import Episode, Step
from tools.datasets import images
from tools.datasets.builder import (
    ConversionError,
    EpisodeBuilder,
    LeftOut,
    Settings,
    SourceError,
    StepLayout,
    Warned,
)
from tools.datasets.sources import Source

CONTROL_RATE_HZ = 20.0
ACTION_SIZE = 7
ORIENTATIONS = ("rotate180", "flip", "stored")
_SUFFIXES = (".hdf5", ".h5")
_NOOP = 1e-4
_SCENE = re.compile(r"^[A-Z_]+SCENE\d+_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiberoSettings(Settings):
    """Settings of `Libero`.

    Attributes:
      source: folder that is searched for HDF5 files, with all folders below.
      camera: keys of `obs`, the main camera first.
      state: keys of `obs`, joined in this order; empty for none.
      orientation: what is done to the stored pictures, which are upside down: rotate180, flip or stored.
      drop_noops: leave out steps that command no motion and leave the gripper as it was.
    """

    source: str
    camera: tuple[str, ...] = ("agentview_rgb", "eye_in_hand_rgb")
    state: tuple[str, ...] = ("ee_states", "gripper_states")
    orientation: str = ORIENTATIONS[0]
    drop_noops: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orientation not in ORIENTATIONS:
            raise ConversionError(f"orientation must be one of {', '.join(ORIENTATIONS)}, got {self.orientation!r}")
        if not self.camera:
            raise ConversionError("camera names no camera; LIBERO has agentview_rgb and eye_in_hand_rgb")


class Libero(EpisodeBuilder):
    """Every demonstration of every file; each is a source of its own, so that `val` holds some of every task."""

    settings_class = LiberoSettings
    settings: LiberoSettings

    @functools.cached_property
    def layout(self) -> StepLayout:
        """The chosen cameras and states; sizes of states are those of the first sound demonstration."""
        return StepLayout(self.settings.camera, self._state_size(), ACTION_SIZE)

    def sources(self) -> list[Source]:
        """One source a demonstration; a file that cannot be opened is one source, and will be reported.

        Raises:
          ConversionError: there is no folder, or no HDF5 file in it.
        """
        sources = []
        for name in self._files():
            path = self._root / name
            size = path.stat().length
            try:
                with open_file(path) as file:
                    count = len(demonstrations(file))
            except (OSError, ValueError):
                sources.append(Source(name, num_bytes=size))
                continue
            sources += [Source(name, records=(index, index + 1), num_bytes=size // count) for index in range(count)]
        return sources

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The one demonstration of a source."""
        with open_file(self._root / source.path) as file:
            if source.records is None:
                raise SourceError("the file could not be read when the conversion was planned, and can be now")
            name = demonstrations(file)[source.records[0]]
            instruction, is_sound = read_instruction(file, source.path)
            if not is_sound:
                yield Warned("the language instruction is not valid text; unreadable characters were replaced")
            demonstration = file["data"][name]
            action = read_array(demonstration, "actions", 2).astype(np.float32)
            keep = np.flatnonzero(~is_noop(action)) if self.settings.drop_noops else np.arange(len(action))
            if len(keep) < len(action):
                yield Warned("steps that command no motion were left out, as --drop_noops asks")
            state = self._read_state(demonstration, len(action))
            pictures = {
                camera: self._read_camera(demonstration, camera, len(action)) for camera in self.settings.camera
            }
            steps, thumbnails = [], []
            for index in keep.tolist():
                frames = {camera: self._upright(picture[index]) for camera, picture in pictures.items()}
                steps.append(
                    Step(
                        {camera: images.encode_jpeg(frame) for camera, frame in frames.items()},
                        None if state is None else state[index],
                        action[index],
                    )
                )
                thumbnails.append(images.thumbnail(frames[self.settings.camera[0]]))
            if not steps:
                raise SourceError("holds no steps")
            yield Episode(
                episode_id=f"{source.path}/{name}",
                source_file=source.path,
                control_rate=CONTROL_RATE_HZ,
                steps=steps,
                motion=images.motion(thumbnails),
                language_instruction=instruction,
            )

    def _upright(self, picture: np.ndarray) -> np.ndarray:
        if self.settings.orientation == "rotate180":
            picture = picture[::-1, ::-1]
        elif self.settings.orientation == "flip":
            picture = picture[::-1]
        return images.shrink(np.ascontiguousarray(picture), self.settings.image_size)

    def _read_camera(self, demonstration: h5py.Group, camera: str, length: int) -> h5py.Dataset:
        """Pictures uint8 `[T, H, W, 3]`, still in the file."""
        key = f"obs/{camera}"
        picture = demonstration.get(key)
        if not isinstance(picture, h5py.Dataset):
            raise SourceError(f"has no camera {key!r}; there are: {', '.join(demonstration.get('obs', {}))}")
        if picture.dtype != np.uint8 or picture.ndim != 4 or picture.shape[-1] != 3:
            raise SourceError(f"{key} is {picture.dtype} of shape {picture.shape}, and not uint8 [T, H, W, 3]")
        if len(picture) != length:
            raise SourceError(f"has {length} actions, but {len(picture)} pictures of {camera}")
        return picture

    def _read_state(self, demonstration: h5py.Group, length: int) -> np.ndarray | None:
        if not self.settings.state:
            return None
        parts = [read_array(demonstration, f"obs/{key}", 2).astype(np.float32) for key in self.settings.state]
        lengths = {len(part) for part in parts}
        if lengths != {length}:
            raise SourceError(f"has {length} actions, but {lengths} states")
        return np.concatenate(parts, axis=1)

    def _state_size(self) -> int | None:
        if not self.settings.state:
            return None
        for name in self._files():
            try:
                with open_file(self._root / name) as file:
                    first = file["data"][demonstrations(file)[0]]
                    return sum(read_array(first, f"obs/{key}", 2).shape[1] for key in self.settings.state)
            except (OSError, ValueError, SourceError):
                continue
        raise ConversionError(f"no demonstration in {self._root} has the states {', '.join(self.settings.state)}")

    @property
    def _root(self) -> epath.Path:
        return epath.Path(self.settings.source)

    def _files(self) -> list[str]:
        if not self._root.is_dir():
            raise ConversionError(f"source folder {self._root} does not exist")
        paths = [folder / file for folder, _, files in self._root.walk() for file in files]
        names = [path.relative_to(self._root).as_posix() for path in paths if path.suffix.lower() in _SUFFIXES]
        if not names:
            raise ConversionError(f"source folder {self._root} holds no HDF5 file ({' or '.join(_SUFFIXES)})")
        return sorted(names)


@contextlib.contextmanager
def open_file(path: epath.Path) -> Iterator[h5py.File]:
    """Opens an HDF5 file for reading.

    Raises:
      OSError, ValueError: it is damaged; h5py would raise RuntimeError or KeyError for some kinds of damage.
    """
    try:
        with path.open("rb") as stream, h5py.File(stream, "r") as file:
            yield file
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"the HDF5 file is damaged: {error}") from error


def demonstrations(file: h5py.File) -> list[str]:
    """Names of the demonstrations, in order of their numbers.

    Raises:
      ValueError: there are none.
    """
    data = file.get("data")
    names = [name for name in data if name.startswith("demo")] if isinstance(data, h5py.Group) else []
    if not names:
        raise ValueError("holds no LIBERO demonstrations: there is no group data/demo_0")
    return sorted(names, key=lambda name: (int(re.sub(r"\D", "", name) or -1), name))


def read_array(group: h5py.Group, key: str, num_axes: int) -> np.ndarray:
    """A whole dataset of a group.

    Raises:
      SourceError: it is missing or has another number of axes.
    """
    found = group.get(key)
    if not isinstance(found, h5py.Dataset):
        raise SourceError(f"has no {key!r}")
    if found.ndim != num_axes:
        raise SourceError(f"{key} has shape {found.shape}, and not {num_axes} axes")
    return found[()]


def read_instruction(file: h5py.File, name: str) -> tuple[str, bool]:
    """The task in words, from the attributes or else from the name of the file; and whether it was valid text."""
    raw = file["data"].attrs.get("problem_info", b"")
    data = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else bytes(raw)
    text = data.decode("utf-8", "replace")
    try:
        found = json.loads(text).get("language_instruction")
    except (ValueError, AttributeError):
        found = None
    if isinstance(found, list):
        found = " ".join(map(str, found))
    if not isinstance(found, str) or not found.strip():
        stem = epath.Path(name).stem.removesuffix("_demo")
        found = _SCENE.sub("", stem).replace("_", " ")
    return found.strip().strip('"'), "\ufffd" not in found


def is_noop(action: np.ndarray) -> np.ndarray:
    """Which of the actions `[T, 7]` command no motion and leave the gripper as it was, bool `[T]`.

    The rule of OpenVLA's cleaned LIBERO (arXiv 2406.09246): a norm under 1e-4 of all but the gripper.
    """
    still = np.linalg.norm(action[:, :-1], axis=1) < _NOOP
    unchanged = np.concatenate([[True], action[1:, -1] == action[:-1, -1]])
    return still & unchanged
