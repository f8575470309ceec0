"""Records of TFRecord and ArrayRecord files: checksums, framing, compression, damage."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from como_jax.convert.builder import LeftOut, SourceError
from como_jax.convert.rlds.records import read_records

RECORDS = [np.random.default_rng(index).bytes(3000 + index) for index in range(6)]


@pytest.fixture
def tfrecord(tmp_path: Path, encode_tfrecord: Callable) -> Callable[..., Path]:
    """Writes `RECORDS` after a change to the bytes of the file."""

    def write(change: Callable[[bytearray], bytes] = bytes) -> Path:
        path = tmp_path / "data.tfrecord-00000-of-00001"
        path.write_bytes(change(bytearray(encode_tfrecord(RECORDS))))
        return path

    return write


@pytest.fixture
def array_record(tmp_path: Path) -> Callable[..., Path]:
    """Writes `RECORDS` after a change to the bytes of the file."""

    def write(change: Callable[[bytearray], bytes] = bytes) -> Path:
        path = tmp_path / "data.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in RECORDS:
            writer.write(record)
        writer.close()
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return write


def offset(index: int) -> int:
    """Where a record begins in the TFRecord file: each has 16 bytes of lengths and checksums."""
    return sum(len(record) + 16 for record in RECORDS[:index])


def flip(*positions: int) -> Callable[[bytearray], bytes]:
    def change(content: bytearray) -> bytes:
        for position in positions:
            content[position] ^= 0x10
        return bytes(content)

    return change


def read(path: Path, start: int = 0, stop: int = len(RECORDS), to_end: bool = False) -> tuple[list, str | None]:
    """What was read up to an error, and its message."""
    found = []
    try:
        for record in read_records(path, start, stop, to_end):
            found.append(record)
    except SourceError as error:
        return found, str(error)
    return found, None


def left_out(found: Sequence[bytes | LeftOut]) -> list[str]:
    return [record.reason for record in found if isinstance(record, LeftOut)]


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_part_of_the_records_can_be_read(request, kind):
    path = request.getfixturevalue(kind)()
    assert read(path) == (RECORDS, None)
    assert read(path, 2, 4) == (RECORDS[2:4], None)
    assert read(path, 2, 4, to_end=True) == (RECORDS[2:], None)
    assert read(path, 4, 9) == (RECORDS[4:], "ends after 6 of 9 records")


def test_a_flipped_byte_costs_its_record_alone(tfrecord):
    for position in (offset(2) + 12, offset(3) - 5, offset(3) - 1):
        found, error = read(tfrecord(flip(position)))
        assert error is None
        assert left_out(found) == ["record 2: its checksum is wrong, the data are damaged"]
        assert found[:2] + found[3:] == RECORDS[:2] + RECORDS[3:]


def test_records_that_are_passed_over_are_not_reported(tfrecord):
    assert read(tfrecord(flip(offset(1) + 50)), 3, 5) == (RECORDS[3:5], None)


@pytest.mark.parametrize("position", [0, 7, 9])
def test_a_damaged_length_ends_the_file(tfrecord, position):
    found, error = read(tfrecord(flip(offset(4) + position)))
    assert found == RECORDS[:4]
    assert error == "cannot be read from record 4 on, of 6: the length of the record is damaged"


@pytest.mark.parametrize("missing", [1, 8, 2000, len(RECORDS[-1]) + 7])
def test_a_file_that_breaks_off_gives_what_it_has(tfrecord, missing):
    found, error = read(tfrecord(lambda content: bytes(content[:-missing])))
    assert (found, error) == (RECORDS[:5], "cannot be read from record 5 on, of 6: the file breaks off")


def test_compressed_files_are_read(tfrecord):
    assert read(tfrecord(gzip.compress), 1, 5) == (RECORDS[1:5], None)
    found, error = read(tfrecord(lambda content: gzip.compress(content)[:-3000]))
    assert found == RECORDS[: len(found)]
    assert 0 < len(found) < 6
    assert error.startswith(f"cannot be read from record {len(found)} on, of 6: ")


def test_a_record_whose_length_looks_like_gzip_is_not_taken_for_it(tmp_path, encode_tfrecord):
    path = tmp_path / "data.tfrecord"
    record = bytes(0x088B1F)
    path.write_bytes(encode_tfrecord([record]))
    assert path.read_bytes()[:3] == b"\x1f\x8b\x08"
    assert read(path, 0, 1) == ([record], None)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_files_without_content(request, tmp_path, kind):
    path = request.getfixturevalue(kind)(lambda content: b"")
    assert read(path) == ([], "the file is empty instead of holding 6 records")
    path.unlink()
    assert read(path) == ([], "the file is missing")


def test_array_records_lose_what_is_damaged_alone(array_record):
    found, error = read(array_record(flip(8000)))
    assert error is None
    (reason,) = left_out(found)
    index = next(index for index, record in enumerate(found) if isinstance(record, LeftOut))
    assert reason == f"record {index}: the data are damaged"
    assert found[:index] + found[index + 1 :] == RECORDS[:index] + RECORDS[index + 1 :]


@pytest.mark.parametrize("content", [b"no array record", bytes(70000)])
def test_files_that_are_no_array_records(array_record, content):
    assert read(array_record(lambda _: content)) == ([], "is damaged: none of its 6 records can be found")


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_no_damage_gives_a_wrong_record(request, kind):
    rng = np.random.default_rng(0)
    write = request.getfixturevalue(kind)
    for _ in range(40):

        def damage(content: bytearray) -> bytes:
            for position in rng.integers(0, len(content), rng.integers(1, 5)):
                content[position] ^= int(rng.integers(1, 256))
            return bytes(content[: rng.integers(1, len(content))] if rng.random() < 0.2 else content)

        found, error = read(write(damage))
        assert all(record in (RECORDS[index],) or isinstance(record, LeftOut) for index, record in enumerate(found))
        assert error is not None or len(found) == len(RECORDS)
