"""Smoke recipes of policies, their runs before the first step, and variants of datasets for them."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from como_jax.training.train_state import TrainState
from experiments.train_policy import train_policy

FAMILIES = ("diffusion", "autoregressive")
ACTION_HEADS = {"diffusion": {"action"}, "autoregressive": {"action_queries", "action_head"}}
LATENT_HEADS = {
    "diffusion": {"latent"},
    "autoregressive": {"latent_start", "latent_pos", "latent_in", "latent_head"},
}


class PolicyRun(NamedTuple):
    """Directory and last state of a policy's training."""

    workdir: Path
    state: TrainState


def smoke(family: str, *datasets: Path | str, **changes: object) -> ConfigDict:
    """The smoke recipe of a family on some datasets, with changes by full name."""
    config = importlib.import_module(f"configs.policy_{family}").get_config("smoke")
    config.data.mixture = ",".join(map(str, datasets))
    # The last step is enough where nothing else is asked for; a run that is stopped before it evaluates nothing.
    config.train.evaluate_every = 0
    config.update_from_flattened_dict(changes)
    return config


def start(config: ConfigDict, workdir: Path) -> TrainState:
    """The state with which a run begins; everything is done but the steps."""
    config.train.num_steps = 0
    return train_policy(config, workdir)


def read_metrics(workdir: Path) -> dict[int, dict[str, float]]:
    """All that a run logged but its speed, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = found.setdefault(values.pop("step"), {})
        values = {name: value for name, value in values.items() if not name.startswith("speed/")}
        assert not step.keys() & values.keys(), "a step was logged twice"
        step |= values
    return found


def copy_dataset(dataset: Path, directory: Path, *, size: int | None = None, splits: tuple[str, ...] = ()) -> Path:
    """A dataset under another name: actions and states cut down to `size` numbers, and only some splits."""
    shutil.copytree(dataset, directory)
    for path in directory.glob("episodes-*.parquet"):
        if splits and path.stem.removeprefix("episodes-") not in splits:
            path.unlink()
        elif size:
            _cut_vectors(path, size)
    if size:
        path = directory / "statistics.json"
        statistics = json.loads(path.read_text())
        for name in ("action", "state"):
            for key, value in statistics[name].items():
                statistics[name][key] = value[:size] if isinstance(value, list) else value
        path.write_text(json.dumps(statistics))
    return directory


def _cut_vectors(path: Path, size: int) -> None:
    table = pq.read_table(path)
    for name in ("action", "state"):
        field = table.schema.field(name)
        rows = [[step[:size] for step in episode] for episode in table[name].to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(rows, field.type))
    pq.write_table(table, path)
