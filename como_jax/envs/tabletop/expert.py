"""Scripted experts for the tabletop tasks, and demonstrations recorded with them.

The experts look at the true state at every step and keep no memory, so they recover from noise.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from como_jax.envs.tabletop.scene import (
    BUTTON_HEIGHT,
    BUTTON_TRAVEL,
    BUTTON_Y,
    GRIP_RATE,
    HANDLE,
    HANDLE_HEIGHT,
    HANDLE_LENGTH,
    MAX_STEP,
    OBJECT_HEIGHT,
    OBJECT_RADIUS,
    Scene,
)
from como_jax.envs.tabletop.tasks import Goal, is_solved, reach_point

if TYPE_CHECKING:
    from como_jax.envs.tabletop.env import Tabletop

_GRASP_HEIGHT = 0.018
_SAFE_HEIGHT = 0.085
_ALIGNED = 0.009
_BEHIND = OBJECT_RADIUS + 0.026
# Holds what is grasped, gently: a rate of closing that no finger follows could not be seen in a video.
_SQUEEZE = 0.2


@dataclass(frozen=True)
class ExpertStyle:
    """How an expert moves in one episode.

    Attributes:
        speed: largest action along any axis, in (0, 1].
        gain: share of the remaining way that it tries to cover in one step, in (0, 1].
        clearance: height at which it travels, in metres.
        curve: angle between its path and the straight line while far away, in radians.
        grip: strength of the grip action, in (0, 1].
        phase: shifts how the fingers open and close on the way when the task leaves it free, in radians.
    """

    speed: float = 0.7
    gain: float = 0.6
    clearance: float = 0.11
    curve: float = 0.0
    grip: float = 0.7
    phase: float = 0.0

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "ExpertStyle":
        """A random style."""
        return cls(
            speed=float(rng.uniform(0.35, 1.0)),
            gain=float(rng.uniform(0.22, 0.6)),
            clearance=float(rng.uniform(0.09, 0.16)),
            curve=float(rng.uniform(-0.7, 0.7)),
            grip=float(rng.uniform(0.3, 1.0)),
            phase=float(rng.uniform(0.0, 2 * math.pi)),
        )


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode of T steps.

    Attributes:
        images: uint8 [T + 1, H, W, 3], RGB; the last one shows the outcome.
        states: float32 [T + 1, 4], gripper x, y, z in metres and opening in [0, 1].
        actions: float32 [T, 4] in [-1, 1]; `actions[t]` was executed after `images[t]` and led to
            `images[t + 1]`.
        instruction: what the episode asked for, in words.
        task: name of the task.
        success: whether the task was solved.
    """

    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    instruction: str
    task: str
    success: bool


def expert_action(scene: Scene, goal: Goal, style: ExpertStyle | None = None) -> np.ndarray:
    """The expert's next action.

    Args:
        scene: the true state.
        goal: what to do; both are attributes of `Tabletop`.
        style: how to move; ordinary speed and straight paths by default.

    Returns:
        float32 [4] in [-1, 1].
    """
    action = _EXPERTS[goal.task](scene, goal, style or ExpertStyle())
    return np.clip(action, -1.0, 1.0).astype(np.float32)


def demonstrate(env: "Tabletop", seed: int, noise: float = 0.0) -> Demonstration:
    """Records one episode of the expert.

    Args:
        env: reset with `seed`, then stepped until the episode ends.
        seed: fixes the episode, the style of the expert and the noise.
        noise: standard deviation of Gaussian noise added to each action before it is executed and recorded.
    """
    rng = np.random.default_rng([seed, 2])
    style = ExpertStyle.sample(rng)
    observation, info = env.reset(seed=seed)
    observations, actions, done = [observation], [], False
    while not done:
        action = expert_action(env.scene, env.goal, style)
        action = np.clip(action + noise * rng.standard_normal(4), -1.0, 1.0).astype(np.float32)
        observation, _, terminated, truncated, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        done = terminated or truncated
    return Demonstration(
        images=np.stack([o["image"] for o in observations]),
        states=np.stack([o["state"] for o in observations]),
        actions=np.stack(actions),
        instruction=info["instruction"],
        task=info["task"],
        success=info["success"],
    )


def _reach(scene: Scene, goal: Goal, style: ExpertStyle) -> np.ndarray:
    target = reach_point(scene, goal)
    return _move(scene, target, _idle_opening(scene, target, style), style)


def _push(scene: Scene, goal: Goal, style: ExpertStyle) -> np.ndarray:
    item, zone = scene.objects[goal.target].position, scene.zones[goal.zone]
    if is_solved(scene, goal):
        return np.zeros(4)
    to_zone = np.array([zone.x, zone.y]) - item[:2]
    forward = to_zone / max(math.hypot(*to_zone), 1e-6)
    sideways = np.array([-forward[1], forward[0]])
    behind = item[:2] - scene.gripper.position[:2]
    gap, error = float(behind @ forward), float(behind @ sideways)
    opening = 0.25 * _idle_opening(scene, item, style)
    low = scene.gripper.position[2] < OBJECT_HEIGHT - 0.01
    if low and 0 < gap < _BEHIND + 0.03 and abs(error) < 0.016 + 0.3 * max(gap - OBJECT_RADIUS, 0):
        # Steering towards the far side of the object keeps it in front of the fingers.
        heading = forward * 0.04 + sideways * 1.5 * error
        return _move(scene, np.array([*(scene.gripper.position[:2] + heading), _GRASP_HEIGHT]), opening, style)
    start = np.array([*(item[:2] - forward * (_BEHIND + 0.012)), _GRASP_HEIGHT])
    return _descend(scene, start, opening, style)


def _pick_place(scene: Scene, goal: Goal, style: ExpertStyle) -> np.ndarray:
    if is_solved(scene, goal):
        return np.zeros(4)
    item, zone = scene.objects[goal.target].position, scene.zones[goal.zone]
    position = scene.gripper.position
    if scene.held == goal.target:
        place = np.array([zone.x, zone.y, -scene.grasp_offset[2]])
        if item[2] < 0.015 and math.hypot(zone.x - item[0], zone.y - item[1]) < 0.02:
            return np.array([0.0, 0.0, 0.0, -style.grip])
        action = _descend(scene, place, 0.0, style)
        action[3] = _SQUEEZE
        return action
    if scene.held is not None:
        return np.array([0.0, 0.0, 0.3, -style.grip])
    grasp = np.array([item[0], item[1], item[2] + _GRASP_HEIGHT])
    if math.hypot(*(grasp - position)[:2]) < 2 * _ALIGNED and position[2] < grasp[2] + 0.015:
        return _move(scene, grasp, 0.0, style)
    return _descend(scene, grasp, 1.0, style)


def _open_drawer(scene: Scene, goal: Goal, style: ExpertStyle) -> np.ndarray:
    handle, position = scene.drawer.handle, scene.gripper.position
    if scene.held == HANDLE:
        return np.array([0.0, -style.speed, 0.0, _SQUEEZE])
    if scene.held is not None:
        return np.array([0.0, 0.0, 0.3, -style.grip])
    if np.abs(handle - position).max() < 0.018:
        return _move(scene, handle, 0.0, style)
    if _in_front(position, handle, 0.075):
        return _move(scene, handle, 0.9, style)
    return _descend(scene, handle - np.array([0.0, 0.055, 0.0]), 0.9, style)


def _close_drawer(scene: Scene, goal: Goal, style: ExpertStyle) -> np.ndarray:
    if scene.held is not None:
        return np.array([0.0, 0.0, 0.0, -style.grip])
    end, position = scene.drawer.handle, scene.gripper.position
    # The fingers touch the tip of the handle, ahead of the point where one would grasp it.
    tip = np.array([end[0], scene.drawer.front - HANDLE_LENGTH, HANDLE_HEIGHT])
    if _in_front(position, tip, 0.075):
        return _move(scene, tip + np.array([0.0, 0.04, 0.0]), 0.0, style)
    return _descend(scene, tip - np.array([0.0, 0.05, 0.0]), 0.0, style)


def _press_button(scene: Scene, goal: Goal, style: ExpertStyle) -> np.ndarray:
    bottom = np.array([scene.button.x, BUTTON_Y, BUTTON_HEIGHT - BUTTON_TRAVEL - 0.01])
    return _descend(scene, bottom, _idle_opening(scene, bottom, style), style)


_EXPERTS = {
    "reach": _reach,
    "push": _push,
    "pick_place": _pick_place,
    "open_drawer": _open_drawer,
    "close_drawer": _close_drawer,
    "press_button": _press_button,
}


def _idle_opening(scene: Scene, target: np.ndarray, style: ExpertStyle) -> float:
    """An opening that varies on the way: without it most episodes would show no motion of the fingers."""
    distance = float(np.abs(target - scene.gripper.position).sum())
    return 0.5 + 0.5 * math.sin(style.phase + 30.0 * distance)


def _in_front(position: np.ndarray, point: np.ndarray, reach: float) -> bool:
    """Whether `position` is on the line along y that leads to `point`, at most `reach` metres before it."""
    dx, dy, dz = point - position
    return abs(dx) < 0.02 and abs(dz) < 0.02 and -0.015 < dy < reach


def _descend(scene: Scene, target: np.ndarray, opening: float, style: ExpertStyle) -> np.ndarray:
    """Moves to `target` from above: high while far away, then down within a funnel."""
    position = scene.gripper.position
    distance = math.hypot(target[0] - position[0], target[1] - position[1])
    if distance < _ALIGNED:
        return _move(scene, target, opening, style)
    height = min(max(style.clearance, target[2] + 0.04), target[2] + 3.0 * (distance - _ALIGNED))
    # Whoever is too low rises first, not to sweep objects along.
    share = min(max(1.0 - (min(height, _SAFE_HEIGHT) - position[2]) / 0.04, 0.1), 1.0)
    waypoint = np.array([*(position[:2] + share * (target - position)[:2]), height])
    return _move(scene, waypoint, opening, style)


def _move(scene: Scene, target: np.ndarray, opening: float, style: ExpertStyle) -> np.ndarray:
    """Proportional control towards a position and an opening, within the speed of the style."""
    wanted = (target - scene.gripper.position) / MAX_STEP
    distance = MAX_STEP * math.hypot(wanted[0], wanted[1])
    angle = style.curve * min(max(distance / 0.06 - 1.0, 0.0), 1.0)
    x, y = wanted[0], wanted[1]
    wanted[0] = math.cos(angle) * x - math.sin(angle) * y
    wanted[1] = math.sin(angle) * x + math.cos(angle) * y
    motion = style.gain * wanted
    motion *= min(1.0, style.speed / max(np.abs(motion).max(), 1e-6))
    grip = (scene.gripper.opening - opening) / GRIP_RATE
    return np.array([*motion, min(max(grip, -style.grip), style.grip)])
