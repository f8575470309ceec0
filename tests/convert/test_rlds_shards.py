"""RLDS: files that dataset_info.json names are compared with those in the folder."""

from __future__ import annotations

import shutil

from como_jax.convert.report import SourceOutcome
from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.convert.rlds.shards import compare_shards

NAMED = [f"made-train.tfrecord-{index:05d}-of-00002" for index in range(2)]


def test_files_under_another_name_of_the_dataset_are_found():
    present = ["other-train.tfrecord-00000-of-00002", NAMED[1], "features.json", "other-val.tfrecord-00001-of-00002"]
    shards = compare_shards(NAMED, present)
    assert shards.found == {NAMED[0]: "other-train.tfrecord-00000-of-00002"}
    assert shards.unnamed == ["other-val.tfrecord-00001-of-00002"]
    assert len(shards.warnings()) == 2


def test_files_of_another_division_or_two_that_fit_are_not_taken():
    present = [f"made-train.tfrecord-{index:05d}-of-00004" for index in range(4)]
    shards = compare_shards(NAMED, present)
    assert shards.found == {} and shards.unnamed == present
    assert shards.missing.startswith("the file is missing; the folder holds others: made-train.tfrecord-00000-of-00004")
    twice = compare_shards(NAMED, [name.replace("made", new) for name in NAMED for new in ("a", "b")])
    assert twice.found == {}
    whole = compare_shards(NAMED, NAMED)
    assert whole.warnings() == [] and whole.missing == "the file is missing"


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
