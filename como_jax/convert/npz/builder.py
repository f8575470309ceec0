"""Builder for a folder of .npz files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

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
from como_jax.convert.npz import trajectories
from como_jax.convert.npz.archive import NpzArchive
from como_jax.convert.npz.selection import Selection, check, select
from como_jax.convert.sources import Source
from como_jax.convert.video_folder.sidecar import SIDECAR_SUFFIXES, Instructions, read_instructions
from como_jax.data.schema import Episode

SUFFIX = ".npz"
WITHOUT_LAST = "there is one action less than there are pictures: the last picture was left off"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzSettings(Settings):
    """Settings of `Npz`.

    Attributes:
      source: folder that is searched for .npz files, with all folders below.
      control_rate: steps per second (Hz), which arrays do not say.
      camera: keys of arrays, the main camera first; empty to take the only one with pictures.
      action: keys, joined in this order; None for `action` or `actions` if there is one, empty for none.
      state: keys, joined in this order; None for `state` or `states` if there is one, empty for none.
      language: key of a text; None for the first usual one, '' for none.
    """

    source: str
    control_rate: float = dataclasses.field(metadata={"help": "arrays do not say how many steps a second has"})
    camera: tuple[str, ...] = ()
    action: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_control_rate(self.control_rate)


class Npz(EpisodeBuilder):
    """The trajectories of all .npz files in a folder, whose arrays have the same keys in every file."""

    settings_class = NpzSettings
    settings: NpzSettings

    @property
    def layout(self) -> StepLayout:
        """The chosen cameras, states and actions."""
        return self._chosen[1]

    def sources(self) -> list[Source]:
        """One source a file."""
        root = epath.Path(self.settings.source)
        return [Source(name, num_bytes=num_bytes(root / name)) for name in self._names]

    def warnings(self) -> list[str]:
        """What was not understood in the folder, and what is missing from the dataset."""
        others = [name for name in self._listing.files if not name.lower().endswith((SUFFIX, *SIDECAR_SUFFIXES))]
        messages = [*self._listing.warnings, *self._instructions.warnings]
        if others:
            messages.append(f"{len(others)} files that are not {SUFFIX} were ignored, such as {others[0]}")
        missing = {"action": not self._selection.actions, "state": not self._selection.states}
        return messages + [f"no {kind} was converted" for kind, is_missing in missing.items() if is_missing]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The trajectories of one file, in order."""
        if source.path in self._listing.unreadable:
            raise SourceError(NOT_UTF8)
        path = epath.Path(self.settings.source) / source.path
        for index, trajectory in enumerate(trajectories.read_trajectories(path, self._selection)):
            if trajectory.without_last:
                yield Warned(WITHOUT_LAST)
            if not trajectory.language:
                instruction = self._instructions.by_name.get(source.path, "")
                trajectory = dataclasses.replace(trajectory, language=instruction)
            name = f"{source.path}/{index:06d}"
            rate, image_size = self.settings.control_rate, self.settings.image_size
            yield trajectories.make_episode(trajectory, name, source.path, rate, image_size)

    @functools.cached_property
    def _listing(self) -> Listing:
        return list_files(epath.Path(self.settings.source))

    @functools.cached_property
    def _names(self) -> list[str]:
        root = epath.Path(self.settings.source)
        if not root.is_dir():
            raise ConversionError(f"source folder {root} does not exist")
        names = [name for name in self._listing.files if name.lower().endswith(SUFFIX)]
        if not names:
            raise ConversionError(f"source folder {root} holds no {SUFFIX} file")
        return names

    @property
    def _selection(self) -> Selection:
        return self._chosen[0]

    @functools.cached_property
    def _chosen(self) -> tuple[Selection, StepLayout]:
        """What is read from every file, by the first file that has it."""
        settings, root, fault = self.settings, epath.Path(self.settings.source), ""
        for name in self._names:
            try:
                with NpzArchive(root / name) as archive:
                    headers = archive.headers
                    chosen = select(headers, settings.camera, settings.action, settings.state, settings.language)
            except (OSError, ValueError) as error:
                fault = fault or f"{name}: {error}"
                continue
            axes = len(check(headers, chosen))
            sizes = [trajectories.vector_size(headers, keys, axes) for keys in (chosen.states, chosen.actions)]
            return chosen, StepLayout(tuple(chosen.cameras), *sizes)
        raise ConversionError(f"no file of {root} can be converted; {fault}")

    @functools.cached_property
    def _instructions(self) -> Instructions:
        sidecars = [name for name in self._listing.files if name.lower().endswith(SIDECAR_SUFFIXES)]
        return read_instructions(epath.Path(self.settings.source), sidecars, self._names)
