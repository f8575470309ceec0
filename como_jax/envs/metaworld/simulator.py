"""Meta-World and MuJoCo, imported when they are first needed, and one task of theirs as this project uses it."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from como_jax.envs.base import missing_extra
from como_jax.errors import ConfigError

_GL_PACKAGES = "libosmesa6 libegl1 libgl1 libegl-mesa0 libgles2"


def load_mujoco() -> ModuleType:
    """MuJoCo with a renderer that needs no display, unless `MUJOCO_GL` asks for another one.

    Raises:
      ConfigError: it or Meta-World is not installed, or it finds no OpenGL.
    """
    if sys.platform == "linux" and "mujoco" not in sys.modules:
        # MuJoCo reads it when it is imported, and never again; its own default wants a screen.
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise missing_extra("Meta-World", "metaworld", error) from error
    except Exception as error:
        # Whatever PyOpenGL happens to trip over: mostly an AttributeError of a library that was not found.
        raise unusable_gl(error) from error
    try:
        # What Meta-World builds on imports more, packaging for one, but only once an environment is made.
        import gymnasium.envs.mujoco.mujoco_rendering  # noqa: F401
        import metaworld  # noqa: F401
    except ImportError as error:
        raise missing_extra("Meta-World", "metaworld", error) from error
    return mujoco


def unusable_gl(error: Exception) -> ConfigError:
    """The error to raise where MuJoCo cannot draw."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({reason}); set it to egl or osmesa "
        f"before MuJoCo is imported, and on Debian or Ubuntu install: apt-get install {_GL_PACKAGES}"
    )


def make_simulator(task: str, max_steps: int) -> Any:
    """Meta-World's own environment of a task, an untyped `SawyerXYZEnv`.

    Its places of objects and goals are drawn by its own generator, which `seed` seeds, and its observations include the
    goal, without which the experts are blind. What `set_task` would do is not used: it fixes the places beforehand.

    Args:
      task: name of the task.
      max_steps: steps of the simulator that an episode can have.
    """
    load_mujoco()
    from metaworld.env_dict import ENV_CLS_MAP

    simulator = ENV_CLS_MAP[task]()
    simulator.max_path_length = max_steps
    simulator.seeded_rand_vec = True
    simulator._freeze_rand_vec = False
    simulator._set_task_called = True
    simulator._partially_observable = False
    # Cached while the goal was hidden; observations are clipped to it.
    del simulator.sawyer_observation_space
    return simulator


def make_expert(task: str) -> Any:
    """Meta-World's scripted policy of a task, whose `get_action` takes an observation."""
    load_mujoco()
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[task]()
