"""Robosuite's own tasks of one arm (arXiv 2009.12293)."""

from __future__ import annotations

from como_jax.envs.libero.task import Task, import_robosuite

# Left out are Wipe, whose tool has no gripper, and the tasks that draw one of several goals, of which the instruction
# would have to know.
_INSTRUCTIONS = {
    "Lift": "lift the red cube",
    "Stack": "stack the red cube on the green cube",
    "Door": "open the door",
    "NutAssembly": "put the square nut on the square peg and the round nut on the round peg",
    "NutAssemblySquare": "put the square nut on the square peg",
    "NutAssemblyRound": "put the round nut on the round peg",
    "PickPlace": "sort the milk, the bread, the cereal and the can into their bins",
    "PickPlaceMilk": "put the milk into its bin",
    "PickPlaceBread": "put the bread into its bin",
    "PickPlaceCereal": "put the cereal into its bin",
    "PickPlaceCan": "put the can into its bin",
}
TASKS = tuple(_INSTRUCTIONS)
# As in robosuite's benchmark (arXiv 2009.12293, section 4).
_MAX_STEPS = 500


def load(task: str) -> Task:
    """One of `TASKS`.

    Raises:
      ConfigError: robosuite is not installed.
    """
    robosuite = import_robosuite()
    return Task(
        f"robosuite:{task}", _INSTRUCTIONS[task], _MAX_STEPS, lambda **arguments: robosuite.make(task, **arguments)
    )
