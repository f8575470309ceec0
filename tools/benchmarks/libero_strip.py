"""Draws one episode of LIBERO's expert for each task, a row of images each, to see that all is as it should be.

    MUJOCO_GL=osmesa python -m tools.benchmarks.libero_strip --out strip.jpg

The file's ending says its format.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath
from PIL import Image

from como_jax import cli
from como_jax.convert.libero_sim.recording import FailedAttempt, record
from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.libero import arm, make
from como_jax.errors import ConfigError

_ATTEMPTS = 8
_TASKS = ["libero_object/0", "libero_spatial/2", "libero_goal/0", "libero_10/1", "libero_90/0"]


def join_rows(episodes: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """One image of several episodes `[T, H, W, 3]`: a row each, from its first to its last frame in even steps."""
    rows = [episode[np.linspace(0, len(episode) - 1, columns).round().astype(int)] for episode in episodes]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def record_images(task: str, render_size: int, look: str) -> np.ndarray:
    """The main camera's images of a successful demonstration, uint8 `[T, H, W, 3]`.

    Raises:
      ConfigError: no attempt succeeded.
    """
    camera = next(iter(arm.CAMERAS))
    settings = {"look": look, "render_size": str(render_size)}
    env = make("libero", task, EnvironmentOptions(render_size, (camera,), settings=settings))
    try:
        for seed in range(_ATTEMPTS):
            try:
                return np.stack(record(env, arm.make_expert, seed, noise=0.0).images[camera])
            except FailedAttempt:
                continue
    finally:
        env.close()
    raise ConfigError(f"`tasks`: the expert did not solve {task} in {_ATTEMPTS} attempts")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list("tasks", _TASKS, "Tasks of LIBERO, a row each.")
    flags.DEFINE_string("look", "fast", "Look, see como_jax/envs/README.md.")
    flags.DEFINE_integer("image_size", 128, "Side of the images in pixels.", lower_bound=16)
    flags.DEFINE_integer("columns", 6, "Images of each episode.", lower_bound=2)
    flags.DEFINE_string("out", None, "File to write.", required=True)


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    values = flags.FLAGS
    episodes = [record_images(task, values.image_size, values.look) for task in values.tasks]
    out = epath.Path(values.out)
    with out.open("wb") as file:
        Image.fromarray(join_rows(episodes, values.columns)).save(file, out.suffix[1:].replace("jpg", "jpeg"))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
