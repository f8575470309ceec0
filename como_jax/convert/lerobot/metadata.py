"""What the folder `meta` of a LeRobot dataset says, in one form for all format versions.

The formats are those of https://github.com/huggingface/lerobot: v2.0 and v2.1 have one table, and one video of
each camera, for every episode; v3.0 joins several episodes in one file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.convert.folder import check_folder
from como_jax.convert.sources import VALIDATION_SPLITS, check_file
from como_jax.errors import ConversionError, one_line

INFO_PATH = "meta/info.json"
FOUND_BY_NAME = "they were found by their names"
_VERSIONS = ("v2.0", "v2.1", "v3.0")
_FOLDERS = ("data", "meta", "videos")
_DEPTH_FLAGS = ("video.is_depth_map", "is_depth_map")
_V2_TABLE = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
_V2_TABLE_NAME = re.compile(r"episode_(\d+)\.parquet")
_V3_TABLE = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_DEFAULT_CHUNK_SIZE = 1000
# Lengths only serve to size shards and to warn.
_MAX_LENGTH = 2**40
# Pandas calls the index of a frame so if it has no name of its own.
_TASK_COLUMNS = ("task", "__index_level_0__")
_TINY, _HUGE = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


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
    """

    index: int
    table: str
    shares_table: bool
    videos: Mapping[str, VideoPart]
    tasks: tuple[str, ...] = ()
    length: int | None = None

    @property
    def name(self) -> str:
        """Unique within the dataset."""
        return f"episode_{self.index:06d}"


class FileIndex:
    """All files of a dataset, listed once.

    Attributes:
      paths: paths relative to the dataset.
      chunk_size: number of episodes in a folder, which some path templates need.
      found_by_name: number of files that `find` found although the path template led elsewhere.
    """

    def __init__(self, root: epath.Path, chunk_size: int | None = None):
        self.paths: set[str] = set()
        self.chunk_size = chunk_size if chunk_size is not None and chunk_size >= 1 else _DEFAULT_CHUNK_SIZE
        self.found_by_name = 0
        self._by_name: dict[str, list[str]] = {}
        for top in _FOLDERS:
            for folder, _, files in (root / top).walk():
                for name in files:
                    path = (folder / name).relative_to(root).as_posix()
                    self.paths.add(path)
                    self._by_name.setdefault(name, []).append(path)

    def __contains__(self, path: str) -> bool:
        return path in self.paths

    def below(self, folder: str, suffix: str) -> list[str]:
        """Returns the files with a suffix in a folder and below, sorted."""
        return sorted(path for path in self.paths if path.startswith(f"{folder}/") and path.endswith(suffix))

    def fields(self, index: int, camera: str = "") -> dict[str, Any]:
        """Returns the values for the path templates of an episode (v2.0 and v2.1)."""
        return {"episode_index": index, "episode_chunk": index // self.chunk_size, "video_key": camera}

    def find(self, template: Any, standard: str, part: str, fields: Mapping[str, Any]) -> str:
        """Finds a file by its path template, or by its name if the template leads to no file.

        The file name of the `standard` template is unique among the files whose path goes through the folder `part`.
        """
        path = fill(template, standard, fields)
        if path in self:
            return path
        name = standard.format(**fields).rpartition("/")[2]
        matches = [match for match in self._by_name.get(name, ()) if part in match.split("/")[:-1]]
        if len(matches) != 1:
            return path
        self.found_by_name += 1
        return matches[0]


def fill(template: Any, standard: str, fields: Mapping[str, Any]) -> str:
    """Fills in a path template, or the standard one if that is not possible."""
    if isinstance(template, str):
        try:
            return template.format(**fields)
        except (AttributeError, LookupError, TypeError, ValueError):
            pass
    return standard.format(**fields)


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
    warnings: list[str] = []
    episodes = (_read_v3 if version == "v3.0" else _read_v2)(root, info, videos, files, warnings)
    if not episodes:
        raise ConversionError(f"{root} is a LeRobot dataset without episodes")
    tasks = _read_tasks(root, "meta/tasks.parquet" if version == "v3.0" else "meta/tasks.jsonl", files, warnings)
    return Metadata(
        root=root,
        info=info,
        fps=_fps(info),
        features=features,
        validation=_validation(root, info),
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


def _validation(root: epath.Path, info: Mapping[str, Any]) -> tuple[range, ...]:
    """Returns the ranges for validation of splits such as `{"train": "0:90", "val": "90:100"}`."""
    splits = _mapping(root, info, "splits") if info.get("splits") else {}
    ranges = []
    for name, text in splits.items():
        if name in VALIDATION_SPLITS:
            bounds = re.fullmatch(r"(\d+):(\d+)", str(text))
            if bounds is None:
                raise ConversionError(f"{root / INFO_PATH}: split {name!r} must be START:STOP, got {text!r}")
            ranges.append(range(int(bounds[1]), int(bounds[2])))
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
    listed = {}
    if path in files:
        rows = _read_json_lines(root / path)
        listed = {_integer(root / path, row, "episode_index"): row for row in rows}
        if len(listed) < len(rows):
            warnings.append(f"{path} lists some episodes twice; the last entry counts")
    matches = [_V2_TABLE_NAME.fullmatch(table.rpartition("/")[2]) for table in files.below("data", ".parquet")]
    stored = {int(match[1]) for match in matches if match}
    if unlisted := stored - listed.keys():
        warnings.append(f"{len(unlisted)} episodes have a table but are not listed in {path}")
    episodes = []
    for index in sorted(stored | listed.keys()):
        row = listed.get(index, {})
        videos = {
            key: VideoPart(files.find(info.get("video_path"), _V2_VIDEO, key, files.fields(index, key)))
            for key in cameras
        }
        table = files.find(info.get("data_path"), _V2_TABLE, "data", files.fields(index))
        episodes.append(EpisodeEntry(index, table, False, videos, _texts(row.get("tasks")), _length(row)))
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
    repeated = False
    for path in paths:
        for row in _read_parquet(root / path):
            index = _integer(root / path, row, "episode_index")
            place = {name: _integer(root / path, row, f"data/{name}") for name in ("chunk_index", "file_index")}
            videos = {key: _v3_video(root / path, info, key, row) for key in cameras}
            repeated |= index in episodes
            episodes[index] = EpisodeEntry(
                index,
                fill(info.get("data_path"), _V3_TABLE, place),
                True,
                {key: video for key, video in videos.items() if video is not None},
                _texts(row.get("tasks")),
                _length(row),
            )
    if repeated:
        warnings.append("meta/episodes lists some episodes twice; the last entry counts")
    return list(episodes.values())


def _read_tasks(root: epath.Path, path: str, files: FileIndex, warnings: list[str]) -> dict[int, str]:
    """Reads the instructions by task index; without the file there are none, and a warning is added."""
    if path not in files:
        warnings.append(f"{path} is missing")
        return {}
    tasks = {}
    for row in (_read_parquet if path.endswith(".parquet") else _read_json_lines)(root / path):
        text = next((row[column] for column in _TASK_COLUMNS if row.get(column)), "")
        tasks[_integer(root / path, row, "task_index")] = str(text)
    return tasks


def _v3_video(path: epath.Path, info: Mapping[str, Any], camera: str, row: Mapping[str, Any]) -> VideoPart | None:
    """Returns the part of a video that belongs to an episode, or None if the episode has none of this camera."""
    prefix = f"videos/{camera}/"
    if row.get(f"{prefix}file_index") is None:
        return None
    place = {name: _integer(path, row, prefix + name) for name in ("chunk_index", "file_index")}
    begin, end = (row.get(f"{prefix}{name}_timestamp") for name in ("from", "to"))
    # Missing times cost only this episode, when it is read.
    seconds = (
        float(begin) if isinstance(begin, int | float) else math.nan,
        float(end) if isinstance(end, int | float) else math.nan,
    )
    return VideoPart(fill(info.get("video_path"), _V3_VIDEO, {**place, "video_key": camera}), seconds)


def _read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    rows = []
    try:
        # Only line feeds end a line of JSON; texts may contain other line separators.
        check_file(path)
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ConversionError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ConversionError(f"{path}, line {number}: expected a JSON object")
        rows.append(row)
    return rows


def _read_parquet(path: epath.Path) -> list[dict[str, Any]]:
    """Reads the rows of a small table, without the columns of statistics."""
    try:
        check_file(path)
        with path.open("rb") as file:
            table = pq.ParquetFile(file)
            columns = [name for name in table.schema_arrow.names if not name.startswith("stats/")]
            return table.read(columns, use_threads=False).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConversionError(f"{path} cannot be read: {one_line(error)}") from error


def _integer(path: epath.Path, row: Mapping[str, Any], key: str) -> int:
    value = whole(row.get(key))
    if value is None or value < 0:
        raise ConversionError(f"{path}: {key} must be a whole number in every row, got {row.get(key)!r}")
    return value


def _length(row: Mapping[str, Any]) -> int | None:
    length = whole(row.get("length"))
    return None if length is None or not 0 <= length <= _MAX_LENGTH else length


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def parse_json(text: str) -> Any:
    """Parses a JSON text.

    Raises:
      ValueError: the text is not JSON, is nested too deeply, or contains surrogates, which are not characters.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # Surrogates, such as "\\ud800", cannot be written as UTF-8.
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def whole(value: Any) -> int | None:
    """Returns a whole number, even if it is stored as a float; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def finite_float(value: Any) -> float | None:
    """Returns a number in the range of float32; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value == 0 or _TINY <= abs(value) <= _HUGE else None
