"""Damaged, odd and hostile LeRobot datasets: all end in the report or in one clear error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from lerobot_files import (
    LENGTHS,
    TOP,
    V3_VIDEO,
    WRIST,
    WRITERS,
    brightness,
    edit_info,
    episode_list,
    rows,
    v2_paths,
    write_episode_list,
    write_json_lines,
    write_table,
    write_v2,
    write_v3,
    write_video,
)

from como_jax.convert.lerobot.builder import LeRobot, LeRobotSettings
from como_jax.convert.lerobot.metadata import read_metadata
from como_jax.errors import ConversionError


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return LeRobot(out, LeRobotSettings(source=str(source), validation_fraction=0.0, **settings)).convert()


def left_out(report: dict[str, Any]) -> dict[str, str]:
    return {entry["source"]: entry["reasons"][0] for entry in report["left_out"]}


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: round(share * len(content))])


def overwrite(path: Path, share: float) -> None:
    """Writes zeros over the tenth of a file that begins at a share of it."""
    content = bytearray(path.read_bytes())
    start = round(share * len(content))
    content[start : start + len(content) // 10] = bytes(len(content) // 10)
    path.write_bytes(content)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["table", "video"])
def test_truncated_files_cost_their_episodes(tmp_path, check_dataset, version, share, kind):
    source = WRITERS[version](tmp_path / "data")
    pattern = "data/**/*.parquet" if kind == "table" else "videos/**/*.mp4"
    truncate(sorted(source.glob(pattern))[0], share)
    report = convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert set(left_out(report)) == {"episode_000001"} | ({"episode_000002"} if version == "v3.0" else set())


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.6, 0.85])
def test_tables_with_zeros_in_them_cost_at_most_their_episodes(tmp_path, check_dataset, version, share):
    source = WRITERS[version](tmp_path / "data")
    overwrite(sorted(source.glob("data/**/*.parquet"))[0], share)
    report = convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert report["sources"]["found"] == 3
    assert "episode_000006" not in left_out(report)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"action": [["a", "b"]] * 5}, "could not convert string to float"),
        ({"action": [{"x": 1.0}] * 5}, "not every row of action holds numbers"),
        ({"action": [[]] * 5}, "not every action has 2 numbers"),
        ({"action": [[np.inf, 0.0]] * 5}, "some action is not finite"),
        ({"action": [[1e300, 0.0]] * 5}, "some action is not finite"),
        ({"observation.state": [[0.0, 1.0, np.nan]] * 5}, "some state is not finite"),
        ({"observation.state": [None] * 5}, "not every state has 3 numbers"),
        ({"action": pa.array([1] * 5, pa.date32())}, "not every row of action holds numbers"),
        ({"action": pa.array([b"\xff"] * 5).view(pa.string())}, "'utf-8'"),
    ],
)
def test_values_that_are_no_finite_numbers_cost_their_episode(tmp_path, check_dataset, changes, reason):
    source = write_v2(tmp_path / "data")
    write_table(v2_paths(source, 1)[0], rows(1, 5) | changes)
    report = convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert set(left_out(report)) == {"episode_000001"}
    assert reason in left_out(report)["episode_000001"]


def test_a_column_that_is_there_twice_costs_its_episode(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    table = pa.table(rows(1, 5))
    pq.write_table(table.append_column("action", table["action"]), v2_paths(source, 1)[0])
    report = convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert left_out(report) == {"episode_000001": "the table has 2 columns 'action'"}


@pytest.mark.parametrize("type_", [pa.string(), pa.float64(), pa.list_(pa.int64())])
def test_episode_numbers_of_another_type_cost_their_file(tmp_path, type_):
    source = write_v3(tmp_path / "data")
    path = sorted(source.glob("data/**/*.parquet"))[0]
    columns = pq.ParquetFile(path).read().to_pydict()
    numbers = columns["episode_index"]
    values = [[number] for number in numbers] if pa.types.is_list(type_) else list(map(str, numbers))
    columns["episode_index"] = pa.array(map(float, numbers) if type_ == pa.float64() else values, type_)
    write_table(path, columns)
    report = convert(source, tmp_path / "out")
    expected = set() if type_ == pa.float64() else {"episode_000001", "episode_000002"}
    assert set(left_out(report)) == expected


def test_a_pipe_or_a_link_that_leads_nowhere_costs_its_episode(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    for index, path in zip(LENGTHS, [v2_paths(source, 1)[0], v2_paths(source, 2)[1]], strict=False):
        path.unlink()
        os.mkfifo(path) if index == 1 else path.symlink_to("gone.mp4")
    report = convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert set(left_out(report)) == {"episode_000001", "episode_000002"}
    assert all("is not a file, or is a link without a target" in reason for reason in left_out(report).values())


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_camera_whose_file_is_missing_costs_its_episodes(tmp_path, check_dataset, version):
    source = WRITERS[version](tmp_path / "data", cameras=(TOP, WRIST))
    path = sorted(source.glob(f"videos/**/{WRIST}/**/*.mp4"))[0]
    path.unlink()
    report = convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert left_out(report) == {"episode_000001": f"{path.relative_to(source)} is missing"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b'{"codebase_version": "v2.1"}'],
    ids=["empty", "half", "list", "null", "text", "bytes", "deep", "little"],
)
def test_info_that_cannot_be_used(tmp_path, content):
    source = write_v2(tmp_path / "data")
    (source / "meta" / "info.json").write_bytes(content)
    with pytest.raises(ConversionError, match=r"meta/info.json"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_in_the_metadata(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    for name in ("info.json", "tasks.jsonl", "episodes.jsonl"):
        path = source / "meta" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert convert(source, tmp_path / "out")["warnings"] == []
    assert len(check_dataset(tmp_path / "out")["train"]) == 3


@pytest.mark.parametrize(
    "fps", [0, -5, "30", [], True, pytest.param(10**400, id="huge"), float("nan"), float("inf"), 1e-320]
)
def test_rates_that_are_none(tmp_path, check_dataset, fps):
    source = write_v2(tmp_path / "data")
    edit_info(source, fps=fps)
    with pytest.raises(ConversionError, match=r"info.json gives no .*fps.*; set `control_rate`"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", control_rate=4.0)
    assert {row["control_rate"] for row in check_dataset(tmp_path / "out")["train"]} == {4.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"chunks_size": 0},
        {"chunks_size": "many"},
        {"data_path": 5, "video_path": []},
        {"data_path": "{episode_index.__class__}", "video_path": "{}{}{}"},
        {"data_path": "../../{episode_index}", "video_path": "/etc/passwd"},
        {"data_path": "{episode_index:q}", "video_path": "{"},
        {"splits": None},
        {"total_episodes": "none"},
    ],
)
def test_entries_of_info_that_nothing_depends_on(tmp_path, check_dataset, changes):
    source = write_v2(tmp_path / "data")
    edit_info(source, **changes)
    convert(source, tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": {"dtype": "float32", "shape": [-2]}}, "shape of 'action' must be a list of positive whole numbers"),
        ({"action": {"dtype": "float32", "shape": [0]}}, "shape of 'action' must be a list of positive whole numbers"),
        ({"action": {"dtype": "float32", "shape": "2"}}, "shape of 'action' must be a list of positive whole numbers"),
        ({"action": {"dtype": "float32", "shape": [3]}}, "not every action has 3 numbers"),
        ({"action": {"dtype": "float32", "shape": [2**62, 2**62]}}, "not every action has"),
        ({TOP: {"dtype": 7}}, "has no camera to convert"),
        ({TOP: "video"}, "has no camera to convert"),
    ],
)
def test_features_that_cannot_be(tmp_path, changes, message):
    source = write_v2(tmp_path / "data")
    features = json.loads((source / "meta" / "info.json").read_text())["features"]
    edit_info(source, features=features | changes)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["{", "f4,f4", "1,", "object", "float7", "", None, [], "datetime64[ns]", "str"])
def test_features_of_types_that_are_no_numbers_are_not_taken(tmp_path, check_dataset, dtype):
    source = write_v2(tmp_path / "data")
    features = json.loads((source / "meta" / "info.json").read_text())["features"]
    edit_info(source, features=features | {"action": {"dtype": dtype, "shape": [2]}})
    report = convert(source, tmp_path / "out")
    assert check_dataset(tmp_path / "out")["train"][0]["action"] is None
    assert [warning["message"] for warning in report["warnings"]] == ["no action was converted"]


def test_cameras_whose_names_would_be_mixed_up(tmp_path, check_dataset):
    names = ["observation.images.a-b", "observation.images.a.b", "observation.images.state"]
    source = write_v2(tmp_path / "data", cameras=names)
    convert(source, tmp_path / "out")
    row = check_dataset(tmp_path / "out")["train"][0]
    assert np.shape(row["state"]) == (5, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tasks.jsonl", b'{"task_index": 0, "task": "caf\xe9"}', "line 1 ('utf-8'"),
        ("tasks.jsonl", b'{"task_index": 0, "task": "\\ud800"}', "line 1 ('utf-8'"),
        ("tasks.jsonl", b'{"task_index": "0", "task": "a"}', "line 1 (task_index must be a whole number, got '0')"),
        ("tasks.jsonl", b'{"task_index": 0.5, "task": "a"}', "line 1 (task_index must be a whole number, got 0.5)"),
        ("tasks.jsonl", b'{"task_index": 0, "task": 7}', "line 1 (task must be a text, got 7)"),
        ("episodes.jsonl", b'{"episode_index": 1, "tasks": ["push"]', "line 1 (Expecting"),
        ("episodes.jsonl", b'{"episode_index": -1}', "line 1 (episode_index must be a whole number, got -1)"),
        ("episodes.jsonl", b'{"episode_index": true}', "line 1 (episode_index must be a whole number, got True)"),
        ("episodes.jsonl", b'{"episode_index": NaN}', "line 1 (episode_index must be a whole number, got nan)"),
        ("episodes.jsonl", b'"episode"', "line 1 (expected a JSON object)"),
        ("episodes.jsonl", b"[" * 100_000, "line 1 (nested too deeply)"),
        ("episodes.jsonl", b'\n\n{"episode_index": 1} x', "line 3 (Extra data"),
    ],
)
def test_damaged_lines_of_lists_are_left_out_and_named(tmp_path, name, content, message):
    source = write_v2(tmp_path / "data")
    path = source / "meta" / name
    path.write_bytes(content + b"\n" + path.read_bytes())
    report = convert(source, tmp_path / "out")
    assert report["left_out"] == []
    (warning,) = (warning["message"] for warning in report["warnings"])
    assert warning.startswith(f"meta/{name}: damaged entries were left out: {message}")


def test_many_damaged_lines_are_counted(tmp_path):
    source = write_v2(tmp_path / "data")
    (source / "meta" / "episodes.jsonl").write_bytes(b"{\n" * 50)
    (warning,) = read_metadata(source).warnings[:1]
    assert "line 20 (" in warning and "line 21" not in warning and warning.endswith("and 30 more")


def test_lists_with_odd_entries(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    entries = [
        {"episode_index": 1, "tasks": "push", "length": "five"},
        {"episode_index": 2, "tasks": [None, 3], "length": -7},
        {"episode_index": 6, "tasks": {}, "length": 10**30},
        {"episode_index": 10**20, "tasks": [], "length": 3},
    ]
    write_json_lines(source / "meta" / "episodes.jsonl", entries)
    report = convert(source, tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == 3
    assert [reason.endswith("is missing") for reason in left_out(report).values()] == [True]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(40) + b"PAR1", b"\xff" * 200])
def test_v3_lists_of_episodes_that_are_no_tables(tmp_path, content):
    source = write_v3(tmp_path / "data")
    name = "episodes/chunk-000/file-000.parquet"
    (source / "meta" / name).write_bytes(content)
    with pytest.raises(ConversionError, match=f"{name} cannot be read"):
        read_metadata(source)
    write_table(source / "meta/episodes/chunk-000/file-001.parquet", {"episode_index": [7]})
    metadata = read_metadata(source)
    assert [entry.index for entry in metadata.episodes] == [7]
    assert f"meta/{name} cannot be read" in metadata.warnings[0]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff" * 200])
def test_v3_tasks_that_are_no_table_come_from_the_episodes(tmp_path, check_dataset, content):
    source = write_v3(tmp_path / "data")
    (source / "meta" / "tasks.parquet").write_bytes(content)
    report = convert(source, tmp_path / "out")
    assert [row["language_instruction"] for row in check_dataset(tmp_path / "out")["train"]] == ["pull", "push", "push"]
    assert "meta/tasks.parquet cannot be read" in report["warnings"][0]["message"]


def test_a_v3_task_that_is_not_utf8(tmp_path):
    source = write_v3(tmp_path / "data")
    text = pa.array([b"caf\xe9", b"pull"]).view(pa.string())
    write_table(source / "meta" / "tasks.parquet", {"task_index": [0, 1], "task": text})
    metadata = read_metadata(source)
    assert metadata.tasks[1] == "pull"
    assert metadata.warnings[0].startswith("meta/tasks.parquet: damaged entries were left out: row 0 (task: 'utf-8'")


def test_a_damaged_part_of_a_v3_list_costs_its_episodes(tmp_path):
    source = write_v3(tmp_path / "data")
    path = source / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.ParquetFile(path).read()
    pq.write_table(table, path, row_group_size=1)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    content[first : first + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    metadata = read_metadata(source)
    assert [entry.index for entry in metadata.episodes] == [1, 6]
    assert "damaged entries were left out: rows 1 to 1 (" in metadata.warnings[0]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("from_timestamp", 1e300, "from 1e\\+300 to 0.5 seconds"),
        ("to_timestamp", 1e300, "from 0.0 to 1e\\+300 seconds"),
        ("to_timestamp", 1e6, "has more frames"),
        ("from_timestamp", 1e6, "from 1000000.0 to 0.5 seconds"),
        ("to_timestamp", "0.5", "to nan seconds"),
        ("chunk_index", -1, "is missing|whole number"),
    ],
)
def test_v3_places_that_do_not_exist(tmp_path, check_dataset, key, value, reason):
    source = write_v3(tmp_path / "data")
    entries = episode_list(source)
    for entry in entries[:1] if not isinstance(value, str) else entries:
        entry[f"videos/{TOP}/{key}"] = value
    write_episode_list(source, entries)
    with pytest.raises(ConversionError, match=reason):
        report = convert(source, tmp_path / "out")
        check_dataset(tmp_path / "out")
        raise ConversionError(left_out(report)["episode_000001"])


def test_v3_whole_numbers_that_pandas_made_floats(tmp_path, check_dataset):
    source = write_v3(tmp_path / "data")
    entries = [
        {key: float(value) if isinstance(value, int) else value for key, value in entry.items()}
        for entry in episode_list(source)
    ]
    write_episode_list(source, entries)
    convert(source, tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == 3


def test_frames_of_videos_and_rows_of_tables_that_differ(tmp_path, check_dataset):
    source = write_v3(tmp_path / "data")
    write_video(source / V3_VIDEO.format(video_key=TOP, chunk_index=0, file_index=1), [50, 60, 70])
    report = convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert left_out(report) == {"episode_000006": "the table has 4 rows, but camera 'top' has only 3 frames"}


def test_v3_cameras_whose_episodes_share_files_in_other_ways(tmp_path, check_dataset):
    source = write_v3(tmp_path / "data", cameras=(TOP, WRIST))
    convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    videos = sorted(path.relative_to(source / "videos").as_posix() for path in source.glob("videos/**/*.mp4"))
    assert [video.partition("/")[2] for video in videos] == [
        "chunk-000/file-000.mp4",
        "chunk-000/file-001.mp4",
        "chunk-000/file-000.mp4",
        "chunk-001/file-000.mp4",
    ]
    for record in tfds.builder_from_directory(tmp_path / "out").as_data_source("train"):
        step, index = record["action"]
        for camera in ("top", "wrist"):
            assert abs(record["observation"][camera].mean() - brightness(int(index), int(step))) < 2
