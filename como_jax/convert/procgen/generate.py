r"""Plays Procgen games with an untrained policy and writes one .npz file an episode.

Runs by itself in an environment that has `procgen-mirror` (README.md), and imports nothing of this project:

    procgen_env/bin/python como_jax/convert/procgen/generate.py --out trajectories --games bigfish,heist --episodes 200
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NUM_ACTIONS = 15
SETTINGS_NAME = "settings.json"
_MAX_LEVEL = 2**31 - 1
_SECONDS_BETWEEN_LINES = 5


def random_actions(rng: np.random.Generator, max_repeat: int) -> Iterator[int]:
    """Actions drawn at random without end, each held for 1 to `max_repeat` steps."""
    while True:
        action = int(rng.integers(NUM_ACTIONS))
        for _ in range(rng.integers(1, max_repeat + 1)):
            yield action


def play(env: Any, actions: Iterator[int], max_steps: int) -> dict[str, np.ndarray]:
    """Plays one episode, and returns its arrays (README.md).

    Args:
      env: a gym3 environment of one game, just made, that gives RGB images under the key `rgb`.
      actions: the policy, which does not look at the images.
      max_steps: longer episodes are cut.
    """
    observations, taken, rewards = [], [], []
    level = env.get_info()[0]["level_seed"]
    for action in actions:
        observations.append(env.observe()[1]["rgb"][0].copy())
        env.act(np.array([action]))
        reward, _, first = env.observe()
        taken.append(action)
        rewards.append(float(reward[0]))
        # Instead of the last image of this episode, the environment gives the first one of the next.
        if first[0] or len(taken) == max_steps:
            break
    return {
        "observations": np.stack(observations),
        "actions": np.array(taken, np.int32),
        "rewards": np.array(rewards, np.float32),
        "level_seed": np.array(level, np.int64),
    }


def make_env(game: str, level: int, mode: str) -> Any:
    """The environment of one level of a game."""
    try:
        from procgen import ProcgenGym3Env
        from procgen.env import ENV_NAMES
    except ImportError as error:
        sys.exit(f"{error}; this script needs an environment with `pip install procgen-mirror`")
    # The library of the games would end the process without raising a Python error.
    if game not in ENV_NAMES:
        sys.exit(f"unknown game {game!r}; there are {', '.join(ENV_NAMES)}")
    # A fixed rand_seed makes the level play the same way every time.
    return ProcgenGym3Env(
        num=1, env_name=game, start_level=level, num_levels=1, distribution_mode=mode, rand_seed=level, num_threads=0
    )


def write_episode(path: Path, arrays: dict[str, Any]) -> None:
    """Writes a file under a temporary name, then renames it, so that a file with its own name is complete."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes down the settings of a folder's episodes; exits if it holds episodes with other settings."""
    path = folder / SETTINGS_NAME
    if not path.exists():
        partial = folder / f".{SETTINGS_NAME}.partial"
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{path} cannot be read: {error}")
    if found != settings:
        sys.exit(f"{folder} holds episodes with the settings {found}, not {settings}; choose another --out")


def generate(out: Path, game: str, levels: range, mode: str, max_repeat: int, max_steps: int, seed: int) -> int:
    """Plays the levels of a game that the folder does not have yet, and returns how many steps were taken."""
    folder = out / game
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, {"mode": mode, "max_repeat": max_repeat, "max_steps": max_steps, "seed": seed})
    steps, shown = 0, time.monotonic()
    for count, level in enumerate(levels, 1):
        path = folder / f"level_{level:010d}.npz"
        if not path.exists():
            policy = random_actions(np.random.default_rng([seed, level, *game.encode()]), max_repeat)
            env = make_env(game, level, mode)
            arrays = play(env, policy, max_steps)
            env.close()
            write_episode(path, arrays)
            steps += len(arrays["actions"])
        if count == len(levels) or time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            print(f"{game}: {count} of {len(levels)} episodes, {steps} new steps", flush=True)
    return steps


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Plays Procgen games with an untrained policy.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; one below for each game")
    parser.add_argument("--games", default="bigfish,chaser,heist,leaper", help="names with commas")
    parser.add_argument("--episodes", type=int, default=100, help="episodes of each game, one a level")
    parser.add_argument("--first_level", type=int, default=0, help="seed of the first level")
    parser.add_argument("--mode", default="hard", choices=("easy", "hard", "extreme", "memory"))
    parser.add_argument("--max_repeat", type=int, default=8, help="an action is held for 1 to this many steps")
    parser.add_argument("--max_steps", type=int, default=1000, help="longer episodes are cut")
    parser.add_argument("--seed", type=int, default=0, help="fixes the actions")
    arguments = parser.parse_args()
    for name, low in (("episodes", 1), ("first_level", 0), ("max_repeat", 1), ("max_steps", 2), ("seed", 0)):
        if getattr(arguments, name) < low:
            parser.error(f"--{name} must be {low} or more")
    if arguments.first_level + arguments.episodes > _MAX_LEVEL:
        parser.error(f"level seeds end at {_MAX_LEVEL}")
    return arguments


def main() -> None:
    """Plays all games that were asked for."""
    arguments = parse_arguments()
    levels = range(arguments.first_level, arguments.first_level + arguments.episodes)
    games = [game.strip() for game in arguments.games.split(",")]
    for game in games:
        # An unknown game is found before any folder is made.
        make_env(game, levels[0], arguments.mode).close()
    for game in games:
        generate(arguments.out, game, levels, arguments.mode, arguments.max_repeat, arguments.max_steps, arguments.seed)


if __name__ == "__main__":
    main()
