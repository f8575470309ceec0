"""Records of many files, read at random while only a few of the files are open."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from array_record.python.array_record_module import ArrayRecordReader

from como_jax.errors import DatasetError
from como_jax.staging import is_local

_MOST_OPEN = 128
# Checkpoints, sockets and worker processes need open files too.
_SHARE_OF_LIMIT = 0.25
# Without read-ahead, and with a small buffer, since neighbouring records are seldom read together.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 2**15


class RecordFiles:
    """The records of several ArrayRecord files, numbered through; may be read from several threads.

    All objects of this class together keep at most 128 files open, and at most a quarter of what the process may open.
    """

    def __init__(self, paths: Sequence[str], lengths: npt.ArrayLike, sizes: npt.ArrayLike | None = None):
        """Opens nothing yet.

        Args:
          paths: the files, each of which is asked for when it is opened.
          lengths: number of records in each.
          sizes: bytes of each, where they are known.
        """
        self._paths, self._lengths = paths, np.asarray(lengths, np.int64)
        self._sizes = None if sizes is None else np.asarray(sizes, np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._lengths)])

    def __len__(self) -> int:
        """Number of records."""
        return int(self._first[-1])

    def __getitem__(self, record: int) -> bytes:
        """One record.

        Raises:
          IndexError: there is no such record.
          DatasetError: the file is missing, damaged, or holds another number of records or bytes.
        """
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} is not one of the {len(self)} records")
        number = int(np.searchsorted(self._first, record, side="right")) - 1
        return _opener()(self, number).read([record - int(self._first[number])])[0]

    def open(self, number: int) -> ArrayRecordReader:
        """Opens one file.

        Raises:
          DatasetError: see `__getitem__`.
        """
        path, length = self._paths[number], self._lengths[number]
        self._check_size(path, number)
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

    def _check_size(self, path: str, number: int) -> None:
        if self._sizes is None or not is_local(path) or not os.path.exists(path):
            return
        size, expected = os.path.getsize(path), self._sizes[number]
        if size != expected:
            raise DatasetError(
                f"{path} has {size} bytes where the episode table was made for {expected}, so that its episodes may be "
                "others; the dataset is damaged, convert it again."
            )


@functools.cache
def _opener() -> Callable[[RecordFiles, int], ArrayRecordReader]:
    """Opens a file, or gives the reader that is open already."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN if limit == resource.RLIM_INFINITY else min(_MOST_OPEN, int(limit * _SHARE_OF_LIMIT))
    # A reader that is dropped closes its file as soon as the last thread is done with it.
    return functools.lru_cache(max(1, most))(RecordFiles.open)
