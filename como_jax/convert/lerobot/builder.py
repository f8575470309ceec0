"""Builder for LeRobot datasets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
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
    check_control_rate,
)
from como_jax.convert.lerobot import features
from como_jax.convert.lerobot.episode_lists import EpisodeEntry
from como_jax.convert.lerobot.frames import stored_frames, video_frames
from como_jax.convert.lerobot.metadata import INFO_PATH, Metadata, read_metadata
from como_jax.convert.lerobot.rows import column_names, join_numbers, read_rows, task_indices
from como_jax.convert.listing import check_file
from como_jax.convert.sources import Source
from como_jax.convert.video import VIDEO_ERRORS
from como_jax.data.schema import Episode, Step

_READ_ERRORS = (*VIDEO_ERRORS, pa.ArrowException)
# About what a picture of the default size takes as JPEG.
_BYTES_PER_PICTURE = 2**15
NO_TASK = "no task is known: the language instruction is empty"
SEVERAL_TASKS = "the task changes within an episode: that of its first step counts"
OTHER_LENGTH = "the metadata list another number of steps than the table has"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeRobotSettings(Settings):
    """Settings of `LeRobot`.

    Attributes:
      source: folder of the dataset, with `meta/info.json`.
      control_rate: steps per second (Hz); None for `fps` of the dataset.
      camera: keys or names of cameras, the main camera first; empty for all that have pictures.
      action: feature keys, joined in this order; None for `action` if there is one, empty for none.
      state: feature keys, joined in this order; None for `observation.state` if there is one, empty for none.
    """

    source: str
    control_rate: float | None = None
    camera: tuple[str, ...] = ()
    action: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control_rate is not None:
            check_control_rate(self.control_rate)


class LeRobot(EpisodeBuilder):
    """The episodes of a LeRobot dataset. Every row of its tables is a step, and has one frame of every camera."""

    settings_class = LeRobotSettings
    settings: LeRobotSettings
    decoder_errors = _READ_ERRORS

    @functools.cached_property
    def layout(self) -> StepLayout:
        """The chosen cameras, states and actions."""
        selection, available = self._selection, self._metadata.features
        return StepLayout(
            cameras=tuple(selection.cameras),
            state_size=features.size(available, selection.states),
            action_size=features.size(available, selection.actions),
        )

    def sources(self) -> list[Source]:
        """One source an episode."""
        validation = self._metadata.validation
        sources = []
        for position, entry in enumerate(self._metadata.episodes):
            in_validation = any(position in positions for positions in validation)
            split = ("val" if in_validation else "train") if validation else None
            num_bytes = (entry.length or 0) * len(self.layout.cameras) * _BYTES_PER_PICTURE
            sources.append(Source(entry.name, split, num_bytes=num_bytes))
        return sources

    def warnings(self) -> list[str]:
        """What is wrong with the metadata, and what is missing from the dataset."""
        selection, cameras = self._selection, self.layout.cameras
        messages = [*self._metadata.warnings]
        messages += [f"camera {key!r} was left out: {fault}" for key, fault in self._camera_faults.items() if fault]
        if len(cameras) > 1 and not self.settings.camera:
            messages.append(f"the main camera is {cameras[0]!r}, the first of several; --camera chooses another")
        missing = {"action": not selection.actions, "state": not selection.states}
        return messages + [f"no {kind} was converted" for kind, is_missing in missing.items() if is_missing]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The one episode of a source."""
        entry, selection = self._entries[source.path], self._selection
        table = self._rows(entry, (*selection.actions, *selection.states))
        states, actions = join_numbers(table, selection.states), join_numbers(table, selection.actions)
        shots = {name: self._shots(entry, name, table.num_rows) for name in selection.cameras}
        pictures = [
            dict(zip(shots, jpegs, strict=True)) for jpegs in zip(*(jpegs for jpegs, _ in shots.values()), strict=True)
        ]
        language, warnings = self._language(entry, table)
        rate = self.settings.control_rate or self._metadata.fps
        assert rate is not None  # Checked with the metadata.
        if entry.length not in (None, table.num_rows):
            warnings.append(OTHER_LENGTH)
        yield from map(Warned, warnings)
        yield Episode(
            episode_id=entry.name,
            source_file=entry.table,
            control_rate=rate,
            steps=[Step(*values) for values in zip(pictures, states, actions, strict=True)],
            motion=images.motion(shots[self.layout.cameras[0]][1]),
            language_instruction=language,
        )

    def _shots(self, entry: EpisodeEntry, camera: str, num_rows: int) -> tuple[list[bytes], list[np.ndarray]]:
        """JPEGs and thumbnails of a camera, one a row of the table."""
        jpegs, thumbnails = [], []
        # One frame more than there are rows tells a video that is too long, however long it is.
        for frame in itertools.islice(self._frames(entry, camera), num_rows + 1):
            small = images.shrink(frame, self.settings.image_size)
            jpegs.append(images.encode_jpeg(small))
            thumbnails.append(images.thumbnail(small))
        if len(jpegs) != num_rows:
            count = "more" if len(jpegs) > num_rows else f"only {len(jpegs)}"
            raise SourceError(f"the table has {num_rows} rows, but camera {camera!r} has {count} frames")
        return jpegs, thumbnails

    def _frames(self, entry: EpisodeEntry, camera: str) -> Iterator[np.ndarray]:
        """The RGB pictures of a camera, from a video or from the table."""
        key = self._selection.cameras[camera]
        if self._metadata.features[key].dtype == "image":
            return stored_frames(self._rows(entry, (key,))[key])
        video = entry.videos.get(key)
        if video is None:
            raise SourceError(f"there is no video of camera {camera!r}")
        return video_frames(self._path(video.path), video.seconds)

    def _rows(self, entry: EpisodeEntry, keys: tuple[str, ...]) -> pa.Table:
        return read_rows(self._path(entry.table), keys, entry.index if entry.shares_table else None)

    def _path(self, path: str) -> epath.Path:
        if path not in self._metadata.files:
            raise SourceError(f"{path} is missing")
        full_path = self._metadata.root / path
        try:
            check_file(full_path)
        except ValueError as error:
            raise SourceError(f"{path} {error}") from error
        return full_path

    def _language(self, entry: EpisodeEntry, table: pa.Table) -> tuple[str, list[str]]:
        """The instruction of an episode, and what is unusual about it."""
        texts = [self._metadata.tasks.get(index, "") for index in dict.fromkeys(task_indices(table))]
        # The list of the episode also has annotations that are no instructions, so that it comes second.
        text = next(filter(None, [*texts[:1], *entry.tasks]), "").strip()
        warnings = [SEVERAL_TASKS] if len(texts) > 1 else []
        return text, warnings if text else [*warnings, NO_TASK]

    @functools.cached_property
    def _metadata(self) -> Metadata:
        metadata = read_metadata(self.settings.source)
        if metadata.fps is None and self.settings.control_rate is None:
            raise ConversionError(f"{metadata.root / INFO_PATH} gives no fps; set --control_rate")
        return metadata

    @functools.cached_property
    def _entries(self) -> dict[str, EpisodeEntry]:
        return {entry.name: entry for entry in self._metadata.episodes}

    @functools.cached_property
    def _selection(self) -> features.Selection:
        metadata, settings = self._metadata, self.settings
        stored = [key for key, fault in self._camera_faults.items() if not fault]
        if not stored:
            faults = ", ".join(f"{key} ({fault})" for key, fault in self._camera_faults.items())
            raise ConversionError(f"{metadata.root} has no camera to convert: {faults or 'info.json lists none'}")
        return features.Selection(
            cameras=features.select_cameras(stored, settings.camera),
            actions=features.select_numbers(metadata.features, "action", settings.action, features.ACTION_KEYS),
            states=features.select_numbers(metadata.features, "state", settings.state, features.STATE_KEYS),
        )

    @functools.cached_property
    def _camera_faults(self) -> dict[str, str]:
        """Why a camera of info.json cannot be converted, or an empty text, by key."""
        metadata, faults = self._metadata, {}
        for key, feature in metadata.features.items():
            if feature.is_depth:
                faults[key] = "its pictures are depth maps"
            elif feature.dtype == "video":
                videos = [entry.videos[key].path for entry in metadata.episodes if key in entry.videos]
                faults[key] = "" if any(path in metadata.files for path in videos) else "it has no files"
            elif feature.dtype == "image":
                faults[key] = "" if key in self._table_columns else "the tables have no such column"
        return faults

    @functools.cached_property
    def _table_columns(self) -> set[str]:
        """Columns of the first table that can be read."""
        for path in dict.fromkeys(entry.table for entry in self._metadata.episodes):
            try:
                return column_names(self._path(path))
            except (SourceError, *self.decoder_errors):
                continue
        return set()
