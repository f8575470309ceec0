"""Tables of known RLDS datasets, and where a dataset is found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.convert.rlds.dataset import locate
from como_jax.convert.rlds.entries import OPEN_X, find_entry, read_table
from como_jax.errors import ConversionError

TINY = """
[tiny]
cameras = ["wrist", "main"]
action = ["action/grip", "action/move"]
action_meaning = "gripper, then position"
control_rate = 4
"""


def convert(source: Path | str, out: Path, **settings: Any) -> dict[str, Any]:
    return Rlds(out, RldsSettings(source=str(source), **settings)).convert()


@pytest.fixture
def source(make_rlds, rlds_steps) -> Path:
    return make_rlds({"train": [[rlds_steps(3, 0), rlds_steps(3, 1)]]})


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "my tables" / "my.toml"
    path.parent.mkdir()
    path.write_text(TINY)
    return path


def test_the_open_x_table_is_sound():
    table = read_table(OPEN_X)
    assert len(table) >= 30
    assert {"bridge_dataset", "bridge", "fractal20220817_data", "droid", "kuka", "bc_z", "language_table"} <= set(table)
    for name, entry in table.items():
        assert entry.cameras and entry.action and entry.action_meaning and entry.language, name
        assert not any("depth" in camera for camera in entry.cameras), name
        assert all(key.split("/")[0] in ("action", "action_dict") for key in entry.action), name
        assert all(key.startswith("observation/") for key in entry.state), name
        assert len({*entry.cameras, *entry.action, *entry.state}) == len(entry.cameras + entry.action + entry.state)
        assert entry.source and all(address.startswith("https://") for address in entry.source), name
        assert entry.control_rate is None or 0.5 <= entry.control_rate <= 60, name
    assert [name for name, entry in table.items() if entry.control_rate is None] == [
        "stanford_mask_vit_converted_externally_to_rlds"
    ]


def test_sample_bridge_needs_no_flags(tmp_path, sample_data, check_dataset, read_json):
    report = convert(sample_data / "bridge_rlds", tmp_path / "out")
    tables = check_dataset(tmp_path / "out")
    assert {split: len(rows) for split, rows in tables.items()} == {"train": 12, "val": 3}
    assert np.shape(tables["train"][0]["action"]) == (10, 7)
    assert report["warnings"] == []
    used = {"entry": "bridge_dataset", "control_rate": 5.0, "camera": ("image_0",), "action": ("action",)}
    assert used.items() <= report["settings"].items()
    metadata = read_json(tmp_path / "out" / "metadata.json")
    assert metadata["entry"] == "bridge_dataset"
    assert "gripper: 1 open, 0 closed" in metadata["action_meaning"]


def test_an_own_entry_is_used_and_flags_override_it(tmp_path, source, table, check_dataset):
    report = convert(source, tmp_path / "out", table=str(table), action=("action/move",))
    (row, *_) = check_dataset(tmp_path / "out")["train"]
    assert row["control_rate"] == 4.0
    assert np.shape(row["action"]) == (3, 2)
    assert row["language_instruction"] == "do task 0"
    assert tfds.builder_from_directory(tmp_path / "out").info.metadata["cameras"] == ["wrist", "main"]
    used = {"entry": "tiny", "table": str(table), "camera": ("wrist", "main"), "action": ("action/move",)}
    assert used.items() <= report["settings"].items()


def test_notes_of_an_entry_are_passed_on(tmp_path, source, table):
    table.write_text(TINY + 'notes = "The gripper lags."\n')
    report = convert(source, tmp_path / "out", table=str(table))
    assert "The gripper lags." in [warning["message"] for warning in report["warnings"]]


def test_an_entry_is_found_by_the_name_of_the_folder(tmp_path, source, table):
    table.write_text(TINY.replace("[tiny]", "[small]"))
    with pytest.raises(ConversionError, match="my.toml has no entry tiny or 1.0.0; .entry. chooses another; .* small"):
        convert(source, tmp_path / "out", table=str(table))
    shutil.copytree(source, tmp_path / "small" / "1.0.0")
    report = convert(tmp_path / "small" / "1.0.0", tmp_path / "out", table=str(table))
    assert report["settings"]["entry"] == "small"
    assert convert(source, tmp_path / "out2", table=str(table), entry="small")["episodes"] == report["episodes"]


def test_control_rate_is_asked_for_where_nobody_knows_it(tmp_path, source, table):
    message = "^rlds needs .control_rate.: RLDS does not record how many steps a second has"
    with pytest.raises(ConversionError, match=f"{message}$"):
        convert(source, tmp_path / "out", camera=("main",))
    table.write_text(TINY.replace("control_rate = 4", ""))
    with pytest.raises(ConversionError, match=f"{message}, nor does the entry 'tiny'$"):
        convert(source, tmp_path / "out", table=str(table))


def test_an_entry_that_does_not_fit_the_dataset_is_named(tmp_path, source):
    message = r"no camera 'image_0' in this dataset; there are: main, wrist \(entry 'bridge_dataset' of open_x.toml;"
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", entry="bridge_dataset")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[tiny", "my.toml is not a TOML table: "),
        ("tiny = 3", r"my.toml, entry 'tiny' is not a section; write \[NAME\] above its fields"),
        ("[tiny]\ncamera = ['a']", "entry 'tiny': unknown field 'camera'; did you mean cameras?"),
        ("[tiny]\nfps = 3", "entry 'tiny': unknown field 'fps'; there are cameras, action, "),
        ("[tiny]\ncameras = 'main'", "entry 'tiny': cameras must be a list of strings, got 'main'"),
        ("[tiny]\nstate = [3]", r"entry 'tiny': state must be a list of strings, got \[3\]"),
        ("[tiny]\nlanguage = true", "entry 'tiny': language must be a string, got True"),
        ("[tiny]\ncontrol_rate = 0", r"control_rate must be a positive number of steps per second \(Hz\), got 0"),
        ("[tiny]\ncontrol_rate = true", "control_rate must be a positive number .*, got True"),
        ("[tiny]\ncontrol_rate = nan", "control_rate must be a positive number .*, got nan"),
    ],
)
def test_mistakes_in_a_table_are_named(table, content, message):
    table.write_text(content)
    with pytest.raises(ConversionError, match=message):
        read_table(table)


def test_tables_and_entries_that_are_missing(tmp_path):
    with pytest.raises(ConversionError, match="cannot read the table .*none.toml: No such file"):
        read_table(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConversionError, match="bad.toml is not a TOML table"):
        read_table(tmp_path / "bad.toml")
    with pytest.raises(ConversionError, match="has no entry 'bridge_datset'; did you mean bridge_dataset"):
        find_entry(read_table(OPEN_X), OPEN_X, "bridge_datset")


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Two datasets, one in several versions, one with configs."""
    for path in ("robot/0.9.0", "robot/0.10.0", "arm/left/1.0.0", "arm/right/2.0.0", "arm/right/2.1.0"):
        (tmp_path / "data" / path).mkdir(parents=True)
        (tmp_path / "data" / path / "dataset_info.json").touch()
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("robot:0.9.0", "robot/0.9.0"),
        ("robot", "robot/0.10.0"),
        ("arm/left", "arm/left/1.0.0"),
        ("arm/right:2.0.0", "arm/right/2.0.0"),
    ],
)
def test_datasets_are_found_by_name(data_dir, name, path):
    found = locate(name, str(data_dir))
    assert (Path(found.directory), found.is_named) == (data_dir / path, True)


def test_the_newest_version_is_taken_and_named(data_dir):
    for source in ("robot", str(data_dir / "robot")):
        note = locate(source, str(data_dir)).note
        assert note == f"took version 0.10.0 of {data_dir}/robot, the newest of 0.9.0, 0.10.0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("robots", "robots is neither a folder nor a dataset in .*data; did you mean robot?"),
        ("lamp", "lamp is neither a folder nor a dataset in .*data; there are arm, robot"),
        ("robot:1.0.0", "data/robot has no version 1.0.0; there are 0.10.0, 0.9.0"),
        ("arm", "choose one of the datasets in .*data/arm: "),
        ("arm/up", "source folder .*data/arm/up holds no RLDS dataset"),
        ("no/such/folder", "source folder no/such/folder does not exist"),
    ],
)
def test_names_without_a_dataset(data_dir, name, message):
    with pytest.raises(ConversionError, match=message):
        locate(name, str(data_dir))


def test_a_bucket_that_cannot_be_reached_gives_one_clear_error(monkeypatch):
    def refuse(self: Any) -> bool:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(type(locate.__globals__["epath"].Path("gs://bucket/x")), "is_dir", refuse)
    with pytest.raises(ConversionError, match="source gs://bucket/x cannot be reached: Please install gcsfs"):
        locate("gs://bucket/x")


def test_a_named_dataset_is_converted(tmp_path, source, table):
    settings = {"table": str(table), "data_dir": str(source.parents[1])}
    report = convert("tiny:1.0.0", tmp_path / "out", **settings)
    assert report["settings"]["source"] == str(source)
    with pytest.raises(ConversionError, match="there is no .*nowhere to look for a dataset of this name"):
        convert("tiny", tmp_path / "out2", data_dir=str(tmp_path / "nowhere"))
