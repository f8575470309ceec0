"""From the name of a task to its environment: FAMILY:TASK, as in tabletop:reach."""

from __future__ import annotations

import importlib
from typing import Protocol

from como_jax.envs.base import Environment, EnvironmentOptions
from como_jax.errors import ConfigError, closest

# Each module has the functions of `Family`. It is imported when it is asked for, and imports its simulator when an
# environment is made, since most simulators are extras that may not be installed.
FAMILIES = {
    "tabletop": "como_jax.envs.tabletop.adapter",
    "metaworld": "como_jax.envs.metaworld",
    "libero": "como_jax.envs.libero",
    "robosuite": "como_jax.envs.libero",
    "pusht": "como_jax.envs.pusht",
}
_MAX_LISTED = 12


class Family(Protocol):
    """What a module of `FAMILIES` provides."""

    def tasks(self, family: str) -> tuple[str, ...]:
        """Names of all tasks."""

    def make(self, family: str, task: str, options: EnvironmentOptions) -> Environment:
        """The environment of one task."""


def environment_names(text: str) -> tuple[str, ...]:
    """`FAMILY:TASK` of every task in `FAMILY:TASK,TASK,...` or `FAMILY:all`, each once, in the order of the text.

    Tasks whose names are `GROUP/...` may be asked for together, by `FAMILY:GROUP`.

    Raises:
      ConfigError: an unknown family or task, or a simulator that is not installed; the message says how to install it.
    """
    family, _, wanted = text.partition(":")
    known = _family(family).tasks(family)
    asked = [task.strip() for task in wanted.split(",") if task.strip()]
    if not asked:
        raise ConfigError(f"`env` {text!r}: name a task, as in {family}:{known[0]}, or all of them by {family}:all.")
    tasks: list[str] = []
    for name in asked:
        found = [task for task in known if name in ("all", task, task.rpartition("/")[0])]
        if not found:
            groups = dict.fromkeys(task.rpartition("/")[0] for task in known if "/" in task)
            listed = ", ".join(known[:_MAX_LISTED])
            if len(known) > _MAX_LISTED:
                listed += f" and {len(known) - _MAX_LISTED} more"
            raise ConfigError(
                f"`env` {text!r}: {family} has no task {name!r}, only {listed}{closest(name, (*groups, *known))}"
            )
        tasks += found
    return tuple(f"{family}:{task}" for task in dict.fromkeys(tasks))


def make_environment(name: str, options: EnvironmentOptions) -> Environment:
    """The environment `FAMILY:TASK`.

    Raises:
      ConfigError: see `environment_names`, or an option that the environment cannot follow.
    """
    names = environment_names(name)
    if len(names) != 1:
        raise ConfigError(f"`env` {name!r}: name one task, not {len(names)}.")
    family, _, task = names[0].partition(":")
    return _family(family).make(family, task, options)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"`env` {name!r}: there are {', '.join(FAMILIES)}{closest(name, FAMILIES)}")
    return importlib.import_module(FAMILIES[name])
