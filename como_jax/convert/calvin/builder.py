"""Builder for CALVIN datasets (arXiv 2112.03227)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import (
    MIN_STEPS,
    ConversionError,
    EpisodeBuilder,
    LeftOut,
    Settings,
    SourceError,
    StepLayout,
    Warned,
)
from como_jax.convert.calvin.annotations import Annotation, read_annotations
from como_jax.convert.calvin.segments import Segment, count_repeated, language_segments, play_segments
from como_jax.convert.calvin.steps import ACTIONS, CAMERAS, STATES, StepError, read_step, step_name
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode, Step

CONTROL_RATE_HZ = 30.0
FOLDERS = {"training": "train", "validation": "val"}
SEGMENTS = ("language", "play", "both")
# About what a picture takes as JPEG.
_BYTES_PER_PICTURE = 2**14
EMPTY = "an annotation is empty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalvinSettings(Settings):
    """Settings of `Calvin`; `validation_fraction` is not used, since CALVIN has a validation folder.

    Attributes:
      source: folder of a task such as `task_D_D`, with the folders `training` and `validation`, or one of them.
      segments: what becomes an episode: `language` (annotated windows), `play` (whole recordings) or `both`.
      clip_seconds: recordings are cut into consecutive episodes of this length.
      camera: of `CAMERAS`, the main camera first.
      action: of `ACTIONS`, joined in this order; empty for none.
      state: of `STATES`, joined in this order; empty for none.
    """

    source: str
    segments: str = "language"
    clip_seconds: float = 20.0
    camera: tuple[str, ...] = CAMERAS
    action: tuple[str, ...] = ("rel_actions",)
    state: tuple[str, ...] = ("robot_obs",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments not in SEGMENTS:
            raise ConversionError(f"segments must be one of {', '.join(SEGMENTS)}, got {self.segments!r}")
        if not (math.isfinite(self.clip_seconds) and self.clip_seconds > 0):
            raise ConversionError(f"clip_seconds must be a positive number, got {self.clip_seconds}")
        if not self.camera:
            raise ConversionError(f"camera must name one or more of {', '.join(CAMERAS)}")
        for field, known in (("camera", CAMERAS), ("action", ACTIONS), ("state", STATES)):
            keys = getattr(self, field)
            if not set(keys) <= set(known) or len(set(keys)) < len(keys):
                raise ConversionError(f"{field} must be different ones of {', '.join(known)}, got {', '.join(keys)}")


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One step as read, or why it could not be."""

    number: int
    step: Step | None = None
    thumbnail: np.ndarray | None = None
    fault: str = ""


class Calvin(EpisodeBuilder):
    """Annotated windows, clips of whole recordings, or both; `training` becomes `train`, `validation` `val`."""

    settings_class = CalvinSettings
    settings: CalvinSettings

    @property
    def layout(self) -> StepLayout:
        """The chosen cameras, states and actions."""
        settings = self.settings
        return StepLayout(
            cameras=settings.camera,
            state_size=sum(STATES[key] for key in settings.state) or None,
            action_size=sum(ACTIONS[key] for key in settings.action) or None,
        )

    def sources(self) -> list[Source]:
        """One source a segment; names of files are made from numbers, so that no folder of a million is listed."""
        per_step = _BYTES_PER_PICTURE * len(self.settings.camera)
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
        missing = {"action": not self.settings.action, "state": not self.settings.state}
        return messages + [f"no {kind} was converted" for kind, is_missing in missing.items() if is_missing]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The steps of a segment; unusable ones cost an annotated window, but only cut a recording in two."""
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
        pictures = {camera: images.shrink(arrays[camera], settings.image_size) for camera in settings.camera}
        step = Step(
            {camera: images.encode_jpeg(picture) for camera, picture in pictures.items()},
            _join(arrays, settings.state),
            _join(arrays, settings.action),
        )
        return _Reading(number, step, images.thumbnail(pictures[settings.camera[0]]))

    def _episode(self, source: Source, folder: str, run: Sequence[_Reading], instruction: str) -> Episode:
        return Episode(
            episode_id=f"{source.path}/{run[0].number:07d}",
            source_file=f"{folder}/{step_name(run[0].number)}",
            control_rate=CONTROL_RATE_HZ,
            steps=[each.step for each in run if each.step is not None],
            motion=images.motion([each.thumbnail for each in run if each.thumbnail is not None]),
            language_instruction=instruction,
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
        if not self._root.is_dir():
            raise ConversionError(f"source folder {self._root} does not exist")
        folders = [folder for folder in FOLDERS if (self._root / folder).is_dir()]
        if not folders:
            raise ConversionError(f"source folder {self._root} has neither of the folders {' and '.join(FOLDERS)}")
        return folders

    @functools.cached_property
    def _annotations(self) -> dict[str, list[Annotation] | None]:
        return {folder: read_annotations(self._root / folder) for folder in self._folders}

    @functools.cached_property
    def _segments(self) -> dict[str, list[Segment]]:
        """By folder."""
        wanted = self.settings.segments
        if wanted == "language" and all(map(self._lacks, self._folders)):
            raise ConversionError(f"{self._root} has no language annotations; --segments play converts it without them")
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
