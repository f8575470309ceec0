"""Writes one shard: its records with TFDS, its part of the episode table, and the notes that mark it as finished."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, file_adapters, writer

from como_jax.convert.report import SourceOutcome
from como_jax.convert.sources import Shard, Source
from como_jax.data import episode_table, schema
from como_jax.data.schema import Episode
from como_jax.files import write_atomic
from como_jax.staging import Staging, is_local


@dataclasses.dataclass(frozen=True)
class ShardNotes:
    """What the conversion needs to know of a finished shard.

    Attributes:
      num_records: number of steps.
      num_bytes: size of the file of records.
      outcomes: what became of each source.
    """

    num_records: int
    num_bytes: int
    outcomes: list[SourceOutcome]

    @classmethod
    def read(cls, staging: Staging, shard: Shard) -> ShardNotes | None:
        """Reads the notes of a shard; None if it is not finished."""
        notes = staging.read_notes(shard.name)
        if notes is None:
            return None
        return cls(**{**notes, "outcomes": [SourceOutcome(**outcome) for outcome in notes["outcomes"]]})


def table_of_shard(staging: Staging, shard: Shard) -> epath.Path:
    """Returns the file of a shard's part of the episode table."""
    return staging.parts / f"episodes-{shard.name}.parquet"


EpisodesOf = Callable[[Source, SourceOutcome], Iterator[Episode]]
OnSource = Callable[[SourceOutcome], None]


class StableSerializer(example_serializer.ExampleSerializer):
    """Gives the same bytes in every process; protobuf alone puts the fields in an order that differs between them."""

    def serialize_example(self, example: Any) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)


@contextlib.contextmanager
def disk_errors(path: epath.Path) -> Iterator[None]:
    """Turns the RuntimeError that ArrayRecord raises when it cannot write a file into an OSError.

    Other RuntimeErrors, which a builder may raise meanwhile, are left as they are: they do not name the file.
    """
    try:
        yield
    except RuntimeError as error:
        if str(path) in str(error):
            raise OSError(f"cannot write records: {error}") from error
        raise


class ShardExamples:
    """The step records of one shard, in order, made while they are iterated over; holds one episode at a time.

    Attributes:
      shard: the shard.
      rows: rows of the episode table, one for each episode so far.
      outcomes: what became of each source so far.
    """

    def __init__(self, shard: Shard, episodes: EpisodesOf, on_source: OnSource | None):
        """Prepares a pass; `episodes` yields the usable episodes of a source, and notes in its outcome the others."""
        self.shard = shard
        self.rows: list[dict[str, Any]] = []
        self.outcomes: list[SourceOutcome] = []
        self._episodes = episodes
        self._on_source = on_source

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields keys and records; iterate only once."""
        for source in self.shard.sources:
            outcome = SourceOutcome(source.name)
            for episode in self._episodes(source, outcome):
                for index, example in enumerate(schema.step_examples(episode)):
                    yield f"{episode.episode_id}/{index}", example
                    # TFDS keeps every example of a shard to count them in the end.
                    example.clear()
                self.rows.append(schema.episode_row(episode))
                outcome.episodes += 1
            self.outcomes.append(outcome)
            if self._on_source is not None:
                self._on_source(outcome)


class ShardWriter(writer.ShardWriter):
    """TFDS's writer of shards, which also writes episodes and notes; on Beam too, where TFDS calls `write`."""

    def __init__(self, features: tfds.features.FeaturesDict, staging: Staging):
        """Prepares writing records with these features into a staging folder."""
        serializer = StableSerializer(features.get_serialized_info())
        super().__init__(features, serializer, _AtomicExampleWriter(file_adapters.FileFormat.ARRAY_RECORD))
        self._staging = staging

    def write(self, examples: ShardExamples, path: epath.Path) -> int:
        """Writes records, episodes and notes, the notes last; returns the number of records."""
        num_records = super().write(examples, path)
        table = table_of_shard(self._staging, examples.shard)
        episode_table.write_episodes(table, examples.rows)
        notes = ShardNotes(num_records, path.stat().length, examples.outcomes)
        self._staging.write_notes(examples.shard.name, [path, table], dataclasses.asdict(notes))
        return num_records


class _AtomicExampleWriter(writer.ExampleWriter):
    """Writes a file of records under a temporary name, and renames it."""

    def write(self, path: epath.PathLike, examples: Iterable[Any]) -> None:
        path = epath.Path(path)
        if is_local(path):
            partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
            try:
                self._write(partial, examples)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        else:
            # ArrayRecord writes to file systems only, and an object of a bucket appears when it is complete.
            with tempfile.TemporaryDirectory() as folder:
                records = epath.Path(folder) / path.name
                self._write(records, examples)
                with records.open("rb") as file:
                    write_atomic(path, lambda target: shutil.copyfileobj(file, target))

    def _write(self, path: epath.Path, examples: Iterable[Any]) -> None:
        with disk_errors(path):
            super().write(path, examples)
