"""Exported labels opened by the tools that others open them with; large, so only with COMO_PEERS=all."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from como_jax.export.labels.dataset import LabelledDataset
from como_jax.export.labels.lerobot import write_lerobot
from como_jax.export.labels.rlds import write_rlds
from tests.peers import peer_python, run_peer

pytestmark = pytest.mark.slow

READ_LEROBOT = """
import json, sys
from lerobot.datasets.lerobot_dataset import LeRobotDataset
dataset = LeRobotDataset("test/data", root=sys.argv[1])
first = dataset[0]
print(json.dumps({
    "steps": len(dataset), "episodes": dataset.num_episodes, "task": first["task"],
    "action": first["action"].tolist(), "image": list(first["observation.images.image"].shape),
}))
"""
READ_RLDS = """
import json, sys
import tensorflow_datasets as tfds
dataset = tfds.builder_from_directory(sys.argv[1]).as_dataset("train")
episodes = [[step["action"].numpy().tolist() for step in episode["steps"]] for episode in dataset]
print(json.dumps(episodes))
"""


@pytest.fixture(scope="module")
def lerobot() -> Path:
    """The interpreter, asked for first: without it nothing need be exported."""
    return peer_python("lerobot")


@pytest.fixture(scope="module")
def tensorflow() -> Path:
    """The interpreter."""
    return peer_python("tensorflow")


def test_lerobot_opens_the_export(lerobot: Path, labelled: Path, rows_of, tmp_path: Path) -> None:
    write_lerobot(LabelledDataset(labelled), epath.Path(tmp_path / "out"))
    found = json.loads(run_peer(lerobot, READ_LEROBOT, tmp_path / "out").splitlines()[-1])
    rows = rows_of(labelled)
    assert (found["steps"], found["episodes"]) == (sum(row["num_steps"] for row in rows), len(rows))
    assert found["task"] == rows[0]["language_instruction"] and found["image"][0] == 3
    np.testing.assert_allclose(found["action"], rows[0]["action"][0], rtol=1e-6)


def test_lerobot_doctor_finds_no_failure(lerobot: Path, labelled: Path, tmp_path: Path) -> None:
    write_lerobot(LabelledDataset(labelled), epath.Path(tmp_path / "out"))
    doctor = lerobot.with_name("lerobot-doctor")
    result = subprocess.run([doctor, "check", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert result.stdout and "FAIL" not in result.stdout + result.stderr


def test_tensorflow_reads_the_export(tensorflow: Path, labelled: Path, rows_of, tmp_path: Path) -> None:
    write_rlds(LabelledDataset(labelled), epath.Path(tmp_path))
    found = json.loads(run_peer(tensorflow, READ_RLDS, tmp_path).splitlines()[-1])
    expected = [row["action"] for row in rows_of(labelled)][: len(found)]
    assert [len(episode) for episode in found] == [len(episode) for episode in expected]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-6)
