"""LIBERO's tasks and robosuite's own, which share the arm, its controller and the actions.

Both show what a dataset of `como_jax.convert.libero` holds: cameras of the same names, images turned the same way,
the same states. Settings have to be those that the policy's dataset was made with:

- `orientation`: rotate180 (the default), flip or stored, see the builder.
- `state`: states to join, `ee_states,gripper_states` by default, see `como_jax.envs.libero.arm.STATES`.
- `render_size`: side in pixels of the rendered images, which are then scaled to the asked size: 128 by default, as
  in LIBERO's files.
- `look`: `fast` (the default) or `full`, what LIBERO itself shows, see `como_jax.envs.libero.render`.

LIBERO alone has

- `init`: where episodes start, from the `official` states (the default), of which the seed gives the number, or from
  states `drawn` by the task's own rules.
- `instruction`: `problem` (the default), the sentence of the task's problem file, which LIBERO writes into its
  demonstrations, or `name`, that of the task's name, which some conversions have instead. They differ in 29 of the
  130 tasks of LIBERO.
"""

from __future__ import annotations

from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.libero import benchmark, own_tasks
from como_jax.envs.libero.arm import STARTS, PandaEnvironment, View


def tasks(family: str) -> tuple[str, ...]:
    """Names of all tasks: `SUITE/NUMBER` for LIBERO, class names for robosuite."""
    return benchmark.TASKS if family == "libero" else own_tasks.TASKS


def make(family: str, task: str, options: EnvironmentOptions) -> PandaEnvironment:
    """One task.

    Raises:
      ConfigError: an option that it cannot follow, or something is not installed; the message says how to.
    """
    if family == "libero":
        settings = options.take(*View.SETTINGS, "init", "instruction")
        view, loaded = View.of(settings, options), benchmark.load(task, settings.get("instruction", "problem"))
        return PandaEnvironment(loaded, view, settings.get("init", STARTS[0]), options.max_steps)
    view = View.of(options.take(*View.SETTINGS), options)
    return PandaEnvironment(own_tasks.load(task), view, max_steps=options.max_steps)
