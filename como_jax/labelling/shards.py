"""The shards of a dataset, which are labelled one by one, and the tables with their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.data import schema
from como_jax.data.episode_table import EpisodeTable, has_split, write_part
from como_jax.data.sources import flatten_steps
from como_jax.errors import DatasetError
from como_jax.evaluation.latents.statistics import LatentSums
from como_jax.files import write_atomic
from como_jax.labelling.streaming import StepLabels


@dataclasses.dataclass(frozen=True)
class LabelShard:
    """Consecutive episodes of a dataset, a group of its episode table, that are labelled together.

    Attributes:
      split: "train" or "val".
      number, count: of the group in the split, from 0, and of all groups.
      first_episode, num_episodes: rows of the split.
      first_record, num_records: steps of the split.
    """

    split: str
    number: int
    count: int
    first_episode: int
    num_episodes: int
    first_record: int
    num_records: int

    @property
    def name(self) -> str:
        """Unique within the dataset."""
        return f"{self.split}-{self.number:05d}-of-{self.count:05d}"


def list_shards(directory: epath.Path) -> list[LabelShard]:
    """All shards of a dataset, in the order of their records.

    Raises:
      DatasetError: there are none.
    """
    shards = []
    for split in schema.SPLITS:
        if not has_split(directory, split):
            continue
        episode = record = 0
        lengths = [table["num_steps"].to_numpy() for table in EpisodeTable(directory, split).read(["num_steps"])]
        for number, group in enumerate(lengths):
            steps = int(group.sum())
            shards.append(LabelShard(split, number, len(lengths), episode, len(group), record, steps))
            episode, record = episode + len(group), record + steps
    if not shards:
        raise DatasetError(f"{directory} holds no dataset: it has no episode tables.")
    return shards


def write_labelled_part(table: pa.Table, target: epath.Path, labels: StepLabels) -> None:
    """Writes a part of an episode table, with these labels of all its steps in place of any that it has."""
    lengths = table["num_steps"].to_numpy()
    columns = {
        "latent_motion": labels.latent.reshape(len(labels.latent), -1),
        "latent_valid": labels.valid,
        "latent_codes": labels.codes,
    }
    for name, values in columns.items():
        position, field = schema.EPISODE_TABLE_SCHEMA.get_field_index(name), schema.EPISODE_TABLE_SCHEMA.field(name)
        column = pa.nulls(len(lengths), field.type) if values is None else _by_episode(values, lengths)
        table = table.set_column(position, field, column)
    write_part(target, table)


def _labels(table: pa.Table, shard: LabelShard) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Valid latents float32 `[N, D]` of a labelled shard, and their records and episodes within the split."""
    valid, latent = flatten_steps(table["latent_valid"]), flatten_steps(table["latent_motion"])
    episode = np.repeat(np.arange(shard.num_episodes), table["num_steps"].to_numpy())
    return latent[valid], shard.first_record + np.flatnonzero(valid), shard.first_episode + episode[valid]


def label_sums(directory: epath.Path, shards: list[LabelShard]) -> LatentSums | None:
    """Sums of all valid latents of labelled shards; None where there are none."""
    parts = []
    for shard, table in _tables(directory, shards, ["num_steps", "latent_motion", "latent_valid"]):
        latents, records, episodes = _labels(table, shard)
        # Both splits count records and episodes from 0.
        offset = schema.SPLITS.index(shard.split) * 2**40
        if len(latents):
            parts.append(LatentSums.of(latents, offset + records, offset + episodes))
    return LatentSums.combine(parts) if parts else None


def latent_statistics(directory: epath.Path, shards: list[LabelShard]) -> dict[str, Any] | None:
    """What normalisation needs of the valid latents of `train`; None where there are none.

    Quantiles are those of a sample of 16,384, see `LatentSums`.
    """
    sums = label_sums(directory, [shard for shard in shards if shard.split == "train"])
    if sums is None:
        return None
    moments, low_high = sums.moments, np.quantile(sums.sample.astype(np.float64), (0.01, 0.99), axis=0)
    found = {
        "mean": moments.mean,
        "std": np.sqrt(np.diag(moments.covariance)),
        "min": sums.minimum,
        "max": sums.maximum,
        "q01": low_high[0],
        "q99": low_high[1],
    }
    return {"count": moments.count} | {name: value.tolist() for name, value in found.items()}


def write_flat_table(directory: epath.Path, shards: list[LabelShard], target: epath.Path) -> None:
    """Writes a table for data frames, with one row for every step of all shards."""

    def write(file: object) -> None:
        writer = None
        for table in _flat_tables(directory, shards):
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        writer.close()

    write_atomic(target, write)


def _flat_tables(directory: epath.Path, shards: list[LabelShard]) -> Iterator[pa.Table]:
    for shard, table in _tables(directory, shards):
        lengths = table["num_steps"].to_numpy()
        columns = {
            "split": pa.array([shard.split] * int(lengths.sum())),
            "episode_id": table["episode_id"].combine_chunks().take(np.repeat(np.arange(len(lengths)), lengths)),
            "step_index": np.concatenate([np.arange(length) for length in lengths]),
            "latent_valid": table["latent_valid"].combine_chunks().flatten(),
            "latent_motion": table["latent_motion"].combine_chunks().flatten(),
        }
        if not table["latent_codes"].null_count:
            columns["latent_codes"] = table["latent_codes"].combine_chunks().flatten()
        yield pa.table(columns)


def _tables(
    directory: epath.Path, shards: list[LabelShard], columns: Sequence[str] | None = None
) -> Iterator[tuple[LabelShard, pa.Table]]:
    """Shards of a labelled dataset with their episodes, in the order of their records."""
    for split in schema.SPLITS:
        chosen = {shard.number: shard for shard in shards if shard.split == split}
        for number, table in enumerate(EpisodeTable(directory, split).read(columns) if chosen else ()):
            if number in chosen:
                yield chosen[number], table


def _by_episode(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Values `[S]` or `[S, D]` as one list per episode."""
    flat = pa.array(values.ravel())
    if values.ndim == 2:
        flat = pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1], flat)
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), flat)
