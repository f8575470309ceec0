"""Exported labels opened by the tools that others open them with; large, so only with COMO_PEERS=all."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from como_jax.export.labels.dataset import LabelledDataset
from como_jax.export.labels.lerobot import write_lerobot
from como_jax.export.labels.rlds import write_rlds
from tests.peers import peer_python, run_peer

pytestmark = pytest.mark.slow

FIELDS = {"observation.state": "state", "action": "action"} | {
    key: key for key in ("latent_motion", "latent_valid", "latent_codes")
}
# The other decoder of LeRobot, torchcodec, needs FFmpeg on the machine.
READ_LEROBOT = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
dataset = LeRobotDataset("test/data", root=sys.argv[1], video_backend="pyav")
bounds = [(row["dataset_from_index"], row["dataset_to_index"]) for row in dataset.meta.episodes]
steps = [step for begin, end in bounds for step in (begin, end - 1)]
items = [dataset[step] for step in steps]
np.savez(
    sys.argv[2], steps=steps, length=len(dataset), task=[item["task"] for item in items],
    **{key: np.stack([value.numpy() for value in values])
       for key in sys.argv[3:] for values in [[item[key] for item in items]]},
)
"""
READ_RLDS = """
import sys
import numpy as np
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(sys.argv[1])
episodes = [episode for split in ("train", "val") for episode in builder.as_dataset(split)]
steps = [step for episode in episodes for step in episode["steps"].as_numpy_iterator()]
names = ("action", "latent_motion", "latent_valid", "latent_codes", "language_instruction", "is_first")
np.savez(
    sys.argv[2], ids=[episode["episode_metadata"]["episode_id"].numpy() for episode in episodes],
    image=np.stack([step["observation"]["image"] for step in steps]),
    state=np.stack([step["observation"]["state"] for step in steps]),
    **{name: np.stack([step[name] for step in steps]) for name in names},
)
"""


@pytest.fixture(scope="module")
def lerobot() -> Path:
    """The interpreter, asked for first: without it nothing need be exported."""
    return peer_python("lerobot")


@pytest.fixture(scope="module")
def tensorflow() -> Path:
    """The interpreter."""
    return peer_python("tensorflow")


@pytest.fixture(scope="module")
def exported(lerobot: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export for LeRobot, in several files."""
    folder = tmp_path_factory.mktemp("lerobot") / "out"
    write_lerobot(LabelledDataset(labelled), epath.Path(folder), max_steps_per_file=200)
    return folder


@pytest.fixture(scope="module")
def images(labelled: Path) -> np.ndarray:
    """The images of all steps."""
    builder = tfds.builder_from_directory(labelled)
    steps = itertools.chain.from_iterable(map(builder.as_data_source, ("train", "val")))
    return np.stack([step["observation"]["image"] for step in steps])


def column(rows: list[dict[str, Any]], field: str) -> np.ndarray:
    """The values of all steps."""
    return np.array(list(itertools.chain.from_iterable(row[field] for row in rows)))


def test_lerobot_reads_the_first_and_the_last_step_of_every_episode(
    lerobot: Path, exported: Path, labelled: Path, rows_of, images: np.ndarray, tmp_path: Path
) -> None:
    camera, path = "observation.images.image", tmp_path / "found.npz"
    run_peer(lerobot, READ_LEROBOT, exported, path, camera, *FIELDS)
    found, rows = np.load(path), rows_of(labelled)
    ends = np.cumsum([row["num_steps"] for row in rows])
    assert found["length"] == ends[-1]
    assert found["steps"].tolist() == np.stack([[0, *ends[:-1]], ends - 1], axis=1).ravel().tolist()
    assert found["task"].tolist() == [row["language_instruction"] for row in rows for _ in range(2)]
    for key, field in FIELDS.items():
        np.testing.assert_array_equal(found[key], column(rows, field)[found["steps"]].astype(found[key].dtype), key)
    # LeRobot has the channels first, from 0 to 1.
    differences = np.abs(np.moveaxis(255 * found[camera], 1, -1) - images[found["steps"]]).mean(axis=(1, 2, 3))
    assert differences.max() < 6


def test_lerobot_doctor_finds_no_failure(lerobot: Path, exported: Path) -> None:
    doctor = lerobot.with_name("lerobot-doctor")
    command = [doctor, "check", exported, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)["summary"]
    assert summary["PASS"] > 0 and summary["FAIL"] == 0, result.stdout


def test_tensorflow_reads_every_step(
    tensorflow: Path, labelled: Path, rows_of, images: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    write_rlds(LabelledDataset(labelled), epath.Path(tmp_path / "out"))
    run_peer(tensorflow, READ_RLDS, tmp_path / "out", tmp_path / "found.npz")
    found, rows = np.load(tmp_path / "found.npz"), rows_of(labelled)
    assert [name.decode() for name in found["ids"]] == [row["episode_id"] for row in rows]
    for field in FIELDS.values():
        np.testing.assert_array_equal(found[field], column(rows, field).astype(found[field].dtype), field)
    instructions = [row["language_instruction"] for row in rows for _ in range(row["num_steps"])]
    assert [text.decode() for text in found["language_instruction"]] == instructions
    assert np.flatnonzero(found["is_first"]).tolist() == [0, *np.cumsum([row["num_steps"] for row in rows])[:-1]]
    # Decoders of JPEG differ by how they enlarge the colours.
    assert np.abs(found["image"].astype(int) - images).mean(axis=(1, 2, 3)).max() < 4
