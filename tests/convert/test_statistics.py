"""Statistics from episode tables, in pieces."""

import numpy as np
import pytest
from etils import epath

from como_jax.convert import statistics
from como_jax.data.episode_table import EpisodeTable, read_part, write_episode_table, write_episodes


@pytest.fixture
def tables(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for shard, lengths in enumerate([(4, 2), (), (3,)]):
        rows = [
            {
                "episode_id": f"{shard}/{index}",
                "source_file": "",
                "language_instruction": "",
                "control_rate": 2.0 + shard,
                "num_steps": length,
                "motion": [0.0, *rng.random(length - 1).tolist()],
                "action": rng.normal(size=(length, 5)).tolist(),
                "state": None,
            }
            for index, length in enumerate(lengths)
        ]
        paths.append(epath.Path(tmp_path) / f"{shard}.parquet")
        write_episodes(paths[-1], rows)
    write_episode_table(tmp_path / "episodes-train.parquet", map(read_part, paths), None)
    return EpisodeTable(tmp_path, "train")


def values(table, column):
    return [row for group in table.read([column]) for row in group[column].to_pylist()]


@pytest.mark.parametrize("max_values", [1, 20, 1000])
def test_dimensions_are_described_one_by_one_or_together(tables, monkeypatch, max_values):
    monkeypatch.setattr(statistics, "_MAX_VALUES", max_values)
    assert len(tables.groups) == 2
    found = statistics.dataset_statistics({"train": tables})
    actions = np.concatenate(values(tables, "action"))
    assert found["action"]["count"] == 9
    for name, expected in {
        "mean": actions.mean(0),
        "std": actions.std(0),
        "q01": np.quantile(actions, 0.01, axis=0),
        "max": actions.max(0),
    }.items():
        np.testing.assert_allclose(found["action"][name], expected)
    assert found["state"] is None
    assert found["splits"]["train"] == {"num_episodes": 3, "num_steps": 9, "seconds": 3.75}


def test_motion_leaves_out_the_first_step_of_every_episode(tables):
    motion = np.concatenate([row[1:] for row in values(tables, "motion")])
    found = statistics.dataset_statistics({"train": tables})["motion"]
    assert found["count"] == 6
    np.testing.assert_allclose([found["min"], found["q50"]], [motion.min(), np.median(motion)])
