"""What the folder `meta` of a LeRobot dataset says, in one form for all format versions.

The formats are those of https://github.com/huggingface/lerobot: v2.0 and v2.1 have one table, and one video of
each camera, for every episode; v3.0 joins several episodes in one file.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from como_jax.convert.folder import check_folder
from como_jax.convert.lerobot.entries import Entry, EntryError, EntryList, finite_float, parse_json, whole
from como_jax.convert.lerobot.file_index import FileIndex, fill
from como_jax.convert.sources import VALIDATION_SPLITS, check_file
from como_jax.errors import ConversionError

INFO_PATH = "meta/info.json"
FOUND_BY_NAME = "they were found by their names"
_VERSIONS = ("v2.0", "v2.1", "v3.0")
_DEPTH_FLAGS = ("video.is_depth_map", "is_depth_map")
_V2_TABLE = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
_V2_TABLE_NAME = re.compile(r"episode_(\d+)\.parquet")
_V3_TABLE = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_SPLIT = re.compile(r"(\d{1,18}):(\d{1,18})")
# Lengths only serve to size shards and to warn.
_MAX_LENGTH = 2**40
# Pandas calls the index of a frame so if it has no name of its own.
_TASK_COLUMNS = ("task", "__index_level_0__")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One column of the steps, or one camera.

    Attributes:
      dtype: name of a NumPy type, `video`, `image` or `string`.
      shape: shape without the time axis, or None if the dataset does not say.
      is_depth: whether the images of a camera are depth maps.
    """

    dtype: str
    shape: tuple[int, ...] | None
    is_depth: bool = False


@dataclasses.dataclass(frozen=True)
class VideoPart:
    """Where the frames of one camera in one episode are.

    Attributes:
      path: the file, relative to the dataset.
      seconds: begin and end of the episode within the file, or None if the file holds nothing else.
    """

    path: str
    seconds: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class EpisodeEntry:
    """One episode as the metadata list it.

    Attributes:
      index: number of the episode.
      table: the file with its rows, relative to the dataset.
      shares_table: whether the file holds other episodes too.
      videos: the video of every camera, by key.
      tasks: all instructions that occur in the episode.
      length: number of rows, or None if the metadata do not say.
      first_row: number of the first row within the dataset, or None if the metadata do not say.
      faults: why the metadata do not say where a video is, by the key of its camera; the table by an empty key.
    """

    index: int
    table: str
    shares_table: bool
    videos: Mapping[str, VideoPart]
    tasks: tuple[str, ...] = ()
    length: int | None = None
    first_row: int | None = None
    faults: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique within the dataset."""
        return f"episode_{self.index:06d}"


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A LeRobot dataset without its data.

    Attributes:
      root: the folder.
      info: the content of info.json.
      fps: control steps per second, or None if the dataset does not say.
      features: what the steps hold, by key.
      validation: positions in `episodes` that are for validation according to info.json; empty if it does not say.
      episodes: in the order of their numbers, which may have gaps.
      tasks: instruction by task index.
      files: all files in the folder.
      warnings: what looks wrong in the metadata.
    """

    root: epath.Path
    info: Mapping[str, Any]
    fps: float | None
    features: Mapping[str, Feature]
    validation: tuple[range, ...]
    episodes: tuple[EpisodeEntry, ...]
    tasks: Mapping[int, str]
    files: FileIndex
    warnings: tuple[str, ...]

    def has_video(self, camera: str) -> bool:
        """Whether there is a video of a camera, in any episode."""
        return any(entry.videos[camera].path in self.files for entry in self.episodes if camera in entry.videos)

    def wrong_totals(self) -> str:
        """Returns which numbers of info.json are not those of the metadata and the files; empty if none is wrong."""
        counted: dict[str, int] = {
            "total_episodes": len(self.episodes),
            "total_tasks": len(self.tasks),
            "total_videos": len(self.files.below("videos", ".mp4")),
            "total_chunks": len({path.rpartition("/")[0] for path in self.files.below("data", ".parquet")}),
        }
        lengths = [entry.length for entry in self.episodes]
        if None not in lengths:
            counted["total_frames"] = sum(length or 0 for length in lengths)
        wrong = [
            f"{name} is {self.info[name]}, and there are {count}"
            for name, count in counted.items()
            if name in self.info and self.info[name] != count
        ]
        return f"{INFO_PATH} counts wrongly: {'; '.join(wrong)}" if wrong else ""


def read_metadata(folder: epath.PathLike) -> Metadata:
    """Reads the metadata of a dataset.

    Raises:
      ConversionError: the folder is not a LeRobot dataset, its version is unknown, or its metadata cannot be read.
    """
    root = epath.Path(folder)
    info = _read_info(root)
    version = info.get("codebase_version")
    if version not in _VERSIONS:
        raise ConversionError(
            f"{root / INFO_PATH}: codebase_version {version!r} is not known; there are {', '.join(_VERSIONS)}"
        )
    features = {key: _feature(value) for key, value in _mapping(root, info, "features").items()}
    videos = [key for key, feature in features.items() if feature.dtype == "video"]
    files = FileIndex(root, whole(info.get("chunks_size")))
    warnings = [f"{path} leads to a folder that it lies in, and is not followed" for path in files.not_followed]
    episodes = (_read_v3 if version == "v3.0" else _read_v2)(root, info, videos, files, warnings)
    if not episodes:
        raise ConversionError(f"{root} is a LeRobot dataset without episodes")
    tasks = _read_tasks(root, "meta/tasks.parquet" if version == "v3.0" else "meta/tasks.jsonl", files, warnings)
    return Metadata(
        root=root,
        info=info,
        fps=_fps(info),
        features=features,
        validation=_validation(info, len(episodes), warnings),
        episodes=tuple(sorted(episodes, key=lambda episode: episode.index)),
        tasks=tasks,
        files=files,
        warnings=tuple(warnings),
    )


def _read_info(root: epath.Path) -> dict[str, Any]:
    check_folder(root)
    path = root / INFO_PATH
    if not path.exists():
        raise ConversionError(f"source folder {root} holds no LeRobot dataset (no {INFO_PATH})")
    try:
        check_file(path)
        info = parse_json(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(info, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return info


def _mapping(root: epath.Path, info: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = info.get(key)
    if not isinstance(value, dict):
        raise ConversionError(f"{root / INFO_PATH}: {key} must be an object, got {value!r}")
    return value


def _fps(info: Mapping[str, Any]) -> float | None:
    fps = finite_float(info.get("fps"))
    return fps if fps and fps > 0 else None


def _validation(info: Mapping[str, Any], num_episodes: int, warnings: list[str]) -> tuple[range, ...]:
    """Returns the ranges for validation of splits such as `{"train": "0:90", "val": "90:100"}`.

    What says no range costs itself alone: it is added to the warnings, and counts as if it were not there.
    """
    splits = info.get("splits") or {}
    if not isinstance(splits, dict):
        warnings.append(f"{INFO_PATH}: splits must be an object, got {splits!r}; it was ignored")
        return ()
    ranges = []
    for name in VALIDATION_SPLITS:
        if name not in splits:
            continue
        bounds = _SPLIT.fullmatch(str(splits[name]))
        positions = range(int(bounds[1]), int(bounds[2])) if bounds else range(0)
        if bounds is None or positions.start > positions.stop:
            warnings.append(f"{INFO_PATH}: split {name!r} must be START:STOP, got {splits[name]!r}; it was ignored")
            continue
        if positions.stop > num_episodes:
            warnings.append(f"{INFO_PATH}: split {name!r} is {splits[name]}, and there are {num_episodes} episodes")
        ranges.append(positions)
    return tuple(ranges)


def _feature(value: Any) -> Feature:
    """Reads the description of a feature in `info.json`; what it lacks shows when the data are read."""
    value = value if isinstance(value, dict) else {}
    shape = value.get("shape")
    sizes = tuple(whole(size) or 0 for size in shape) if isinstance(shape, list) else (0,)
    # v2.0 calls the details `video_info`, later versions `info`.
    details = [value.get(key) for key in ("info", "video_info")]
    flags = [entry.get(key) for entry in details if isinstance(entry, dict) for key in _DEPTH_FLAGS]
    return Feature(str(value.get("dtype", "")), sizes if all(size > 0 for size in sizes) else None, any(flags))


def _read_v2(
    root: epath.Path, info: Mapping[str, Any], cameras: Sequence[str], files: FileIndex, warnings: list[str]
) -> list[EpisodeEntry]:
    """Reads the episodes of v2.0 and v2.1: all that are listed, and all that have a table."""
    path = "meta/episodes.jsonl"
    listed: dict[int, _Details] = {}
    if path in files:
        entries = EntryList(root, path)
        repeated = 0
        for entry in entries:
            try:
                index = entry.number("episode_index")
            except EntryError as error:
                entries.note(entry.place, error)
                continue
            repeated += index in listed
            listed[index] = _details(entries, entry)
        warnings += entries.warnings()
        if repeated:
            warnings.append(f"{path} lists some episodes twice; the last entry counts")
    matches = [_V2_TABLE_NAME.fullmatch(table.rpartition("/")[2]) for table in files.below("data", ".parquet")]
    stored = {int(match[1]) for match in matches if match}
    if unlisted := stored - listed.keys():
        warnings.append(f"{len(unlisted)} episodes have a table but are not listed in {path}")
    episodes = []
    for index in sorted(stored | listed.keys()):
        details = listed.get(index, _Details())
        videos = {
            key: VideoPart(files.find(info.get("video_path"), _V2_VIDEO, key, files.fields(index, key)))
            for key in cameras
        }
        table = files.find(info.get("data_path"), _V2_TABLE, "data", files.fields(index))
        episodes.append(EpisodeEntry(index, table, False, videos, details.tasks, details.length))
    if files.found_by_name:
        warnings.append(
            f"{files.found_by_name} files do not lie where the path templates of info.json say; {FOUND_BY_NAME}"
        )
    return episodes


def _read_v3(
    root: epath.Path, info: Mapping[str, Any], cameras: Sequence[str], files: FileIndex, warnings: list[str]
) -> list[EpisodeEntry]:
    """Reads the episodes of v3.0 from the tables in `meta/episodes`."""
    paths = files.below("meta/episodes", ".parquet")
    if not paths:
        raise ConversionError(f"{root} is of format v3.0 but has no table of episodes in meta/episodes")
    episodes: dict[int, EpisodeEntry] = {}
    repeated, unreadable = Counter[int](), list[ConversionError]()
    for path in paths:
        entries = EntryList(root, path)
        try:
            for entry in entries:
                try:
                    episode = _v3_episode(info, cameras, entry, entries)
                except EntryError as error:
                    entries.note(entry.place, error)
                    continue
                before = episodes.get(episode.index)
                repeated[episode.index] += before is not None
                episodes[episode.index] = episode if before is None else _newer(before, episode)
        except ConversionError as error:
            unreadable.append(error)
            warnings.append(f"{str(error).removeprefix(f'{root}/')}; the episodes that it lists were left out")
        warnings += entries.warnings()
    if unreadable and not episodes:
        raise unreadable[0]
    if any(repeated.values()):
        warnings.append("meta/episodes lists some episodes twice; the last entry counts")
    return list(episodes.values())


def _v3_episode(info: Mapping[str, Any], cameras: Sequence[str], entry: Entry, entries: EntryList) -> EpisodeEntry:
    """Reads an episode of a list; an index of a file that is no number costs what the file holds.

    Raises:
      EntryError: the entry does not say which episode it is.
    """
    index = entry.number("episode_index")
    table, videos, faults = "", {}, {}
    try:
        place = {name: entry.number(f"data/{name}") for name in ("chunk_index", "file_index")}
        table = fill(info.get("data_path"), _V3_TABLE, place)
    except EntryError as error:
        faults[""] = f"{entries.path}, {entry.place}: {error}"
    for key in cameras:
        try:
            video = _v3_video(info, key, entry)
        except EntryError as error:
            faults[key] = f"{entries.path}, {entry.place}: {error}"
            continue
        if video is not None:
            videos[key] = video
    details = _details(entries, entry)
    return EpisodeEntry(index, table, True, videos, details.tasks, details.length, details.first_row, faults)


def _newer(before: EpisodeEntry, last: EpisodeEntry) -> EpisodeEntry:
    """Returns the last of two entries of one episode, without its places if they contradict those of the other."""
    if (before.table, before.videos, before.faults) == (last.table, last.videos, last.faults):
        return last
    fault = "the metadata list it twice, at different places"
    return dataclasses.replace(last, table="", videos={}, faults={"": fault})


def _read_tasks(root: epath.Path, path: str, files: FileIndex, warnings: list[str]) -> dict[int, str]:
    """Reads the instructions by task index; without the file there are none, and a warning is added."""
    if path not in files:
        warnings.append(f"{path} is missing")
        return {}
    tasks: dict[int, str] = {}
    entries = EntryList(root, path)
    changed = False
    try:
        for entry in entries:
            stored = [entry.values[column] for column in _TASK_COLUMNS if column in entry.values]
            text = next(filter(None, stored), stored[0] if stored else "")
            try:
                index = entry.number("task_index")
                if not isinstance(text, str):
                    raise EntryError(f"task must be a text, got {text!r}")
            except EntryError as error:
                entries.note(entry.place, error)
                continue
            changed |= tasks.get(index, text) != text
            tasks[index] = text
    except ConversionError as error:
        warnings.append(f"{str(error).removeprefix(f'{root}/')}; instructions come from the list of episodes alone")
    warnings += entries.warnings()
    if changed:
        warnings.append(f"{path} gives several texts for one task_index; the last entry counts")
    return tasks


def _v3_video(info: Mapping[str, Any], camera: str, entry: Entry) -> VideoPart | None:
    """Returns the part of a video that belongs to an episode, or None if the episode has none of this camera.

    Raises:
      EntryError: an index of the file is no whole number.
    """
    prefix = f"videos/{camera}/"
    indices = {name: entry.values.get(prefix + name) for name in ("chunk_index", "file_index")}
    # Pandas writes NaN where there is nothing.
    if any(value is None or value != value for value in indices.values()):
        return None
    place = {name: entry.number(prefix + name) for name in indices}
    begin, end = (entry.values.get(f"{prefix}{name}_timestamp") for name in ("from", "to"))
    # Missing times cost only this episode, when it is read.
    seconds = (
        float(begin) if isinstance(begin, int | float) else math.nan,
        float(end) if isinstance(end, int | float) else math.nan,
    )
    return VideoPart(fill(info.get("video_path"), _V3_VIDEO, {**place, "video_key": camera}), seconds)


class _Details(NamedTuple):
    """See `EpisodeEntry`."""

    tasks: tuple[str, ...] = ()
    length: int | None = None
    first_row: int | None = None


def _details(entries: EntryList, entry: Entry) -> _Details:
    """Reads what an episode can do without; what of it is damaged is noted, and costs itself."""
    stored = {key: entry.values[key] for key in ("tasks", "length", "dataset_from_index") if key in entry.values}
    tasks = stored.get("tasks", [])
    listed = [tasks] if isinstance(tasks, str) else tasks if isinstance(tasks, list) else [None]
    texts = tuple(text for text in listed if isinstance(text, str))
    length, first_row = (whole(stored.get(key)) for key in ("length", "dataset_from_index"))
    length = None if length is None or not 0 <= length <= _MAX_LENGTH else length
    damaged = {
        "tasks must be texts": len(texts) < len(listed) and "tasks",
        "length must be a whole number": length is None and "length",
        "dataset_from_index must be a whole number": first_row is None and "dataset_from_index",
    }
    for message, key in damaged.items():
        if key and key in stored:
            entries.note(entry.place, f"{message}, got {stored[key]!r}")
    return _Details(texts, length, first_row)
