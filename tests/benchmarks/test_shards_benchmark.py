"""The datasets of many shards that a benchmark makes."""

from __future__ import annotations

from pathlib import Path

from como_jax.data.sources import EpisodeSource
from tools.benchmarks.shards import multiply


def test_a_shard_is_there_as_often_as_asked_for(tabletop_dataset: Path, tmp_path: Path) -> None:
    multiply(tabletop_dataset, tmp_path / "one", 1)
    multiply(tabletop_dataset, tmp_path / "many", 3)
    one, many = (EpisodeSource(tmp_path / name, "train") for name in ("one", "many"))
    assert len(many) == 3 * len(one) and len(many.record_files) == 3
    assert many.read_jpegs([len(one), 3 * len(one) - 1]) == one.read_jpegs([0, len(one) - 1])
