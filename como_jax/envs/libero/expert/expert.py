"""The expert: plans from the goal that the task states, and acts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from como_jax.envs.libero.expert.arm import OPEN, Motion
from como_jax.envs.libero.expert.fixtures import Handles, Setting
from como_jax.envs.libero.expert.scene import Region, Scene
from como_jax.envs.libero.expert.skills import Skills, Target

Goal = Sequence[str]
_ROUNDS = 4
_IDLE = np.array([0, 0, 0, 0, 0, 0, OPEN], np.float32)
# What is so low and so wide is pushed along the ground.
_FLAT, _BROAD = 0.035, 0.12
# A region that slopes more is to lie on; nothing is leaned over further by the hand, it falls the rest of the way.
_SLOPING, _MOST_LEAN = np.radians(20), np.radians(42)
# What lies no further under a drawer can be grasped.
_MOST_UNDER = 0.035
# What a goal is about, in the properties of LIBERO's fixtures, and its opposite.
_RANGES = {
    "open": ("default_open_ranges", "default_close_ranges"),
    "close": ("default_close_ranges", "default_open_ranges"),
    "turnon": ("default_turnon_ranges", "default_turnoff_ranges"),
    "turnoff": ("default_turnoff_ranges", "default_turnon_ranges"),
}


class Expert:
    """A scripted expert for one episode of any task of LIBERO, with privileged state.

    Make one after every reset of the simulator, and execute its actions; it looks at the simulator before each, so that
    actions may be executed with noise.
    """

    def __init__(self, env: Any, seed: int = 0):
        """Takes LIBERO's problem object and a seed."""
        self.scene = Scene(env)
        self.skills = Skills(self.scene, np.random.default_rng(seed))
        self.handles = Handles(self.scene, self.skills.arm)
        self.goals = [tuple(goal) for goal in env.parsed_problem["goal_state"]]
        self.done = False
        self.reason = ""
        self._actions = self._run()

    def act(self) -> np.ndarray:
        """The next action, float32 `[7]` in [-1, 1]; no movement once it is done or has given up."""
        return next(self._actions, _IDLE).copy()

    def _run(self) -> Iterator[np.ndarray]:
        for _ in range(_ROUNDS):
            for goal in order(self.goals):
                if not self.scene.is_true(goal):
                    yield from self._achieve(goal)
            self.done = self._solved()
            # What has been reached may be undone, as by something that tips over.
            while self._solved():
                yield _IDLE
            self.done = False
        self.reason = self.reason or self.skills.trouble or "The goal was not reached."

    def _solved(self) -> bool:
        return all(self.scene.is_true(goal) for goal in self.goals)

    def _achieve(self, goal: Goal) -> Motion:
        predicate, name = goal[0], goal[1]

        def reached() -> bool:
            return self.scene.is_true(goal)

        if predicate in ("in", "on"):
            container = goal[2]
            if predicate == "in" and self.scene.joint(container) and not self.scene.is_true(("open", container)):
                yield from self._clear_the_way(name, container)
                yield from self._achieve(("open", container))
            return (yield from self.skills.bring(name, lambda: self.target(goal), reached))
        setting = self._setting(goal)
        if setting is None:
            self.reason = f"There is no skill for the goal {' '.join(goal)}."
            return False
        skill = {"open": self.handles.pull, "close": self.handles.push}.get(predicate, self.handles.turn)
        return (yield from skill(name, setting, reached))

    def _clear_the_way(self, name: str, drawer: str) -> Motion:
        """Pushes an object sideways from where it would lie under an open drawer, since it is taken from above."""
        scene, joint, setting = self.scene, self.scene.joint(drawer), self._setting(("open", drawer))
        if joint is None or setting is None or not joint.slides:
            return True
        corners = scene.corners(scene.body_geoms(joint.body))
        way = (setting.value - joint.value) * joint.axis
        low, high = np.minimum(corners, corners + way).min(axis=0), np.maximum(corners, corners + way).max(axis=0)
        first, last = (edge(scene.corners(scene.geoms(name)), axis=0) for edge in (np.min, np.max))
        if last[2] > low[2] or np.any((np.minimum(high, last) - np.maximum(low, first))[:2] < _MOST_UNDER):
            return True
        across = int(np.argmin(np.abs(way[:2])))
        point = scene.position(name)
        point[across] += min(low[across] - last[across], high[across] - first[across], key=abs)
        return (yield from self.skills.push(name, Target(point, np.zeros(3), point[:2])))

    def _setting(self, goal: Goal) -> Setting | None:
        """What the joint that a goal is about has to be set to; None for goals of other kinds."""
        wanted, other = _RANGES.get(goal[0], ("", ""))
        sites = self.scene.env.object_sites_dict
        fixture = sites[goal[1]].parent_name if goal[1] in sites else goal[1]
        ranges = self.scene.env.get_object(fixture).object_properties.get("articulation", {})
        if not ranges.get(wanted) or self.scene.joint(goal[1]) is None:
            return None
        value = float(np.mean(ranges[wanted]))
        return Setting(value, float(np.sign(value - np.mean(ranges[other]))))

    def target(self, goal: Goal) -> Target:
        """Where the object of a goal has to be."""
        scene, place = self.scene, goal[2]
        if place not in scene.env.object_sites_dict:
            point = scene.position(place)
            return Target(point, np.array([0, 0, 0.3]), point[:2])
        region = scene.region(place)
        if goal[0] == "in":
            # LIBERO lowers the floor of a region by 10 mm.
            return Target(region.centre - [0, 0, 0.0048], region.half + [0, 0, 0.0048], self._wish(goal, region))
        normal = region.axes[:, 2] * np.sign(region.axes[2, 2])
        slope = float(np.arccos(normal[2]))
        if slope > _SLOPING:
            return _lying(region, normal, slope)
        corners = scene.corners(scene.geoms(goal[1]))
        # By its own axes, for it may have been pushed onto something; but what stands upright is not flat.
        size, height = np.ptp(corners @ scene.rotation(goal[1]), axis=0), float(np.ptp(corners[:, 2]))
        flat = not region.parent and size.min() < _FLAT and size.max() > _BROAD and height < 2 * _FLAT
        centre, half = region.centre + [0, 0, 0.05], np.array([*region.half[:2], 0.1])
        return Target(centre, half, self._wish(goal, region), slides=flat)

    def _wish(self, goal: Goal, region: Region) -> np.ndarray:
        """The middle of a region, or a part of it if it has to hold several objects."""
        sharers = [other[1] for other in self.goals if len(other) == 3 and other[2] == goal[2]]
        if len(sharers) < 2:
            return region.centre[:2]
        half = region.half
        axis = np.eye(2)[int(half[1] >= half[0])]
        share = np.linspace(-1, 1, len(sharers))[sharers.index(goal[1])]
        return region.centre[:2] + 0.55 * share * (axis * half[:2])


def _lying(region: Region, normal: np.ndarray, slope: float) -> Target:
    """For an object that stands on a sloping region, which has a wall behind it: leaned back onto that wall."""
    axis = np.cross([0, 0, 1], normal)
    lean = Rotation.from_rotvec(axis / np.linalg.norm(axis) * min(slope, _MOST_LEAN))
    off_the_wall = np.array([0, 0, 1]) - normal[2] * normal
    centre = region.centre + 0.025 * normal + 0.02 * off_the_wall / np.linalg.norm(off_the_wall)
    return Target(centre, np.zeros(3), centre[:2], lean=lean)


def order(goals: Sequence[Goal]) -> list[Goal]:
    """Goals in the order to pursue them.

    What stands in the way is closed first, then things are opened and turned on, objects are put in their places, each
    after what it shall stand on, and what holds them is closed.
    """
    places = [goal[2] for goal in goals if len(goal) == 3]

    def depth(name: str) -> int:
        return max((1 + depth(goal[2]) for goal in goals if len(goal) == 3 and goal[1] == name), default=0)

    def rank(goal: Goal) -> tuple[int, int]:
        if goal[0] == "close":
            return (4 if any(place.startswith(goal[1]) for place in places) else 0), 0
        if goal[0] in ("in", "on"):
            return 3, depth(goal[2])
        return (1 if goal[0] == "open" else 2), 0

    return sorted(goals, key=rank)
