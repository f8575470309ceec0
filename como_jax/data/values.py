"""Sequences that make a Python object when it is asked for, since a large dataset has too many of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import tensorflow_datasets as tfds

_AT_ONCE = 2**16


class Values(Sequence[Any]):
    """The values of a column."""

    def __init__(self, column: pa.ChunkedArray, missing: Any = None):
        """Wraps a column; `missing` stands in the place of values that are not there."""
        # Large texts, since the offsets of others end at 2 GiB.
        column = column.cast(pa.large_string()) if pa.types.is_string(column.type) else column
        self._column, self._missing = pa.chunked_array([column.combine_chunks()]), missing

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        value = self._column[int(index)].as_py()
        return self._missing if value is None else value

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _AT_ONCE):
            for value in self._column.slice(first, _AT_ONCE).to_pylist():
                yield self._missing if value is None else value


class ShardPaths(Sequence[str]):
    """The paths of a split's files of records."""

    def __init__(self, split: tfds.core.SplitInfo):
        """Knows the first name; TFDS takes as long for a path as for reading some records."""
        self._template, self._count = split.filename_template, split.num_shards
        first = self._by_template(0)
        self._digits = max(5, len(str(self._count)))
        ending = self._ending(0)
        self._stem = first.removesuffix(ending) if first.endswith(ending) else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(self._count)[int(index)]
        return self._by_template(number) if self._stem is None else f"{self._stem}{self._ending(number)}"

    def _by_template(self, number: int) -> str:
        return os.fspath(self._template.sharded_filepath(shard_index=number, num_shards=self._count))

    def _ending(self, number: int) -> str:
        return f"-{number:0{self._digits}d}-of-{self._count:0{self._digits}d}"
