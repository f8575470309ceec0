"""Labelled datasets as RLDS: what the files hold, and what our own builder reads."""

import itertools
import json

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.export.labels.dataset import LabelledDataset
from como_jax.export.labels.rlds import write_rlds

JPEGS = {"steps": {"observation": {"image": tfds.decode.SkipDecoding()}}}


@pytest.fixture(scope="module")
def exported(labelled, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("rlds"))
    write_rlds(LabelledDataset(labelled), folder, max_steps_per_file=100)
    return folder


def test_a_record_is_an_episode_with_its_labels(exported, labelled, rows_of):
    info = tfds.builder_from_directory(exported).info
    assert len(info.splits["train"].shard_lengths) > 1
    paths = [path for split in ("train", "val") for path in info.splits[split].filepaths]
    records = itertools.chain.from_iterable(grain.experimental.TFRecordIterDataset(str(path)) for path in paths)
    episodes = [info.features.deserialize_example_np(record, decoders=JPEGS) for record in records]
    images = tfds.builder_from_directory(labelled)
    jpegs = [
        step["observation"]["image"]
        for split in ("train", "val")
        for step in images.as_data_source(split, decoders={"observation": JPEGS["steps"]["observation"]})
    ]
    rows = rows_of(labelled)
    assert len(episodes) == len(rows)
    for row, episode in zip(rows, episodes, strict=True):
        metadata, steps = episode["episode_metadata"], list(episode["steps"])
        assert metadata["episode_id"].decode() == row["episode_id"]
        assert metadata["file_path"].decode() == row["source_file"]
        assert metadata["control_rate"] == row["control_rate"]
        assert [step["is_first"] for step in steps] == [True] + [False] * (len(steps) - 1)
        assert [step["is_last"] for step in steps] == [False] * (len(steps) - 1) + [True]
        assert {step["language_instruction"].decode() for step in steps} == {row["language_instruction"]}
        for field in ("action", "latent_motion", "latent_valid", "latent_codes"):
            np.testing.assert_array_equal([step[field] for step in steps], row[field])
        np.testing.assert_array_equal([step["observation"]["state"] for step in steps], row["state"])
        assert [step["observation"]["image"] for step in steps] == jpegs[: len(steps)]
        del jpegs[: len(steps)]
    assert not jpegs


def test_nothing_is_claimed_that_is_not_known(exported):
    steps = tfds.builder_from_directory(exported).info.features["steps"].feature
    assert {"reward", "discount", "is_terminal"}.isdisjoint(steps)
    assert set(steps) >= {"is_first", "is_last", "latent_motion", "latent_valid"}


def test_provenance_comes_along(exported, labelled):
    assert (exported / "labels.json").read_bytes() == (labelled / "labels.json").read_bytes()


def test_our_own_builder_reads_it(exported, labelled, rows_of, tmp_path):
    settings = RldsSettings(source=str(exported), control_rate=10.0)
    report = Rlds(tmp_path / "back", settings).convert()
    assert not report["left_out"] and not report["partially_converted"]
    for before, after in zip(rows_of(labelled), rows_of(tmp_path / "back"), strict=True):
        for field in ("language_instruction", "other_instructions", "num_steps", "action", "state"):
            assert after[field] == before[field], field
        # Measured on the images before and after they became JPEGs.
        np.testing.assert_allclose(after["motion"], before["motion"], atol=0.01)


def test_labels_are_read_back_as_actions(exported, labelled, rows_of, tmp_path):
    settings = RldsSettings(source=str(exported), control_rate=10.0, action=("latent_motion",), state=("latent_codes",))
    Rlds(tmp_path / "back", settings).convert()
    for before, after in zip(rows_of(labelled), rows_of(tmp_path / "back"), strict=True):
        assert after["action"] == before["latent_motion"]
        assert after["state"] == before["latent_codes"]


def test_a_model_without_codes(labelled, with_changed_rows, tmp_path):
    source = with_changed_rows(labelled, lambda row: {**row, "latent_codes": None})
    write_rlds(LabelledDataset(source), epath.Path(tmp_path))
    steps = tfds.builder_from_directory(tmp_path).info.features["steps"].feature
    assert "latent_codes" not in steps and "latent_motion" in steps


def test_files_do_not_depend_on_the_run(labelled, exported, tmp_path):
    write_rlds(LabelledDataset(labelled), epath.Path(tmp_path), max_steps_per_file=100)
    for path in exported.glob("*.tfrecord-*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "metadata.json").read_text()) == {"cameras": ["image"]}


def test_a_folder_that_cannot_be_written_to(labelled, tmp_path):
    with pytest.raises(OSError, match="missing"):
        write_rlds(LabelledDataset(labelled), epath.Path(tmp_path / "missing"))
