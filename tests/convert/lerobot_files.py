"""Writes small LeRobot datasets of all format versions, after the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS = 10
TOP, WRIST = "observation.images.top", "observation.images.wrist"
V2_TABLE = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_TABLE = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
TASKS = {0: "push", 1: "pull"}
# A gap in the numbers, a second chunk of the size 4, and different lengths.
LENGTHS = {1: 5, 2: 7, 6: 4}


def brightness(index: int, step: int) -> int:
    """Grey value of a frame, which tells the episode and the step."""
    return 20 + 30 * index + 4 * step


def write_video(path: Path, values: Sequence[int], rate: Fraction = Fraction(FPS)) -> None:
    """An H.264 video of plain grey frames, with B-frames and few key frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        stream.options = {"crf": "4", "bf": "3", "g": "9", "b_strategy": "0", "sc_threshold": "0"}
        for value in values:
            image = np.full((24, 32, 3), value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def rows(index: int, length: int) -> dict[str, list[Any]]:
    """The columns of one episode."""
    return {
        "action": [[float(step), float(index)] for step in range(length)],
        "observation.state": [[step / 2, 1.0, 2.0] for step in range(length)],
        "gripper": [float(-step) for step in range(length)],
        "note": ["as usual"] * length,
        "timestamp": [step / FPS for step in range(length)],
        "frame_index": list(range(length)),
        "episode_index": [index] * length,
        "task_index": [index % 2] * length,
    }


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_info(root: Path, version: str, cameras: Sequence[str], **changes: Any) -> None:
    table, video = (V3_TABLE, V3_VIDEO) if version == "v3.0" else (V2_TABLE, V2_VIDEO)
    features: dict[str, Any] = {key: {"dtype": "video", "shape": [24, 32, 3]} for key in cameras}
    for key, size in (("action", 2), ("observation.state", 3), ("gripper", 1), ("timestamp", 1)):
        features[key] = {"dtype": "float32", "shape": [size], "names": None}
    for key in ("frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    for key in ("frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    features["note"] = {"dtype": "string", "shape": [1], "names": None}
    info = {
        "codebase_version": version,
        "robot_type": None,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS.values()),
        "total_tasks": len(TASKS),
        "fps": FPS,
        "chunks_size": 4,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": table,
        "video_path": video,
        "features": features,
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps(info | changes))


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_json_lines(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def v2_paths(root: Path, index: int, camera: str = TOP) -> tuple[Path, Path]:
    """Table and video of an episode."""
    fields = {"episode_chunk": index // 4, "episode_index": index, "video_key": camera}
    return root / V2_TABLE.format(**fields), root / V2_VIDEO.format(**fields)


def write_v2(root: Path, version: str = "v2.1", cameras: Sequence[str] = (TOP,)) -> Path:
    write_info(root, version, cameras)
    for index, length in LENGTHS.items():
        write_table(v2_paths(root, index)[0], rows(index, length))
        for camera in cameras:
            write_video(v2_paths(root, index, camera)[1], [brightness(index, step) for step in range(length)])
    listed = [{"episode_index": i, "tasks": [TASKS[i % 2], "valid"], "length": n} for i, n in LENGTHS.items()]
    write_json_lines(root / "meta" / "episodes.jsonl", listed)
    write_json_lines(root / "meta" / "tasks.jsonl", [{"task_index": i, "task": task} for i, task in TASKS.items()])
    return root


def write_v3(root: Path, cameras: Sequence[str] = (TOP,), numbers: Sequence[int] = tuple(LENGTHS)) -> Path:
    """The first two episodes share a table and the videos of all cameras but the last of several, where the last do."""
    write_info(root, "v3.0", cameras)
    lengths = dict(zip(numbers, LENGTHS.values(), strict=True))
    tables = dict(zip(numbers, [(0, 0), (0, 0), (0, 1)], strict=True))
    others = dict(zip(numbers, [(0, 0), (1, 0), (1, 0)], strict=True))
    places = dict.fromkeys(cameras, tables) | dict.fromkeys(cameras[1:], others)
    entries = []
    first_row = 0
    for index, length in lengths.items():
        entry = {"episode_index": index, "tasks": [TASKS[index % 2]], "length": length}
        entry |= {"dataset_from_index": first_row, "dataset_to_index": first_row + length}
        entry |= {"data/chunk_index": tables[index][0], "data/file_index": tables[index][1]}
        for camera, place in places.items():
            before = sum(lengths[other] for other in lengths if other < index and place[other] == place[index])
            times = {"from_timestamp": before / FPS, "to_timestamp": (before + length) / FPS}
            values = {"chunk_index": place[index][0], "file_index": place[index][1]} | times
            entry |= {f"videos/{camera}/{name}": value for name, value in values.items()}
        entry |= {"stats/action/max": [1.0, 2.0], "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        entries.append(entry)
        first_row += length
    for place in dict.fromkeys(tables.values()):
        _write_v3_table(root, place, [entry for entry in entries if tables[entry["episode_index"]] == place])
    for camera, place in places.items():
        for file in dict.fromkeys(place.values()):
            members = [index for index in lengths if place[index] == file]
            values = [brightness(index, step) for index in members for step in range(lengths[index])]
            write_video(root / V3_VIDEO.format(video_key=camera, chunk_index=file[0], file_index=file[1]), values)
    write_episode_list(root, entries)
    # Pandas would write the texts as the index of the table, which is its last column.
    write_table(root / "meta" / "tasks.parquet", {"task_index": list(TASKS), "task": list(TASKS.values())})
    return root


def _write_v3_table(root: Path, place: tuple[int, int], entries: Sequence[dict[str, Any]]) -> None:
    """One table of several episodes, with a row group for each, as a writer leaves it that adds one after the other."""
    path = root / V3_TABLE.format(chunk_index=place[0], file_index=place[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for entry in entries:
        numbers = list(range(entry["dataset_from_index"], entry["dataset_to_index"]))
        columns = rows(entry["episode_index"], entry["length"])
        parts.append(pa.table(columns | {"frame_index": list(range(entry["length"])), "index": numbers}))
    with pq.ParquetWriter(path, parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)


def write_episode_list(root: Path, entries: Sequence[dict[str, Any]]) -> None:
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(entries)), path)


def episode_list(root: Path) -> list[dict[str, Any]]:
    return pq.ParquetFile(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet").read().to_pylist()


WRITERS: dict[str, Callable[..., Path]] = {
    "v2.0": lambda root, **options: write_v2(root, "v2.0", **options),
    "v2.1": write_v2,
    "v3.0": write_v3,
}
