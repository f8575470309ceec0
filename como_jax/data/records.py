"""Records of many files, read at random while only a few of the files are open."""

from __future__ import annotations

import bisect
import functools
import itertools
import resource
from collections.abc import Callable, Sequence

from array_record.python.array_record_module import ArrayRecordReader

from como_jax.errors import DatasetError

_MOST_OPEN = 128
# Checkpoints, sockets and worker processes need open files too.
_SHARE_OF_LIMIT = 0.25
# Without read-ahead, and with a small buffer, since neighbouring records are seldom read together.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 2**15

_serial_numbers = itertools.count()


class RecordFiles:
    """The records of several ArrayRecord files, numbered through; may be read from several threads.

    All objects of this class together keep at most 128 files open, and at most a quarter of what the process may open.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int]):
        """Opens nothing yet.

        Args:
          paths: the files.
          lengths: number of records in each.
        """
        self._paths, self._lengths = paths, lengths
        self._first = [0, *itertools.accumulate(lengths)]
        # A file may be replaced by another one of the same name, of which another object is made.
        self._serial = next(_serial_numbers)

    def __len__(self) -> int:
        """Number of records."""
        return self._first[-1]

    def __getitem__(self, record: int) -> bytes:
        """One record.

        Raises:
          IndexError: there is no such record.
          DatasetError: the file is missing, damaged, or holds another number of records.
        """
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} is not one of the {len(self)} records")
        number = bisect.bisect_right(self._first, record) - 1
        reader = _opener()(self._serial, self._paths[number], self._lengths[number])
        return reader.read([record - self._first[number]])[0]


@functools.cache
def _opener() -> Callable[[int, str, int], ArrayRecordReader]:
    """Opens a file, or gives the reader that is open already."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN if limit == resource.RLIM_INFINITY else min(_MOST_OPEN, int(limit * _SHARE_OF_LIMIT))
    # A reader that is dropped closes its file as soon as the last thread is done with it.
    return functools.lru_cache(max(1, most))(_open)


def _open(serial: int, path: str, length: int) -> ArrayRecordReader:
    del serial
    try:
        reader = ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
        found = reader.num_records()
    except (RuntimeError, ValueError, OSError) as error:
        raise DatasetError(f"{path} cannot be read; convert the dataset again: {error}") from error
    if found != length:
        raise DatasetError(
            f"{path} holds {found} records where dataset_info.json says {length}; "
            "the dataset is damaged, convert it again."
        )
    return reader
