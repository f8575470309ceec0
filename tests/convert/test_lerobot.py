"""LeRobot datasets: all format versions, choice of features, damage, and the faults of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from lerobot_files import (
    LENGTHS,
    TOP,
    V3_TABLE,
    V3_VIDEO,
    WRIST,
    WRITERS,
    brightness,
    edit_info,
    episode_list,
    rows,
    v2_paths,
    write_episode_list,
    write_info,
    write_json_lines,
    write_table,
    write_v2,
    write_v3,
    write_video,
)

from como_jax.convert.lerobot.builder import (
    NO_TASK,
    OTHER_LENGTH,
    OTHER_TASK,
    SEVERAL_TASKS,
    UNKNOWN_TASK,
    LeRobot,
    LeRobotSettings,
)
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConversionError


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return LeRobot(out, LeRobotSettings(source=str(source), **({"validation_fraction": 0.0} | settings))).convert()


def messages(report: dict[str, Any]) -> list[str]:
    return [warning["message"] for warning in report["warnings"]]


def left_out(report: dict[str, Any]) -> dict[str, list[str]]:
    return {entry["source"]: entry["reasons"] for entry in report["left_out"]}


def check_images(directory: Path, camera: str = "top") -> None:
    """Every image is the one that belongs to the action of its step."""
    for record in tfds.builder_from_directory(directory).as_data_source("train"):
        step, index = record["action"]
        assert abs(record["observation"][camera].mean() - brightness(int(index), int(step))) < 2


@pytest.mark.parametrize("version", list(WRITERS))
def test_every_format_gives_the_same_episodes(tmp_path, check_dataset, version):
    report = convert(WRITERS[version](tmp_path / "data"), tmp_path / "out")
    table = check_dataset(tmp_path / "out")["train"]
    check_images(tmp_path / "out")
    assert [row["episode_id"] for row in table] == ["episode_000001", "episode_000002", "episode_000006"]
    assert [row["language_instruction"] for row in table] == ["pull", "push", "push"]
    assert [row["num_steps"] for row in table] == list(LENGTHS.values())
    assert {row["control_rate"] for row in table} == {10.0}
    np.testing.assert_array_equal(table[1]["state"], rows(2, 7)["observation.state"])
    assert messages(report) == []


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_features_and_control_rate_are_those_that_were_asked_for(tmp_path, check_dataset, version):
    source = WRITERS[version](tmp_path / "data", cameras=(TOP, WRIST))
    chosen = {"camera": ("wrist", TOP), "action": ("action", "gripper"), "state": ()}
    report = convert(source, tmp_path / "out", control_rate=5.0, **chosen)
    row = check_dataset(tmp_path / "out")["train"][0]
    assert tfds.builder_from_directory(tmp_path / "out").info.metadata["cameras"] == ["wrist", "top"]
    assert row["action"][3] == [3.0, 1.0, -3.0]
    assert row["state"] is None
    assert row["control_rate"] == 5.0
    assert messages(report) == ["no state was converted"]


def test_all_cameras_are_converted_and_the_main_one_is_named(tmp_path, check_dataset):
    report = convert(write_v2(tmp_path / "data", cameras=(TOP, WRIST)), tmp_path / "out")
    check_dataset(tmp_path / "out")
    check_images(tmp_path / "out", "wrist")
    assert messages(report) == ["the main camera is 'top', the first of several; `camera` chooses another"]


def test_rows_are_put_in_order_of_time(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    columns = {key: values[::-1] for key, values in rows(2, 7).items()}
    write_table(v2_paths(source, 2)[0], columns)
    convert(source, tmp_path / "out")
    assert check_dataset(tmp_path / "out")["train"][1]["action"] == rows(2, 7)["action"]
    check_images(tmp_path / "out")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_images_in_the_table(tmp_path, check_dataset, version):
    source = WRITERS[version](tmp_path / "data", cameras=())
    info = json.loads((source / "meta" / "info.json").read_text())
    edit_info(source, features=info["features"] | {"image": {"dtype": "image", "shape": [24, 32, 3]}})
    for path in sorted(source.glob("data/**/*.parquet")):
        columns = pq.ParquetFile(path).read().to_pydict()
        actions = columns["action"]
        images = [np.full((24, 32, 3), brightness(int(index), int(step)), np.uint8) for step, index in actions]
        images = [cv2.imencode(".png", image)[1].tobytes() for image in images]
        write_table(path, columns | {"image": [{"bytes": png, "path": "frame.png"} for png in images]})
    convert(source, tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == 3
    check_images(tmp_path / "out", "image")


def test_images_that_are_not_in_the_table_cost_their_episode(tmp_path):
    source = write_v2(tmp_path / "data", cameras=())
    info = json.loads((source / "meta" / "info.json").read_text())
    edit_info(source, features=info["features"] | {"image": {"dtype": "image", "shape": [24, 32, 3]}})
    for index, length in LENGTHS.items():
        image = {"bytes": simplejpeg.encode_jpeg(np.zeros((24, 32, 3), np.uint8)), "path": None}
        if index == 2:
            image = {"bytes": None, "path": "images/frame.png"}
        write_table(v2_paths(source, index)[0], rows(index, length) | {"image": [image] * length})
    report = convert(source, tmp_path / "out")
    assert left_out(report) == {"episode_000002": ["the image of row 0 is not in the table"]}


def test_the_split_is_drawn_by_episode_or_taken_from_info(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    convert(source, tmp_path / "drawn", validation_fraction=0.4)
    tables = check_dataset(tmp_path / "drawn")
    assert (len(tables["train"]), len(tables["val"])) == (2, 1)
    edit_info(source, splits={"train": "0:2", "val": "2:3"})
    convert(source, tmp_path / "given", validation_fraction=0.4)
    tables = check_dataset(tmp_path / "given")
    assert [row["episode_id"] for row in tables["val"]] == ["episode_000006"]


def test_cameras_without_files_are_left_out_and_named(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    features = json.loads((source / "meta" / "info.json").read_text())["features"]
    depth = {"dtype": "video", "shape": [24, 32, 3], "info": {"video.is_depth_map": True}}
    edit_info(source, features={WRIST: features[TOP], "observation.images.depth": depth} | features)
    report = convert(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert messages(report) == [
        f"camera '{WRIST}' was left out: it has no files",
        "camera 'observation.images.depth' was left out: its images are depth maps",
    ]
    for path in source.glob("videos/**/*.mp4"):
        path.unlink()
    with pytest.raises(ConversionError, match=rf"has no camera to convert: {WRIST} \(it has no files\), .*{TOP}"):
        convert(source, tmp_path / "other")


def test_v3_cameras_without_files(tmp_path):
    source = write_v3(tmp_path / "data", cameras=(TOP, WRIST))
    for path in source.glob(f"videos/{WRIST}/**/*.mp4"):
        path.unlink()
    report = convert(source, tmp_path / "out")
    assert messages(report) == [f"camera '{WRIST}' was left out: it has no files"]


def test_damage_costs_only_its_episode(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    listed = [json.loads(line) for line in (source / "meta" / "episodes.jsonl").read_text().splitlines()]
    for index in range(10, 18):
        write_table(v2_paths(source, index)[0], rows(index, 6))
        write_video(v2_paths(source, index)[1], [100] * 6)
        listed.append({"episode_index": index, "tasks": [], "length": 6})
    write_json_lines(source / "meta" / "episodes.jsonl", listed)
    write_video(v2_paths(source, 10)[1], [100] * 5)
    write_video(v2_paths(source, 11)[1], [100] * 20)
    write_table(v2_paths(source, 12)[0], rows(12, 6) | {"action": [[0.0, np.nan]] * 6})
    v2_paths(source, 13)[0].unlink()
    v2_paths(source, 14)[1].unlink()
    video = v2_paths(source, 15)[1]
    video.write_bytes(video.read_bytes()[:200])
    write_table(v2_paths(source, 16)[0], rows(16, 6) | {"action": [[0.0, None]] * 3 + [[0.0]] * 3})
    write_table(v2_paths(source, 17)[0], {key: value for key, value in rows(17, 6).items() if key != "action"})
    report = convert(source, tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == len(LENGTHS)
    reasons = left_out(report)
    assert "Invalid data" in reasons.pop("episode_000015")[0]
    assert reasons == {
        "episode_000010": ["the table has 6 rows, but camera 'top' has only 5 frames"],
        "episode_000011": ["the table has 6 rows, but camera 'top' has more frames"],
        "episode_000012": ["episode episode_000012: some action is not finite"],
        "episode_000013": ["data/chunk-003/episode_000013.parquet is missing"],
        "episode_000014": [f"videos/chunk-003/{TOP}/episode_000014.mp4 is missing"],
        "episode_000016": ["episode episode_000016: not every action has 2 numbers"],
        "episode_000017": ["the table has no column 'action'"],
    }


def test_v3_damage_costs_only_the_episodes_that_it_hits(tmp_path, check_dataset):
    source = write_v3(tmp_path / "data")
    entries = episode_list(source)
    for index, changes in {20: {"to": 0.8}, 21: {"from": None}, 22: {"from": np.inf}}.items():
        times = {f"videos/{TOP}/{name}_timestamp": time for name, time in changes.items()}
        entries.append(entries[0] | {"episode_index": index} | times)
        table = source / V3_TABLE.format(chunk_index=0, file_index=0)
        columns = pq.ParquetFile(table).read().to_pydict()
        write_table(table, {key: columns[key] + column for key, column in rows(index, 5).items()})
    entries += [entries[0] | {"episode_index": 23, "length": 9}, entries[1]]
    write_episode_list(source, entries)
    (source / V3_VIDEO.format(video_key=TOP, chunk_index=0, file_index=1)).unlink()
    report = convert(source, tmp_path / "out")
    assert [row["num_steps"] for row in check_dataset(tmp_path / "out")["train"]] == [5, 7]
    check_images(tmp_path / "out")
    assert left_out(report) == {
        "episode_000006": [f"videos/{TOP}/chunk-000/file-001.mp4 is missing"],
        "episode_000020": ["the table has 5 rows, but camera 'top' has more frames"],
        "episode_000021": ["the metadata say that it runs from nan to 0.5 seconds of its video"],
        "episode_000022": ["the metadata say that it runs from inf to 0.5 seconds of its video"],
        "episode_000023": ["the table has no rows of this episode"],
    }
    assert messages(report) == [
        "meta/episodes lists some episodes twice; the last entry counts",
        "meta/info.json counts wrongly: total_episodes is 3, and there are 7; total_frames is 16, and there are 40",
    ]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_without_tasks_the_language_is_empty(tmp_path, check_dataset, version):
    source = WRITERS[version](tmp_path / "data")
    (path,) = (source / "meta").glob("tasks.*")
    path.unlink()
    if version == "v3.0":
        write_episode_list(source, [entry | {"tasks": None} for entry in episode_list(source)])
    else:
        (source / "meta" / "episodes.jsonl").unlink()
    report = convert(source, tmp_path / "out")
    assert {row["language_instruction"] for row in check_dataset(tmp_path / "out")["train"]} == {""}
    assert f"meta/{path.name} is missing" in messages(report)
    assert {"message": NO_TASK, "count": 3, "examples": [f"episode_{i:06d}" for i in LENGTHS]} in report["warnings"]


def test_tasks_in_an_index_without_a_name(tmp_path, check_dataset):
    source = write_v3(tmp_path / "data")
    write_table(source / "meta" / "tasks.parquet", {"task_index": [0, 1], "__index_level_0__": ["lift", "turn"]})
    convert(source, tmp_path / "out")
    instructions = [row["language_instruction"] for row in check_dataset(tmp_path / "out")["train"]]
    assert instructions == ["turn", "lift", "lift"]


def test_without_a_task_index_the_first_task_of_the_episode_counts(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    columns = rows(1, 5)
    del columns["task_index"]
    write_table(v2_paths(source, 1)[0], columns)
    write_table(v2_paths(source, 2)[0], rows(2, 7) | {"task_index": [[0], [0], [1], [1], [1], [1], [1]]})
    write_json_lines(source / "meta" / "tasks.jsonl", [{"task_index": 0, "task": "lift"}])
    report = convert(source, tmp_path / "out")
    instructions = [row["language_instruction"] for row in check_dataset(tmp_path / "out")["train"]]
    assert instructions == ["pull", "lift", "lift"]
    totals = "meta/info.json counts wrongly: total_tasks is 2, and there are 1"
    assert messages(report) == [totals, UNKNOWN_TASK, OTHER_TASK, SEVERAL_TASKS]


def test_episodes_that_the_metadata_forget_or_count_wrongly_are_reported(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    write_json_lines(source / "meta" / "episodes.jsonl", [{"episode_index": 1, "tasks": [], "length": 9}] * 2)
    report = convert(source, tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == 3
    assert messages(report) == [
        "meta/episodes.jsonl lists some episodes twice; the last entry counts",
        "2 episodes have a table but are not listed in meta/episodes.jsonl",
        OTHER_LENGTH,
    ]


def test_files_are_found_by_name_when_the_templates_lead_elsewhere(tmp_path, check_dataset):
    source = write_v2(tmp_path / "data")
    edit_info(source, data_path="data/chunk-{episode_index:03d}/episode_{episode_index:06d}.parquet", video_path="{x}")
    edit_info(source, chunks_size=1000)
    report = convert(source, tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == 3
    (message,) = messages(report)
    assert message.startswith("4 files do not lie where the path templates of info.json say")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"camera": ("left",)}, "no camera 'left' in this dataset; there are: top"),
        ({"action": ("torque",)}, "no action key 'torque' with numbers in this dataset; there are: action, obs"),
        (
            {"state": ("note",)},
            "no state key 'note' with numbers in this dataset; there are: action, observation.state",
        ),
        ({"control_rate": 0.0}, "control_rate must be a positive number"),
    ],
)
def test_what_is_asked_for_must_be_there(tmp_path, settings, message):
    with pytest.raises(ConversionError, match=message):
        convert(write_v2(tmp_path / "data"), tmp_path / "out", **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v1.6"}, r"codebase_version 'v1.6' is not known; there are v2.0, v2.1, v3.0"),
        ({"codebase_version": "v3.0"}, "is of format v3.0 but has no table of episodes in meta/episodes"),
        ({"features": None}, "features must be an object"),
        ({"fps": None}, "gives no fps; set `control_rate`"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, changes, message):
    source = write_v2(tmp_path / "data")
    edit_info(source, **changes)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(ConversionError, match="source folder .*gone does not exist"):
        convert(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(ConversionError, match=r"holds no LeRobot dataset \(no meta/info.json\)"):
        convert(tmp_path, tmp_path / "out")
    write_info(tmp_path / "data", "v2.1", [TOP])
    with pytest.raises(ConversionError, match="is a LeRobot dataset without episodes"):
        convert(tmp_path / "data", tmp_path / "out")


@pytest.mark.slow
def test_sample_of_a_simulated_robot(tmp_path, sample_data, check_dataset):
    report = convert(sample_data / "lerobot_gr1_sim", tmp_path / "out", image_size=32)
    table = check_dataset(tmp_path / "out")["train"]
    assert [row["num_steps"] for row in table] == [416, 470, 470, 412]
    assert table[0]["language_instruction"] == "pick the pear from the counter and place it in the plate"
    assert "camera 'observation.images.egoview' was left out: it has no files" in messages(report)
    assert any("they were found by their names" in message for message in messages(report))
    source = EpisodeSource(tmp_path / "out", "train")
    assert source.camera == "ego_view"
    assert source.action.shape == (1768, 44)
    assert (source.action.std(0) < 1e-6).sum() == 25


@pytest.mark.slow
def test_sample_of_a_real_robot(tmp_path, sample_data, check_dataset):
    report = convert(sample_data / "lerobot_g1_real", tmp_path / "out", image_size=32)
    table = check_dataset(tmp_path / "out")["train"]
    assert [row["episode_id"] for row in table] == [f"episode_{index:06d}" for index in (10, 28, 29, 30)]
    assert {row["control_rate"] for row in table} == {30.0}
    assert report["steps"]["train"] == 1066
    assert messages(report) == []
    stored = pq.ParquetFile(sample_data / "lerobot_g1_real" / table[1]["source_file"]).read(["action"])
    np.testing.assert_array_equal(np.float32(table[1]["action"]), np.float32(stored["action"].to_pylist()))
