"""Folders of .npz files: choice of arrays, batches, language, and damaged files."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from como_jax.convert.npz.archive import NpzArchive
from como_jax.convert.npz.builder import CHANGES, WITHOUT_LAST, Npz, NpzSettings
from como_jax.convert.report import SourceOutcome
from como_jax.errors import ConversionError


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    given = {"control_rate": 5.0, "validation_fraction": 0.0} | settings
    return Npz(out, NpzSettings(source=str(source), **given)).convert()


def images(*lead: int) -> np.ndarray:
    """Plain grey images `[*lead, 8, 12, 3]` that get brighter with every one."""
    values = np.arange(np.prod(lead)).reshape(lead) * 10
    return np.broadcast_to(values[..., None, None, None], (*lead, 8, 12, 3)).astype(np.uint8)


def arrays(*lead: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"observations": images(*lead), "states": rng.normal(size=(*lead, 3)), "actions": rng.normal(size=lead)}


def write(path: Path, **values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **values)
    return path


def left_out(report: dict[str, Any]) -> dict[str, str]:
    return {entry["source"]: entry["reasons"][0] for entry in report["left_out"]}


def messages(report: dict[str, Any]) -> list[str]:
    return [warning["message"] for warning in report["warnings"]]


def test_one_trajectory_and_a_batch_give_the_same_steps(tmp_path, check_dataset):
    batch = arrays(3, 4)
    write(tmp_path / "batch" / "all.npz", **batch)
    for index in range(3):
        write(tmp_path / "single" / f"{index}.npz", **{key: value[index] for key, value in batch.items()})
    tables, brightness = [], []
    for kind in ("batch", "single"):
        report = convert(tmp_path / kind, tmp_path / "out" / kind)
        assert messages(report) == []
        tables.append(check_dataset(tmp_path / "out" / kind)["train"])
        records = tfds.builder_from_directory(tmp_path / "out" / kind).as_data_source("train")
        brightness.append([record["observation"]["observations"].mean() for record in records])
    np.testing.assert_allclose(brightness[0], 10 * np.arange(12), atol=1)
    np.testing.assert_array_equal(brightness[0], brightness[1])
    assert [row["episode_id"] for row in tables[0]] == [f"all.npz/{index:06d}" for index in range(3)]
    for key in ("action", "state", "motion"):
        assert [row[key] for row in tables[0]] == [row[key] for row in tables[1]]
    np.testing.assert_array_equal(tables[0][1]["state"], np.float32(batch["states"][1]))
    np.testing.assert_array_equal(np.ravel(tables[0][1]["action"]), np.float32(batch["actions"][1]))
    assert {row["control_rate"] for row in tables[0]} == {5.0}


def test_arrays_are_those_that_were_asked_for(tmp_path, check_dataset):
    values = arrays(4)
    fortran = np.asfortranarray(np.arange(24.0).reshape(4, 2, 3))
    write(tmp_path / "data" / "a.npz", **values, wrist=images(4)[:, ::2], torque=fortran)
    report = convert(
        tmp_path / "data", tmp_path / "out", camera=("wrist", "observations"), action=("torque", "actions"), state=()
    )
    (row,) = check_dataset(tmp_path / "out")["train"]
    assert tfds.builder_from_directory(tmp_path / "out").info.metadata["cameras"] == ["wrist", "observations"]
    np.testing.assert_array_equal(np.array(row["action"])[:, :6], np.arange(24).reshape(4, 6))
    np.testing.assert_array_equal(np.array(row["action"])[:, 6], np.float32(values["actions"]))
    assert row["state"] is None
    assert messages(report) == ["no state was converted"]


def test_a_batch_in_fortran_order(tmp_path, check_dataset):
    values = arrays(2, 3)
    write(tmp_path / "data" / "a.npz", **{key: np.asfortranarray(value) for key, value in values.items()})
    convert(tmp_path / "data", tmp_path / "out")
    rows = check_dataset(tmp_path / "out")["train"]
    np.testing.assert_array_equal([row["state"] for row in rows], np.float32(values["states"]))


@pytest.mark.parametrize("lead", [(4,), (2, 4)])
def test_the_last_image_may_go_without_an_action(tmp_path, check_dataset, lead):
    values = arrays(*lead)
    write(tmp_path / "data" / "a.npz", **values | {"actions": values["actions"][..., :-1]})
    report = convert(tmp_path / "data", tmp_path / "out")
    assert {row["num_steps"] for row in check_dataset(tmp_path / "out")["train"]} == {3}
    assert messages(report) == [WITHOUT_LAST]


@pytest.mark.parametrize(
    ("lead", "texts", "expected", "changes"),
    [
        ((3,), "push", [["push"]], False),
        ((3,), ["push", "shove"], [["push", "shove"]], False),
        ((3,), ["push"] * 3, [["push"]], False),
        ((3,), ["", "push", "pull"], [["push"]], True),
        ((3,), [["push", "shove"]] * 3, [["push", "shove"]], False),
        ((2, 3), ["push", "pull"], [["push"], ["pull"]], False),
        ((2, 3), [["push", "shove"], ["pull", ""]], [["push", "shove"], ["pull"]], False),
        ((2, 3), [["push"] * 3, ["pull", "pull", "lift"]], [["push"], ["pull"]], True),
        ((2, 3), [[b"push"] * 3, [b"pull"] * 3], [["push"], ["pull"]], False),
    ],
)
def test_several_texts_are_kept_and_a_change_is_said(tmp_path, lead, texts, expected, changes):
    source = write(tmp_path / "in" / "a.npz", observations=images(*lead), language=np.array(texts)).parent
    builder = Npz(tmp_path / "out", NpzSettings(source=str(source), control_rate=5.0))
    (part,) = builder.sources()
    outcome = SourceOutcome(part.name)
    episodes = list(builder.read(part, outcome))
    assert [[each.language_instruction, *each.other_instructions] for each in episodes] == expected
    assert outcome.warnings == ([CHANGES] if changes else [])


def test_language_of_the_file_comes_before_that_of_a_sidecar(tmp_path, check_dataset):
    source = tmp_path / "data"
    write(source / "a.npz", **arrays(2, 3), instruction=np.array(["push", "pull"]))
    write(source / "b.npz", **arrays(3), instruction=np.array([b"lift"] * 3))
    write(source / "c.npz", **arrays(3), instruction=np.array(""))
    write(source / "d.npz", **arrays(2, 3), instruction=np.array(["one for all"] * 3))
    write(source / "e.npz", **arrays(3), instruction=np.arange(3))
    (source / "language.json").write_text(json.dumps({"a": "no", "c": "from beside", "gone": "x"}))
    (source / "notes.txt").write_text("about the robot")
    report = convert(source, tmp_path / "out")
    rows = check_dataset(tmp_path / "out")["train"]
    assert [row["language_instruction"] for row in rows] == ["push", "pull", "lift", "from beside"]
    assert left_out(report) == {
        "d.npz": "array 'instruction' has 3 texts for 2 trajectories",
        "e.npz": "array 'instruction' is int64 [3], which is not text",
    }
    assert messages(report) == [
        "language.json: 1 of 3 entries name no recording, such as 'gone'",
        "1 files that are not .npz were ignored, such as notes.txt",
    ]


def test_damage_costs_only_its_file(tmp_path, check_dataset):
    source, values = tmp_path / "data", arrays(4)
    write(source / "good.npz", **values)
    truncated = write(source / "truncated.npz", **values)
    truncated.write_bytes(truncated.read_bytes()[:-60])
    flipped = write(source / "flipped.npz", **values)
    content = bytearray(flipped.read_bytes())
    content[600] ^= 255
    flipped.write_bytes(content)
    (source / "empty.npz").write_bytes(b"")
    (source / "text.npz").write_text("not an archive")
    (source / "gone.npz").symlink_to("nowhere.npz")
    (source / "link").symlink_to(source)
    os.mkfifo(source / "pipe.npz")
    shutil.copy(source / "good.npz", os.fsencode(source) + b"/bad_\xff.npz")
    (source / "folder.npz").mkdir()
    write(source / "objects.npz", **values | {"actions": np.array([{"a": 1}] * 4, object)})
    write(source / "long.npz", **values | {"actions": np.zeros(6)})
    write(source / "other_states.npz", **values | {"states": np.zeros((3, 3))})
    write(source / "nan.npz", **values | {"actions": np.array([0, 1, np.nan, 3])})
    write(source / "overflow.npz", **values | {"actions": np.array([0, 1, 1e300, 3])})
    write(source / "wide.npz", **values | {"actions": np.zeros((4, 2))})
    write(source / "float.npz", **values | {"observations": np.zeros((4, 8, 12, 3), np.float32)})
    write(source / "still.npz", **{key: value[:1] for key, value in values.items()})
    write(source / "nothing.npz", **{key: value[:0] for key, value in values.items()})
    write(source / "blind.npz", actions=np.zeros(4))
    report = convert(source, tmp_path / "out")
    assert [row["source_file"] for row in check_dataset(tmp_path / "out")["train"]] == ["good.npz"]
    reasons = left_out(report)
    assert reasons.pop("truncated.npz").startswith("the file is damaged: ")
    assert reasons.pop("empty.npz").startswith("the file is damaged: ")
    assert reasons.pop("text.npz").startswith("the file is damaged: File is not a zip file")
    assert "CRC" in reasons.pop("flipped.npz")
    assert reasons.pop("bad_\\xff.npz") == "its name is not valid UTF-8; rename it"
    assert {reasons.pop(f"{name}.npz") for name in ("gone", "pipe")} == {"is not a file, or is a link without a target"}
    assert messages(report)[0] == "1 links lead to folders that are read already or hold this one, such as 'link'"
    assert "there is no array 'observations'; there are: actions float64 [4]" in reasons.pop("blind.npz")
    assert reasons == {
        "objects.npz": "array 'actions' holds Python objects, which are not read since they may run code",
        "long.npz": "array 'actions' is float64 [6], but 'observations' is uint8 [4, 8, 12, 3]",
        "other_states.npz": "array 'states' is float64 [3, 3], but 'observations' is uint8 [4, 8, 12, 3]",
        "nan.npz": "episode nan.npz/000000: some action is not finite",
        "overflow.npz": "episode overflow.npz/000000: some action is not finite",
        "wide.npz": "episode wide.npz/000000: not every action has 1 numbers",
        "float.npz": "array 'observations' is float32 [4, 8, 12, 3], but images are uint8 [T, H, W, 3] or "
        "[N, T, H, W, 3]",
        "still.npz": "episode still.npz/000000: has 1 step(s), and a pair of frames needs 2",
        "nothing.npz": "array 'observations' is empty: uint8 [0, 8, 12, 3]",
    }


def test_an_object_array_is_never_unpickled(tmp_path):
    path = write(tmp_path / "a.npz", x=np.array([None, 1], object))
    with NpzArchive(path) as archive, pytest.raises(ValueError, match="may run code"):
        archive.read("x")


def test_a_header_that_promises_more_than_the_file_holds(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("observations.npy", stream.getvalue() + bytes(100))
    with pytest.raises(ConversionError, match="'observations' does not have the number of bytes of uint8"):
        convert(tmp_path, tmp_path.parent / "out")


@pytest.mark.parametrize("position", range(0, 1000, 37))
def test_any_flipped_byte_ends_in_the_report(tmp_path, check_dataset, position):
    write(tmp_path / "data" / "a.npz", **arrays(2))
    path = write(tmp_path / "data" / "b.npz", **arrays(2))
    content = bytearray(path.read_bytes())
    content[-1 - position] ^= 0b01010101
    path.write_bytes(content)
    convert(tmp_path / "data", tmp_path / "out")
    assert check_dataset(tmp_path / "out")["train"]


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (
            {"a": images(4), "b": images(4)},
            {},
            r"a.npz: more than one array is uint8 .*`camera` from: a uint8 ",
        ),
        (
            {"a": np.zeros((4, 8, 8, 3))},
            {},
            r"no array is uint8 .*`camera` from: a float64 \[4, 8, 8, 3\]",
        ),
        ({"a": np.zeros((4, 8, 8, 3))}, {"camera": ("a",)}, r"'a' is float64 \[4, 8, 8, 3\], but images are uint8"),
        ({"a": images(4)}, {"camera": ("b",)}, r"there is no array 'b'; there are: a uint8"),
        ({"a": images(4)}, {"action": ("torque",)}, "there is no array 'torque'"),
        (
            {"a": images(4), "words": np.array(["x"] * 4)},
            {"state": ("words",)},
            r"'words' is <U1 .4., which are",
        ),
        ({"a": images(4), "objects": np.array([None] * 4)}, {"state": ("objects",)}, "holds Python objects"),
        ({"a/b": images(4), "a.b": images(4)}, {"camera": ("a/b", "a.b")}, "do not have different names"),
    ],
)
def test_what_cannot_be_chosen(tmp_path, values, settings, message):
    write(tmp_path / "data" / "a.npz", **values)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "data", tmp_path / "out", **settings)


def test_folders_without_trajectories(tmp_path):
    with pytest.raises(ConversionError, match="source folder .*gone does not exist"):
        convert(tmp_path / "gone", tmp_path / "out")
    (tmp_path / "data").mkdir()
    with pytest.raises(ConversionError, match="source folder .*data holds no .npz file"):
        convert(tmp_path / "data", tmp_path / "out")
    with pytest.raises(ConversionError, match="control_rate must be a positive number"):
        NpzSettings(source="data", control_rate=0.0)


def test_sample_of_two_frames(tmp_path, sample_data, check_dataset):
    report = convert(sample_data / "droid_franka_npz", tmp_path / "out", image_size=64)
    (row,) = check_dataset(tmp_path / "out")["train"]
    assert (row["num_steps"], np.shape(row["state"]), row["action"]) == (2, (2, 7), None)
    assert messages(report) == ["no action was converted"]
