"""Tests that records are read with few open files, however many files there are."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from como_jax.data import parquet, records
from como_jax.data.records import RecordFiles
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Twenty files of three records, "file/record"."""
    paths = [str(tmp_path / f"{number:02d}.array_record") for number in range(20)]
    for number, path in enumerate(paths):
        writer = ArrayRecordWriter(path, "group_size:1")
        for record in range(3):
            writer.write(f"{number}/{record}".encode())
        writer.close()
    return paths


@pytest.fixture
def few_open(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lets this process have four files of records open."""
    monkeypatch.setattr(records, "_MOST_OPEN", 4)
    records._opener.cache_clear()
    yield 4
    records._opener.cache_clear()


def _open_files(folder: Path) -> int:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links if os.path.lexists(link))


def test_records_of_many_files_with_few_open(files: list[str], few_open: int, tmp_path: Path) -> None:
    opened = RecordFiles(files, [3] * len(files))
    assert len(opened) == 60 and not _open_files(tmp_path)
    numbers = [*range(60), *range(59, -1, -7)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(opened.__getitem__, numbers))
    assert found == [f"{number // 3}/{number % 3}".encode() for number in numbers]
    assert _open_files(tmp_path) == few_open
    # Datasets share the files that may be open.
    other = RecordFiles(files, [3] * len(files))
    assert [other[number] for number in range(0, 60, 3)] == [f"{number}/0".encode() for number in range(20)]
    assert _open_files(tmp_path) == few_open


def test_the_limit_of_the_process_counts(files: list[str], few_open: int, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records.resource, "getrlimit", lambda _: (8, 8))
    opened = RecordFiles(files, [3] * len(files))
    assert [opened[number] for number in (0, 30, 59)] == [b"0/0", b"10/0", b"19/2"]
    assert _open_files(tmp_path) == 2


@pytest.mark.parametrize("record", [-1, 60])
def test_records_that_are_not_there(files: list[str], record: int) -> None:
    with pytest.raises(IndexError, match=f"record {record} is not one of the 60"):
        RecordFiles(files, [3] * len(files))[record]


def test_damaged_files_are_named_and_the_others_read(files: list[str]) -> None:
    Path(files[1]).write_bytes(b"damaged")
    os.truncate(files[2], 0)
    Path(files[3]).unlink()
    shutil.copy(files[0], files[4])
    opened = RecordFiles(files, [3, 3, 3, 3, 2, *[3] * 15])
    for number, message in ((3, "01.array"), (6, "02.array"), (9, "03.array"), (12, "04.array_record holds 3 records")):
        with pytest.raises(DatasetError, match=message):
            opened[number]
    assert opened[0] == b"0/0" and opened[14] == b"5/0"


def test_a_missing_file_is_named_at_the_first_read(tabletop_dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tabletop_dataset, tmp_path / "copy")
    [path] = copy.glob("*-val.array_record-*")
    path.unlink()
    assert EpisodeSource(copy, "train").read_jpegs([0])
    with pytest.raises(DatasetError, match=rf"{path.name} is missing"):
        EpisodeSource(copy, "val").read_jpegs([0])


def test_tables_are_read_without_threads_that_outlive_it(tabletop_dataset: Path, monkeypatch) -> None:
    """A thread of Arrow that still holds the file when Python ends aborts the process."""
    names: list[bool] = []
    read = parquet.pq.ParquetFile.read_row_groups

    def spy(self, *args: object, **kwargs: bool) -> object:
        names.append(kwargs["use_threads"])
        return read(self, *args, **kwargs)

    monkeypatch.setattr(parquet.pq.ParquetFile, "read_row_groups", spy)
    assert len(EpisodeSource(tabletop_dataset, "train").motion)
    assert names and not any(names)
