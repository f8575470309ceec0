"""Builder for a folder of LIBERO demonstrations (arXiv 2306.03310)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import h5py
import numpy as np
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import (
    ConversionError,
    EpisodeBuilder,
    LeftOut,
    Settings,
    SourceError,
    StepLayout,
    Warned,
)
from como_jax.convert.libero import language
from como_jax.convert.libero.demonstrations import (
    ACTION_SIZE,
    CAMERAS,
    STATES,
    Demonstration,
    announced_number,
    demonstration_names,
    open_demonstrations,
)
from como_jax.convert.listing import Listing, list_files, num_bytes
from como_jax.convert.sources import Source, assign_splits
from como_jax.data.schema import Episode, Step

CONTROL_RATE_HZ = 20.0
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
ORIENTATIONS = ("rotate180", "flip", "stored")
_SUFFIXES = (".hdf5", ".h5")
_NOOP = 1e-4

NAMED = "the file has no readable instruction: the one in its name counts"
UNPUBLISHED = (
    "the file lacks the attributes of the published ones; if it was made by a replay that recorded pictures before "
    "actions, it needs --action_shift 0"
)
OUT_OF_RANGE = "some actions lie outside [-1, 1]"
NOOPS_DROPPED = "steps that command no motion were left out, as --drop_noops asks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiberoSettings(Settings):
    """Settings of `Libero`.

    Attributes:
      source: folder that is searched for HDF5 files, with all folders below.
      camera: of `CAMERAS`, the main camera first.
      state: of `STATES`, joined in this order; empty for none.
      orientation: what is done to the stored pictures, which are upside down: rotate180, flip or stored.
      action_shift: the step of picture t gets the action that is stored at t + action_shift.
      drop_noops: leave out steps that command no motion and leave the gripper as it was.
    """

    source: str
    camera: tuple[str, ...] = CAMERAS
    state: tuple[str, ...] = ("ee_states", "gripper_states")
    orientation: str = ORIENTATIONS[0]
    action_shift: int = 1
    drop_noops: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orientation not in ORIENTATIONS:
            raise ConversionError(f"orientation must be one of {', '.join(ORIENTATIONS)}, got {self.orientation!r}")
        if self.action_shift < 0:
            raise ConversionError(f"action_shift must be 0 or more, got {self.action_shift}")
        if not self.camera:
            raise ConversionError(f"camera must name one or more of {', '.join(CAMERAS)}")
        for field, known in (("camera", CAMERAS), ("state", STATES)):
            keys = getattr(self, field)
            if not set(keys) <= set(known) or len(set(keys)) < len(keys):
                raise ConversionError(f"{field} must be different ones of {', '.join(known)}, got {', '.join(keys)}")


@dataclasses.dataclass(frozen=True)
class _Contents:
    """Names of the demonstrations in a file, and how many it says there are."""

    names: list[str]
    announced: int | None


class Libero(EpisodeBuilder):
    """Every demonstration of every file; a file is a task, and each task has demonstrations in both splits."""

    settings_class = LiberoSettings
    settings: LiberoSettings

    @property
    def layout(self) -> StepLayout:
        """The chosen cameras and states, and the actions."""
        state_size = sum(STATES[key][1] for key in self.settings.state)
        return StepLayout(self.settings.camera, state_size or None, ACTION_SIZE)

    def sources(self) -> list[Source]:
        """One source a demonstration, or a file in which none can be found, which will be reported.

        Raises:
          ConversionError: there is no folder, or no HDF5 file in it.
        """
        sources = []
        for name, contents in self._contents.items():
            if not contents.names:
                sources.append(Source(name, "train"))
                continue
            size = num_bytes(self._root / name) // len(contents.names)
            members = [Source(f"{name}/{each}", num_bytes=size) for each in contents.names]
            # Drawn within each file, so that both splits hold every task.
            sources += assign_splits(members, self.settings.validation_fraction, self.settings.seed)
        return sources

    def warnings(self) -> list[str]:
        """Folders that were not looked into, and files that have lost demonstrations without other signs of damage."""
        return self._listing.warnings + [
            f"{name} announces {contents.announced} demonstrations and holds {len(contents.names)}"
            for name, contents in self._contents.items()
            if contents.names and contents.announced not in (None, len(contents.names))
        ]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The one demonstration of a source."""
        if source.path.lower().endswith(_SUFFIXES):
            with open_demonstrations(self._root / source.path):
                raise SourceError("holds no demonstrations")
        name, _, demonstration = source.path.rpartition("/")
        with open_demonstrations(self._root / name) as data:
            warnings, episode = self._episode(name, data, demonstration)
        yield from map(Warned, warnings)
        yield episode

    def _episode(self, name: str, data: h5py.Group, demonstration_name: str) -> tuple[list[str], Episode]:
        """What is unusual about a demonstration, and the demonstration as an episode."""
        demonstration = Demonstration(data, demonstration_name)
        settings, warnings = self.settings, []
        if settings.action_shift and not language.attribute_text(data, "env_args"):
            warnings.append(UNPUBLISHED)
        # The first actions led to pictures recorded after them, and none follow the last pictures.
        actions = demonstration.actions[settings.action_shift :]
        if (np.abs(actions) > 1).any():
            warnings.append(OUT_OF_RANGE)
        kept = np.arange(len(actions))
        if settings.drop_noops and is_noop(actions).any():
            warnings.append(NOOPS_DROPPED)
            kept = np.flatnonzero(~is_noop(actions))
        if not len(kept):
            raise SourceError("holds no steps")
        instruction = language.stored_instruction(data)
        if not instruction:
            warnings.append(NAMED)
            instruction = language.named_instruction(epath.Path(name).name)
        convention = language.attribute_text(data, "macros_image_convention")
        shots = {camera: self._shots(demonstration.pictures(camera, kept), convention) for camera in settings.camera}
        states = [demonstration.state(key)[kept] for key in settings.state]
        steps = [
            Step(
                {camera: jpegs[position] for camera, (jpegs, _) in shots.items()},
                np.concatenate([state[position] for state in states]) if states else None,
                action,
            )
            for position, action in enumerate(actions[kept])
        ]
        return warnings, Episode(
            episode_id=f"{name}/{demonstration_name}",
            source_file=name,
            control_rate=CONTROL_RATE_HZ,
            steps=steps,
            motion=images.motion(shots[settings.camera[0]][1]),
            language_instruction=instruction,
        )

    def _shots(self, pictures: Iterator[np.ndarray], convention: str) -> tuple[list[bytes], list[np.ndarray]]:
        """JPEGs and thumbnails of some stored pictures."""
        jpegs, thumbnails = [], []
        for picture in pictures:
            turned = np.ascontiguousarray(turn(picture, self.settings.orientation, convention))
            small = images.shrink(turned, self.settings.image_size)
            jpegs.append(images.encode_jpeg(small))
            thumbnails.append(images.thumbnail(small))
        return jpegs, thumbnails

    @property
    def _root(self) -> epath.Path:
        """Paths of sources are relative to it: above the folder of a suite, so that they name the suite."""
        source = epath.Path(self.settings.source)
        return source.parent if source.name in SUITES else source

    @functools.cached_property
    def _listing(self) -> Listing:
        source = epath.Path(self.settings.source)
        if not source.is_dir():
            raise ConversionError(f"source folder {source} does not exist")
        return list_files(source)

    @functools.cached_property
    def _contents(self) -> dict[str, _Contents]:
        """By file; nothing for a file that cannot be read, which is reported when it is to be converted."""
        contents = {}
        for name in self._files():
            try:
                with open_demonstrations(self._root / name) as data:
                    contents[name] = _Contents(demonstration_names(data), announced_number(data))
            except (SourceError, OSError, ValueError):
                contents[name] = _Contents([], None)
        return contents

    def _files(self) -> list[str]:
        source = epath.Path(self.settings.source)
        prefix = f"{source.name}/" if source.name in SUITES else ""
        names = [prefix + name for name in self._listing.files if name.lower().endswith(_SUFFIXES)]
        if not names:
            raise ConversionError(f"source folder {source} holds no HDF5 file ({' or '.join(_SUFFIXES)})")
        return names


def turn(picture: np.ndarray, orientation: str, convention: str) -> np.ndarray:
    """A stored picture, uint8 `[H, W, 3]`, as asked for.

    MuJoCo's renderer begins with the row at the bottom, and robosuite hands that on unless its macro IMAGE_CONVENTION,
    which LIBERO stores with the data, is `opencv`.
    """
    if orientation == "stored":
        return picture
    upright = picture if convention == "opencv" else picture[::-1]
    return upright[:, ::-1] if orientation == "rotate180" else upright


def is_noop(actions: np.ndarray) -> np.ndarray:
    """Which of the actions `[T, 7]` command no motion and leave the gripper as it was, bool `[T]`.

    The rule of OpenVLA's cleaned LIBERO (arXiv 2406.09246): a norm under 1e-4 of all but the gripper.
    """
    still = np.linalg.norm(actions[:, :-1], axis=1) < _NOOP
    unchanged = np.concatenate([[True], actions[1:, -1] == actions[:-1, -1]])
    return still & unchanged
