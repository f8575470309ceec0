"""What the expert can do with objects: pick one up, put it down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.spatial.transform import Rotation

from como_jax.envs.libero.expert import grasps
from como_jax.envs.libero.expert.arm import OPEN, SHUT, Arm, Motion, pointing_down
from como_jax.envs.libero.expert.grasps import Grasp, Spot
from como_jax.envs.libero.expert.heights import HeightMap
from como_jax.envs.libero.expert.scene import Scene

_ABOVE = 0.06
_CELL = 0.004
_GAP = 0.008
_LOST = 0.04
# What the best of many pairs of grasp and place is sought in.
_CANDIDATES = 40
_DROP_COST = 1.0
_REACH_COST = 10.0


@dataclasses.dataclass(frozen=True)
class Target:
    """Where an object shall be.

    Attributes:
      centre, half: `[3]`, the box that its body has to come to rest in.
      wish: point on the ground near which it should be.
      slides: whether it is pushed along the ground.
    """

    centre: np.ndarray
    half: np.ndarray
    wish: np.ndarray
    slides: bool = False


@dataclasses.dataclass(frozen=True)
class Handling:
    """A grasp of an object where it is, and the spot that it is taken to."""

    grasp: Grasp
    spot: Spot
    body: np.ndarray


class Skills:
    """Skills with objects; each is a motion, closed loop, and returns whether it succeeded."""

    def __init__(self, scene: Scene, rng: np.random.Generator):
        """Takes what all skills share."""
        self.scene, self.rng, self.arm = scene, rng, Arm(scene)

    def bring(self, name: str, target: Callable[[], Target], reached: Callable[[], bool]) -> Motion:
        """Picks an object up, carries it to its target and lets go of it; again if it slipped."""
        failed: list[Grasp] = []
        for _ in range(5):
            handling = self.plan(name, target(), failed)
            if handling is None:
                return False
            if not (yield from self.pick(name, handling, slides=target().slides)):
                failed.append(handling.grasp)
                continue
            if not (yield from self.carry(name, handling, slides=target().slides)):
                continue
            yield from self.release(name)
            if reached():
                return True
        return False

    # Planning.

    def plan(self, name: str, target: Target, failed: list[Grasp]) -> Handling | None:
        """The best pair of grasp and spot; None if there is none."""
        scene = self.scene
        geoms, body = scene.geoms(name), scene.position(name)
        corners = scene.corners(geoms)
        middle = (corners.min(0) + corners.max(0)) / 2
        extent = float((corners.max(0) - corners.min(0))[:2].max()) / 2
        upper, around = scene.height_maps(middle, extent + 0.14, _CELL, geoms)
        found = [grasp for grasp in grasps.search(upper, around, middle) if not _tried(grasp, failed)]
        found = [grasp for grasp in found if self.arm.within_reach(grasp.point) < 0.03]
        lower, _ = scene.height_maps(middle, extent + 0.02, _CELL, geoms, below=True)
        side = float(target.half[:2].max())
        _, there = scene.height_maps(target.centre, side + extent + 0.14, 0.006, geoms)
        spots = grasps.find_spots(
            there, lower.points() - body, target.centre, target.half, target.wish, self._turns(target)
        )
        return self._best(found[:400], spots[:_CANDIDATES], body, there)

    def _turns(self, target: Target) -> tuple[float, ...]:
        wide = target.half[:2].max() > 1.5 * target.half[:2].min() > 0
        return tuple(np.arange(-4, 5) * np.pi / 8) if wide else (0.0,)

    def _best(self, found: list[Grasp], spots: list[Spot], body: np.ndarray, there: HeightMap) -> Handling | None:
        if not found or not spots:
            return None
        pairs = [self._best_grasp(found, spot, body, there) for spot in spots]
        return max(pairs, key=lambda pair: pair[0])[1]

    def _best_grasp(self, found: list[Grasp], spot: Spot, body: np.ndarray, there: HeightMap) -> tuple[float, Handling]:
        """The best grasp for a spot, and what both together are worth."""
        points = np.array([grasp.point for grasp in found])
        yaws = np.array([grasp.yaw for grasp in found])
        offsets = points - body
        flat = offsets[:, :2] @ grasps.hand_turn(spot.turn).T
        hands = spot.point + np.column_stack([flat, offsets[:, 2]])
        clear = np.empty(len(found))
        for yaw in np.unique(yaws):
            clear[yaws == yaw] = grasps.clear_height(there, hands[yaws == yaw], yaw + spot.turn)
        drop = np.maximum(0, clear - hands[:, 2])
        far = np.array(
            [
                max(0.0, self.arm.within_reach(hand)) + max(0.0, self.arm.within_reach(point + [0, 0, _ABOVE]))
                for hand, point in zip(hands, points, strict=True)
            ]
        )
        total = np.array([grasp.score for grasp in found]) + spot.score - _DROP_COST * drop - _REACH_COST * far
        index = int(total.argmax())
        return float(total[index]), Handling(found[index], spot, body)

    # Acting.

    def pick(self, name: str, handling: Handling, *, slides: bool = False) -> Motion:
        """Grasps an object from above and lifts it a little.

        Returns:
          False if it is not between the fingers.
        """
        scene, arm = self.scene, self.arm
        rotation = pointing_down(handling.grasp.yaw)

        def point(above: float) -> np.ndarray:
            return handling.grasp.point + (scene.position(name) - handling.body) + [0, 0, above]

        yield from arm.travel(point(_ABOVE), rotation, OPEN)
        yield from arm.go(lambda: (point(0.02 + self._funnel(point(0))), rotation), OPEN, near=0.02)
        yield from arm.go(lambda: (point(self._funnel(point(0))), rotation), OPEN, near=0.004, turned=0.06, steps=60)
        yield from arm.close(scene.geoms(name))
        if not scene.holds(name):
            here, axes = scene.hand
            yield from arm.hold(OPEN, 4)
            yield from arm.go((here + [0, 0, 0.08], axes), OPEN, near=0.02)
            return False
        if not slides:
            here, _ = scene.hand
            yield from arm.go((here + [0, 0, 0.05], rotation), SHUT, near=0.02, turned=0.3)
        return any(scene.touched_by(scene.geoms(name)))

    def _funnel(self, point: np.ndarray) -> float:
        """How far above its goal the hand has to stay while it is beside it."""
        away = np.linalg.norm((self.scene.hand[0] - point)[:2])
        return float(np.clip(8 * (away - 0.005), 0, _ABOVE))

    def carry(self, name: str, handling: Handling, *, slides: bool = False) -> Motion:
        """Takes what is held to a spot and lowers it there.

        Returns:
          False if it was lost on the way.
        """
        scene, arm = self.scene, self.arm
        here, axes = scene.hand
        rotation = Rotation.from_euler("z", handling.spot.turn).as_matrix() @ axes
        held_at = axes.T @ (scene.position(name) - here)

        def lost() -> bool:
            point, now = scene.hand
            moved = np.linalg.norm(now.T @ (scene.position(name) - point) - held_at)
            return bool(moved > _LOST or not any(scene.touched_by(scene.geoms(name))))

        def above(height: float) -> tuple[np.ndarray, np.ndarray]:
            """Where the hand has to be for the object to be above its spot."""
            point, now = scene.hand
            offset = rotation @ now.T @ (point - scene.position(name))
            return handling.spot.point + offset + [0, 0, height], rotation

        if not slides:
            yield from arm.travel(*above(0.03), SHUT, load=scene.geoms(name), until=lost)
        if lost():
            return False
        clear = self._clear_at(name, handling)

        def goal() -> tuple[np.ndarray, np.ndarray]:
            point, _ = above(0.0 if slides else _GAP)
            away = np.linalg.norm((scene.hand[0] - point)[:2])
            lowest = max(point[2], clear) if not slides else point[2]
            return np.array([*point[:2], lowest + (0 if slides else np.clip(3 * (away - 0.008), 0, 0.03))]), rotation

        yield from arm.go(goal, SHUT, near=0.005, turned=0.15, steps=80, until=lost)
        return not lost()

    def _clear_at(self, name: str, handling: Handling) -> float:
        here, axes = self.scene.hand
        turn = Rotation.from_euler("z", handling.spot.turn).as_matrix()
        point = handling.spot.point + turn @ (here - self.scene.position(name))
        _, there = self.scene.height_maps(point, 0.13, 0.006, self.scene.geoms(name))
        fingers = turn @ axes[:, 0]
        return float(grasps.clear_height(there, point, float(np.arctan2(-fingers[0], fingers[1]))))

    def release(self, name: str) -> Motion:
        """Opens the fingers and rises."""
        scene, arm = self.scene, self.arm
        yield from arm.open()
        yield from self._let_go(name)
        here, axes = scene.hand
        yield from arm.go((here + [0, 0, 0.10], axes), OPEN, near=0.03, turned=0.5, steps=25)
        return not any(scene.touched_by(scene.geoms(name)))

    def _let_go(self, name: str) -> Motion:
        """Moves sideways away from a finger that still touches: thin walls of objects hook on it."""
        scene, arm = self.scene, self.arm
        for _ in range(3):
            touched = scene.touched_by(scene.geoms(name))
            if not any(touched):
                return True
            here, axes = scene.hand
            outward = scene.finger_sides() @ np.array(touched, float)
            yield from arm.go((here + 0.012 * outward, axes), OPEN, near=0.004, turned=0.3, steps=8)
            here, axes = scene.hand
            height = scene.position(name)[2]
            yield from arm.go((here + [0, 0, 0.015], axes), OPEN, near=0.004, turned=0.3, steps=8)
            if scene.position(name)[2] < height + 0.006:
                return True
            yield from arm.go((here, axes), OPEN, near=0.004, turned=0.3, steps=8)
        return False


def _tried(grasp: Grasp, failed: list[Grasp]) -> bool:
    return any(
        np.linalg.norm(grasp.point - other.point) < 0.012 and abs(grasp.yaw - other.yaw) < 0.3 for other in failed
    )
