"""Builder for CALVIN datasets (arXiv 2112.03227)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import MIN_STEPS, EpisodeBuilder, Item, LeftOut, SourceError, StepLayout, Warned
from como_jax.convert.calvin.annotations import Annotation, read_annotations
from como_jax.convert.calvin.segments import (
    ACTIONS,
    CAMERAS,
    STATES,
    Segment,
    StepError,
    count_repeated,
    language_segments,
    play_segments,
    read_step,
    step_name,
)
from como_jax.convert.folder import check_folder
from como_jax.convert.images import Frame
from como_jax.convert.selection import missing_warnings
from como_jax.convert.settings import Settings, one_of, positive, setting, some_of
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode
from como_jax.errors import ConversionError

CONTROL_RATE_HZ = 30.0
FOLDERS = {"training": "train", "validation": "val"}
SEGMENTS = ("language", "play", "both")
# The approximate size of an image as JPEG.
_BYTES_PER_IMAGE = 2**14
EMPTY = "an annotation is empty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalvinSettings(Settings):
    """Settings of `Calvin`; `validation_fraction` is not used, since CALVIN has a validation folder."""

    source: str = setting("folder of a task such as task_D_D, with the folders training and validation, or one of them")
    segments: str = setting(
        "what becomes an episode: language (annotated windows), play (whole recordings) or both",
        "language",
        one_of(SEGMENTS),
    )
    clip_seconds: float = setting("recordings are cut into episodes of this length", 20.0, positive())
    camera: tuple[str, ...] = setting(
        "names of cameras, the main camera first [all]", CAMERAS, some_of(CAMERAS, may_be_empty=False)
    )
    action: tuple[str, ...] = setting(
        "names of actions, joined in this order; '' for none", ("rel_actions",), some_of(tuple(ACTIONS))
    )
    state: tuple[str, ...] = setting(
        "names of states, joined in this order; '' for none", ("robot_obs",), some_of(tuple(STATES))
    )


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One step as read, or the reason why it cannot be used."""

    number: int
    frames: dict[str, Frame] = dataclasses.field(default_factory=dict)
    state: np.ndarray | None = None
    action: np.ndarray | None = None
    fault: str = ""


class Calvin(EpisodeBuilder):
    """Annotated windows, clips of whole recordings, or both; `training` becomes `train`, `validation` `val`."""

    settings_class = CalvinSettings
    settings: CalvinSettings

    @property
    def layout(self) -> StepLayout:
        settings = self.settings
        return StepLayout(
            cameras=settings.camera,
            state_size=sum(STATES[key] for key in settings.state) or None,
            action_size=sum(ACTIONS[key] for key in settings.action) or None,
        )

    def sources(self) -> list[Source]:
        """One source a segment; file names are made from numbers, so that no folder of a million files is listed."""
        per_step = _BYTES_PER_IMAGE * len(self.settings.camera)
        return [
            Source(
                f"{folder}/{segment.name}",
                FOLDERS[folder],
                (segment.start, segment.stop),
                max(0, segment.stop - segment.start) * per_step if segment.is_possible else 0,
            )
            for folder, segments in self._segments.items()
            for segment in segments
        ]

    def warnings(self) -> list[str]:
        """What is missing, and what is there twice."""
        messages = [f"there is no folder {folder!r}" for folder in FOLDERS if folder not in self._folders]
        if self.settings.segments != "play":
            messages += [f"{folder} has no language annotations" for folder in self._folders if self._lacks(folder)]
        for folder, segments in self._segments.items():
            covered, repeated = count_repeated(segments)
            if repeated:
                messages.append(f"{repeated} of the {covered} different steps of {folder} are in more than one episode")
        return messages + missing_warnings(action=self.settings.action, state=self.settings.state)

    def episodes(self, source: Source) -> Iterator[Item]:
        """The steps of a segment; an unusable step costs an annotated window, but only cuts a recording in two."""
        assert source.records is not None
        folder, _, name = source.path.partition("/")
        segment = Segment(name, *source.records, self._instruction(folder, name))
        if not segment.is_possible:
            raise SourceError(f"there are no steps from {segment.start} to {segment.stop - 1}")
        readings = [self._read(folder, number) for number in range(segment.start, segment.stop)]
        if segment.instruction is not None:
            if fault := next((f"step {each.number}: {each.fault}" for each in readings if each.fault), None):
                raise SourceError(fault)
            if not segment.instruction:
                yield Warned(EMPTY)
        for fault, group in itertools.groupby(readings, key=lambda each: each.fault):
            run = list(group)
            if fault:
                yield LeftOut(f"steps {run[0].number} to {run[-1].number}: {fault}")
            else:
                yield self._episode(source, folder, run, segment.instruction or "")

    def _read(self, folder: str, number: int) -> _Reading:
        settings = self.settings
        try:
            keys = (*settings.camera, *settings.state, *settings.action)
            arrays = read_step(self._root / folder / step_name(number), keys)
        except StepError as error:
            return _Reading(number, fault=str(error))
        frames = {camera: images.make_frame(arrays[camera], settings.image_size) for camera in settings.camera}
        return _Reading(number, frames, _join(arrays, settings.state), _join(arrays, settings.action))

    def _episode(self, source: Source, folder: str, run: Sequence[_Reading], instruction: str) -> Episode:
        return images.make_episode(
            f"{source.path}/{run[0].number:07d}",
            f"{folder}/{step_name(run[0].number)}",
            CONTROL_RATE_HZ,
            {camera: [each.frames[camera] for each in run] for camera in self.settings.camera},
            [each.state for each in run] if self.settings.state else None,
            [each.action for each in run] if self.settings.action else None,
            instruction,
        )

    def _instruction(self, folder: str, name: str) -> str | None:
        kind, _, index = name.partition("/")
        return (self._annotations[folder] or [])[int(index)].instruction if kind == "language" else None

    def _lacks(self, folder: str) -> bool:
        return self._annotations[folder] is None

    @property
    def _root(self) -> epath.Path:
        return epath.Path(self.settings.source)

    @functools.cached_property
    def _folders(self) -> list[str]:
        check_folder(self._root)
        folders = [folder for folder in FOLDERS if (self._root / folder).is_dir()]
        if not folders:
            raise ConversionError(f"source folder {self._root} has neither of the folders {' and '.join(FOLDERS)}")
        return folders

    @functools.cached_property
    def _annotations(self) -> dict[str, list[Annotation] | None]:
        return {folder: read_annotations(self._root / folder) for folder in self._folders}

    @functools.cached_property
    def _segments(self) -> dict[str, list[Segment]]:
        wanted = self.settings.segments
        if wanted == "language" and all(map(self._lacks, self._folders)):
            raise ConversionError(f"{self._root} has no language annotations; `segments` play converts it without them")
        length = max(MIN_STEPS, round(CONTROL_RATE_HZ * self.settings.clip_seconds))
        segments: dict[str, list[Segment]] = {folder: [] for folder in self._folders}
        for folder, members in segments.items():
            if wanted != "play":
                members += language_segments(self._annotations[folder] or [])
            if wanted != "language":
                members += play_segments(self._root / folder, length)
        return segments


def _join(arrays: dict[str, np.ndarray], keys: Sequence[str]) -> np.ndarray | None:
    return np.concatenate([arrays[key] for key in keys]) if keys else None
