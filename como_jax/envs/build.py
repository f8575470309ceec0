"""From a name on the command line to environments."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Protocol

from como_jax.envs.base import Environment
from como_jax.errors import ConfigError, closest

# Each module has `tasks()` and `make(task, options)`; a simulator is imported when it is asked for, since most are
# extras that are not installed.
FAMILIES = {
    "tabletop": "como_jax.envs.tabletop.adapter",
    "metaworld": "como_jax.envs.metaworld",
    "libero": "como_jax.envs.libero",
    "robosuite": "como_jax.envs.libero",
    "pusht": "como_jax.envs.pusht",
}


@dataclasses.dataclass(frozen=True)
class EnvironmentOptions:
    """What all environments understand.

    Attributes:
      image_size: side of the square pictures, in pixels.
      cameras: names of the pictures to render; empty for the environment's own choice.
      max_steps: steps after which an unsolved episode ends; 0 for the environment's own limit.
      settings: of one environment, such as the look of the tabletop.
    """

    image_size: int = 64
    cameras: tuple[str, ...] = ()
    max_steps: int = 0
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.max_steps < 0:
            raise ConfigError(
                f"image_size must be 1 or more and max_steps 0 or more, got {self.image_size} and {self.max_steps}."
            )

    def take(self, *known: str) -> dict[str, str]:
        """The settings, which must be among `known`.

        Raises:
          ConfigError: a setting that the environment does not have.
        """
        for name in self.settings:
            if name not in known:
                choices = ", ".join(known) or "none"
                raise ConfigError(f"--env_setting {name}: this environment has {choices}{closest(name, known)}")
        return dict(self.settings)


class _Family(Protocol):
    """What a module of `FAMILIES` holds."""

    def tasks(self, family: str) -> tuple[str, ...]:
        """Names of all tasks."""

    def make(self, family: str, task: str, options: EnvironmentOptions) -> Environment:
        """One task."""


def environment_names(text: str) -> tuple[str, ...]:
    """`FAMILY:TASK` of every task in `FAMILY:TASK,TASK,...` or `FAMILY:all`.

    Tasks that are named `GROUP/...` may be asked for together, by `FAMILY:GROUP`.

    Raises:
      ConfigError: an unknown family or task, or a simulator that is not installed; the message says how to.
    """
    family, _, wanted = text.partition(":")
    known = _family(family).tasks(family)
    asked = [task.strip() for task in wanted.split(",") if task.strip()]
    if not asked:
        raise ConfigError(f"--env {text}: name a task, as in {family}:{known[0]}, or all of them by {family}:all.")
    tasks = []
    for name in asked:
        found = [task for task in known if name in ("all", task, task.rpartition("/")[0])]
        if not found:
            raise ConfigError(f"--env {text}: {family} has no task {name!r}, only {_list(known)}{closest(name, known)}")
        tasks += found
    # Each once, in the order in which they were asked for.
    return tuple(f"{family}:{task}" for task in dict.fromkeys(tasks))


def make_environment(name: str, options: EnvironmentOptions) -> Environment:
    """The environment `FAMILY:TASK`.

    Raises:
      ConfigError: see `environment_names`, or an option that the environment cannot follow.
    """
    names = environment_names(name)
    if len(names) != 1:
        raise ConfigError(f"--env {name}: name one task, not {len(names)}.")
    (name,) = names
    family, _, task = name.partition(":")
    return _family(family).make(family, task, options)


def missing_extra(simulator: str, extra: str, error: ImportError) -> ConfigError:
    """The error to raise where a simulator cannot be imported."""
    return ConfigError(f"{simulator} cannot be imported ({error}); install it with: pip install 'como_jax[{extra}]'")


def _family(name: str) -> _Family:
    if name not in FAMILIES:
        raise ConfigError(f"--env {name}: there are {', '.join(FAMILIES)}{closest(name, FAMILIES)}")
    return importlib.import_module(FAMILIES[name])


def _list(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"
