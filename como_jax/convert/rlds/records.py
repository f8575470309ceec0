"""Reads raw records of TFRecord and ArrayRecord files, and names the damaged ones; writes TFRecord."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

import google_crc32c
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from como_jax.convert.builder import LeftOut, SourceError

# A TFRecord: length, masked CRC32C of the length, data, masked CRC32C of the data (TensorFlow's record_writer.h).
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = _LENGTH.size + _CHECKSUM.size
_MASK = 0xA282EAD8
_GZIP = b"\x1f\x8b\x08"


def read_records(path: epath.PathLike, start: int, stop: int, to_end: bool = False) -> Iterator[bytes | LeftOut]:
    """Yields the records of one file from `start` on, and a `LeftOut` in place of a damaged one.

    Args:
      path: a TFRecord file, compressed or not, or an ArrayRecord file.
      start: number of records to skip.
      stop: number of the record after the last one, as the dataset announces it.
      to_end: also read the records after `stop`.

    Raises:
      SourceError: the file is missing, ends before `stop`, or cannot be read further.
    """
    path = epath.Path(path)
    if not path.exists():
        raise SourceError("the file is missing")
    if stop and not path.stat().length:
        raise SourceError(f"the file is empty instead of holding {stop} records")
    read = _read_array_records if "array_record" in path.name else _read_tfrecords
    yield from read(path, start, stop, to_end)


def count_records(path: epath.PathLike) -> int:
    """Returns how many records a file has before damage, by their headers; at least one unless it is empty.

    What is damaged is found when the records are read.
    """
    path = epath.Path(path)
    if not path.stat().length:
        return 0
    if "array_record" in path.name:
        with contextlib.suppress(ValueError, RuntimeError):
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            reader.close()
            return max(count, 1)
        return 1
    count = 0
    with path.open("rb") as file, contextlib.suppress(OSError, EOFError, zlib.error):
        stream = gzip.GzipFile(fileobj=file) if _is_compressed(file) else file
        while len(header := stream.read(_HEADER_BYTES)) == _HEADER_BYTES:
            length, checksum = header[: _LENGTH.size], header[_LENGTH.size :]
            if not _is_intact(length, checksum):
                break
            stream.seek(_LENGTH.unpack(length)[0] + _CHECKSUM.size, 1)
            count += 1
    return max(count, 1)


def write_tfrecords(path: epath.Path, records: Iterable[bytes]) -> None:
    """Writes a TFRecord file."""
    with path.open("wb") as file:
        for record in records:
            length = _LENGTH.pack(len(record))
            file.writelines((length, _checksum(length), record, _checksum(record)))


def _read_tfrecords(path: epath.Path, start: int, stop: int, to_end: bool) -> Iterator[bytes | LeftOut]:
    with path.open("rb") as file:
        stream = gzip.GzipFile(fileobj=file) if _is_compressed(file) else file
        for index in itertools.count() if to_end else range(stop):
            try:
                record = _read_tfrecord(stream, index, checked=index >= start)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise SourceError(f"cannot be read from record {index} on, of {stop}: {error}") from error
            if record is None:
                if index < stop:
                    raise SourceError(f"ends after {index} of {stop} records")
                return
            if index >= start:
                yield record


def _read_tfrecord(stream: IO[bytes], index: int, checked: bool) -> bytes | LeftOut | None:
    """Reads the next record; None at the end of the file.

    Raises:
      ValueError: the record is damaged in such a way that the next one cannot be found.
    """
    header = stream.read(_HEADER_BYTES)
    if not header:
        return None
    if len(header) < _HEADER_BYTES:
        raise ValueError("the file breaks off")
    # Checked before the data are read: a damaged length could ask for more memory than there is.
    if not _is_intact(header[: _LENGTH.size], header[_LENGTH.size :]):
        raise ValueError("the length of the record is damaged")
    (length,) = _LENGTH.unpack(header[: _LENGTH.size])
    data, checksum = stream.read(length), stream.read(_CHECKSUM.size)
    if len(data) < length or len(checksum) < _CHECKSUM.size:
        raise ValueError("the file breaks off")
    if checked and not _is_intact(data, checksum):
        return LeftOut(f"record {index}: its checksum is wrong, the data are damaged")
    return data


def _is_intact(data: bytes, checksum: bytes) -> bool:
    return _checksum(data) == checksum


def _checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return _CHECKSUM.pack(((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


def _is_compressed(file: IO[bytes]) -> bool:
    """Whether a file is GZIP. The length of a plain record may look like GZIP, but then its checksum is right."""
    header = file.read(_HEADER_BYTES)
    file.seek(0)
    is_plain = len(header) == _HEADER_BYTES and _is_intact(header[: _LENGTH.size], header[_LENGTH.size :])
    return header.startswith(_GZIP) and not is_plain


def _read_array_records(path: epath.Path, start: int, stop: int, to_end: bool) -> Iterator[bytes | LeftOut]:
    reader = ArrayRecordReader(str(path))
    try:
        # A file without its last block opens like any other, with no records in it.
        count = reader.num_records()
        if stop and not count:
            raise SourceError(f"is damaged: none of its {stop} records can be found")
        for index in range(start, count if to_end else min(stop, count)):
            yield _read_array_record(reader, index)
    finally:
        # Closing raises the error of a damaged file once more.
        with contextlib.suppress(ValueError, RuntimeError):
            reader.close()
    if count < stop:
        raise SourceError(f"ends after {count} of {stop} records")


def _read_array_record(reader: ArrayRecordReader, index: int) -> bytes | LeftOut:
    try:
        return reader.read([index])[0]
    except (ValueError, RuntimeError, IndexError):
        # The message of the reader is not used, since it may contain the damaged bytes.
        return LeftOut(f"record {index}: the data are damaged")
