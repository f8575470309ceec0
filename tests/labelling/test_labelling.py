"""Labelling of a dataset: goes on after a stop, survives damage, and never replaces what it is not told to."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from como_jax.data import episode_table, schema
from como_jax.data.episode_table import EpisodeTable, table_name, write_episode_table
from como_jax.data.schema import LabelInfo
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError, OutputError
from como_jax.labelling import labelling, shards
from como_jax.staging import Staging
from como_jax.training.run import Run
from tests.export.conftest import change_tables
from tests.labelling.conftest import label


class Stop(Exception):
    """Ends a labelling."""


def stop_after(count: int) -> Any:
    """A progress callback that ends the labelling with the given shard."""
    told: list[Any] = []

    def progress(shard: Any, notes: Any) -> None:
        told.append(shard)
        if len(told) == count:
            raise Stop

    return progress


def contents(out: Path) -> dict[str, bytes]:
    """All files, but for the date of the labels."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    labels = json.loads(found["labels.json"])
    del labels["date"]
    return {**found, "labels.json": json.dumps(labels).encode()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What would change if a file were written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def damage(directory: Path, split: str, row: int, step: int) -> None:
    """Replaces the image of one step in its shard of records."""
    start = 0
    record = int(EpisodeSource(directory, split).start[row]) + step
    for path in sorted(directory.glob(f"*-{split}.array_record-*")):
        records = ArrayRecordReader(str(path)).read_all()
        if start <= record < start + len(records):
            example = tf_example_pb2.Example.FromString(records[record - start])
            example.features.feature["observation/image"].bytes_list.value[0] = b"junk"
            records[record - start] = example.SerializeToString()
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for each in records:
                writer.write(each)
            writer.close()
            _forget_sizes(directory, split)
            return
        start += len(records)
    raise AssertionError(f"no record {record} in {directory}")


def _forget_sizes(directory: Path, split: str) -> None:
    """Lets an episode table know nothing of the files of records, one of which was written anew."""
    table = EpisodeTable(directory, split)
    write_episode_table(directory / table_name(split), list(table.read()), None)


def test_a_stopped_labelling_goes_on_with_the_next_shard_and_gives_the_same_bytes(
    run: Run, few: Path, labelled: Path, tmp_path: Path
) -> None:
    out, told = tmp_path / "few", []
    with pytest.raises(Stop):
        label(run, few, out, progress=stop_after(2))
    assert not out.exists()
    parts = tmp_path / "few.partial" / "parts"
    before = identities(parts)
    assert len(before) == 2
    (parts / ".episodes.partial-01234567").write_bytes(b"half")
    seen = []

    def progress(shard: Any, notes: Any) -> None:
        told.append(shard.name)
        seen.append(identities(parts))

    label(run, few, out, progress=progress)
    assert told == ["train-00002-of-00003", "val-00000-of-00001"]
    assert {name: seen[-1][name] for name in before} == before and len(seen[-1]) == 4
    assert contents(out) == contents(labelled)
    assert [path.name for path in tmp_path.iterdir()] == ["few"]


def test_a_kill_while_the_dataset_is_put_together_or_tidied_up_loses_nothing(
    run: Run, few: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "few"

    def stop(*unused: Any) -> None:
        raise Stop

    for owner, name in ((labelling, "write_flat_table"), (labelling, "latent_statistics"), (Staging, "tidy")):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(owner, name, stop)
            label(run, few, out, progress=lambda *_: None)
    assert out.exists() and (tmp_path / "few.partial").exists()
    report = label(run, few, out)
    assert report == json.loads((out / "labelling_report.json").read_text())
    assert contents(out) == contents(labelled)
    assert [path.name for path in tmp_path.iterdir()] == ["few"]


def test_other_settings_do_not_mix_with_what_is_there(run: Run, few: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "few"
    with pytest.raises(Stop):
        label(run, few, out, progress=stop_after(1), settings={"gap_seconds": 0.7})
    with pytest.raises(
        OutputError, match=r"unfinished labelling with other settings .*gap_seconds: 0.7, now 0.3.*`restart`"
    ):
        label(run, few, out)
    label(run, few, out, restart=True)
    assert contents(out) == contents(labelled)


def test_another_checkpoint_does_not_mix_with_what_is_there(
    run: Run, discrete_run: Run, few: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        label(run, few, tmp_path / "few", progress=stop_after(1))
    with pytest.raises(OutputError, match="other settings or sources .*parameters"):
        label(discrete_run, few, tmp_path / "few")


def test_a_dataset_that_was_converted_anew_does_not_mix_with_what_is_there(run: Run, few: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(few, tmp_path / "data" / "few"))
    with pytest.raises(Stop):
        label(run, data, tmp_path / "few", progress=stop_after(1))
    change_tables(data, lambda row: {**row, "language_instruction": "another"})
    with pytest.raises(OutputError, match=r"other settings or sources \(instructions\)"):
        label(run, data, tmp_path / "few")
    label(run, data, tmp_path / "few", restart=True)
    labels = json.loads((tmp_path / "few" / "labels.json").read_text())
    assert labels["data"]["steps of train"] == len(EpisodeSource(data, "train"))


def test_two_labellings_into_the_same_place_are_refused(run: Run, few: Path, tmp_path: Path) -> None:
    with (
        Staging(epath.Path(tmp_path / "few"), "labelling").locked(),
        pytest.raises(OutputError, match="another labelling into .*few is running"),
    ):
        label(run, few, tmp_path / "few")


def test_what_exists_is_replaced_only_if_asked_and_only_once_the_new_one_is_complete(
    run: Run, few: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "few"
    shutil.copytree(labelled, out)
    before = identities(out)
    with pytest.raises(OutputError, match=f"{out} exists already; `overwrite` replaces it"):
        label(run, few, out, settings={"gap_seconds": 0.7})
    with pytest.raises(Stop):
        label(run, few, out, settings={"gap_seconds": 0.7}, overwrite=True, progress=stop_after(2))
    assert identities(out) == before
    label(run, few, out, settings={"gap_seconds": 0.7}, overwrite=True)
    assert json.loads((out / "labels.json").read_text())["settings"]["gap_seconds"] == 0.7
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by this project"):
        label(run, few, tmp_path / "notes", overwrite=True)


@pytest.mark.parametrize("inside", ["", "labelled"])
def test_the_dataset_itself_is_no_place_for_its_labels(run: Run, few: Path, tmp_path: Path, inside: str) -> None:
    data = tmp_path / "few"
    shutil.copytree(few, data)
    before = identities(data)
    with pytest.raises(OutputError, match=f"`out` .* lies inside `data` {data}"):
        label(run, data, data / inside, overwrite=True)
    assert identities(data) == before


def test_an_unreadable_image_is_listed_and_masks_only_its_own_pairs(
    run: Run, few: Path, labelled: Path, tmp_path: Path
) -> None:
    broken, out = tmp_path / "broken" / "few", tmp_path / "few"
    shutil.copytree(few, broken)
    row = int(EpisodeSource(few, "train").length.argmax())
    damage(broken, "train", row, 4)
    report = label(run, broken, out)
    source, whole = EpisodeSource(out, "train"), EpisodeSource(labelled, "train")
    assert report["unreadable"] == [{"episode": source.episode_id[row], "step": 4}]
    assert json.loads((out / "labelling_report.json").read_text()) == report
    record = int(source.start[row]) + 4
    lost = [record - 3, record]
    assert whole.latent_valid[lost].all() and not source.latent_valid[lost].any()
    assert not source.latent_motion[lost].any()
    others = np.setdiff1d(np.arange(len(source)), lost)
    np.testing.assert_array_equal(source.latent_valid[others], whole.latent_valid[others])
    np.testing.assert_allclose(source.latent_motion[others], whole.latent_motion[others], atol=1e-6)
    valid = [each.latent_valid.sum() for each in (source, EpisodeSource(out, "val"))]
    assert report["labelled"] == sum(valid)


def test_a_shard_without_a_readable_image_is_an_error_and_the_rest_is_kept(run: Run, few: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(few, broken)
    (val,) = broken.glob("*-val.array_record-*")
    val.write_bytes(b"")
    with pytest.raises(DatasetError, match=f"{broken}: no image of shard val-00000-of-00001 can be read"):
        label(run, broken, tmp_path / "few")
    assert len(list((tmp_path / "few.partial" / "done").iterdir())) == 3


def test_a_dataset_of_other_control_rates_is_labelled_with_the_gap_in_seconds(
    run: Run, few: Path, labelled: Path, tmp_path: Path
) -> None:
    faster = tmp_path / "faster"
    shutil.copytree(few, faster)
    rates = iter([5.0, 10.0, 20.0, 30.0] * 4)
    change_tables(faster, lambda row: {**row, "control_rate": next(rates)})
    label(run, faster, tmp_path / "few")
    usual = EpisodeSource(labelled, "train")
    source = EpisodeSource(tmp_path / "few", "train")
    assert set(usual.control_rate) == {10.0} and set(source.control_rate) == {5.0, 10.0, 20.0, 30.0}
    for start, length, rate in zip(source.start, source.length, source.control_rate, strict=True):
        rows, gap = slice(start, start + length), round(0.3 * rate)
        assert source.latent_valid[rows].tolist() == [step + gap < length for step in range(length)]
        same = np.allclose(source.latent_motion[rows], usual.latent_motion[rows], atol=1e-6)
        assert same == (rate == 10.0)


def test_old_labels_leave_nothing_behind_when_they_are_made_anew(
    run: Run, discrete_run: Run, few: Path, labelled: Path, tmp_path: Path
) -> None:
    label(discrete_run, few, tmp_path / "codes")
    assert EpisodeSource(tmp_path / "codes", "train").latent_codes is not None
    label(run, tmp_path / "codes", tmp_path / "again")
    again, first = (EpisodeSource(directory, "train") for directory in (tmp_path / "again", labelled))
    assert again.latent_codes is None
    np.testing.assert_array_equal(again.latent_motion, first.latent_motion)
    assert (tmp_path / "again" / "latents.parquet").read_bytes() == (labelled / "latents.parquet").read_bytes()


def test_labels_say_how_large_they_are_and_of_which_model(
    run: Run, discrete_run: Run, few: Path, labelled: Path, tmp_path: Path
) -> None:
    label(discrete_run, few, tmp_path / "codes")
    plain, coded = (LabelInfo.read(directory) for directory in (labelled, tmp_path / "codes"))
    assert plain.parameters != coded.parameters
    for info, model, directory in ((plain, run, labelled), (coded, discrete_run, tmp_path / "codes")):
        size = model.config.data.image_size
        encode = jax.jit(lambda params, frames, model=model: model.model.bind(params).encode(frames))
        assert encode(model.params, np.zeros((1, 2, size, size, 3), np.uint8)).shape == (1, 1, *info.latent_shape)
        source = EpisodeSource(directory, "train")
        assert source.latent_motion.shape[1] == np.prod(info.latent_shape)
        if source.latent_codes is None:
            assert info is plain and info.codebook_size == 0
        else:
            assert info is coded and info.codebook_size == discrete_run.config.model.bottleneck.codebook_size
            assert source.latent_codes.shape[1] == info.latent_shape[0]
            known = source.latent_codes[source.latent_valid]
            assert known.min() >= 0 and known.max() < info.codebook_size
            assert np.all(source.latent_codes[~source.latent_valid] == -1)


def test_a_full_disk_leaves_what_is_finished_and_says_so(
    run: Run, few: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, write = tmp_path / "few", [], episode_table.write_atomic

    def fill_up(path: Any, fill: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            # What is on the disk before it is full is of no use.
            write(path, lambda file: (file.write(b"half"), full()))
        write(path, fill)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError) as error:
        patch.setattr(episode_table, "write_atomic", fill_up)
        label(run, few, out)
    assert "No space left on device" in str(error.value)
    assert f"2 of 4 shards are finished and kept in {out}.partial; the same command resumes" in str(error.value)
    assert len(identities(tmp_path / "few.partial" / "parts")) == 2
    told: list[str] = []
    label(run, few, out, progress=lambda shard, notes: told.append(shard.name))
    assert told == ["train-00002-of-00003", "val-00000-of-00001"]
    assert contents(out) == contents(labelled)


def test_a_directory_without_a_dataset_and_an_unknown_camera_are_refused(run: Run, few: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere holds no dataset"):
        label(run, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DatasetError, match="has no camera 'wrist'; it has: image"):
        label(run, few, tmp_path / "out", settings={"camera": "wrist"})
    assert not list(tmp_path.iterdir())


def test_shards_list_all_steps_in_order(few: Path) -> None:
    found = shards.list_shards(epath.Path(few))
    assert [shard.name for shard in found] == [*(f"train-{n:05d}-of-00003" for n in range(3)), "val-00000-of-00001"]
    for split in schema.SPLITS:
        record = episode = 0
        for shard in (each for each in found if each.split == split):
            assert (shard.first_record, shard.first_episode) == (record, episode)
            record, episode = record + shard.num_records, episode + shard.num_episodes
        assert (record, episode) == (len(EpisodeSource(few, split)), len(EpisodeSource(few, split).length))
