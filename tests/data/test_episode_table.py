"""Tests of the one episode table of a split: what it joins, what it notices, and what stands in its place."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.data import episode_table, parquet
from como_jax.data.clips import ClipConfig
from como_jax.data.episode_table import (
    EpisodeTable,
    ShardSizes,
    read_episode_table,
    read_part,
    write_episode_table,
    write_episodes,
)
from como_jax.data.identity import identify
from como_jax.data.mixture import MixtureEntry, MixturePart
from como_jax.data.sources import EpisodeSource, flatten_steps
from como_jax.errors import DatasetError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose training episodes lie in four shards."""
    directory = tmp_path_factory.mktemp("datasets") / "shards"
    settings = {"episodes": 14, "image_size": 64, "validation_fraction": 0.1}
    BUILDERS["tabletop"](directory, make_settings("tabletop", settings)).convert()
    return directory


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


def split_up(directory: Path) -> None:
    """Gives a dataset a table a shard in place of the one, as earlier versions did."""
    for split in ("train", "val"):
        tables = list(EpisodeTable(directory, split).read())
        (directory / f"episodes-{split}.parquet").unlink()
        for number, table in enumerate(tables):
            name = f"episodes-{split}-{number:05d}-of-{len(tables):05d}.parquet"
            pq.write_table(table.drop_columns(["latent_codes", "latent_valid"]), directory / name)


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "episode_id": f"episode {start + number}",
            "source_file": "",
            "language_instruction": "",
            "control_rate": 5.0,
            "num_steps": 2,
            "motion": [0.0, 0.5],
        }
        for number in range(count)
    ]


def test_a_dataset_has_one_table_a_split_however_many_shards(shards: Path) -> None:
    assert sorted(path.name for path in shards.glob("episodes-*")) == ["episodes-train.parquet", "episodes-val.parquet"]
    files = sorted(shards.glob("*-train.array_record-*"))
    table = EpisodeTable(shards, "train")
    assert len(files) == len(table.groups) == len(table.shards.records) == 4
    assert table.shards.num_bytes.tolist() == [path.stat().st_size for path in files]
    source = EpisodeSource(shards, "train")
    assert list(source.record_files) == [str(path) for path in files]
    assert sum(table.shards.records) == len(source) == len(source.motion) == len(source.action)
    assert [group.num_episodes for group in table.groups] == [4, 4, 4, 1]


def test_many_parts_share_groups_and_empty_ones_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, sizes = [epath.Path(tmp_path / f"{number}.parquet") for number in range(10)], [1, 0, 2, 3, 0, 0, 4, 1, 1, 1]
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        write_episodes(part, rows(size, 10 * number))
    everything = [row["episode_id"] for number, size in enumerate(sizes) for row in rows(size, 10 * number)]
    for most_groups, group_steps, bytes_at_once, expected in (
        (512, 2**18, 2**26, [1, 2, 3, 4, 1, 1, 1]),
        (512, 2**18, 1, [1, 2, 3, 4, 1, 1, 1]),
        (4, 2**18, 2**26, [3, 3, 6, 1]),
        (1, 2**18, 2**26, [13]),
        (1, 8, 2**26, [6, 4, 3]),
    ):
        monkeypatch.setattr(parquet, "_BYTES_AT_ONCE", bytes_at_once)
        monkeypatch.setattr(episode_table, "_MOST_GROUPS", most_groups)
        monkeypatch.setattr(episode_table, "_GROUP_STEPS", group_steps)
        sizes, at_once = ShardSizes(np.array([2]), np.array([7])), episode_table.share_groups(len(parts))
        write_episode_table(tmp_path / "episodes-train.parquet", map(read_part, parts), sizes, at_once)
        table = EpisodeTable(tmp_path, "train")
        assert [group.num_episodes for group in table.groups] == expected
        assert [len(flatten_steps(group["motion"])) for group in table.read(["motion"])] == [2 * n for n in expected]
        assert [len(table.read_group(number)) for number in range(len(expected))] == expected
        assert read_episode_table(tmp_path, "train", ["episode_id"])["episode_id"].to_pylist() == everything
        assert table.shards.num_bytes.tolist() == [7]


def test_datasets_of_earlier_versions_are_read(shards: Path, copy: Path, monkeypatch, caplog) -> None:
    split_up(copy)
    monkeypatch.setattr(episode_table, "_FEW_TABLES", 3)
    with caplog.at_level(logging.WARNING):
        old = EpisodeSource(copy, "train")
    assert "has 4 episode tables where there is one today" in caplog.text
    new = EpisodeSource(shards, "train")
    assert [group.num_episodes for group in old.table.groups] == [4, 4, 4, 1] and old.table.shards is None
    assert [*old.episode_id] == [*new.episode_id] and [*old.other_instructions] == [*new.other_instructions]
    np.testing.assert_array_equal(old.motion, new.motion)
    assert old.latent_motion is None and old.latent_valid is None
    # The identity does not depend on how the table is stored.
    assert identify(copy) == identify(shards)
    [first, *_] = sorted(copy.glob("episodes-train-*"))
    pq.write_table(pq.read_table(first).drop_columns(["motion"]), first)
    with pytest.raises(DatasetError, match=f"{first.name} cannot be read; convert the dataset again: .*motion"):
        _ = EpisodeSource(copy, "train").motion


def other_lengths(copy: Path) -> str:
    info = json.loads((copy / "dataset_info.json").read_text())
    [split] = [split for split in info["splits"] if split["name"] == "train"]
    lengths = [int(length) for length in split["shardLengths"]]
    split["shardLengths"] = [str(lengths[0]), str(lengths[1] - 1), str(lengths[2] + 1), str(lengths[3])]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    return rf"made for {lengths[1]} records in \S*-00001-of-00004, where dataset_info.json says {lengths[1] - 1}"


def other_count(copy: Path) -> str:
    info = json.loads((copy / "dataset_info.json").read_text())
    [split] = [split for split in info["splits"] if split["name"] == "train"]
    split["shardLengths"] = split["shardLengths"][:3]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    return "'train' was made for 4 files of records, and there are 3"


def other_table(copy: Path) -> str:
    """Written by another program, without what the files of records hold."""
    table = read_episode_table(copy, "train").slice(1)
    pq.write_table(table.replace_schema_metadata(None), copy / "episodes-train.parquet")
    return r"the episode table of split 'train' lists \d+ steps but there are \d+ records"


def no_table(copy: Path) -> str:
    (copy / "episodes-train.parquet").unlink()
    return "no episode table episodes-train.parquet, so it is no dataset of this project; .*by the builder `rlds`"


@pytest.mark.parametrize("make", [other_lengths, other_count, other_table, no_table])
def test_a_table_that_does_not_fit_is_named(copy: Path, make: Callable[[Path], str]) -> None:
    message = make(copy)
    with pytest.raises(DatasetError, match=message):
        EpisodeSource(copy, "train")


def test_records_of_another_conversion_are_named_when_they_are_opened(copy: Path) -> None:
    first, second, *_ = sorted(copy.glob("*-train.array_record-*"))
    source = EpisodeSource(copy, "train")
    assert source.read_jpegs([0])
    with second.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DatasetError, match=rf"{second.name} has \d+ bytes where the episode table was made for"):
        source.read_jpegs([int(source.table.shards.records[0])])
    assert source.read_jpegs([0])
    problems = EpisodeSource(copy, "train").check_files()
    assert len(problems) == 1 and second.name in problems[0] and "bytes" in problems[0]
    first.rename(copy / first.name.replace("-of-00004", "-of-00005"))
    problems = EpisodeSource(copy, "train").check_files()
    assert len(problems) == 3 and "is missing" in problems[0] and "-of-00005" in problems[2]


def test_a_table_that_was_replaced_meanwhile_is_not_mixed_with_the_old_one(copy: Path) -> None:
    source = EpisodeSource(copy, "train")
    assert len(source.motion)
    rows = [{**row, "action": None} for row in read_episode_table(copy, "train").to_pylist()]
    write_episodes(copy / "episodes-train.parquet", rows)
    with pytest.raises(DatasetError, match="episodes-train.parquet was replaced while it was in use"):
        _ = source.action
    assert EpisodeSource(copy, "train").action is None


def test_nothing_is_read_before_it_is_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start of pretraining does not read motion and actions, which grow with the dataset."""
    asked: list[str] = []
    read = episode_table.read_groups

    def spy(path: epath.Path, columns: list[str], numbers: list[int] | None = None):
        asked.extend(columns)
        return read(path, columns, numbers)

    monkeypatch.setattr(episode_table, "read_groups", spy)
    part = MixturePart.open(MixtureEntry(str(copy)), "train", ClipConfig(0.2))
    assert len(part.index) and part.source.read_jpegs([0])
    assert set(asked) == {"num_steps", "control_rate"}
    assert part.source.action.shape == (len(part.source), 4) and asked[-1] == "action"
