"""RLDS directories: choice of features, records, damage, and agreement with an independent decoder."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.errors import ConversionError

KEYS: dict[str, Any] = {"camera": ("main",), "action": ("action/move", "action/grip"), "control_rate": 5.0}


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return Rlds(out, RldsSettings(source=str(source), **(KEYS | settings))).convert()


def reasons_by_file(entries: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {entry["source"].partition("record-")[2].partition("[")[0]: entry["reasons"] for entry in entries}


@pytest.fixture
def steps(rlds_steps):
    """Four episodes of 3, 4, 5 and 6 steps."""
    return [rlds_steps(3 + seed, seed) for seed in range(4)]


def test_small_files_share_a_shard_and_large_ones_do_not(tmp_path, make_rlds, rlds_steps, monkeypatch):
    source = make_rlds({"train": [[rlds_steps(2, seed)] for seed in range(8)]})
    convert(source, tmp_path / "out", validation_fraction=0)
    assert len(list((tmp_path / "out").glob("*array_record*"))) == 2
    monkeypatch.setattr("como_jax.convert.sources._FEW_BYTES", 1)
    convert(source, tmp_path / "large", validation_fraction=0)
    assert len(list((tmp_path / "large").glob("*array_record*"))) == 8


@pytest.mark.parametrize("tfrecord", [True, False])
def test_steps_are_those_of_the_source(tmp_path, make_rlds, steps, check_dataset, tfrecord):
    source = make_rlds({"train": [steps[:2], steps[2:3]], "test": [steps[3:]]}, tfrecord)
    convert(source, tmp_path / "out")
    tables = check_dataset(tmp_path / "out")
    assert [row["num_steps"] for row in tables["train"]] == [3, 4, 5]
    assert [row["num_steps"] for row in tables["val"]] == [6]
    row = tables["train"][1]
    assert row["episode_id"].endswith("-00000-of-00002/000001")
    assert row["language_instruction"] == "do task 1"
    assert row["control_rate"] == 5.0
    expected = [[*step["action"]["move"], step["action"]["grip"]] for step in steps[1]]
    np.testing.assert_array_equal(np.float32(row["action"]), np.float32(expected))
    np.testing.assert_array_equal(np.float32(row["state"]), [step["observation"]["state"] for step in steps[1]])


def test_png_images_become_jpeg_of_the_right_size(tmp_path, make_rlds, rlds_steps):
    steps = rlds_steps(2, 0, height=64, width=96)
    smooth = cv2.GaussianBlur(steps[0]["observation"]["main"], (31, 31), 0)
    steps[0]["observation"]["main"] = smooth
    convert(make_rlds({"train": [[steps]]}), tmp_path / "out", image_size=32)
    record = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")[0]
    image = record["observation"]["main"].astype(int)
    expected = cv2.resize(smooth, (48, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(image - expected).mean() < 2


def test_several_cameras_and_a_warning_about_black_ones(tmp_path, make_rlds, steps, check_dataset):
    report = convert(make_rlds({"train": [steps]}), tmp_path / "out", camera=("main", "wrist"), validation_fraction=0.0)
    check_dataset(tmp_path / "out")
    info = tfds.builder_from_directory(tmp_path / "out").info
    assert info.metadata["cameras"] == ["main", "wrist"]
    assert set(info.features["observation"]) == {"main", "wrist", "state"}
    assert [warning["message"] for warning in report["warnings"]] == ["camera 'wrist' is black over a whole episode"]


def test_parts_that_are_not_wanted_are_left_off(tmp_path, make_rlds, steps, check_dataset):
    source = make_rlds({"train": [steps]})
    report = convert(source, tmp_path / "out", action=(), state=(), language="")
    (row, *_) = check_dataset(tmp_path / "out")["train"]
    assert (row["action"], row["state"], row["language_instruction"]) == (None, None, "")
    assert [warning["message"] for warning in report["warnings"]] == [
        "no action was converted",
        "no state was converted",
        "no language was converted",
    ]


def test_few_files_without_validation_split_are_cut_by_records(tmp_path, make_rlds, rlds_steps, check_dataset):
    source = make_rlds({"train": [[rlds_steps(2, seed) for seed in range(20)]]})
    convert(source, tmp_path / "out")
    tables = check_dataset(tmp_path / "out")
    assert [row["language_instruction"] for row in tables["val"]] == ["do task 18", "do task 19"]
    assert len(tables["train"]) == 18


def test_many_files_without_validation_split_are_drawn(tmp_path, make_rlds, rlds_steps, check_dataset):
    source = make_rlds({"train": [[rlds_steps(2, seed)] for seed in range(5)]})
    convert(source, tmp_path / "out", validation_fraction=0.4)
    tables = check_dataset(tmp_path / "out")
    assert (len(tables["train"]), len(tables["val"])) == (3, 2)


@pytest.mark.parametrize("tfrecord", [True, False])
def test_damage_costs_only_what_it_hits(tmp_path, make_rlds, steps, check_dataset, tfrecord):
    steps[1][2]["action"]["move"][0] = np.inf
    source = make_rlds({"train": [steps[:2], steps[2:], steps[:1], steps[:1]]}, tfrecord)
    files = sorted(source.glob("*record-*"))
    content = files[1].read_bytes()
    # The last record loses its end; ArrayRecord needs its own last block to be read at all.
    files[1].write_bytes(content[: -len(content) // 4] if tfrecord else content[:100])
    files[2].unlink()
    report = convert(source, tmp_path / "out", validation_fraction=0.0)
    rows = check_dataset(tmp_path / "out")["train"]
    assert [row["num_steps"] for row in rows] == ([3, 5, 3] if tfrecord else [3, 3])
    left_out = reasons_by_file(report["left_out"])
    assert left_out["00002-of-00004"] == ["the file is missing"]
    partial = reasons_by_file(report["partially_converted"])
    assert ["some action is not finite" in reason for reason in partial["00000-of-00004"]] == [True]
    if tfrecord:
        assert partial["00001-of-00004"] == ["cannot be read from record 1 on, of 2: the file breaks off"]
    else:
        assert left_out["00001-of-00004"] == ["is damaged: none of its 2 records can be found"]


def test_fewer_records_than_announced(tmp_path, make_rlds, steps, check_dataset):
    source = make_rlds({"train": [steps[:2]], "val": [steps[2:]]}, tfrecord=True)
    info = json.loads((source / "dataset_info.json").read_text())
    next(split for split in info["splits"] if split["name"] == "train")["shardLengths"] = ["7"]
    (source / "dataset_info.json").write_text(json.dumps(info))
    report = convert(source, tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == 2
    assert report["partially_converted"][0]["reasons"] == ["ends after 2 of 7 records"]


def test_an_unreadable_record_does_not_stop_the_file(tmp_path, make_rlds, steps, check_dataset):
    source = make_rlds({"train": [steps]}, tfrecord=True)
    (path,) = source.glob("*tfrecord*")
    content = bytearray(path.read_bytes())
    first = int.from_bytes(content[:8], "little")
    # Bytes of the second record's message, behind the length and checksum of both.
    content[first + 32 : first + 64] = b"\xff" * 32
    path.write_bytes(content)
    report = convert(source, tmp_path / "out", validation_fraction=0.0)
    assert [row["num_steps"] for row in check_dataset(tmp_path / "out")["train"]] == [3, 5, 6]
    assert report["partially_converted"][0]["reasons"][0].startswith("record 1: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"camera": ()}, "`camera` must choose one of the cameras of this dataset: main, wrist"),
        ({"camera": ("front",)}, "no camera 'front' in this dataset; there are: main, wrist"),
        ({"camera": ("depth",)}, "no camera 'depth' in this dataset; there are: main, wrist"),
        ({"action": None}, "action key 'action' is a group; choose some of action/grip, action/move"),
        (
            {"state": ("joints",)},
            "no state key 'joints' in the steps of this dataset; there are: action/grip, action/move, is_last",
        ),
        ({"language": "action/grip"}, "language key 'action/grip' is not text"),
    ],
)
def test_keys_that_do_not_fit(tmp_path, make_rlds, steps, settings, message):
    source = make_rlds({"train": [steps[:1]]})
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", **settings)


def test_where_the_dataset_lies(tmp_path, make_rlds, steps):
    source = make_rlds({"train": [steps]})
    convert(source.parents[1], tmp_path / "out")
    shutil.copytree(source, source.parents[1] / "other" / "1.0.0")
    with pytest.raises(ConversionError, match="choose one of the datasets in .*other/1.0.0, .*tiny/1.0.0"):
        convert(source.parents[1], tmp_path / "out2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="empty holds no RLDS dataset"):
        convert(tmp_path / "empty", tmp_path / "out2")
    with pytest.raises(ConversionError, match="gone does not exist"):
        convert(tmp_path / "gone", tmp_path / "out2")
    with pytest.raises(ConversionError, match="control_rate must be a positive number"):
        convert(source, tmp_path / "out2", control_rate=0.0)


def test_sample_bridge_equals_an_independent_decode(tmp_path, sample_data, check_dataset):
    source = sample_data / "bridge_rlds" / "bridge_dataset" / "1.0.0"
    report = convert(source, tmp_path / "out", camera=("image_0",), action=None)
    tables = check_dataset(tmp_path / "out")
    assert report["warnings"] == []
    assert {split: len(rows) for split, rows in tables.items()} == {"train": 12, "val": 3}
    theirs = tfds.builder_from_directory(source)
    ours = tfds.builder_from_directory(tmp_path / "out")
    for split, rows in tables.items():
        records = grain.experimental.TFRecordIterDataset(str(theirs.info.splits[split].filepaths[0]))
        expected = [theirs.info.features.deserialize_example_np(record)["steps"] for record in records]
        images = [record["observation"]["image_0"] for record in ours.as_data_source(split)]
        for index, (row, episode) in enumerate(zip(rows, expected, strict=True)):
            assert row["num_steps"] == len(episode) == 10
            actions = np.stack([step["action"] for step in episode])
            assert actions.shape == (10, 7)
            np.testing.assert_array_equal(np.float32(row["action"]), actions)
            assert row["language_instruction"] == episode[0]["language_instruction"].decode()
            np.testing.assert_array_equal(images[10 * index + 4], episode[4]["observation"]["image_0"])


def test_sample_bridge_has_a_black_camera(tmp_path, sample_data):
    source = sample_data / "bridge_rlds"
    report = convert(source, tmp_path / "out", camera=("image_3",), action=None)
    assert report["warnings"][0]["message"] == "camera 'image_3' is black over a whole episode"
