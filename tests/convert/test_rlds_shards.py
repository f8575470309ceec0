"""RLDS: files that dataset_info.json names are compared with those in the folder."""

from __future__ import annotations

import gzip
import shutil

import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from como_jax.convert.report import SourceOutcome
from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.convert.rlds.shards import compare_shards

NAMED = [f"made-train.tfrecord-{index:05d}-of-00002" for index in range(2)]


def test_files_under_another_name_of_the_dataset_are_found():
    present = ["other-train.tfrecord-00000-of-00002", NAMED[1], "features.json", "other-val.tfrecord-00001-of-00002"]
    shards = compare_shards({"train": NAMED}, present)
    assert shards.found == {NAMED[0]: "other-train.tfrecord-00000-of-00002"}
    assert shards.unnamed == ["other-val.tfrecord-00001-of-00002"]
    assert len(shards.warnings()) == 2


def test_one_complete_set_of_another_division_is_taken():
    present = [f"other-train.array_record-{index:05d}-of-00003" for index in range(3)]
    shards = compare_shards({"train": NAMED, "val": ["made-val.tfrecord-00000-of-00001"]}, [*present, "features.json"])
    assert shards.divided == {"train": present} and shards.unnamed == [] and shards.found == {}
    (said,) = shards.warnings()
    assert "divides split 'train' in another way: the 3 files in the folder were converted, such as " in said
    # Neither a file too few or too many, nor one of several sets, nor one beside files that are named.
    for names in (
        present[:2],
        [*present, "made-train.tfrecord-00000-of-00001"],
        [*present, NAMED[1]],
        [name.replace("train", "test") for name in present],
    ):
        shards = compare_shards({"train": NAMED}, names)
        assert shards.divided == {}
        assert shards.unnamed == sorted(set(names) - {NAMED[1]})


def test_files_of_which_two_fit_are_not_taken():
    twice = compare_shards({"train": NAMED}, [name.replace("made", new) for name in NAMED for new in ("a", "b")])
    assert twice.found == {} and twice.divided == {}
    whole = compare_shards({"train": NAMED}, NAMED)
    assert whole.warnings() == [] and whole.missing == "the file is missing"
    broken = compare_shards({"train": NAMED}, ["made-train.tfrecord-00000-of-00004"])
    assert broken.missing.startswith("the file is missing; the folder holds others: made-train.tfrecord-00000-of-00004")


def test_renamed_and_unnamed_files_of_a_dataset(tmp_path, make_rlds, rlds_steps):
    source = make_rlds({"train": [[rlds_steps(2, seed)] for seed in range(2)]}, tfrecord=True)
    first, second = sorted(source.glob("*.tfrecord-*"))
    shutil.copy(second, second.with_name(second.name.replace("-of-00002", "-of-00003")))
    first.rename(first.with_name(first.name.replace(first.name.partition("-")[0], "renamed")))
    settings = RldsSettings(source=str(source), control_rate=5.0, camera=("main",), action=(), validation_fraction=0.0)
    builder = Rlds(tmp_path / "out", settings)
    outcomes = [SourceOutcome(each.name) for each in builder.sources()]
    episodes = [list(builder.read(each, outcome)) for each, outcome in zip(builder.sources(), outcomes, strict=True)]
    assert [len(each) for each in episodes] == [1, 1]
    renamed, unnamed = builder.warnings()[:2]
    assert "dataset_info.json gives other names to 1 files, such as" in renamed
    assert "does not name were not converted" in unnamed and "-of-00003" in unnamed


@pytest.mark.parametrize("kind", ["tfrecord", "gzip", "array_record"])
def test_a_folder_that_was_divided_anew(tmp_path, make_rlds, rlds_steps, encode_tfrecord, kind):
    source = make_rlds({"train": [[rlds_steps(2, seed) for seed in range(3)]], "val": [[rlds_steps(2, 9)]]})
    (old,) = source.glob("*-train*")
    reader = ArrayRecordReader(str(old))
    records = reader.read([0, 1, 2])
    reader.close()
    old.unlink()
    for index, part in enumerate((records[:2], records[2:])):
        path = source / old.name.replace("00000-of-00001", f"{index:05d}-of-00002")
        if kind == "array_record":
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for record in part:
                writer.write(record)
            writer.close()
        else:
            content = encode_tfrecord(part)
            content = gzip.compress(content) if kind == "gzip" else content
            path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(content)
    settings = RldsSettings(source=str(source), control_rate=5.0, camera=("main",), action=())
    builder = Rlds(tmp_path / "out", settings)
    sources = builder.sources()
    assert [(each.split, each.records) for each in sources] == [("train", (0, 2)), ("train", (0, 1)), ("val", (0, 1))]
    outcomes = [SourceOutcome(each.name) for each in sources]
    episodes = [list(builder.read(each, outcome)) for each, outcome in zip(sources, outcomes, strict=True)]
    assert [len(each) for each in episodes] == [2, 1, 1]
    assert not any(outcome.problems or outcome.warnings for outcome in outcomes)
    assert [said for said in builder.warnings() if "dataset_info" in said] == builder.warnings()[:1]


def test_damage_in_a_folder_that_was_divided_anew_is_said(tmp_path, make_rlds, rlds_steps, encode_tfrecord):
    source = make_rlds({"train": [[rlds_steps(2, seed) for seed in range(3)]]}, tfrecord=True)
    (old,) = source.glob("*-train*")
    names = [old.name.replace("00000-of-00001", f"{index:05d}-of-00003") for index in range(3)]
    content = old.read_bytes()
    old.unlink()
    for name, part in zip(names, (content[:-9], b"", b"damage that is longer than a header"), strict=True):
        (source / name).write_bytes(part)
    settings = RldsSettings(source=str(source), control_rate=5.0, camera=("main",), action=(), validation_fraction=0.0)
    builder = Rlds(tmp_path / "out", settings)
    outcomes = [SourceOutcome(each.name) for each in builder.sources()]
    episodes = [list(builder.read(each, outcome)) for each, outcome in zip(builder.sources(), outcomes, strict=True)]
    assert [len(each) for each in episodes] == [2, 0, 0]
    assert "cannot be read from record 2 on, of 3" in outcomes[0].problems[0]
    assert "the length of the record is damaged" in outcomes[2].problems[0]
    assert "split 'train' has 4 records, and dataset_info.json says 3" in builder.warnings()
