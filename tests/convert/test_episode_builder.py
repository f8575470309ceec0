"""The shared writer, with sources that live in memory."""

import copy
from pathlib import Path

import numpy as np
import pytest
from fake_builder import FakeBuilder, FakeSettings

from como_jax.convert import builder as base
from como_jax.convert.sources import Source, assign_splits, group_sources, make_shards
from como_jax.convert.video_folder.builder import VideoFolder, VideoFolderSettings
from como_jax.data.episode_table import EpisodeTable
from como_jax.errors import OutputError
from como_jax.ownership import MARK


def convert(out: Path, *behaviours: str, **options: bool) -> dict:
    return FakeBuilder(out, FakeSettings(behaviours=behaviours)).convert(**options)


def test_records_tables_and_shards_agree(tmp_path, check_dataset):
    FakeBuilder(tmp_path / "out", FakeSettings()).convert()
    tables = check_dataset(tmp_path / "out")
    assert len(tables["train"]) == 18
    assert len(tables["val"]) == 2
    assert len(EpisodeTable(tmp_path / "out", "train").groups) == 3
    np.testing.assert_allclose(tables["train"][0]["motion"], [0, 0.1, 0.1, 0.1, 0.1], atol=0.003)


def test_output_directory_holds_the_dataset_alone(tmp_path):
    convert(tmp_path / "out", "good", "good")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    suffixes = {path.name.split("-")[0] for path in (tmp_path / "out").iterdir()}
    names = {MARK, "conversion_report.json", "dataset_info.json", "features.json", "metadata.json", "statistics.json"}
    assert suffixes == {"episodes", "out"} | names


def test_broken_parts_are_left_out_and_counted(tmp_path, check_dataset, read_json):
    behaviours = ("good", "broken", "ends early", "left out", "not finite", "one step", "warns", "warns")
    convert(tmp_path / "out", *behaviours)
    tables = check_dataset(tmp_path / "out")
    assert sum(map(len, tables.values())) == 2 * 4 + 3
    report = read_json(tmp_path / "out" / "conversion_report.json")
    assert report["sources"] == {"found": 8, "converted": 3, "partially_converted": 4, "left_out": 1}
    assert report["left_out"] == [{"source": "01_broken", "reasons": ["damaged header"]}]
    assert [entry["reasons"][0] for entry in report["partially_converted"]] == [
        "ends early",
        "record 1: unreadable",
        "episode 04_not finite/1: some action is not finite",
        "episode 05_one step/1: has 1 step(s), and a pair of frames needs 2",
    ]
    assert report["warnings"] == [
        {"message": "about everything", "count": 1, "examples": []},
        {"message": "dark images", "count": 2, "examples": ["06_warns", "07_warns"]},
    ]


def test_a_split_that_lost_all_its_sources_is_dropped(tmp_path, check_dataset):
    class FixedSplits(FakeBuilder):
        def sources(self) -> list[Source]:
            return [Source("0_good", "train"), Source("1_broken", "val")]

    report = FixedSplits(tmp_path / "out", FakeSettings()).convert()
    assert list(check_dataset(tmp_path / "out")) == ["train"]
    assert not list((tmp_path / "out").glob("*val*"))
    assert report["warnings"][1]["message"] == "there is no split 'val': all of its sources were left out"


def test_a_shard_that_lost_all_its_sources_does_not_shift_the_others(tmp_path, check_dataset):
    settings = FakeSettings(behaviours=(*["good"] * 4, *["broken"] * 4, *["good"] * 4), validation_fraction=0)
    FakeBuilder(tmp_path / "out", settings).convert()
    assert len(check_dataset(tmp_path / "out")["train"]) == 16
    assert len(list((tmp_path / "out").glob("*array_record*"))) == 3


def test_nothing_left_is_an_error_and_no_dataset(tmp_path):
    with pytest.raises(base.ConversionError) as error:
        convert(tmp_path / "out", *["broken"] * 5)
    assert str(error.value) == (
        "none of the 5 sources could be converted: 00_broken (damaged header), 01_broken (damaged header), "
        "02_broken (damaged header) and 2 more"
    )
    assert not any(tmp_path.iterdir())


def test_a_mistake_in_a_builder_is_not_hidden_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="mistake"):
        convert(tmp_path / "out", "good", "good", "bug", "bug")
    assert not any(tmp_path.iterdir())


def test_existing_output_is_kept_until_the_new_one_is_complete(tmp_path, check_dataset):
    out = tmp_path / "out"
    convert(out, "good", "good")
    with pytest.raises(OutputError, match="exists already; `overwrite` replaces it"):
        convert(out, "good", "good", "good")
    with pytest.raises(base.ConversionError, match="none of the 2"):
        convert(out, "broken", "broken", overwrite=True)
    assert sum(map(len, check_dataset(out).values())) == 4
    convert(out, "good", "good", "good", overwrite=True)
    assert sum(map(len, check_dataset(out).values())) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_what_is_not_a_dataset(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    for out in (tmp_path, tmp_path / "."):
        with pytest.raises(OutputError, match="was not made by this project"):
            convert(out, "good", overwrite=True)
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "empty", "good")
    with pytest.raises(OutputError, match="is not a directory"):
        convert(tmp_path / "photo.jpg", "good", overwrite=True)


def test_relative_output(tmp_path, monkeypatch, check_dataset):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    convert(Path("deep/out"), "good", "good")
    check_dataset(tmp_path / "inside" / "deep" / "out")


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to .*file/out"):
        convert(tmp_path / "file" / "out", "good")


def test_two_conversions_are_byte_identical(tmp_path):
    for name in ("a", "b"):
        FakeBuilder(tmp_path / name / "out", FakeSettings()).convert()
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]


def test_statistics_are_those_of_the_training_steps(tmp_path, check_dataset, read_json):
    FakeBuilder(tmp_path / "out", FakeSettings()).convert()
    rows = check_dataset(tmp_path / "out")["train"]
    states = np.concatenate([np.array(row["state"]) for row in rows])
    statistics = read_json(tmp_path / "out" / "statistics.json")
    state = statistics["state"]
    assert state["count"] == len(states) == statistics["splits"]["train"]["num_steps"]
    np.testing.assert_allclose(state["mean"], states.mean(0))
    np.testing.assert_allclose(state["std"], states.std(0))
    np.testing.assert_allclose(state["q99"], np.quantile(states, 0.99, axis=0))
    assert (state["min"], state["max"]) == ([0.0], [4.0])
    assert statistics["action"]["mean"] == [0.5, 0.5]
    assert statistics["action"]["std"] == [0.0, 0.0]
    motion = np.concatenate([row["motion"][1:] for row in rows])
    assert statistics["motion"]["count"] == len(motion)
    np.testing.assert_allclose(statistics["motion"]["mean"], motion.mean(), rtol=1e-6)
    np.testing.assert_allclose(statistics["motion"]["q90"], np.quantile(motion, 0.9), rtol=1e-6)
    assert statistics["control_rates"] == [{"control_rate": 4.0, "episodes": 20}]
    assert statistics["splits"]["val"] == {"num_episodes": 2, "num_steps": 8, "seconds": 2.0}


def test_a_copy_in_a_worker_yields_the_same_episodes(tmp_path):
    original = FakeBuilder(tmp_path / "out", FakeSettings())
    source = original.sources()[3]
    for ours, theirs in zip(original.episodes(source), copy.copy(original).episodes(source), strict=True):
        assert ours.episode_id == theirs.episode_id
        assert [step.images for step in ours.steps] == [step.images for step in theirs.steps]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(1, 0.5, 0), (2, 0.1, 1), (2, 0.9, 1), (20, 0.1, 2), (20, 0, 0)]
)
def test_number_of_validation_sources(count, fraction, expected):
    sources = [Source(f"{index}.mp4") for index in range(count)]
    splits = [source.split for source in assign_splits(sources, fraction, seed=0)]
    assert splits.count("val") == expected
    assert splits.count("train") == count - expected


def test_split_depends_on_names_and_seed_alone():
    sources = [Source(f"{index}.mp4") for index in range(50)]

    def draw(sources, seed):
        return {source.name for source in assign_splits(sources, 0.2, seed) if source.split == "val"}

    assert draw(sources, 0) == draw(sources[::-1], 0)
    assert draw(sources, 0) != draw(sources, 1)
    decided = [Source("a", "val"), Source("b", "train")]
    assert assign_splits(decided, 0.5, 0) == decided


def test_shards_are_limited_in_sources_and_bytes():
    sources = [Source(str(size), num_bytes=size) for size in (10, 10, 10, 95, 200, 1)]
    shards = group_sources(sources, max_sources=2, max_bytes=100)
    assert [[source.num_bytes for source in shard] for shard in shards] == [[10, 10], [10], [95], [200], [1]]


def test_few_sources_make_several_shards_and_many_make_full_ones():
    def shards(count: int, num_bytes: int = 0) -> list[int]:
        sources = [Source(f"{index}", "train", num_bytes=num_bytes) for index in range(count)]
        return [len(shard.sources) for shard in make_shards(sources, ("train", "val"), 2**30)]

    assert shards(30) == [4] * 7 + [2]
    assert shards(30, num_bytes=2**26) == [1] * 30
    assert len(shards(140_000)) == 511
    # Two terabytes in files of 256 MB: 1 GiB a shard.
    assert set(shards(2**13, num_bytes=2**28)) == {4}
    assert shards(0) == []


@pytest.mark.parametrize(
    ("path", "name"), [("a/Bridge V2", "bridge_v2"), ("a/3hz-clips/", "dataset_3hz_clips"), ("ok", "ok")]
)
def test_dataset_name_from_a_path(path, name):
    assert base.dataset_name(path) == name


def test_output_inside_the_source_would_become_a_source(tmp_path, make_video):
    make_video(tmp_path / "clips" / "a.mp4")
    settings = VideoFolderSettings(source=str(tmp_path / "clips"))
    with pytest.raises(OutputError, match="clips/new/out lies inside `source` .*clips; choose"):
        VideoFolder(tmp_path / "clips" / "new" / "out", settings).convert()
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["a.mp4"]


def test_invalid_settings():
    with pytest.raises(base.ConversionError, match="not a valid dataset name"):
        FakeBuilder("out", FakeSettings(), name="no spaces")
    with pytest.raises(base.ConversionError, match=r"validation_fraction must lie in \[0, 1\), got 1.5"):
        FakeSettings(validation_fraction=1.5)
    with pytest.raises(base.ConversionError, match="image_size"):
        FakeSettings(image_size=0)
