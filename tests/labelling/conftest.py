"""A small dataset of several shards, a run that labels it, and ways to look at what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.labelling.labelling import DatasetLabeller, LabelSettings
from como_jax.labelling.shards import list_shards
from como_jax.training import sharding
from como_jax.training.run import Run, load_run

GAP_SECONDS = 0.3


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten demonstrations in three shards of `train` and one of `val`."""
    directory = tmp_path_factory.mktemp("datasets") / "few"
    BUILDERS["tabletop"](directory, make_settings("tabletop", {"episodes": 10}), None).convert()
    assert len(list_shards(epath.Path(directory))) == 4
    return directory


@pytest.fixture(scope="session")
def run(smoke_run: Callable[[str], Path]) -> Run:
    return load_run(smoke_run("como"), sharding.make_mesh())


@pytest.fixture(scope="session")
def discrete_run(smoke_run: Callable[[str], Path]) -> Run:
    return load_run(smoke_run("discrete"), sharding.make_mesh())


def label(run: Run, data: Path, out: Path, *, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Labels a dataset, by default without any summary, and returns the report."""
    chosen = LabelSettings(**{"gap_seconds": GAP_SECONDS, "batch_size": 32, **(settings or {})})
    labeller = DatasetLabeller(run, data, out, chosen, 2)
    return labeller.label(**{"progress": lambda *_: None, "summarize": lambda *_: {}, **options})


@pytest.fixture(scope="session")
def labelled(run: Run, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`few`, labelled without interruption."""
    out = tmp_path_factory.mktemp("labelled") / "few"
    label(run, few, out)
    return out
