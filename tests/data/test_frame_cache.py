"""Decoded frames that are kept: the same batches, without decoding, and no file that a run could fall over."""

import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import chex
import numpy as np
import pytest

from como_jax.data.clips import ClipConfig
from como_jax.data.mixture import Mixture, MixtureEntry
from como_jax.data.motion_data import ClipFiller
from como_jax.data.reader import BatchReader
from como_jax.data.sampler import Augmentation
from como_jax.data.sources import EpisodeSource

_SIZE = 16
_ROOM = 2**24
Open = Callable[..., BatchReader]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of caches, which the test has for itself."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"como_jax-frames-{os.getuid()}"


@pytest.fixture
def open_reader(tabletop_dataset: Path) -> Open:
    def make(cache_bytes: int = _ROOM, size: int = _SIZE, fit: str = "crop") -> BatchReader:
        mixture = Mixture.open([MixtureEntry(str(tabletop_dataset))], "train", ClipConfig(gap_seconds=0.5))
        return BatchReader(ClipFiller(mixture), size, fit=fit, cache_bytes=cache_bytes)

    return make


def read(reader: BatchReader, **augmentation: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    clips = reader.filler.draw(np.zeros(6, np.int64), np.arange(6), rng, Augmentation(**augmentation))
    return reader.map(clips)["frames"]


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(EpisodeSource, "read_cameras", refuse)


@pytest.mark.parametrize("shift", [0, 3])
def test_frames_are_those_of_decoding_and_are_decoded_once(
    open_reader: Open, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    plain, reader = read(open_reader(0), random_shift=shift), open_reader()
    chex.assert_trees_all_equal(read(reader, random_shift=shift), plain)
    other = pickle.loads(pickle.dumps(reader))
    forbid_reading(monkeypatch)
    chex.assert_trees_all_equal(read(reader, random_shift=shift), plain)
    chex.assert_trees_all_equal(read(other, random_shift=shift), plain)


def test_another_run_finds_the_frames(open_reader: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, later = read(open_reader()), open_reader()
    forbid_reading(monkeypatch)
    chex.assert_trees_all_equal(read(later), plain)


def test_a_dataset_whose_records_were_written_again_has_another_file(
    tabletop_dataset: Path, tmp_path: Path, folder: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(tabletop_dataset, copied)
    for _ in range(2):
        mixture = Mixture.open([MixtureEntry(str(copied))], "train", ClipConfig(gap_seconds=0.5))
        read(BatchReader(ClipFiller(mixture), _SIZE, cache_bytes=_ROOM))
        os.utime(mixture.parts[0].source.record_files[0])
    assert len(list(folder.iterdir())) == 2


def test_frames_that_are_cut_at_random_are_not_kept(open_reader: Open) -> None:
    chex.assert_trees_all_equal(read(open_reader(), min_crop_fraction=0.5), read(open_reader(0), min_crop_fraction=0.5))


def test_a_damaged_frame_is_decoded_again(open_reader: Open, folder: Path) -> None:
    plain = read(open_reader())
    [path] = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[-len(content) // 2 :] = bytes(reversed(content[-len(content) // 2 :]))
    path.write_bytes(content)
    chex.assert_trees_all_equal(read(open_reader()), plain)


def test_other_frames_have_other_files(open_reader: Open, folder: Path) -> None:
    for size, fit in ((_SIZE, "crop"), (_SIZE, "stretch"), (_SIZE + 2, "crop")):
        chex.assert_trees_all_equal(read(open_reader(size=size, fit=fit)), read(open_reader(0, size=size, fit=fit)))
    assert len(list(folder.iterdir())) == 3


def test_the_longest_unused_file_makes_room(open_reader: Open, folder: Path) -> None:
    read(open_reader(size=16))
    [first] = folder.iterdir()
    os.utime(first, (0, 0))
    room = 2 * first.stat().st_size
    read(open_reader(room, size=18))
    assert not first.exists()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= room


def test_what_does_not_fit_is_decoded_every_time(open_reader: Open, folder: Path) -> None:
    chex.assert_trees_all_equal(read(open_reader(1000)), read(open_reader(0)))
    assert not folder.exists()


def test_a_full_disk_costs_the_cache_alone(
    open_reader: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.WARNING):
        chex.assert_trees_all_equal(read(open_reader()), read(open_reader(0)))
    assert "No space left on device" in caplog.text
    assert not list(folder.iterdir())


def test_a_system_without_fallocate_keeps_frames_too(
    open_reader: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    chex.assert_trees_all_equal(read(open_reader()), read(open_reader(0)))
    assert len(list(folder.iterdir())) == 1


def test_the_folder_of_somebody_else_is_not_used(
    open_reader: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")
    chex.assert_trees_all_equal(read(open_reader()), read(open_reader(0)))
    assert "belongs to somebody else" in caplog.text
