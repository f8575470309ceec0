"""Lists of episodes and tasks, in the two forms that LeRobot has had."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.convert.lerobot.files import FileIndex, fill
from como_jax.convert.lerobot.values import parse_json, whole
from como_jax.convert.listing import check_file
from como_jax.errors import ConversionError

_V2_TABLE = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
_V2_TABLE_NAME = re.compile(r"episode_(\d+)\.parquet")
_V3_TABLE = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_DEFAULT_CHUNK_SIZE = 1000
# Lengths only serve to size shards and to warn.
_MAX_LENGTH = 2**40
# Pandas names the index of a frame so when it has no name of its own.
_TASK_COLUMNS = ("task", "__index_level_0__")


@dataclasses.dataclass(frozen=True)
class VideoPart:
    """Where the frames of one camera in one episode lie.

    Attributes:
      path: the file, relative to the dataset.
      seconds: begin and end of the episode within the file, or None when the file holds nothing else.
    """

    path: str
    seconds: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class EpisodeEntry:
    """One episode as the metadata list it.

    Attributes:
      index: its number.
      table: the file with its rows, relative to the dataset.
      shares_table: whether the file holds other episodes too.
      videos: by camera key.
      tasks: all instructions that occur in it.
      length: number of rows, or None when the metadata do not say.
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


def read_v2(
    root: epath.Path, info: Mapping[str, Any], cameras: Sequence[str], files: FileIndex, warnings: list[str]
) -> list[EpisodeEntry]:
    """The episodes of v2.0 and v2.1: all that are listed, and all that have a table."""
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
    chunk_size = whole(info.get("chunks_size"))
    if chunk_size is None or chunk_size < 1:
        chunk_size = _DEFAULT_CHUNK_SIZE
    episodes = []
    for index in sorted(stored | listed.keys()):
        row = listed.get(index, {})
        fields = {"episode_index": index, "episode_chunk": index // chunk_size}
        videos = {
            key: VideoPart(files.find(info.get("video_path"), _V2_VIDEO, key, {**fields, "video_key": key}))
            for key in cameras
        }
        table = files.find(info.get("data_path"), _V2_TABLE, "data", fields)
        episodes.append(EpisodeEntry(index, table, False, videos, _texts(row.get("tasks")), _length(row)))
    if files.found_by_name:
        warnings.append(
            f"{files.found_by_name} files do not lie where the path templates of info.json say; "
            "they were found by their names"
        )
    return episodes


def read_v3(
    root: epath.Path, info: Mapping[str, Any], cameras: Sequence[str], files: FileIndex, warnings: list[str]
) -> list[EpisodeEntry]:
    """The episodes of v3.0, from the tables in `meta/episodes`."""
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


def read_v2_tasks(root: epath.Path, files: FileIndex, warnings: list[str]) -> dict[int, str]:
    """Instruction by task index; empty, with a warning, without the file."""
    path = "meta/tasks.jsonl"
    if path not in files:
        warnings.append(f"{path} is missing")
        return {}
    rows = _read_json_lines(root / path)
    return {_integer(root / path, row, "task_index"): str(row.get("task") or "") for row in rows}


def read_v3_tasks(root: epath.Path, files: FileIndex, warnings: list[str]) -> dict[int, str]:
    """Instruction by task index; empty, with a warning, without the file."""
    path = "meta/tasks.parquet"
    if path not in files:
        warnings.append(f"{path} is missing")
        return {}
    tasks = {}
    for row in _read_parquet(root / path):
        text = next((row[column] for column in _TASK_COLUMNS if row.get(column)), "")
        tasks[_integer(root / path, row, "task_index")] = str(text)
    return tasks


def _v3_video(path: epath.Path, info: Mapping[str, Any], camera: str, row: Mapping[str, Any]) -> VideoPart | None:
    """The part of a video that belongs to an episode, or None when the episode has none of this camera."""
    prefix = f"videos/{camera}/"
    if row.get(f"{prefix}file_index") is None:
        return None
    place = {name: _integer(path, row, prefix + name) for name in ("chunk_index", "file_index")}
    begin, end = (row.get(f"{prefix}{name}_timestamp") for name in ("from", "to"))
    # Times that are missing cost this episode alone, when it is read.
    seconds = (
        float(begin) if isinstance(begin, int | float) else math.nan,
        float(end) if isinstance(end, int | float) else math.nan,
    )
    return VideoPart(fill(info.get("video_path"), _V3_VIDEO, {**place, "video_key": camera}), seconds)


def _read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    rows = []
    try:
        # Only line feeds end a line of JSON; texts may hold other separators.
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
    """The rows of a small table, without the statistics that may lie in it."""
    try:
        check_file(path)
        with path.open("rb") as file:
            table = pq.ParquetFile(file)
            columns = [name for name in table.schema_arrow.names if not name.startswith("stats/")]
            return table.read(columns).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        # Arrow's messages have several lines.
        raise ConversionError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


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
