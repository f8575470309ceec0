"""Raw records of TFRecord and ArrayRecord files."""

import itertools
from collections.abc import Iterator

import grain
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from tools.datasets.builder import SourceError


def read_records(path: epath.PathLike, start: int, stop: int) -> Iterator[bytes]:
    """Yields the records `start` to `stop` - 1 of one file.

    Raises:
      SourceError: the file ends too early, or cannot be read on.
      OSError: the file is missing.
    """
    path = epath.Path(path)
    if not path.exists():
        raise SourceError("the file is missing")
    read = _read_array_records if "array_record" in path.name else _read_tfrecords
    index = start
    try:
        for record in read(path, start, stop):
            index += 1
            yield record
    except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
        # Their messages may hold the damaged bytes; a damaged length even asks for more memory than there is.
        raise SourceError(f"cannot be read from record {index} on, of {stop}") from error
    if index < stop:
        raise SourceError(f"ends after {index} of {stop} records")


def _read_tfrecords(path: epath.Path, start: int, stop: int) -> Iterator[bytes]:
    return itertools.islice(iter(grain.experimental.TFRecordIterDataset(str(path))), start, stop)


def _read_array_records(path: epath.Path, start: int, stop: int) -> Iterator[bytes]:
    reader = ArrayRecordReader(str(path))
    try:
        for index in range(start, min(stop, reader.num_records())):
            yield reader.read([index])[0]
    finally:
        reader.close()
