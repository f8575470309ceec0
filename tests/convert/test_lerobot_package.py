"""LeRobot's own package, where there is one: we read what it writes, and it reads what the other tests convert."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from lerobot_files import LENGTHS as WRITTEN_LENGTHS
from lerobot_files import TASKS, TOP, WRIST, write_v3

from como_jax.convert.lerobot.builder import LeRobot, LeRobotSettings

SCRIPT = Path(__file__).with_name("lerobot_package.py")
LENGTHS = (5, 7, 4, 6, 9)


@pytest.fixture(scope="module")
def run_package(tmp_path_factory) -> Callable[..., str]:
    """Runs the script in an environment that has the package, which may need other versions than this project."""
    python = os.environ.get("COMO_LEROBOT_PYTHON", sys.executable)
    if python == sys.executable and importlib.util.find_spec("lerobot") is None:
        pytest.skip("set COMO_LEROBOT_PYTHON to the interpreter of an environment with lerobot (0.4 or later)")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("home"))}

    def run(*arguments: object) -> str:
        command = [python, str(SCRIPT), *map(str, arguments)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.mark.parametrize("max_megabytes", [200, 0.002])
def test_images_actions_and_tasks_are_those_that_were_recorded(tmp_path, run_package, check_dataset, max_megabytes):
    source = tmp_path / "data"
    run_package("write", source, max_megabytes)
    videos = sorted(path.relative_to(source).as_posix() for path in source.glob("videos/*.top/**/*.mp4"))
    files = ["000/file-000"] if max_megabytes == 200 else ["000/file-000", "000/file-001", "001/file-000"]
    assert videos == [f"videos/observation.images.top/chunk-{file}.mp4" for file in files]
    settings = LeRobotSettings(source=str(source), validation_fraction=0.0, action=("action", "gripper"))
    report = LeRobot(tmp_path / "out", settings).convert()
    table = check_dataset(tmp_path / "out")["train"]
    assert tuple(row["num_steps"] for row in table) == LENGTHS
    assert [row["language_instruction"] for row in table] == ["push", "pull", "push", "pull", "push"]
    np.testing.assert_array_equal(table[1]["state"], [[step / 2, 1, 2] for step in range(7)])
    assert {row["control_rate"] for row in table} == {10.0}
    assert report["left_out"] == []
    for record in tfds.builder_from_directory(tmp_path / "out").as_data_source("train"):
        step, episode, gripper = record["action"]
        assert gripper == -step
        for camera in ("top", "wrist"):
            assert abs(record["observation"][camera].mean() - (20 + 30 * episode + 4 * step)) < 2


def test_the_files_that_other_tests_convert_are_of_the_format(tmp_path, run_package):
    source = write_v3(tmp_path / "data", cameras=(TOP, WRIST), numbers=(0, 1, 2))
    found = json.loads(run_package("read", source).splitlines()[-1])
    numbered = list(enumerate(WRITTEN_LENGTHS.values()))
    assert found["actions"] == [[step, index] for index, length in numbered for step in range(length)]
    assert found["tasks"] == [TASKS[index % 2] for index, length in numbered for _ in range(length)]
    files = {TOP: ["000/file-000", "000/file-000", "000/file-001"], WRIST: ["000/file-000"] + ["001/file-000"] * 2}
    assert found["videos"] == {
        key: [f"videos/{key}/chunk-{name}.mp4" for name in names] for key, names in files.items()
    }
    assert all((source / path).is_file() for paths in found["videos"].values() for path in paths)
