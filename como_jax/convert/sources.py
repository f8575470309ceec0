"""Sources of a conversion, and how they are distributed to splits and shards."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence

from etils import epath

from como_jax.staging import is_local

# Names of splits of a source that become `val`.
VALIDATION_SPLITS = ("val", "valid", "validation", "eval", "test")
# As many shards as keep the cores of a large machine busy; up to that number, shards are kept small.
_MANY_SHARDS = 512
_FEW_SOURCES = 4
_FEW_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, or a group of records, that is converted on its own.

    Attributes:
      path: path below the source folder if there is one, or another stable name.
      split: the split it belongs to, or None to have it drawn.
      records: first record and the one after the last, if the source is a part of a file.
      num_bytes: size of the source, which limits how many sources share a shard.
    """

    path: str
    split: str | None = None
    records: tuple[int, int] | None = None
    num_bytes: int = 0

    @property
    def name(self) -> str:
        """Unique within the dataset."""
        return self.path if self.records is None else f"{self.path}[{self.records[0]}:{self.records[1]}]"


def assign_splits(sources: Sequence[Source], fraction: float, seed: int) -> list[Source]:
    """Gives a split to every source that has none; the draw depends on the names and the seed, not on the order.

    If there are two or more to draw, and the fraction is not 0, each split gets at least one.
    """
    undecided = [source.name for source in sources if source.split is None]

    def draw(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}/{name}".encode()).digest()

    count = min(max(1, round(fraction * len(undecided))), len(undecided) - 1) if fraction > 0 else 0
    validation = set(sorted(undecided, key=draw)[: max(count, 0)])
    return [
        dataclasses.replace(source, split=source.split or ("val" if source.name in validation else "train"))
        for source in sources
    ]


def group_sources(sources: Sequence[Source], max_sources: int, max_bytes: int) -> list[list[Source]]:
    """Groups sources into shards, in order, with at least one source in each."""
    shards: list[list[Source]] = []
    size = 0
    for source in sources:
        if not shards or len(shards[-1]) == max_sources or size + source.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.num_bytes
    return shards


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records and its episode table, which are written together.

    Attributes:
      split: `train` or `val`.
      index: position within the split, from 0.
      count: number of shards of the split.
      sources: what is converted into the shard, in order.
    """

    split: str
    index: int
    count: int
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """Unique within the dataset; the names of the files contain it."""
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}"


def make_shards(sources: Sequence[Source], splits: Sequence[str], max_bytes: int) -> list[Shard]:
    """Distributes sources that have a split to shards; the result depends only on the sources and the limit.

    Shards are the units of parallel work and of resuming, so they are kept small while there are few. However many
    sources there are, about 512 shards are made, or as many as `max_bytes` each ask for.
    """
    num_bytes = sum(source.num_bytes for source in sources)
    few_sources = max(_FEW_SOURCES, math.ceil(len(sources) / _MANY_SHARDS))
    few_bytes = max(_FEW_BYTES, math.ceil(num_bytes / _MANY_SHARDS))
    shards = []
    for split in splits:
        members = [source for source in sources if source.split == split]
        groups = group_sources(members, few_sources, min(max_bytes, few_bytes))
        shards += [Shard(split, index, len(groups), tuple(group)) for index, group in enumerate(groups)]
    return shards


def check_file(path: epath.PathLike) -> None:
    """Raises ValueError for a pipe, which would block, and for a link whose target does not exist."""
    # The `is_file` of epath is true of pipes.
    if is_local(path) and not os.path.isfile(path):
        raise ValueError("is not a file, or is a link without a target")
