"""Procgen: the generator, with a game made up for the test and with the real ones, and the builder."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from como_jax.convert.procgen import generate
from como_jax.convert.procgen.builder import NUM_ACTIONS, Procgen, ProcgenSettings
from como_jax.errors import ConversionError

SCRIPT = Path(generate.__file__)


class Game:
    """Stands for a game: the image shows the number of steps, and the sixth action ends the episode."""

    def __init__(self, level: int):
        self.level, self.actions = level, []

    def get_info(self) -> list[dict[str, int]]:
        return [{"level_seed": self.level}]

    def observe(self) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        count = len(self.actions) % 6
        image = np.full((1, 64, 64, 3), 40 * count, np.uint8)
        return np.array([float(count)]), {"rgb": image}, np.array([count == 0])

    def act(self, actions: np.ndarray) -> None:
        self.actions.append(int(actions[0]))

    def close(self) -> None:
        pass


@pytest.fixture
def games(monkeypatch) -> list[tuple[str, int]]:
    """Games and levels that were played, all of them the made up one."""
    played = []

    def make_env(game: str, level: int, mode: str) -> Game:
        played.append((game, level))
        return Game(level)

    monkeypatch.setattr(generate, "make_env", make_env)
    return played


def play(out: Path, game: str = "bigfish", count: int = 4, **changes: Any) -> int:
    options = {"mode": "hard", "max_repeat": 3, "max_steps": 100, "seed": 0} | changes
    return generate.generate(out, game, range(count), **options)


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return Procgen(out, ProcgenSettings(source=str(source), **settings)).convert()


def write(path: Path, **changes: Any) -> None:
    values = {"observations": np.zeros((3, 64, 64, 3), np.uint8), "actions": np.array([0, 7, 14]), "level_seed": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{key: value for key, value in (values | changes).items() if value is not None})


def test_images_actions_and_rewards_belong_to_one_step():
    game = Game(3)
    arrays = generate.play(game, generate.random_actions(np.random.default_rng(0), 2), max_steps=100)
    assert arrays["observations"].shape == (6, 64, 64, 3)
    np.testing.assert_array_equal(arrays["observations"][:, 0, 0, 0], 40 * np.arange(6))
    np.testing.assert_array_equal(arrays["actions"], game.actions)
    np.testing.assert_array_equal(arrays["rewards"], [1, 2, 3, 4, 5, 0])
    assert arrays["level_seed"] == 3


def test_actions_are_held_for_a_while_and_all_occur():
    actions = list(itertools.islice(generate.random_actions(np.random.default_rng(0), 8), 5000))
    assert set(actions) == set(range(NUM_ACTIONS))
    changes = np.count_nonzero(np.diff(actions)) / len(actions)
    # Held for 4.5 steps on average, after which one of 15 is drawn anew.
    assert abs(changes - 14 / 15 / 4.5) < 0.03


def test_a_run_that_was_stopped_goes_on(tmp_path, games):
    play(tmp_path, count=3)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "bigfish").glob("*.npz")}
    (tmp_path / "bigfish" / "level_0000000001.npz").unlink()
    (tmp_path / "bigfish" / ".level_0000000001.npz.partial").write_bytes(b"half a file")
    games.clear()
    assert play(tmp_path, count=4) == 12
    assert games == [("bigfish", 1), ("bigfish", 3)]
    arrays = np.load(tmp_path / "bigfish" / "level_0000000001.npz")
    with np.load(tmp_path / "bigfish" / "level_0000000000.npz") as other:
        assert not np.array_equal(arrays["actions"], other["actions"])
    assert {path.name for path in (tmp_path / "bigfish").iterdir()} == {
        *whole,
        "level_0000000003.npz",
        generate.SETTINGS_NAME,
    }
    with pytest.raises(SystemExit, match="holds episodes with the settings .*choose another --out"):
        play(tmp_path, seed=1)


def test_conversion_of_what_was_generated(tmp_path, games, check_dataset):
    for game in ("bigfish", "heist"):
        play(tmp_path / "npz", game, count=10)
    report = convert(tmp_path / "npz", tmp_path / "out", validation_fraction=0.3)
    tables = check_dataset(tmp_path / "out")
    assert report["sources"]["converted"] == 20
    rows = {row["episode_id"]: row for table in tables.values() for row in table}
    action = np.load(tmp_path / "npz" / "heist" / "level_0000000002.npz")["actions"]
    stored = np.array(rows["heist/level_0000000002.npz"]["action"])
    assert stored.shape == (6, NUM_ACTIONS)
    np.testing.assert_array_equal(stored.argmax(1), action)
    np.testing.assert_array_equal(stored.sum(1), np.ones(6))
    assert {row["control_rate"] for row in rows.values()} == {15.0}
    levels = {split: {row["source_file"].partition("/")[2] for row in table} for split, table in tables.items()}
    assert len(levels["val"]) == 3
    assert not levels["train"] & levels["val"]
    assert len(tables["val"]) == 6


def test_damage_costs_only_its_episode(tmp_path, check_dataset):
    source = tmp_path / "npz"
    write(source / "good.npz")
    write(source / "by_step.npz", level_seed=np.full(3, 5), actions=np.array([[0], [1], [2]], np.int8))
    write(source / "no_level.npz", level_seed=None)
    write(source / "two_levels.npz", level_seed=np.array([1, 2, 2]))
    write(source / "action.npz", actions=np.array([0, 15, 1]))
    write(source / "half.npz", actions=np.array([0.5, 1, 1]))
    write(source / "vectors.npz", actions=np.zeros((3, 2)))
    write(source / "batch.npz", observations=np.zeros((2, 3, 8, 8, 3), np.uint8), actions=np.zeros((2, 3)))
    (source / "text.npz").write_text("no archive")
    report = convert(source, tmp_path / "out", validation_fraction=0.0)
    assert [row["source_file"] for row in check_dataset(tmp_path / "out")["train"]] == ["by_step.npz", "good.npz"]
    reasons = {entry["source"]: entry["reasons"][0] for entry in report["left_out"]}
    assert reasons.pop("text.npz").startswith("the file is damaged")
    assert reasons == {
        "no_level.npz": "there is no array 'level_seed', by which episodes are split",
        "two_levels.npz": "array 'level_seed' must hold one whole number, got int64 [1, 2]",
        "action.npz": "actions must be whole numbers from 0 to 14",
        "half.npz": "actions must be whole numbers from 0 to 14",
        "vectors.npz": "expected one action a step, got 2",
        "batch.npz": "holds 2 trajectories, but a level is split by files of one trajectory each",
    }


def test_folders_without_episodes(tmp_path):
    with pytest.raises(ConversionError, match="source folder .*gone does not exist"):
        convert(tmp_path / "gone", tmp_path / "out")
    (tmp_path / "npz").mkdir()
    with pytest.raises(ConversionError, match="holds no .npz file; generate.py makes them"):
        convert(tmp_path / "npz", tmp_path / "out")


def test_the_real_games_play_the_same_way_twice(tmp_path, check_dataset):
    python = os.environ.get("COMO_PROCGEN_PYTHON")
    if python is None:
        pytest.skip("set COMO_PROCGEN_PYTHON to the interpreter of an environment with procgen-mirror")
    for name in ("first", "second"):
        command = [python, SCRIPT, "--out", tmp_path / name, "--games", "bigfish,heist", "--episodes", 2]
        command += ["--max_steps", 60]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "heist: 2 of 2 episodes" in result.stdout
    for path in (tmp_path / "first").rglob("*.npz"):
        with np.load(path) as first, np.load(tmp_path / "second" / path.relative_to(tmp_path / "first")) as second:
            for key in first:
                np.testing.assert_array_equal(first[key], second[key])
    convert(tmp_path / "first", tmp_path / "out", validation_fraction=0.0)
    rows = check_dataset(tmp_path / "out")["train"]
    assert len(rows) == 4
    assert all(max(row["motion"]) > 0 for row in rows)
    result = subprocess.run(
        [python, str(SCRIPT), "--out", str(tmp_path / "x"), "--games", "chess"], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "unknown game 'chess'; there are bigfish" in result.stderr
