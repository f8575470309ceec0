r"""How many steps of LIBERO a core simulates and shows in a second, by look and cameras.

    MUJOCO_GL=osmesa python -m tools.benchmarks.libero_rendering --tasks libero_goal/8,libero_spatial/0 --image_size 128

Prints a Markdown table with a line for each task and look: CPU seconds of a step without images, of one camera and of
two, and steps a second with two cameras.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from como_jax import cli
from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.libero.arm import CAMERAS
from como_jax.envs.libero.render import LOOKS
from como_jax.envs.registry import make_environment
from como_jax.evaluation.tables import markdown_table

_ACTION = np.array([0.3, 0.1, -0.2, 0, 0, 0, 1])


def cpu_seconds(run: Callable[[], object], times: int) -> float:
    """CPU seconds of all threads of this process for one run, the mean of several."""
    run()
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def measure(task: str, look: str, image_size: int, steps: int) -> tuple[str, ...]:
    """One line of the table."""
    simulated, seen = 0.0, []
    for cameras in (tuple(CAMERAS)[:1], tuple(CAMERAS)):
        settings = {"look": look, "render_size": str(image_size)}
        env = make_environment(f"libero:{task}", EnvironmentOptions(image_size, cameras, settings=settings))
        env.reset(0)
        simulated = cpu_seconds(lambda env=env: env.simulation.step(_ACTION), steps)
        seen.append(cpu_seconds(env.images, steps))
        env.close()
    return (task, look, *(f"{seconds:.4f}" for seconds in (simulated, *seen)), f"{1 / (simulated + seen[1]):.1f}")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list("tasks", ["libero_goal/8", "libero_spatial/0", "libero_object/0"], "Tasks of LIBERO.")
    flags.DEFINE_list("looks", list(LOOKS), "Looks, see como_jax/envs/README.md.")
    flags.DEFINE_integer("image_size", 128, "Side of the images in pixels.", lower_bound=16)
    flags.DEFINE_integer("steps", 20, "Steps to measure.", lower_bound=1)


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    values = flags.FLAGS
    rows = [("task", "look", "step (s)", "one camera (s)", "two cameras (s)", "steps/s with two")]
    for task in values.tasks:
        rows += [measure(task, look, values.image_size, values.steps) for look in values.looks]
    print(markdown_table(rows, numbers=True), end="")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
