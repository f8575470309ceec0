"""The shards of a dataset, which are labelled one by one, and the tables with their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.data import schema
from como_jax.data.parquet import read_parquet
from como_jax.errors import DatasetError
from como_jax.evaluation.latents.statistics import LatentSums
from como_jax.files import write_atomic
from como_jax.labelling.streaming import StepLabels


@dataclasses.dataclass(frozen=True)
class LabelShard:
    """One episode table of a dataset, and the records that it describes.

    Attributes:
      split: "train" or "val".
      table: name of its file.
      first_episode, num_episodes: rows of the split.
      first_record, num_records: steps of the split.
    """

    split: str
    table: str
    first_episode: int
    num_episodes: int
    first_record: int
    num_records: int

    @property
    def name(self) -> str:
        """Unique within the dataset."""
        return epath.Path(self.table).stem.removeprefix("episodes-")


def list_shards(directory: epath.Path) -> list[LabelShard]:
    """All shards of a dataset, in the order of their records.

    Raises:
      DatasetError: there are none.
    """
    shards = []
    for split in schema.SPLITS:
        episode = record = 0
        for path in sorted(directory.glob(f"episodes-{split}-*.parquet")):
            lengths = read_parquet(path, ["num_steps"])["num_steps"].to_numpy()
            steps = int(lengths.sum())
            shards.append(LabelShard(split, path.name, episode, len(lengths), record, steps))
            episode, record = episode + len(lengths), record + steps
    if not shards:
        raise DatasetError(f"{directory} holds no dataset: it has no episode tables.")
    return shards


def write_labelled_table(source: epath.Path, target: epath.Path, labels: StepLabels) -> None:
    """Copies an episode table, with these labels of all its steps in place of any that it has."""
    table = schema.read_table_of_shard(source)
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
    write_atomic(target, lambda file: pq.write_table(table, file))


def read_labels(directory: epath.Path, shard: LabelShard) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Valid latents float32 `[N, D]` of a labelled shard, and their records and episodes within the split."""
    table = read_parquet(directory / shard.table, ["num_steps", "latent_motion", "latent_valid"])
    valid = table["latent_valid"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    steps = table["latent_motion"].combine_chunks().flatten()
    latent = steps.flatten().to_numpy(zero_copy_only=False).reshape(len(steps), -1)
    episode = np.repeat(np.arange(shard.num_episodes), table["num_steps"].to_numpy())
    return latent[valid], shard.first_record + np.flatnonzero(valid), shard.first_episode + episode[valid]


def label_sums(directory: epath.Path, shards: list[LabelShard]) -> LatentSums | None:
    """Sums of all valid latents of labelled shards; None where there are none."""
    parts = []
    for shard in shards:
        latents, records, episodes = read_labels(directory, shard)
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
    for shard in shards:
        table = schema.read_table_of_shard(directory / shard.table)
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


def _by_episode(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Values `[S]` or `[S, D]` as one list per episode."""
    flat = pa.array(values.ravel())
    if values.ndim == 2:
        flat = pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1], flat)
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), flat)
