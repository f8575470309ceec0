"""A labelled dataset, and ways to change it."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from como_jax.data.episode_table import EpisodeTable, read_episode_table, write_episode_table
from como_jax.data.schema import EPISODE_TABLE_SCHEMA

GAP = 3
LABELS = {"run": "runs/como", "step": 1000, "gap_seconds": 0.3}
Row = dict[str, Any]


def change_tables(directory: Path, change: Callable[[Row], Row]) -> None:
    """Writes the episode tables of a dataset anew, with every row changed, and without the sizes of files."""
    for path in directory.glob("episodes-*.parquet"):
        groups = [table.to_pylist() for table in EpisodeTable(directory, path.stem.removeprefix("episodes-")).read()]
        tables = [pa.Table.from_pylist([*map(change, rows)], EPISODE_TABLE_SCHEMA) for rows in groups]
        write_episode_table(path, tables, None)


@pytest.fixture(scope="session")
def with_changed_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Callable[[Row], Row]], Path]:
    """Copies a dataset and changes every row of its episode tables."""

    def make(source: Path, change: Callable[[Row], Row]) -> Path:
        directory = tmp_path_factory.mktemp("changed") / source.name
        shutil.copytree(source, directory)
        change_tables(directory, change)
        return directory

    return make


@pytest.fixture(scope="session")
def labelled(tabletop_dataset: Path, with_changed_rows: Callable[..., Path]) -> Path:
    """Demonstrations with random labels of six numbers and two codes; the last steps of an episode have none.

    Every third episode has one text, the others have two or three.
    """
    rng = np.random.default_rng(0)
    numbers = itertools.count()

    def label(row: Row) -> Row:
        steps = row["num_steps"]
        return {
            **row,
            "other_instructions": ["go on", "do as you are told"][: next(numbers) % 3],
            "latent_motion": rng.normal(size=(steps, 6)).astype(np.float32).tolist(),
            "latent_valid": [step < steps - GAP for step in range(steps)],
            "latent_codes": rng.integers(0, 64, (steps, 2)).tolist(),
        }

    directory = with_changed_rows(tabletop_dataset, label)
    (directory / "labels.json").write_text(json.dumps(LABELS))
    return directory


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path], list[Row]]:
    """The rows of the episode tables, those of `train` first."""
    return lambda directory: [
        row for split in ("train", "val") for row in read_episode_table(directory, split).to_pylist()
    ]
