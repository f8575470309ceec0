"""Builder for a folder of LIBERO demonstrations (arXiv 2306.03310)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import h5py
import numpy as np
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import Item, SourceError, StepLayout, Warned
from como_jax.convert.folder import FolderBuilder, FolderSettings, num_bytes
from como_jax.convert.images import Frame
from como_jax.convert.libero.demonstrations import (
    ACTION_SIZE,
    CAMERAS,
    STATES,
    Demonstration,
    announced_number,
    attribute_text,
    demonstration_names,
    named_instruction,
    open_demonstrations,
    stored_instruction,
)
from como_jax.convert.settings import number, one_of, setting, some_of
from como_jax.convert.sources import Source, assign_splits
from como_jax.data.schema import Episode

CONTROL_RATE_HZ = 20.0
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
ORIENTATIONS = ("rotate180", "flip", "stored")
_NOOP = 1e-4

NAMED = "the file has no readable instruction: the one in its name counts"
UNPUBLISHED = (
    "the file lacks the attributes of the published ones; if it was made by a replay that recorded images before "
    "actions, it needs an `action_shift` of 0"
)
OUT_OF_RANGE = "some actions lie outside [-1, 1]"
NOOPS_DROPPED = "steps that command no motion were left out, as `drop_noops` asks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiberoSettings(FolderSettings):
    """Settings of `Libero`."""

    camera: tuple[str, ...] = setting(
        "names of cameras, the main camera first [all]", CAMERAS, some_of(CAMERAS, may_be_empty=False)
    )
    state: tuple[str, ...] = setting(
        "names of states, joined in this order; '' for none", ("ee_states", "gripper_states"), some_of(tuple(STATES))
    )
    orientation: str = setting(
        "what is done to the stored images, which are upside down: rotate180, flip or stored",
        ORIENTATIONS[0],
        one_of(ORIENTATIONS),
    )
    action_shift: int = setting("the step of image t gets the action stored at t plus this number", 1, number(0))
    drop_noops: bool = setting("leave out steps that command no motion and leave the gripper as it was", False)


@dataclasses.dataclass(frozen=True)
class _Contents:
    """Names of the demonstrations in a file, and how many there are according to its attributes."""

    names: list[str]
    announced: int | None


class Libero(FolderBuilder):
    """Every demonstration of every file; a file is a task, and both splits have demonstrations of each task."""

    settings_class = LiberoSettings
    settings: LiberoSettings
    suffixes = (".hdf5", ".h5")
    contents = "HDF5 file (.hdf5 or .h5)"

    @property
    def layout(self) -> StepLayout:
        state_size = sum(STATES[key][1] for key in self.settings.state)
        return StepLayout(self.settings.camera, state_size or None, ACTION_SIZE)

    @property
    def environment(self) -> dict[str, str]:
        settings = self.settings
        return {
            "family": "libero",
            "look": "full",
            "orientation": settings.orientation,
            "state": ",".join(settings.state),
        }

    @property
    def _base(self) -> epath.Path:
        """Paths of sources are relative to it: above the folder of a suite, so that they name the suite."""
        return self.root.parent if self.root.name in SUITES else self.root

    def sources(self) -> list[Source]:
        """One source a demonstration, or a file in which none can be found, which will be reported."""
        sources = []
        for name, contents in self._contents.items():
            if not contents.names:
                sources.append(Source(name, "train"))
                continue
            size = num_bytes(self._base / name) // len(contents.names)
            members = [Source(f"{name}/{each}", num_bytes=size) for each in contents.names]
            # The split is drawn within each file, so that both splits hold every task.
            sources += assign_splits(members, self.settings.validation_fraction, self.settings.seed)
        return sources

    def warnings(self) -> list[str]:
        """Folders that were not looked into, and files that have lost demonstrations without other signs of damage."""
        return self.listing.warnings + [
            f"{name} announces {contents.announced} demonstrations and holds {len(contents.names)}"
            for name, contents in self._contents.items()
            if contents.names and contents.announced not in (None, len(contents.names))
        ]

    def episodes(self, source: Source) -> Iterator[Item]:
        """The one demonstration of a source."""
        if self.is_wanted(source.path):
            with open_demonstrations(self._base / source.path):
                raise SourceError("holds no demonstrations")
        name, _, demonstration = source.path.rpartition("/")
        with open_demonstrations(self._base / name) as data:
            warnings, episode = self._episode(name, data, demonstration)
        yield from map(Warned, warnings)
        yield episode

    def _episode(self, name: str, data: h5py.Group, demonstration_name: str) -> tuple[list[str], Episode]:
        """Returns what is unusual about a demonstration, and the demonstration as an episode."""
        demonstration = Demonstration(data, demonstration_name)
        settings, warnings = self.settings, []
        if settings.action_shift and not attribute_text(data, "env_args"):
            warnings.append(UNPUBLISHED)
        # The first actions led to images that were recorded after them; no action follows the last images.
        actions = demonstration.actions[settings.action_shift :]
        if (np.abs(actions) > 1).any():
            warnings.append(OUT_OF_RANGE)
        kept = np.arange(len(actions))
        if settings.drop_noops and is_noop(actions).any():
            warnings.append(NOOPS_DROPPED)
            kept = np.flatnonzero(~is_noop(actions))
        if not len(kept):
            raise SourceError("holds no steps")
        instruction = stored_instruction(data)
        if not instruction:
            warnings.append(NAMED)
            instruction = named_instruction(epath.Path(name).name)
        convention = attribute_text(data, "macros_image_convention")
        frames = {camera: self._frames(demonstration, camera, kept, convention) for camera in settings.camera}
        states = [demonstration.state(key)[kept] for key in settings.state]
        return warnings, images.make_episode(
            f"{name}/{demonstration_name}",
            name,
            CONTROL_RATE_HZ,
            frames,
            np.concatenate(states, axis=1) if states else None,
            actions[kept],
            instruction,
        )

    def _frames(self, demonstration: Demonstration, camera: str, kept: np.ndarray, convention: str) -> list[Frame]:
        return [
            images.make_frame(
                np.ascontiguousarray(turn(image, self.settings.orientation, convention)), self.settings.image_size
            )
            for image in demonstration.images(camera, kept)
        ]

    @functools.cached_property
    def _contents(self) -> dict[str, _Contents]:
        """The contents by file; none for a file that cannot be read, which is reported when it is to be converted."""
        contents = {}
        prefix = f"{self.root.name}/" if self.root.name in SUITES else ""
        for name in (prefix + name for name in self.names):
            try:
                with open_demonstrations(self._base / name) as data:
                    contents[name] = _Contents(demonstration_names(data), announced_number(data))
            except (SourceError, OSError, ValueError):
                contents[name] = _Contents([], None)
        return contents


def turn(image: np.ndarray, orientation: str, convention: str) -> np.ndarray:
    """Turns a stored image, uint8 `[H, W, 3]`, as the setting `orientation` asks.

    MuJoCo's renderer begins with the row at the bottom, and robosuite hands that on unless its macro IMAGE_CONVENTION,
    which LIBERO stores with the data, is `opencv`.
    """
    if orientation == "stored":
        return image
    upright = image if convention == "opencv" else image[::-1]
    return upright[:, ::-1] if orientation == "rotate180" else upright


def is_noop(actions: np.ndarray) -> np.ndarray:
    """Returns which of the actions `[T, 7]` command no motion and leave the gripper as it was, bool `[T]`.

    This is the rule of OpenVLA's cleaned LIBERO (arXiv 2406.09246): a norm under 1e-4 of all numbers but the gripper.
    """
    still = np.linalg.norm(actions[:, :-1], axis=1) < _NOOP
    unchanged = np.concatenate([[True], actions[1:, -1] == actions[:-1, -1]])
    return still & unchanged
