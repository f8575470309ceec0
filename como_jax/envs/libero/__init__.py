"""LIBERO's tasks and robosuite's own, which share the arm, its controller and the actions.

Both show what a dataset of `como_jax.convert.libero` holds: cameras of the same names, images turned the same way,
the same states. Settings have to be those that the policy's dataset was converted with:

- `orientation`: rotate180 (the default), flip or stored, see the builder.
- `state`: states to join, `ee_states,gripper_states` by default, see `como_jax.envs.libero.arm.STATES`.
- `render_size`: side in pixels of the rendered images, which are then scaled to the asked size: 128 by default, as
  in LIBERO's files.
- `instruction`, for LIBERO alone: `problem` (the default), the sentence of the task's problem file, which LIBERO
  writes into its demonstrations, or `name`, that of the task's name, which some conversions have instead. They
  differ in 29 of 130 tasks.
"""

from __future__ import annotations

from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.libero import benchmark, own_tasks
from como_jax.envs.libero.arm import PandaEnvironment, View


def tasks(family: str) -> tuple[str, ...]:
    """Names of all tasks: `SUITE/NUMBER` for LIBERO, class names for robosuite."""
    return benchmark.TASKS if family == "libero" else own_tasks.TASKS


def make(family: str, task: str, options: EnvironmentOptions) -> PandaEnvironment:
    """One task.

    Raises:
      ConfigError: an option that it cannot follow, or something is not installed; the message says how to.
    """
    if family == "libero":
        settings = options.take(*View.SETTINGS, "instruction")
        view = View.of(settings, options)
        return PandaEnvironment(benchmark.load(task, settings.get("instruction", "problem")), view, options.max_steps)
    view = View.of(options.take(*View.SETTINGS), options)
    return PandaEnvironment(own_tasks.load(task), view, options.max_steps)
