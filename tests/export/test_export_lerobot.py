"""Labelled datasets as LeRobot v3.0: files read on their own, and by our own builder."""

import itertools
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.convert.lerobot.builder import LeRobot, LeRobotSettings
from como_jax.errors import DatasetError
from como_jax.export.labels.dataset import LabelledDataset
from como_jax.export.labels.lerobot import write_lerobot

CAMERA = "observation.images.image"
TEXTS = {"language_instruction_2", "language_instruction_3"}
NUMBERS = {"observation.state": "state", "action": "action"} | {
    key: key for key in ("latent_motion", "latent_valid", "latent_codes")
}


def write(source: Path, folder: Path, **options: int) -> Path:
    write_lerobot(LabelledDataset(source), epath.Path(folder), **options)
    return folder


def read_info(folder: Path) -> dict:
    return json.loads((folder / "meta" / "info.json").read_text())


@pytest.fixture(scope="module")
def exported(labelled, tmp_path_factory):
    return write(labelled, tmp_path_factory.mktemp("lerobot"), max_steps_per_file=200)


@pytest.fixture(scope="module")
def episodes(exported):
    return pq.read_table(exported / "meta/episodes/chunk-000/file-000.parquet").to_pylist()


@pytest.fixture(scope="module")
def table(exported):
    return pa.concat_tables(pq.ParquetFile(path).read() for path in sorted((exported / "data").glob("*/*.parquet")))


def test_tables_hold_every_number_of_every_step(exported, table, labelled, rows_of):
    rows = rows_of(labelled)
    for key, field in NUMBERS.items():
        expected = list(itertools.chain.from_iterable(row[field] for row in rows))
        assert table[key].to_pylist() == expected, key
    steps = sum(row["num_steps"] for row in rows)
    frames = np.concatenate([np.arange(row["num_steps"]) for row in rows])
    assert table["index"].to_pylist() == list(range(steps))
    np.testing.assert_array_equal(table["frame_index"], frames)
    np.testing.assert_array_equal(table["timestamp"], np.float32(frames / rows[0]["control_rate"]))
    tasks = pq.read_table(exported / "meta/tasks.parquet").to_pydict()
    assert tasks["task_index"] == list(range(len(tasks["task"])))
    instructions = [row["language_instruction"] for row in rows for _ in range(row["num_steps"])]
    assert [tasks["task"][index] for index in table["task_index"].to_pylist()] == instructions


def test_the_features_are_those_of_the_columns(exported, table, labelled, rows_of):
    info, rows = read_info(exported), rows_of(labelled)
    assert (info["codebase_version"], info["fps"]) == ("v3.0", rows[0]["control_rate"])
    assert (info["total_episodes"], info["total_frames"]) == (len(rows), table.num_rows)
    shapes = {key: (each["dtype"], each["shape"]) for key, each in info["features"].items()}
    assert shapes["latent_motion"] == ("float32", [6])
    assert shapes["latent_valid"] == ("bool", [1])
    assert shapes["latent_codes"] == ("int64", [2])
    assert shapes.pop(CAMERA) == ("video", [64, 64, 3])
    assert list(shapes) == table.column_names
    for key, (dtype, (size,)) in shapes.items():
        kind = table.schema.field(key).type
        assert (kind.value_type if size > 1 else kind) == pa.type_for_alias(dtype), key
    train, val = (info["splits"][split].split(":") for split in ("train", "val"))
    assert [train[0], train[1], val[1]] == ["0", val[0], str(len(rows))]


def test_every_episode_has_its_part_of_the_files(exported, episodes, labelled, rows_of):
    info = read_info(exported)
    assert len({row["data/file_index"] for row in episodes}) > 2
    for index, (row, before) in enumerate(zip(episodes, rows_of(labelled), strict=True)):
        assert row["episode_index"] == index
        assert (row["length"], row["tasks"]) == (before["num_steps"], [before["language_instruction"]])
        assert (row["source_episode_id"], row["source_file"]) == (before["episode_id"], before["source_file"])
        place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
        steps = pq.read_table(exported / info["data_path"].format(**place), filters=[("episode_index", "=", index)])
        expected = list(range(row["dataset_from_index"], row["dataset_to_index"]))
        assert steps["index"].to_pylist() == expected
        seconds = row[f"videos/{CAMERA}/to_timestamp"] - row[f"videos/{CAMERA}/from_timestamp"]
        assert seconds == pytest.approx(row["length"] / info["fps"])


def test_videos_have_one_frame_a_step_at_its_time(exported, episodes, labelled):
    jpegs = iter(
        step["observation"]["image"]
        for split in ("train", "val")
        for step in tfds.builder_from_directory(labelled).as_data_source(split)
    )
    fps = read_info(exported)["fps"]
    for _, group in itertools.groupby(episodes, key=lambda row: row["data/file_index"]):
        rows = list(group)
        place = {name: rows[0][f"videos/{CAMERA}/{name}"] for name in ("chunk_index", "file_index")}
        path = exported / read_info(exported)["video_path"].format(video_key=CAMERA, **place)
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == sum(row["length"] for row in rows)
        times = [float(frame.pts * frame.time_base) for frame in frames]
        np.testing.assert_allclose(times, np.arange(len(frames)) / fps, atol=1e-6)
        for frame in frames:
            difference = frame.to_ndarray(format="rgb24").astype(int) - next(jpegs)
            assert np.abs(difference).mean() < 6
    assert next(jpegs, None) is None


def test_statistics_leave_out_steps_without_a_label(exported, labelled, rows_of):
    statistics = json.loads((exported / "meta/stats.json").read_text())
    rows = rows_of(labelled)
    valid = np.concatenate([row["latent_valid"] for row in rows])
    motion = np.concatenate([row["latent_motion"] for row in rows])[valid]
    assert statistics["latent_motion"]["count"] == [valid.sum()]
    np.testing.assert_allclose(statistics["latent_motion"]["mean"], motion.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics["latent_motion"]["q99"], np.quantile(motion, 0.99, axis=0), rtol=1e-5)
    images = np.stack(
        [
            step["observation"]["image"] / 255
            for split in ("train", "val")
            for step in tfds.builder_from_directory(labelled).as_data_source(split)
        ]
    )
    for name in ("mean", "std", "min", "max"):
        expected = getattr(images, name)(axis=(0, 1, 2)).reshape(3, 1, 1)
        np.testing.assert_allclose(statistics[CAMERA][name], expected, rtol=1e-6, atol=1e-9)
    assert set(statistics) == set(read_info(exported)["features"]) - TEXTS


def test_labels_of_which_none_is_valid_have_no_statistics(labelled, with_changed_rows, tmp_path):
    def invalidate(row):
        steps = row["num_steps"]
        return {**row, "latent_valid": [False] * steps, "latent_motion": [[float("nan")] * 6] * steps}

    folder = write(with_changed_rows(labelled, invalidate), tmp_path)
    statistics = json.loads((folder / "meta/stats.json").read_text())
    assert set(read_info(folder)["features"]) - set(statistics) == {"latent_motion", "latent_codes", *TEXTS}
    table = pq.read_table(next((folder / "data").glob("*/*.parquet")))
    assert np.isnan(table["latent_motion"][0].as_py()).all()


def test_our_own_builder_reads_it(exported, labelled, rows_of, tmp_path):
    report = LeRobot(tmp_path / "back", LeRobotSettings(source=str(exported))).convert()
    assert not report["left_out"] and not report["warnings"]
    # Actions and states are float32 in both, and the splits are the same.
    for split in ("train", "val"):
        assert report["episodes"][split] == len(LabelledDataset(labelled).lengths(split))
    for before, after in zip(rows_of(labelled), rows_of(tmp_path / "back"), strict=True):
        for field in ("language_instruction", "other_instructions", "num_steps", "control_rate", "action", "state"):
            assert after[field] == before[field], field
        np.testing.assert_allclose(after["motion"], before["motion"], atol=0.01)


def test_labels_are_read_back_as_actions(exported, labelled, rows_of, tmp_path):
    settings = LeRobotSettings(source=str(exported), action=("latent_motion",), state=("latent_codes", "latent_valid"))
    LeRobot(tmp_path / "back", settings).convert()
    for before, after in zip(rows_of(labelled), rows_of(tmp_path / "back"), strict=True):
        assert after["action"] == before["latent_motion"]
        expected = [
            [*codes, valid] for codes, valid in zip(before["latent_codes"], before["latent_valid"], strict=True)
        ]
        assert after["state"] == expected


def test_provenance_comes_along(exported, labelled):
    assert (exported / "meta/labels.json").read_bytes() == (labelled / "labels.json").read_bytes()


def test_pandas_finds_the_tasks_in_the_index(exported):
    description = json.loads(pq.read_schema(exported / "meta/tasks.parquet").metadata[b"pandas"])
    assert description["index_columns"] == ["task"]


def test_video_of_people_without_actions(tmp_path, with_changed_rows):
    settings = make_settings("tabletop", {"episodes": 3, "tasks": ("reach",), "look": "human", "actions": False})
    BUILDERS["tabletop"](tmp_path / "people", settings, None).convert()

    def label(row):
        steps = row["num_steps"]
        return {**row, "latent_motion": [[0.5]] * steps, "latent_valid": [True] * steps, "control_rate": 10 / 3}

    source = with_changed_rows(tmp_path / "people", label)
    folder = write(source, tmp_path / "out")
    info = read_info(folder)
    assert info["fps"] == 10 / 3
    assert {"action", "observation.state", "latent_codes"}.isdisjoint(info["features"])
    assert pq.read_table(next((folder / "data").glob("*/*.parquet")))["latent_motion"][0].as_py() == 0.5
    report = LeRobot(tmp_path / "back", LeRobotSettings(source=str(folder))).convert()
    assert not report["left_out"]
    assert sum(report["steps"].values()) == info["total_frames"]


def test_several_control_rates_are_refused(labelled, with_changed_rows, tmp_path):
    rates = itertools.cycle((5.0, 29.97))
    source = with_changed_rows(labelled, lambda row: {**row, "control_rate": next(rates)})
    with pytest.raises(DatasetError, match=r"several control rates \(5, 29.97 Hz\).*write it as rlds"):
        write(source, tmp_path / "out")
