"""Builder for trajectories of Procgen games."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from etils import epath

from como_jax.convert.builder import (
    ConversionError,
    EpisodeBuilder,
    LeftOut,
    Settings,
    SourceError,
    StepLayout,
    Warned,
    check_control_rate,
)
from como_jax.convert.listing import NOT_UTF8, Listing, list_files, num_bytes
from como_jax.convert.npz.archive import NpzArchive
from como_jax.convert.npz.selection import Selection
from como_jax.convert.npz.trajectories import make_episode, read_trajectories
from como_jax.convert.sources import Source, assign_splits
from como_jax.data.schema import Episode
from como_jax.names import DEFAULT_CAMERA

NUM_ACTIONS = 15
# The frames per second that procgen/env.py declares for its videos.
CONTROL_RATE = 15.0
_LEVEL_KEY = "level_seed"
_SELECTION = Selection({DEFAULT_CAMERA: "observations"}, actions=("actions",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcgenSettings(Settings):
    """Settings of `Procgen`.

    Attributes:
      source: folder that is searched for .npz files, with all folders below.
      control_rate: steps per second (Hz).
    """

    source: str
    control_rate: float = CONTROL_RATE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_control_rate(self.control_rate)


class Procgen(EpisodeBuilder):
    """The episodes in .npz files of `generate.py`, or of a trained agent; actions are one-hot."""

    settings_class = ProcgenSettings
    settings: ProcgenSettings

    @property
    def layout(self) -> StepLayout:
        """One camera, and a number for each of the actions."""
        return StepLayout(action_size=NUM_ACTIONS)

    def sources(self) -> list[Source]:
        """One source an episode; all of one level are on the same side of the split."""
        root = epath.Path(self.settings.source)
        if not root.is_dir():
            raise ConversionError(f"source folder {root} does not exist")
        names = [name for name in self._listing.files if name.lower().endswith(".npz")]
        if not names:
            raise ConversionError(f"source folder {root} holds no .npz file; generate.py makes them")
        levels = {name: _level_name(root / name) for name in names}
        # A file whose level cannot be read is going to be left out.
        known = [Source(level) for level in sorted(set(levels.values())) if level]
        drawn = assign_splits(known, self.settings.validation_fraction, self.settings.seed)
        splits = {level.name: level.split for level in drawn} | {"": "train"}
        return [Source(name, splits[levels[name]], num_bytes=num_bytes(root / name)) for name in names]

    def warnings(self) -> list[str]:
        """Folders that were not looked into."""
        return self._listing.warnings

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The one episode of a file."""
        if source.path in self._listing.unreadable:
            raise SourceError(NOT_UTF8)
        path = epath.Path(self.settings.source) / source.path
        read_level(path)
        found = list(read_trajectories(path, _SELECTION))
        if len(found) != 1:
            raise SourceError(f"holds {len(found)} trajectories, but a level is split by files of one trajectory each")
        trajectory = found[0]
        assert trajectory.actions is not None
        trajectory = dataclasses.replace(trajectory, actions=one_hot(trajectory.actions))
        rate, image_size = self.settings.control_rate, self.settings.image_size
        yield make_episode(trajectory, source.path, source.path, rate, image_size)

    @functools.cached_property
    def _listing(self) -> Listing:
        return list_files(epath.Path(self.settings.source))


def one_hot(actions: np.ndarray) -> np.ndarray:
    """float32 `[T, NUM_ACTIONS]` from indices `[T, 1]`, which have no order that a number could express.

    Raises:
      ValueError: there is another action, or more than one a step.
    """
    if actions.shape[1] != 1:
        raise ValueError(f"expected one action a step, got {actions.shape[1]}")
    if not np.isin(actions, np.arange(NUM_ACTIONS)).all():
        raise ValueError(f"actions must be whole numbers from 0 to {NUM_ACTIONS - 1}")
    return np.eye(NUM_ACTIONS, dtype=np.float32)[actions[:, 0].astype(int)]


def read_level(path: epath.PathLike) -> int:
    """The level seed of an episode.

    Raises:
      ValueError, OSError: there is none, or more than one, or the file is damaged.
    """
    with NpzArchive(path) as archive:
        if _LEVEL_KEY not in archive.headers:
            raise ValueError(f"there is no array {_LEVEL_KEY!r}, by which episodes are split")
        levels = np.unique(archive.read(_LEVEL_KEY))
    if levels.dtype.kind not in "iu" or len(levels) != 1:
        raise ValueError(f"array {_LEVEL_KEY!r} must hold one whole number, got {levels.dtype} {levels[:3].tolist()}")
    return int(levels[0])


def _level_name(path: epath.PathLike) -> str:
    """Name of the level of an episode, empty if it cannot be read."""
    try:
        return f"level_{read_level(path)}"
    except (OSError, ValueError):
        return ""
