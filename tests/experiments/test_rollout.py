"""Rollouts from the command line, of a policy that needs no training."""

import csv
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from como_jax.errors import ConfigError, RunError
from como_jax.evaluation.rollouts import rollout as rollouts
from como_jax.evaluation.rollouts.resuming import read_episodes, rollout_directory
from como_jax.evaluation.rollouts.rollout import RolloutOptions, parse_settings
from como_jax.spec.control import ControlConfig
from experiments import rollout as command
from experiments.rollout import rollout
from tests.conftest import REPOSITORY
from tests.evaluation.rollout_fakes import LINE_POLICY, TABLETOP_POLICY, FakeRunner, always_exit

OPTIONS = RolloutOptions(episodes=2, workers=2)
SCRIPT = """
import functools
from experiments import rollout as command
from tests.evaluation import rollout_fakes as fakes
command.load_policy = lambda *_: fakes.FakeRunner(fakes.TABLETOP_POLICY)
if {crash}:
    command.roll_out = functools.partial(command.roll_out, make=fakes.always_exit)
command.define_flags()
command.cli.run(command.main)
"""


@pytest.fixture(autouse=True)
def policy(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    runner = FakeRunner(TABLETOP_POLICY)
    monkeypatch.setattr(command, "load_policy", lambda *_: runner)
    return runner


def run(workdir: Path, *arguments: str, crash: bool = False) -> subprocess.CompletedProcess[str]:
    code = [sys.executable, "-c", SCRIPT.format(crash=crash), "--workdir", str(workdir), *arguments]
    return subprocess.run(code, capture_output=True, text=True, cwd=REPOSITORY, check=False)


def test_tables_videos_and_images_agree(tmp_path: Path):
    summary = rollout(tmp_path, "tabletop:reach,push", OPTIONS, max_steps=5, settings={"look": "hard"})
    (out,) = (tmp_path / "rollouts").iterdir()
    assert out.name == "tabletop-reach-push-step7"
    rows = list(csv.DictReader((out / "episodes.csv").open(newline="")))
    assert [(row["task"], row["seed"]) for row in rows] == [
        (task, seed) for task in ("tabletop:reach", "tabletop:push") for seed in ("900000000", "900000001")
    ]
    assert sum(int(row["success"]) for row in rows) == summary.total.successes and all(
        row["instruction"] for row in rows
    )
    for row in rows:
        outcome = "success" if row["success"] == "1" else "failure"
        name = f"{row['task'].replace(':', '-')}-{int(row['episode']):03d}-{outcome}.mp4"
        with av.open(str(out / "videos" / name)) as container:
            assert len(list(container.decode(video=0))) == int(row["steps"]) + 1
            assert float(container.streams.video[0].average_rate) == 10.0
    values = json.loads((out / "summary.json").read_text())
    assert values["step"] == 7 and values["environment"]["settings"] == {"look": "hard"}
    assert values["options"]["control"]["execute"] == 1
    assert (out / "grid.png").stat().st_size > 0 and (out / "table.md").exists()


def test_equal_rollouts_are_equal_and_get_directories_of_their_own(tmp_path: Path):
    for workers in (1, 2):
        options = RolloutOptions(episodes=2, workers=workers, control=ControlConfig(2, 0.1))
        rollout(tmp_path, "tabletop:reach", options, max_steps=4)
    first, second = (tmp_path / "rollouts" / f"tabletop-reach-step7{end}" for end in ("", "-2"))
    for name in ("episodes.csv", "table.md", "videos/tabletop-reach-000-failure.mp4"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(tmp_path: Path, policy: FakeRunner):
    for arguments, words in [
        ({"env": "tabletop:reech"}, "did you mean reach"),
        ({"env": "tabletop:reach", "settings": {"colour": "red"}}, "setting colour"),
        ({"env": "tabletop:reach", "image_size": 16}, "image_size"),
    ]:
        with pytest.raises(ConfigError, match=words):
            rollout(tmp_path, options=OPTIONS, **arguments)
    policy.spec = LINE_POLICY
    with pytest.raises(ConfigError, match="one camera, image, not front"):
        rollout(tmp_path, "tabletop:reach", OPTIONS)
    assert not any(path.is_file() for path in tmp_path.rglob("*")) and not list((tmp_path / "rollouts").iterdir())

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="`out` .* holds files already"):
        rollout(tmp_path, "tabletop:reach", OPTIONS, out=tmp_path)
    with pytest.raises(RunError, match="`out` .* cannot be made"):
        rollout(tmp_path, "tabletop:reach", OPTIONS, out=tmp_path / "notes.txt" / "out")
    for text in ("look", "=hard"):
        with pytest.raises(ConfigError, match="must be NAME=VALUE"):
            parse_settings([text])


def test_the_command_prints_the_table(tmp_path: Path):
    arguments = ("--env=tabletop:reach,push", "--episodes=1", "--max_steps=3", "--env_setting=look=human", "--videos=0")
    ended = run(tmp_path, *arguments, "--out", str(tmp_path / "out"), "--execute=2", "--ensemble=0.1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == (tmp_path / "out" / "table.md").read_text()
    assert "tabletop:push, episode 0: failure after 3 steps" in ended.stderr
    assert not (tmp_path / "out" / "videos").exists()
    values = json.loads((tmp_path / "out" / "summary.json").read_text())["options"]
    assert values["control"] == {"execute": 2, "ensemble": 0.1} and values["episodes"] == 1


@pytest.mark.slow
def test_the_command_fails_if_all_episodes_crash(tmp_path: Path):
    ended = run(tmp_path, "--env=tabletop:reach", "--episodes=2", crash=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "All 2 episodes crashed" in ended.stderr and "exit status 3" in ended.stderr
    assert ended.stdout.splitlines()[-1] == "| tabletop:reach | 2 | - | - | - | - | 2 |"


def test_crashes_are_listed_beside_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "roll_out", functools.partial(rollouts.roll_out, make=always_exit))
    summary = rollout(tmp_path / "run", "tabletop:reach", OPTIONS, out=tmp_path / "out")
    assert summary.total.crashed == 2 and summary.total.rate is None
    rows = list(csv.DictReader((tmp_path / "out/episodes.csv").open(newline="")))
    assert [row["crashed"] for row in rows] == ["1", "1"] and "exit status 3" in rows[0]["reason"]
    assert np.all([not row["instruction"] for row in rows])


@pytest.mark.slow
def test_stopped_rollouts_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run_twice(stop_after: int) -> Path:
        """Interrupts at an episode, and gives the same command again with another number of workers."""
        write, left = command.RolloutRecorder.__call__, [stop_after]

        def write_or_stop(self: object, *episode: object) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(self, *episode)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(command.RolloutRecorder, "__call__", write_or_stop)
            rollout(tmp_path / str(stop_after), "tabletop:reach,push", OPTIONS, max_steps=4)
        options = RolloutOptions(episodes=2, workers=1)
        rollout(tmp_path / str(stop_after), "tabletop:reach,push", options, max_steps=4)
        (out,) = (tmp_path / str(stop_after) / "rollouts").iterdir()
        return out

    stopped, whole = run_twice(3), tmp_path / "whole"
    rollout(tmp_path / "run", "tabletop:reach,push", OPTIONS, max_steps=4, out=whole)
    for name in ("episodes.csv", "table.csv", "videos/tabletop-push-001-failure.mp4"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in stopped.iterdir()} == {path.name for path in whole.iterdir()}
    # With nothing written there is nothing to go on with, nor to leave.
    assert run_twice(0).name == "tabletop-reach-push-step7"


def test_other_rollouts_do_not_go_on_in_a_stopped_directory(tmp_path: Path):
    plan = {"env": "a", "sizes": (1, 2)}
    with pytest.raises(KeyboardInterrupt), rollout_directory(None, tmp_path, "a:b", plan) as first:
        (first / "episodes.csv").write_text("task\n")
        # It has an owner, who is still at work.
        with rollout_directory(None, tmp_path, "a:b", plan) as second:
            pass
        raise KeyboardInterrupt
    with rollout_directory(None, tmp_path, "a:b", {**plan, "env": "c"}) as third:
        pass
    assert [path.name for path in (first, second, third)] == ["a-b", "a-b-2", "a-b-3"]
    with pytest.raises(RunError, match="holds files already"), rollout_directory(first, tmp_path, "", {"env": "c"}):
        pass
    with pytest.raises(RunError, match="episodes.csv is damaged"), rollout_directory(first, tmp_path, "", plan):
        (first / "episodes.csv").write_text("task,episode,crashed\na,b,0\n")
        read_episodes(first)
    with rollout_directory(None, tmp_path, "a:b", plan) as again:
        pass
    assert again == first and not (first / "unfinished.json").exists()


def test_the_settings_of_the_data_hold_unless_others_are_given(
    tmp_path: Path, policy: FakeRunner, caplog: pytest.LogCaptureFixture
):
    policy.environment = {"family": "tabletop", "look": "hard"}
    rollout(tmp_path, "tabletop:reach", dataclasses.replace(OPTIONS, videos=0), max_steps=1)
    (out,) = (tmp_path / "rollouts").iterdir()
    assert json.loads((out / "summary.json").read_text())["environment"]["settings"] == {"look": "hard"}
    assert not caplog.records
    given = {"look": "plain"}
    assert rollouts.trained_settings(policy.environment, ["tabletop:reach"], given) == given
    assert "The policy was trained on images and states of look=hard, not plain." in caplog.text
    # Another simulator has settings of its own.
    assert rollouts.trained_settings(policy.environment, ["metaworld:reach-v3"], {}) == {}
