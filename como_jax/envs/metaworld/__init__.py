"""Meta-World, an extra: `pip install 'como_jax[metaworld]'`."""

from como_jax.envs.metaworld.adapter import (
    ACTION_SIZE,
    DEFAULT_ACTION_REPEAT,
    STATE_SIZE,
    MetaWorldEnvironment,
    make,
    tasks,
)
from como_jax.envs.metaworld.instructions import INSTRUCTIONS, TASKS
from como_jax.envs.metaworld.simulator import CAMERAS, IMAGE_SIZES, check_cameras, check_image_size, load_mujoco

__all__ = [
    "ACTION_SIZE",
    "CAMERAS",
    "DEFAULT_ACTION_REPEAT",
    "IMAGE_SIZES",
    "INSTRUCTIONS",
    "STATE_SIZE",
    "TASKS",
    "MetaWorldEnvironment",
    "check_cameras",
    "check_image_size",
    "load_mujoco",
    "make",
    "tasks",
]
