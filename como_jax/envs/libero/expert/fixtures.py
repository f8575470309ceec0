"""What the expert can do with fixtures: pull a drawer open, push a drawer or door shut, turn a knob."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.spatial.transform import Rotation

from como_jax.envs.libero.expert import grasps
from como_jax.envs.libero.expert.arm import OPEN, SHUT, Arm, Motion, pitched, pointing_down
from como_jax.envs.libero.expert.grasps import PALM, TIP, Grasp
from como_jax.envs.libero.expert.scene import Joint, Scene

_UP = np.array([0.0, 0, 1])
# Below the horizontal, of the hand that pulls, and of the one that pushes.
_PULL_PITCH, _PUSH_PITCH = np.radians(20), np.radians(40)
_BEFORE = 0.08
# How much deeper than its middle a handle is grasped, so that it does not slip out.
_DEEPER = 0.007
_AHEAD = 0.035
_TRIES = 5
# No further than this from upright is a knob's hand turned: the last joint of the arm ends.
_MOST_YAW = 2.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a joint shall be set to.

    Attributes:
      value: to stop at.
      sign: of the way there, 1 or -1.
    """

    value: float
    sign: float

    def passed(self, value: float) -> bool:
        """Whether a value is far enough."""
        return (value - self.value) * self.sign >= 0


class Handles:
    """Skills with what turns or slides; each is a motion, closed loop, and returns whether it succeeded."""

    def __init__(self, scene: Scene, arm: Arm):
        """Takes what all skills share."""
        self.scene, self.arm = scene, arm

    def pull(self, name: str, setting: Setting, reached: Callable[[], bool]) -> Motion:
        """Pulls a drawer by the bar in front of it; grasps the bar again if it slipped."""
        for _ in range(_TRIES):
            yield from self._pull_once(name, setting)
            if reached():
                return (yield from self._rise())
        return False

    def _pull_once(self, name: str, setting: Setting) -> Motion:
        scene, arm = self.scene, self.arm
        joint = self._joint(name)
        out = joint.axis * setting.sign
        handle = self._handle(joint, out)
        rotation = self._facing(out, _PULL_PITCH, upright=True)
        ahead = rotation[:, 2]
        yield from arm.travel(self._middle(handle) - _BEFORE * ahead, rotation, OPEN)
        deep = self._middle(handle) + _DEEPER * ahead
        yield from arm.go((deep, rotation), OPEN, near=0.006, turned=0.06, patience=4)
        yield from arm.close({handle})
        held_at = scene.hand[0] - self._middle(handle)
        slipped: list[bool] = []

        def over() -> bool:
            slipped.append(not any(scene.touched_by({handle})))
            return setting.passed(self._joint(name).value) or (len(slipped) > 3 and all(slipped[-3:]))

        def pulled() -> tuple[np.ndarray, np.ndarray]:
            return self._middle(handle) + held_at + _AHEAD * out, rotation

        yield from arm.go(pulled, SHUT, until=over, steps=60, patience=60)
        yield from arm.hold(OPEN, 6)
        here, axes = scene.hand
        return (yield from arm.go((here - 0.07 * ahead + 0.02 * out, axes), OPEN, near=0.02, steps=20))

    def push(self, name: str, setting: Setting, reached: Callable[[], bool]) -> Motion:
        """Pushes a drawer or a door shut with closed fingers."""
        for _ in range(_TRIES):
            yield from self._push_once(name, setting, reached)
            if reached():
                return True
        return False

    def _push_once(self, name: str, setting: Setting, reached: Callable[[], bool]) -> Motion:
        scene, arm = self.scene, self.arm
        joint = self._joint(name)
        out = -joint.axis * setting.sign
        handle = self._handle(joint, out) if joint.slides else self._farthest(joint)
        leaning = self._facing(out, _PUSH_PITCH, upright=False) if joint.slides else None

        def pose(ahead: float) -> tuple[np.ndarray, np.ndarray]:
            way, point = self._way(self._joint(name), setting, handle)
            rotation = self._across(way) if leaning is None else leaning
            return point + ahead * way - TIP * rotation[:, 2], rotation

        def shut() -> bool:
            return reached() and setting.passed(self._joint(name).value)

        yield from arm.travel(*pose(-_BEFORE), SHUT)
        yield from arm.go(lambda: pose(-0.03), SHUT, near=0.012, turned=0.15)
        yield from arm.go(lambda: pose(_AHEAD), SHUT, until=shut, steps=60, patience=60)
        here, axes = scene.hand
        way, _ = self._way(self._joint(name), setting, handle)
        yield from arm.go((here - 0.06 * way, axes), SHUT, near=0.03, steps=15)
        return (yield from self._rise())

    def turn(self, name: str, setting: Setting, reached: Callable[[], bool]) -> Motion:
        """Turns a knob that stands upright, from above."""
        failed: list[Grasp] = []
        for _ in range(_TRIES):
            joint = self._joint(name)
            geoms = set(self.scene.body_geoms(joint.body))
            angle = (setting.value - joint.value) * float(np.sign(joint.axis[2]))
            grasp = self._grasp_of_knob(joint, geoms, angle, failed)
            if grasp is None:
                return False
            if not (yield from self._turn_once(name, setting, grasp, angle)):
                failed.append(grasp)
            if reached():
                return True
        return False

    def _turn_once(self, name: str, setting: Setting, grasp: Grasp, angle: float) -> Motion:
        scene, arm = self.scene, self.arm
        joint = self._joint(name)
        geoms = set(scene.body_geoms(joint.body))
        rotation = pointing_down(grasp.yaw)
        yield from arm.travel(grasp.point + [0, 0, 0.06], rotation, OPEN)
        yield from arm.go((grasp.point, rotation), OPEN, near=0.005, turned=0.06)
        held = yield from arm.close(geoms)
        here, axes = scene.hand
        further = Rotation.from_euler("z", 1.15 * angle).as_matrix()
        goal = np.array([*(joint.anchor + further @ (here - joint.anchor))[:2], here[2]]), further @ axes
        yield from arm.go(goal, SHUT, turned=0.03, patience=30, until=lambda: setting.passed(self._joint(name).value))
        yield from arm.hold(SHUT, 3)
        yield from arm.open()
        yield from self._rise()
        return held

    def _rise(self) -> Motion:
        """Leaves upward, and opens."""
        here, axes = self.scene.hand
        yield from self.arm.go((here + [0, 0, 0.09], axes), OPEN, near=0.03, turned=0.5, steps=20)
        return True

    # Geometry.

    def _joint(self, name: str) -> Joint:
        joint = self.scene.joint(name)
        assert joint is not None
        return joint

    def _handle(self, joint: Joint, out: np.ndarray) -> int:
        """The geometry of a drawer that stands out most: the bar of its handle."""
        return max(self.scene.body_geoms(joint.body), key=lambda geom: float(self._middle(geom) @ out))

    def _farthest(self, joint: Joint) -> int:
        """The geometry of a door that is farthest from its hinge: its handle."""
        return max(
            self.scene.body_geoms(joint.body),
            key=lambda geom: float(np.linalg.norm((self._middle(geom) - joint.anchor)[:2])),
        )

    def _middle(self, geom: int) -> np.ndarray:
        return self.scene.corners([geom]).mean(axis=0)

    def _facing(self, out: np.ndarray, pitch: float, *, upright: bool) -> np.ndarray:
        """The hand facing a front, and leaning up from the horizontal; its fingers one above the other if upright."""
        ahead = -np.cos(pitch) * out - np.sin(pitch) * _UP
        side = np.cross(_UP, out)
        fingers = np.cross(side, ahead) if upright else side
        choices = [pitched(ahead, fingers), pitched(ahead, -fingers)]
        _, axes = self.scene.hand
        return max(choices, key=lambda choice: float(np.trace(choice.T @ axes)))

    def _across(self, way: np.ndarray) -> np.ndarray:
        """The hand pointing down with its fingers across a way."""
        across = np.array([-way[1], way[0]])
        return pointing_down(float((np.arctan2(-across[0], across[1]) + np.pi / 2) % np.pi - np.pi / 2))

    def _way(self, joint: Joint, setting: Setting, handle: int) -> tuple[np.ndarray, np.ndarray]:
        """The direction to push in, and the point to push."""
        middle = self._middle(handle)
        if joint.slides:
            return joint.axis * setting.sign, middle
        way = np.cross(joint.axis, middle - joint.anchor) * setting.sign
        way = way / np.linalg.norm(way)
        # The hand stays above the door.
        top = self.scene.corners(self.scene.body_geoms(joint.body))[:, 2].max()
        return way, np.array([*middle[:2], top + 0.005 - PALM - TIP])

    def _grasp_of_knob(self, joint: Joint, geoms: set[int], angle: float, failed: list[Grasp]) -> Grasp | None:
        upper, around = self.scene.height_maps(joint.anchor, 0.18, 0.004, geoms)
        middle = self.scene.corners(geoms).mean(axis=0)
        choices = []
        for grasp in grasps.search(upper, around, middle):
            for yaw in (grasp.yaw, grasp.yaw - np.pi, grasp.yaw + np.pi):
                ends = max(abs(yaw), abs(yaw + angle))
                if ends < _MOST_YAW and not any(np.linalg.norm(grasp.point - other.point) < 0.01 for other in failed):
                    choices.append(Grasp(grasp.point, yaw, grasp.score - 0.002 * ends))
        return max(choices, key=lambda grasp: grasp.score, default=None)
