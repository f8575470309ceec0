"""Builder for LeRobot datasets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import EpisodeBuilder, Item, SourceError, StepLayout, Warned
from como_jax.convert.images import GREY, Decoded, Frame, NotRgbError
from como_jax.convert.lerobot import order, placement
from como_jax.convert.lerobot.language import column_texts, language_columns, like_labels
from como_jax.convert.lerobot.metadata import INFO_PATH, EpisodeEntry, Feature, Metadata, read_metadata
from como_jax.convert.lerobot.reading import (
    NoRowsError,
    bounds,
    column_names,
    first_stored,
    frame_times,
    join_numbers,
    read_rows,
    stored_episodes,
    stored_frames,
    task_indices,
    video_frames,
)
from como_jax.convert.selection import Selection, as_identifier, missing_warnings
from como_jax.convert.settings import RATE, Settings, setting
from como_jax.convert.sources import Source, check_file
from como_jax.convert.video import VIDEO_ERRORS
from como_jax.errors import ConversionError

_ACTION_KEYS = ("action", "actions")
_STATE_KEYS = ("observation.state", "state")
# In a step, the states are stored under this name beside the cameras.
_STATE = "state"
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
# The approximate size of an image of the default size as JPEG.
_BYTES_PER_IMAGE = 2**15
# Episodes in which an image of a camera is looked for, before the conversion begins.
_MAX_PROBED = 5
NO_TASK = "no task is known: the language instruction is empty"
SEVERAL_TASKS = "the task changes within an episode: that of its first step counts"
DEPTH_NAME = "its images are grey, and its name says that they are depth maps"
OTHER_TASK = "its rows have another task than the list of episodes says: that of the rows counts"
UNKNOWN_TASK = "its rows have a `task_index` that the list of tasks does not have"
OTHER_TABLE = "its rows do not lie in the table that the metadata name; they were found in another one"
OTHER_VIDEO = "its frames do not lie in the video that the metadata name; they were found in another one"
OTHER_INDEX = "the metadata say that its rows begin at another `index` than they do"
OTHER_LENGTH = "the metadata list another number of steps than the table has"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeRobotSettings(Settings):
    """Settings of `LeRobot`."""

    source: str = setting("folder of the dataset, with meta/info.json")
    control_rate: float | None = setting("steps per second (Hz) [fps of the dataset]", None, RATE)
    camera: tuple[str, ...] = setting("keys or names of cameras, the main camera first [all with images]", ())
    action: tuple[str, ...] | None = setting("keys, joined in this order; '' for none [action]", None)
    state: tuple[str, ...] | None = setting("keys, joined in this order; '' for none [observation.state]", None)
    language: str | None = setting(
        "columns of texts, or of numbers of tasks, that mean the same; '' for none [the tasks, and the usual ones]",
        None,
    )


class MissingFileError(SourceError):
    """A file that the metadata name is not in the folder."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """The frames of one camera in one episode.

    Attributes:
      path: the video.
      times: of all frames of the video in seconds, or None if they are not known.
      frames: number of the first frame of the episode and of that after its last, or None if it has the whole video.
      warnings: what is odd about the place.
    """

    path: epath.Path
    times: np.ndarray | None
    frames: tuple[int, int] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def episode_times(self) -> np.ndarray | None:
        """The times of the frames of the episode."""
        return self.times if self.times is None or self.frames is None else self.times[slice(*self.frames)]


class LeRobot(EpisodeBuilder):
    """The episodes of a LeRobot dataset. Every row of its tables is a step, and has one frame of every camera."""

    settings_class = LeRobotSettings
    settings: LeRobotSettings
    decoder_errors = (*VIDEO_ERRORS, pa.ArrowException)

    @functools.cached_property
    def layout(self) -> StepLayout:
        selection, available = self.selection, self.metadata.features
        return StepLayout(
            cameras=tuple(selection.cameras),
            state_size=_size(available, selection.states),
            action_size=_size(available, selection.actions),
        )

    def sources(self) -> list[Source]:
        """One source an episode."""
        validation = self.metadata.validation
        sources = []
        for position, entry in enumerate(self.metadata.episodes):
            in_validation = any(position in positions for positions in validation)
            split = ("val" if in_validation else "train") if validation else None
            num_bytes = (entry.length or 0) * len(self.layout.cameras) * _BYTES_PER_IMAGE
            sources.append(Source(entry.name, split, num_bytes=num_bytes))
        return sources

    def warnings(self) -> list[str]:
        """What is wrong with the metadata, and what is missing from the dataset."""
        selection, cameras = self.selection, self.layout.cameras
        messages = [*self.metadata.warnings, *filter(None, [self.metadata.wrong_totals()])]
        messages += [f"camera {key!r} was left out: {fault}" for key, fault in self._camera_faults.items() if fault]
        if len(cameras) > 1 and not self.settings.camera:
            messages.append(f"the main camera is {cameras[0]!r}, the first of several; `camera` chooses another")
        return messages + missing_warnings(action=selection.actions, state=selection.states)

    def episodes(self, source: Source) -> Iterator[Item]:
        """The one episode of a source."""
        entry, selection = self._entries[source.path], self.selection
        table, warnings = self._rows(entry, (*selection.actions, *selection.states, *selection.language_keys))
        states, actions = join_numbers(table, selection.states), join_numbers(table, selection.actions)
        parts = {name: self._part(entry, name) for name in selection.cameras}
        chosen = {name: _chosen(part, table) for name, part in parts.items()}
        frames = {name: self._frames(entry, name, part, table.num_rows, chosen[name]) for name, part in parts.items()}
        timing = self._timing(table, [part for part in parts.values() if part is not None])
        language, language_warnings = self._language(entry, table)
        warnings += [*timing.warnings, *language_warnings]
        warnings += [warning for part in parts.values() if part is not None for warning in part.warnings]
        if any(chosen.values()):
            warnings.append(order.FRAMES_WITHOUT_ROWS)
        if entry.length not in (None, table.num_rows):
            warnings.append(OTHER_LENGTH)
        if entry.first_row is not None and order.first_index(table) not in (None, entry.first_row):
            warnings.append(OTHER_INDEX)
        yield from map(Warned, dict.fromkeys(warnings))
        edges = [0, *timing.starts, table.num_rows]
        for number, rows in enumerate(itertools.starmap(slice, itertools.pairwise(edges))):
            name = f"{entry.name}/{number:05d}" if timing.starts else entry.name
            shown = {camera: each[rows] for camera, each in frames.items()}
            vectors = (None if each is None else each[rows] for each in (states, actions))
            yield images.make_episode(name, entry.table, timing.rate, shown, *vectors, language)

    def _frames(
        self, entry: EpisodeEntry, camera: str, part: _Part | None, num_rows: int, chosen: Sequence[int] | None
    ) -> list[Frame]:
        """Reads the frames of a camera, one for each row of the table; `chosen` are their numbers, or None for all."""
        stored = self._images(entry, camera, part)
        if chosen:
            wanted = set(chosen)
            stored = (image for number, image in enumerate(stored) if number in wanted)
        # One frame more than there are rows shows that a video is too long, without reading all of it.
        stored = itertools.islice(stored, num_rows + 1)
        frames = [images.make_frame(image, self.settings.image_size, note) for image, note in stored]
        if len(frames) != num_rows:
            count = "more" if len(frames) > num_rows else f"only {len(frames)}"
            raise SourceError(f"the table has {num_rows} rows, but camera {camera!r} has {count} frames")
        return frames

    def _images(self, entry: EpisodeEntry, camera: str, part: _Part | None) -> Iterator[Decoded]:
        """Yields the RGB images of a camera, from a video or from the table."""
        if part is None:
            key = self.selection.cameras[camera]
            return stored_frames(self._rows(entry, (key,))[0][key])
        if part.times is None or part.frames is None:
            return video_frames(part.path)
        return video_frames(part.path, bounds(part.times, *part.frames))

    def _part(self, entry: EpisodeEntry, camera: str) -> _Part | None:
        """Finds the frames of an episode in the video of a camera; None if the camera's images lie in the table."""
        key = self.selection.cameras[camera]
        if self.metadata.features[key].dtype == "image":
            return None
        video = entry.videos.get(key)
        if video is None:
            raise SourceError(entry.faults.get(key) or f"there is no video of camera {camera!r}")
        if video.seconds is None:
            path = self._path(video.path)
            return _Part(path, frame_times(path))
        window = placement.Window(entry.index, video.seconds, entry.length)
        try:
            return self._place(key, video.path, window)
        except SourceError:
            neighbours = [path for path in self._videos[key] if path != video.path and self._fits(key, path, window)]
            if len(neighbours) != 1:
                raise
            part = self._place(key, neighbours[0], window)
            return dataclasses.replace(part, warnings=(OTHER_VIDEO, *part.warnings))

    def _place(self, key: str, video: str, window: placement.Window) -> _Part:
        """Finds the frames of an episode in a video of several."""
        is_listed = window in self._windows.get((key, video), ())
        layout = self._layout(key, video) if is_listed else self._layout_with(key, video, window)
        first, stop, warnings = layout.place(window.episode)
        return _Part(self._path(video), layout.times, (first, stop), tuple(warnings))

    def _fits(self, key: str, video: str, window: placement.Window) -> bool:
        """Whether the frames that other episodes leave in a video are those of this one."""
        try:
            return self._layout_with(key, video, window).is_full
        except (SourceError, *self.decoder_errors):
            return False

    @functools.cached_property
    def _layout(self) -> Callable[[str, str], placement.VideoLayout]:
        """Finds the frames of all episodes in a video; the last ones are kept, since episodes follow each other."""
        return functools.lru_cache(maxsize=16)(self._layout_with)

    def _layout_with(self, key: str, video: str, *more: placement.Window) -> placement.VideoLayout:
        times = frame_times(self._path(video))
        if times is None:
            raise SourceError(f"the frames of {video} have no times, by which those of the episode are found")
        others = [each for each in self._windows.get((key, video), ()) if each.episode not in {m.episode for m in more}]
        return placement.VideoLayout(times, [*others, *more], self.metadata.fps)

    @functools.cached_property
    def _videos(self) -> dict[str, list[str]]:
        """All videos of every camera."""
        videos = self.metadata.files.below("videos", ".mp4")
        return {key: [path for path in videos if key in path.split("/")] for key in self.selection.cameras.values()}

    @functools.cached_property
    def _windows(self) -> dict[tuple[str, str], list[placement.Window]]:
        """The parts of every video that the metadata give to episodes, by camera and file."""
        windows: dict[tuple[str, str], list[placement.Window]] = {}
        for entry in self.metadata.episodes:
            for key, video in entry.videos.items():
                if video.seconds is not None:
                    window = placement.Window(entry.index, video.seconds, entry.length)
                    windows.setdefault((key, video.path), []).append(window)
        return windows

    def _timing(self, table: pa.Table, parts: Sequence[_Part]) -> order.Timing:
        """Finds out how fast an episode runs, and which of its rows begin another one since time jumps before them."""
        clock, numbers = order.row_times(table), order.row_numbers(table)
        if rate := self.settings.control_rate:
            uneven = order.jumps(numbers) or order.jumps(clock, numbers)
            return order.Timing(rate, [], [order.JUMPS_AT_RATE] if uneven else [])
        assert self.metadata.fps is not None  # Checked with the metadata.
        videos = [part.episode_times for part in parts if part.episode_times is not None]
        return order.find_timing(self.metadata.fps, table.num_rows, clock, videos, numbers)

    def _rows(self, entry: EpisodeEntry, keys: tuple[str, ...]) -> tuple[pa.Table, list[str]]:
        if fault := entry.faults.get(""):
            raise SourceError(fault)
        if not entry.shares_table:
            return read_rows(self._path(entry.table), keys)
        try:
            return read_rows(self._path(entry.table), keys, entry.index)
        except (MissingFileError, NoRowsError):
            tables = self._tables.get(entry.index, ())
            if len(tables) != 1:
                raise
            table, warnings = read_rows(self._path(tables[0]), keys, entry.index)
            return table, [OTHER_TABLE, *warnings]

    @functools.cached_property
    def _tables(self) -> dict[int, list[str]]:
        """The tables with rows of every episode, whatever the metadata say."""
        tables: dict[int, list[str]] = {}
        for path in self.metadata.files.below("data", ".parquet"):
            try:
                for index in stored_episodes(self._path(path)):
                    tables.setdefault(index, []).append(path)
            except (SourceError, KeyError, *self.decoder_errors):
                continue
        return tables

    def _path(self, path: str) -> epath.Path:
        if path not in self.metadata.files:
            raise MissingFileError(f"{path} is missing")
        full_path = self.metadata.root / path
        try:
            check_file(full_path)
        except ValueError as error:
            raise SourceError(f"{path} {error}") from error
        return full_path

    def _language(self, entry: EpisodeEntry, table: pa.Table) -> tuple[list[str], list[str]]:
        """Returns the instructions of an episode, and what is unusual about them."""
        texts, warnings = column_texts(table, self.selection.language_keys, self.metadata.tasks)
        if self.settings.language is None:
            task, task_warnings = self._task(entry, table)
            texts, warnings = [task, *texts], [*warnings, *task_warnings]
        texts = [text for text in texts if text]
        return texts, warnings if texts or self.settings.language == "" else [*warnings, NO_TASK]

    def _task(self, entry: EpisodeEntry, table: pa.Table) -> tuple[str, list[str]]:
        """Returns the task of an episode, or an empty text, and what is unusual about it."""
        indices, tasks = dict.fromkeys(task_indices(table)), self.metadata.tasks
        texts = [tasks.get(index, "").strip() for index in indices]
        listed = [text.strip() for text in entry.tasks if text.strip()]
        found = {
            SEVERAL_TASKS: len(texts) > 1,
            UNKNOWN_TASK: bool(tasks) and any(index not in tasks for index in indices),
            OTHER_TASK: bool(listed) and any(each and each not in listed for each in texts),
        }
        # The list of the episode also holds annotations that are not instructions, so it comes second.
        text = next(filter(None, [*texts[:1], *listed]), "")
        return text, [message for message, applies in found.items() if applies]

    def label_files(self) -> list[str]:
        """The tasks, and the columns that look as if they held instructions, unless the user wants none."""
        if self.settings.language == "":
            return []
        tasks = sorted(path for path in self.metadata.files.paths if path.startswith("meta/tasks"))
        return [*tasks, *like_labels(self.metadata.features)]

    @functools.cached_property
    def metadata(self) -> Metadata:
        """What the dataset says about itself; raises ConversionError if that cannot be read."""
        metadata = read_metadata(self.settings.source)
        if metadata.fps is None and self.settings.control_rate is None:
            raise ConversionError(f"{metadata.root / INFO_PATH} gives no fps; set `control_rate`")
        return metadata

    @functools.cached_property
    def _entries(self) -> dict[str, EpisodeEntry]:
        return {entry.name: entry for entry in self.metadata.episodes}

    @functools.cached_property
    def selection(self) -> Selection:
        """The chosen cameras, actions and states; raises ConversionError if the dataset does not have them."""
        metadata, settings = self.metadata, self.settings
        stored = [key for key, fault in self._camera_faults.items() if not fault]
        for key in settings.camera:
            if fault := self._camera_faults.get(key) or self._camera_faults.get(f"observation.images.{key}"):
                raise ConversionError(f"camera {key!r} cannot be converted: {fault}")
        if not stored:
            faults = ", ".join(f"{key} ({fault})" for key, fault in self._camera_faults.items())
            raise ConversionError(f"{metadata.root} has no camera to convert: {faults or 'info.json lists none'}")
        return Selection(
            # Images of depth in false colours are RGB, but motion should not be measured on them.
            cameras=select_cameras(sorted(stored, key=lambda key: "depth" in key.lower()), settings.camera),
            actions=_select_numbers(metadata.features, "action", settings.action, _ACTION_KEYS),
            states=_select_numbers(metadata.features, "state", settings.state, _STATE_KEYS),
            language=language_columns(metadata.features, self._table_columns, settings.language),
        )

    @functools.cached_property
    def _camera_faults(self) -> dict[str, str]:
        """The reason why a camera of info.json cannot be converted, or an empty text, by key."""
        metadata, faults = self.metadata, {}
        for key, feature in metadata.features.items():
            if feature.is_depth:
                faults[key] = "its images are depth maps"
            elif feature.dtype == "video":
                faults[key] = self._image_fault(key) if metadata.has_video(key) else "it has no files"
            elif feature.dtype == "image":
                known = key in self._table_columns
                faults[key] = self._image_fault(key) if known else "the tables have no such column"
        return faults

    def _image_fault(self, key: str) -> str:
        """Returns why the images of a camera are not RGB, as the first one that can be read shows, or ''."""
        is_stored = self.metadata.features[key].dtype == "image"
        for entry in self.metadata.episodes[:_MAX_PROBED]:
            try:
                video = entry.videos.get(key)
                if is_stored:
                    first = first_stored(self._path(entry.table), key)
                elif video is not None:
                    first = next(video_frames(self._path(video.path), None))
                else:
                    continue
            except NotRgbError as error:
                return str(error)
            except (SourceError, *self.decoder_errors):
                continue
            return DEPTH_NAME if first.note == GREY and "depth" in key.lower() else ""
        return ""

    @functools.cached_property
    def _table_columns(self) -> set[str]:
        """The columns of the first table that can be read."""
        for path in dict.fromkeys(entry.table for entry in self.metadata.episodes):
            try:
                return column_names(self._path(path))
            except (SourceError, *self.decoder_errors):
                continue
        return set()


def _chosen(part: _Part | None, table: pa.Table) -> list[int] | None:
    """Returns the numbers of the frames that have rows, if that is known of a video with more frames."""
    times = None if part is None else part.episode_times
    return None if times is None else order.frames_of_rows(table, len(times))


def select_cameras(available: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """Returns the key of every wanted camera by its name in the steps; all of them if none is named.

    Wanted are keys, or names such as `top` for `observation.images.top`.

    Raises:
      ConversionError: there is no such camera.
    """
    names = {key: _camera_name(key) for key in available}
    if len(set(names.values())) < len(names) or _STATE in names.values():
        names = {key: as_identifier(key) for key in available}
    if len(set(names.values())) < len(names) or _STATE in names.values():
        names = {key: f"camera_{index}" for index, key in enumerate(available)}
    keys = {name: key for key, name in names.items()} | {key: key for key in available}
    for name in wanted:
        if name not in keys:
            raise ConversionError(f"no camera {name!r} in this dataset; there are: {', '.join(names.values())}")
    return {names[key]: key for key in [keys[name] for name in wanted] or available}


def _select_numbers(
    features: Mapping[str, Feature], kind: str, wanted: Sequence[str] | None, defaults: Sequence[str]
) -> tuple[str, ...]:
    """Returns the wanted keys of actions or states (`kind`), or by default the first of `defaults` that there is.

    Raises:
      ConversionError: a key does not exist, or does not hold numbers.
    """
    available = [key for key, feature in features.items() if _is_number(feature) and key not in _BOOKKEEPING]
    if wanted is None:
        return tuple(key for key in defaults if key in available)[:1]
    for key in wanted:
        if key not in available:
            names = ", ".join(available) or "none"
            raise ConversionError(f"no {kind} key {key!r} with numbers in this dataset; there are: {names}")
    return tuple(wanted)


def _size(features: Mapping[str, Feature], keys: Sequence[str]) -> int | None:
    """Returns the number of values in the joined keys, or None without keys.

    Raises:
      ConversionError: the shape of a feature is not known.
    """
    shapes = {key: features[key].shape for key in keys}
    for key, shape in shapes.items():
        if shape is None:
            raise ConversionError(f"meta/info.json: shape of {key!r} must be a list of positive whole numbers")
    return sum(math.prod(shape) for shape in shapes.values() if shape is not None) if keys else None


def _camera_name(key: str) -> str:
    short = key.removeprefix("observation.").removeprefix("images.")
    return as_identifier(short or key)


def _is_number(feature: Feature) -> bool:
    try:
        return np.dtype(feature.dtype).kind in "biuf"
    except (SyntaxError, TypeError, ValueError):
        return False
