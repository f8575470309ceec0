"""The folder in which a dataset is made, and from which the same command goes on after a kill.

OUT.partial/plan.json     what is being made: only the same plan goes on with it
OUT.partial/lock          held by the conversion that runs, freed by the system however that ends
OUT.partial/done/         one file a finished shard, renamed into place when all else of the shard is
OUT.partial/dataset/      what becomes OUT
OUT.partial/replaced/     the older OUT, for the moment in which the new one takes its place
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from como_jax.data import schema
from como_jax.errors import ConversionError
from tools.datasets.report import SourceOutcome, write_json
from tools.datasets.sources import Shard

_MAX_SHOWN = 60


@dataclasses.dataclass(frozen=True)
class ShardNotes:
    """What a finished shard tells the rest of the conversion.

    Attributes:
      num_records: steps in it.
      num_bytes: size of its file of records.
      outcomes: of its sources.
    """

    num_records: int
    num_bytes: int
    outcomes: list[SourceOutcome]


class Staging:
    """The staging folder of one output directory."""

    def __init__(self, out: epath.Path):
        """Names the folders; makes nothing."""
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.dataset = self.folder / "dataset"
        self._replaced = self.folder / "replaced"
        self._done = self.folder / "done"
        self._plan = self.folder / "plan.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other conversions into the same output away, and removes the folder if no plan is left in it.

        A bucket has no locks, so that nobody is kept away there.

        Raises:
          ConversionError: another conversion runs.
        """
        self.folder.mkdir(exist_ok=True)
        with contextlib.nullcontext() if not is_local(self.folder) else self._lock():
            if self._replaced.exists() and not self.out.exists():
                self._replaced.rename(self.out)
            try:
                yield
            finally:
                if not self._plan.exists():
                    self.folder.rmtree()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # A lock of the system's, and not the mere existence of a file, ends with the process that holds it.
        with open(self.folder / "lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise ConversionError(f"another conversion into {self.out} is running ({owner})") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    def is_published(self, plan: Mapping[str, Any]) -> bool:
        """Whether an earlier run of a plan had published the dataset, and was killed before it had tidied up."""
        # The plan is written after the folder of the dataset is made, which only publishing takes away.
        return self._found_plan() == _as_json(plan) and not self.dataset.exists()

    def open(self, plan: Mapping[str, Any], restart: bool) -> None:
        """Makes the folder for a plan, or goes on with what an earlier run of the same plan left in it.

        Raises:
          ConversionError: what is there belongs to another plan, and is not to be discarded.
        """
        found = self._found_plan()
        if found is not None and self.dataset.exists() and not restart:
            if changes := _changes(found, _as_json(plan)):
                raise ConversionError(
                    f"{self.folder} holds an unfinished conversion with other settings or sources ({changes}); "
                    "--restart discards it"
                )
            return
        _delete(self._plan, self.dataset, self._replaced, self._done)
        self.dataset.mkdir()
        self._done.mkdir()
        write_json(self._plan, plan)

    def _found_plan(self) -> dict[str, Any] | None:
        return json.loads(self._plan.read_text()) if self._plan.exists() else None

    def finished(self, shards: Sequence[Shard], records: Mapping[str, epath.Path]) -> dict[str, ShardNotes]:
        """Notes of the shards that are complete; everything else is removed from the unfinished dataset.

        Args:
          shards: of the plan.
          records: files of records by the name of the shard.
        """
        finished, kept = {}, set()
        for shard in shards:
            files = [records[shard.name], self.dataset / table_name(shard)]
            notes = self.read_notes(shard)
            if notes and all(file.exists() for file in files) and files[0].stat().length == notes.num_bytes:
                finished[shard.name] = notes
                kept.update(file.name for file in files)
        for path in self.dataset.iterdir():
            if path.name not in kept:
                path.unlink()
        for path in self._done.iterdir():
            if path.name.removesuffix(".json") not in finished:
                path.unlink()
        return finished

    def read_notes(self, shard: Shard) -> ShardNotes | None:
        """The notes of a shard, or None when it is not finished."""
        path = self._done / f"{shard.name}.json"
        if not path.exists():
            return None
        notes = json.loads(path.read_text())
        return ShardNotes(**{**notes, "outcomes": [SourceOutcome(**outcome) for outcome in notes["outcomes"]]})

    def write_notes(self, shard: Shard, notes: ShardNotes) -> None:
        """Marks a shard as finished, once its records and its episode table are in place."""
        write_json(self._done / f"{shard.name}.json", dataclasses.asdict(notes))

    def publish(self, overwrite: bool) -> None:
        """Makes the dataset the output; after a kill at any point in it, the same command goes on.

        Raises:
          ConversionError: the output exists, and is not to be replaced.
        """
        if self.out.exists():
            if not overwrite:
                raise ConversionError(f"{self.out} exists already; --overwrite replaces it")
            self.out.rename(self._replaced)
        self.dataset.rename(self.out)
        self.tidy()

    def tidy(self) -> None:
        """Removes what is left of a published dataset, the plan last, so that this can be taken up again."""
        _delete(self._replaced, self._done, self._plan)

    def discard(self) -> None:
        """Gives an unfinished conversion up; without a plan, the folder is removed with the lock."""
        _delete(self._plan)


def _delete(*paths: epath.Path) -> None:
    for path in paths:
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _as_json(plan: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(plan))


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is one of the file system, and not of a bucket."""
    return "://" not in os.fspath(path)


def table_name(shard: Shard) -> str:
    """File name of a shard's episode table."""
    return schema.episode_table_name(shard.split, shard.index, shard.count)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Names the differences between two plans, and those of their settings one by one."""
    names = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += [_change(field, before, after) for field in after if before.get(field) != after[field]]
        elif before != after:
            names.append(_change(key, old, new))
    return ", ".join(names)


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    values = f"{key}: {old.get(key)}, now {new.get(key)}"
    return values if len(values) <= _MAX_SHOWN else key
