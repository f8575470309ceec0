"""Compares the files of records that dataset_info.json names with those in the folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

_SHARD = re.compile(r".+-(?P<place>[^-.]+\.(?:tfrecord|array_record)-\d+-of-\d+)")
_FORMATS = (".tfrecord", ".array_record")
_MAX_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a dataset.

    Attributes:
      found: the file in the folder for each name in dataset_info.json that is missing there, if only the name of the
        dataset differs.
      unnamed: other files of records in the folder, which dataset_info.json does not name.
    """

    found: Mapping[str, str]
    unnamed: Sequence[str]

    def warnings(self) -> list[str]:
        """Returns what is odd about the folder."""
        messages = []
        if self.found:
            old, new = next(iter(self.found.items()))
            messages.append(f"dataset_info.json gives other names to {len(self.found)} files, such as {old} for {new}")
        if self.unnamed:
            messages.append(
                f"files of records that dataset_info.json does not name were not converted: {_some(self.unnamed)}"
            )
        return messages

    @property
    def missing(self) -> str:
        """Returns what to say of a file that is not there."""
        others = f"; the folder holds others: {_some(self.unnamed)}" if self.unnamed else ""
        return f"the file is missing{others}"


def compare_shards(named: Iterable[str], present: Iterable[str]) -> Shards:
    """Compares the names in dataset_info.json with those of the files in the folder."""
    wanted, there = set(named), set(present)
    others = {name for name in there - wanted if any(kind in name for kind in _FORMATS)}
    places: dict[str, list[str]] = {}
    for name in others:
        if match := _SHARD.fullmatch(name):
            places.setdefault(match["place"], []).append(name)
    found = {}
    for name in sorted(wanted - there):
        match = _SHARD.fullmatch(name)
        candidates = places.get(match["place"], []) if match else []
        if len(candidates) == 1:
            found[name] = candidates[0]
    return Shards(found, sorted(others - set(found.values())))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
