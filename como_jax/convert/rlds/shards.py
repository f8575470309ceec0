"""Compares the files of records that dataset_info.json names with those in the folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

_SHARD = re.compile(
    r"(?P<dataset>.+)-(?P<place>(?P<split>[^-.]+)\.(?P<kind>tfrecord|array_record)-(?P<index>\d+)-of-(?P<count>\d+))"
)
_FORMATS = (".tfrecord", ".array_record")
_MAX_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a dataset.

    Attributes:
      found: the file in the folder for each name in dataset_info.json that is missing there, if only the name of the
        dataset differs.
      divided: the files of every split of which all named files are missing, but which is there as one complete set of
        another number of files.
      unnamed: other files of records in the folder, which dataset_info.json does not name.
    """

    found: Mapping[str, str]
    divided: Mapping[str, Sequence[str]]
    unnamed: Sequence[str]

    def warnings(self) -> list[str]:
        """Returns what is odd about the folder."""
        messages = []
        if self.found:
            old, new = next(iter(self.found.items()))
            messages.append(f"dataset_info.json gives other names to {len(self.found)} files, such as {old} for {new}")
        messages += [
            f"dataset_info.json divides split {split!r} in another way: the {len(files)} files in the folder were "
            f"converted, such as {files[0]}"
            for split, files in self.divided.items()
        ]
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


def compare_shards(named: Mapping[str, Iterable[str]], present: Iterable[str]) -> Shards:
    """Compares the names in dataset_info.json, by split, with those of the files in the folder."""
    there = set(present)
    wanted = {name for names in named.values() for name in names}
    others = {name for name in there - wanted if any(kind in name for kind in _FORMATS)}
    found = _renamed(wanted - there, others)
    others -= set(found.values())
    lost = wanted - there - set(found)
    divided = {}
    for split, names in named.items():
        sets = _complete_sets(split, others) if lost.issuperset(names) else []
        if len(sets) == 1:
            (divided[split],) = sets
    return Shards(found, divided, sorted(others - {name for names in divided.values() for name in names}))


def _renamed(missing: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Returns the file for each missing one that differs from it by the name of the dataset alone, if there is one."""
    places: dict[str, list[str]] = {}
    for name in others:
        if match := _SHARD.fullmatch(name):
            places.setdefault(match["place"], []).append(name)
    found = {}
    for name in sorted(missing):
        match = _SHARD.fullmatch(name)
        candidates = places.get(match["place"], []) if match else []
        if len(candidates) == 1:
            found[name] = candidates[0]
    return found


def _complete_sets(split: str, names: Iterable[str]) -> list[list[str]]:
    """Returns the files of each set of a split that has all files from the first one to the last one."""
    sets: dict[tuple[str, ...], dict[int, str]] = {}
    for match in filter(None, map(_SHARD.fullmatch, names)):
        if match["split"] == split:
            sets.setdefault(match.group("dataset", "kind", "count"), {})[int(match["index"])] = match[0]
    return [
        [members[index] for index in sorted(members)]
        for (_, _, count), members in sets.items()
        if sorted(members) == list(range(int(count)))
    ]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
