"""The embedded environment: a gripper or hand on a table, drawn with NumPy and OpenCV alone."""

from como_jax.envs.tabletop.env import IMAGE_SIZES, Tabletop
from como_jax.envs.tabletop.expert import Demonstration, ExpertStyle, demonstrate, expert_action
from como_jax.envs.tabletop.look import HARD, HUMAN, LOOKS, MOVING, PLAIN, Look
from como_jax.envs.tabletop.scene import CONTROL_RATE_HZ, Scene
from como_jax.envs.tabletop.tasks import SCENES, TASKS, Goal

__all__ = [
    "CONTROL_RATE_HZ",
    "HARD",
    "HUMAN",
    "IMAGE_SIZES",
    "LOOKS",
    "MOVING",
    "PLAIN",
    "SCENES",
    "TASKS",
    "Demonstration",
    "ExpertStyle",
    "Goal",
    "Look",
    "Scene",
    "Tabletop",
    "demonstrate",
    "expert_action",
]
