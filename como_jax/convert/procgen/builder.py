"""Builder for trajectories of Procgen games."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from etils import epath

from como_jax.convert.builder import Item, SourceError, StepLayout
from como_jax.convert.folder import FolderBuilder, FolderSettings
from como_jax.convert.npz.archive import NpzArchive
from como_jax.convert.npz.builder import read_trajectories
from como_jax.convert.selection import Selection
from como_jax.convert.settings import RATE, setting
from como_jax.convert.sources import Source, assign_splits
from como_jax.names import DEFAULT_CAMERA

NUM_ACTIONS = 15
# The frames per second that procgen/env.py declares for its videos.
CONTROL_RATE = 15.0
_LEVEL_KEY = "level_seed"
_SELECTION = Selection({DEFAULT_CAMERA: "observations"}, actions=("actions",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcgenSettings(FolderSettings):
    """Settings of `Procgen`."""

    control_rate: float = setting("steps per second (Hz)", CONTROL_RATE, RATE)


class Procgen(FolderBuilder):
    """The episodes in .npz files of `generate.py`, or of a trained agent; actions are one-hot."""

    settings_class = ProcgenSettings
    settings: ProcgenSettings
    suffixes = (".npz",)
    contents = ".npz file; generate.py makes them"

    @property
    def layout(self) -> StepLayout:
        return StepLayout(action_size=NUM_ACTIONS)

    def sources(self) -> list[Source]:
        """One source an episode; all episodes of one level are on the same side of a split that is drawn."""
        levels = {name: _level_name(self.root / name) for name in self.names}
        # A file whose level cannot be read will be left out.
        known = [Source(level) for level in sorted(set(levels.values())) if level]
        drawn = assign_splits(known, self.settings.validation_fraction, self.settings.seed)
        splits = {level.name: level.split for level in drawn} | {"": "train"}
        return [
            dataclasses.replace(source, split=source.split or splits[levels[source.path]])
            for source in super().sources()
        ]

    def episodes(self, source: Source) -> Iterator[Item]:
        """The one episode of a file."""
        path = self.path(source)
        read_level(path)
        found = list(read_trajectories(path, _SELECTION))
        if len(found) != 1:
            raise SourceError(f"holds {len(found)} trajectories, but a level is split by files of one trajectory each")
        assert found[0].actions is not None
        trajectory = dataclasses.replace(found[0], actions=one_hot(found[0].actions))
        settings = self.settings
        yield trajectory.to_episode(source.path, source.path, settings.control_rate, settings.image_size)


def one_hot(actions: np.ndarray) -> np.ndarray:
    """Turns indices of actions `[T, 1]`, which have no order, into one-hot vectors, float32 `[T, NUM_ACTIONS]`.

    Raises:
      ValueError: an index is not that of an action, or there is more than one in a step.
    """
    if actions.shape[1] != 1:
        raise ValueError(f"expected one action a step, got {actions.shape[1]}")
    if not np.isin(actions, np.arange(NUM_ACTIONS)).all():
        raise ValueError(f"actions must be whole numbers from 0 to {NUM_ACTIONS - 1}")
    return np.eye(NUM_ACTIONS, dtype=np.float32)[actions[:, 0].astype(int)]


def read_level(path: epath.PathLike) -> int:
    """Reads the level seed of an episode.

    Raises:
      ValueError, OSError: there is no seed, or more than one, or the file is damaged.
    """
    with NpzArchive(path) as archive:
        if _LEVEL_KEY not in archive.headers:
            raise ValueError(f"there is no array {_LEVEL_KEY!r}, by which episodes are split")
        levels = np.unique(archive.read(_LEVEL_KEY))
    if levels.dtype.kind not in "iu" or len(levels) != 1:
        raise ValueError(f"array {_LEVEL_KEY!r} must hold one whole number, got {levels.dtype} {levels[:3].tolist()}")
    return int(levels[0])


def _level_name(path: epath.PathLike) -> str:
    """Returns the name of the level of an episode, empty if it cannot be read."""
    try:
        return f"level_{read_level(path)}"
    except (OSError, ValueError):
        return ""
