"""Damaged and odd RLDS records and directories: each ends in the report or in one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from como_jax.convert import images
from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.convert.rlds.episodes import EpisodeReader
from como_jax.convert.selection import Selection
from como_jax.errors import ConversionError

KEYS: dict[str, Any] = {
    "camera": ("main",),
    "action": ("action/move",),
    "control_rate": 5.0,
    "validation_fraction": 0.0,
}
OBSERVATION = {
    "main": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
    "raw": tfds.features.Tensor(shape=(9, 8, 4), dtype=np.uint8),
    "grey": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
    "present/xyz": tfds.features.Tensor(shape=(3,), dtype=np.float32, encoding="zlib"),
    "codes": tfds.features.Tensor(shape=(8,), dtype=np.int32),
}
STEP = tfds.features.FeaturesDict({"observation": OBSERVATION, "instruction": tfds.features.Text()})


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return Rlds(out, RldsSettings(source=str(source), **(KEYS | settings))).convert()


def reasons(report: dict[str, Any]) -> list[str]:
    return [reason for entry in report["partially_converted"] + report["left_out"] for reason in entry["reasons"]]


def messages(report: dict[str, Any]) -> list[str]:
    return [warning["message"] for warning in report["warnings"]]


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def image(height: int = 10, width: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def encode(*changes: dict[str, Any]) -> bytes:
    """A record with one step for each change to the values of a usual step."""
    values = {
        "main": png(image()),
        "raw": np.full((9, 8, 4), 200, np.uint8),
        "grey": np.full((8, 8, 1), 77, np.uint8),
        "present/xyz": np.arange(3, dtype=np.float32),
        "codes": np.array([*map(ord, "go up"), 0, 0, 7], np.int32),
        "instruction": b"go left",
    }
    steps = []
    for change in changes:
        observation = values | change
        steps.append({"instruction": observation.pop("instruction"), "observation": observation})
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(STEP)}).serialize_example({"steps": steps})


def reader(**keys: Any) -> EpisodeReader:
    chosen = {"cameras": ("observation/main",), "language": "instruction"} | keys
    chosen["cameras"] = {key.rpartition("/")[2]: key for key in chosen["cameras"]}
    return EpisodeReader(STEP, Selection(**chosen), control_rate=5.0, image_size=64)


def decode(jpeg: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(jpeg)


def test_keys_with_slashes_and_compressed_tensors_are_read():
    episode, warnings = reader(states=("observation/present/xyz",)).read(encode({}, {}), "file", 3)
    assert (episode.episode_id, episode.language_instruction, warnings) == ("file/000003", "go left", [])
    np.testing.assert_array_equal(episode.steps[1].state, np.float32([0, 1, 2]))


def test_language_may_be_code_points():
    episode, _ = reader(language="observation/codes").read(encode({}), "file", 0)
    assert episode.language_instruction == "go up"


def test_language_that_is_not_utf8_is_replaced_and_warned_about():
    episode, (warning,) = reader().read(encode({"instruction": b" \n"}, {"instruction": b"caf\xe9 "}), "file", 0)
    assert episode.language_instruction == "caf\ufffd"
    assert warning == "a language instruction is not UTF-8; its bad bytes were replaced by \ufffd"


def test_raw_grey_and_transparent_images_become_colour():
    episode, _ = reader(cameras=("observation/raw", "observation/grey")).read(encode({}, {}), "file", 0)
    np.testing.assert_array_equal(decode(episode.steps[0].images["raw"]), np.full((9, 8, 3), 200))
    np.testing.assert_array_equal(decode(episode.steps[1].images["grey"]), np.full((8, 8, 3), 77))
    for stored in (png(np.full((8, 8), 77, np.uint8)), png(np.full((8, 8, 4), 77, np.uint8))):
        episode, _ = reader().read(encode({"main": stored}), "file", 0)
        np.testing.assert_array_equal(decode(episode.steps[0].images["main"]), np.full((8, 8, 3), 77))


def test_images_of_several_sizes_keep_theirs_up_to_the_largest():
    record = encode({}, {"main": png(image(20, 30))}, {"main": png(image(100, 128))})
    episode, warnings = reader().read(record, "file", 0)
    shapes = [decode(step.images["main"]).shape for step in episode.steps]
    assert shapes == [(10, 12, 3), (20, 30, 3), (64, 82, 3)]
    assert warnings == ["images of camera 'main' change their size within an episode"]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "the image is empty"),
        (b"no image", "an image cannot be decoded"),
        (png(image())[:60], "an image cannot be decoded"),
        (simplejpeg.encode_jpeg(image())[:20], ""),
        (simplejpeg.encode_jpeg(image())[:8] + bytes(99), ""),
    ],
)
def test_a_image_that_cannot_be_decoded_is_named(stored, message):
    with pytest.raises(ValueError, match="step 1, camera 'main': " + message) as error:
        reader().read(encode({}, {"main": stored}), "file", 0)
    assert "0x" not in str(error.value)


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch):
    huge = np.zeros((9000, 12000), np.uint8)
    for stored in (png(huge), simplejpeg.encode_jpeg(huge[..., None], colorspace="GRAY")):
        with monkeypatch.context() as patch:
            patch.setattr(images.simplejpeg, "decode_jpeg", None)
            patch.setattr(images.cv2, "imdecode", None)
            with pytest.raises(ValueError, match="image of 12000x9000 pixels, .*more than the 33554432"):
                images.convert_stored(stored, 64)
    with pytest.raises(ValueError, match="image of 12000x9000 pixels"):
        images.convert_stored(huge[..., None], 64)


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="the image is empty"):
        images.convert_stored(np.zeros((0, 8, 3), np.uint8), 64)
    with pytest.raises(ValueError, match=r"an image has shape \(8, 8, 2\) and type uint8"):
        images.convert_stored(np.zeros((8, 8, 2), np.uint8), 64)


def test_an_episode_without_steps_is_refused():
    with pytest.raises(ValueError, match="holds no steps"):
        reader(cameras=("observation/main",)).read(encode(), "file", 0)


def test_a_record_of_something_else_is_refused():
    other = tfds.features.FeaturesDict({"steps": tfds.features.Dataset({"instruction": tfds.features.Text()})})
    record = other.serialize_example({"steps": [{"instruction": "go"}]})
    with pytest.raises(ValueError, match="does not hold what the dataset describes"):
        reader().read(b"no record", "file", 0)
    with pytest.raises(ValueError, match="^holds no observation/main$"):
        reader().read(record, "file", 0)


def test_no_damage_to_a_record_raises_anything_else():
    rng = np.random.default_rng(0)
    intact = encode({}, {}, {})
    everything = reader(
        cameras=("observation/main", "observation/raw"), states=("observation/present/xyz", "observation/codes")
    )
    outcomes = set()
    for _ in range(400):
        record = bytearray(intact)
        for position in rng.integers(0, len(record), rng.integers(1, 4)):
            record[position] ^= int(rng.integers(1, 256))
        if rng.random() < 0.2:
            del record[rng.integers(0, len(record)) :]
        try:
            everything.read(bytes(record), "file", 0)
            outcomes.add("read")
        except ValueError as error:
            assert str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_episodes_that_cannot_be_used_leave_the_others(tmp_path, make_rlds, rlds_steps, check_dataset):
    episodes = [rlds_steps(3, seed) for seed in range(5)]
    episodes[1][0]["action"]["move"][1] = np.nan
    episodes[2] = []
    episodes[3][2]["observation"]["main"] = np.zeros((1, 1, 3), np.uint8)
    report = convert(make_rlds({"train": [episodes]}, tfrecord=True), tmp_path / "out")
    rows = check_dataset(tmp_path / "out")["train"]
    assert [row["language_instruction"] for row in rows] == ["do task 0", "do task 3", "do task 4"]
    first, second = sorted(reasons(report))
    assert first.endswith("some action is not finite")
    assert second == "record 2: holds no steps"
    assert "images of camera 'main' change their size within an episode" in messages(report)


def test_more_records_than_announced_are_converted_too(tmp_path, make_rlds, rlds_steps, check_dataset):
    source = make_rlds({"train": [[rlds_steps(2, seed) for seed in range(5)]]}, tfrecord=True)
    info = json.loads((source / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["3"]
    (source / "dataset_info.json").write_text(json.dumps(info))
    report = convert(source, tmp_path / "out", validation_fraction=0.2)
    tables = check_dataset(tmp_path / "out")
    assert {split: len(rows) for split, rows in tables.items()} == {"train": 2, "val": 3}
    assert "a file holds more records than dataset_info.json says; they were converted as well" in messages(report)


def test_folders_may_have_spaces_and_any_letters(tmp_path, make_rlds, rlds_steps, check_dataset):
    source = make_rlds({"train": [[rlds_steps(2, 0)]]})
    moved = tmp_path / "Küche 台所 (2)" / "my data"
    shutil.copytree(source, moved)
    convert(moved, tmp_path / "out put" / "dé jà")
    assert len(check_dataset(tmp_path / "out put" / "dé jà")["train"]) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_info.json", ""),
        ("dataset_info.json", "[]"),
        ("dataset_info.json", "{}"),
        ("dataset_info.json", '{"name": "tiny", "version": "new", "fileFormat": "tfrecord"}'),
        ("dataset_info.json", '{"name": "tiny", "version": "1.0.0", "fileFormat": "parcel"}'),
        ("features.json", None),
        ("features.json", "{"),
        ("features.json", '{"pythonClassName": "nowhere.Feature"}'),
    ],
)
def test_directories_that_describe_no_dataset(tmp_path, make_rlds, rlds_steps, name, content):
    source = make_rlds({"train": [[rlds_steps(2, 0)]]})
    (source / name).unlink()
    if content is not None:
        (source / name).write_text(content)
    with pytest.raises(ConversionError, match=f"^{source} cannot be read as an RLDS dataset: ") as error:
        convert(source, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_directories_of_something_else(tmp_path, make_rlds, rlds_steps):
    source = make_rlds({"train": [[rlds_steps(2, 0)]]})
    convert(source, tmp_path / "steps")
    with pytest.raises(ConversionError, match="is not an RLDS dataset: its records have no `steps`"):
        convert(tmp_path / "steps", tmp_path / "out")
    info = json.loads((source / "dataset_info.json").read_text())
    (source / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
    with pytest.raises(ConversionError, match="riegeli files; only tfrecord and array_record can be read"):
        convert(source, tmp_path / "out")
    (source / "dataset_info.json").write_text(json.dumps(info | {"splits": []}))
    with pytest.raises(ConversionError, match="has no splits in its dataset_info.json"):
        convert(source, tmp_path / "out")
