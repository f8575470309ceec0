"""What the expert can do with objects: pick one up, put it down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.spatial.transform import Rotation

from como_jax.envs.libero.expert import grasps
from como_jax.envs.libero.expert.arm import OPEN, SHUT, Arm, Motion, pitched, pointing_down
from como_jax.envs.libero.expert.grasps import Grasp, Spot
from como_jax.envs.libero.expert.heights import HeightMap
from como_jax.envs.libero.expert.scene import Scene

_ABOVE = 0.06
_CELL, _FINE = 0.004, 0.002
_GAP = 0.008
# So far above the ground what was let go of may hang on a finger.
_HANGING = 0.015
# The way of an open hand until the finger behind what it has put down has pushed that over.
_TOPPLE = 0.05
# What has moved so far in the hand is lost, and what no finger has touched for so many steps.
_LOST, _UNTOUCHED = 0.06, 3
# What was grasped has come up so far when the hand has come up by the first of these heights, or by both: a bowl that
# is held at its rim first tilts.
_RISEN = 0.015
_LIFTS = (0.05, 0.04)
# What the best of many pairs of grasp and place is sought in.
_GRASPS, _SPOTS = 400, 40
_TRIES = 5
_NARROW = 1.5
# What is higher above the floor of a container lies on its walls, or on what it holds.
_ON_THE_FLOOR = 0.02
# What is pushed may stop so far from its place; it is stuck if it comes no nearer for so many steps.
_ARRIVED, _STUCK = 0.01, 15
# Of fingers that push: where they begin, how far ahead and below they aim, how high they begin, half their width, and
# their lean.
_BEHIND, _LEAD, _DOWNWARD = 0.006, 0.06, 0.02
_OFF_THE_GROUND, _FINGERTIP, _PUSH_LEAN = 0.003, 0.011, np.radians(30)
# Further than this from its rest the last joint of the arm does not turn the hand.
_MOST_YAW = 1.9
# What it costs to grasp a bottle that is to be leaned over with the fingers along the lean.
_LEAN_COST = 0.05
_DROP_COST = 1.0
# How much a metre counts toward the side of an object that an episode prefers.
_TASTE = 0.1
# Nearer to the end of its reach than this the arm's elbow is almost straight, and the hand hardly comes back.
_REACH_COST, _SPARE_REACH = 10.0, 0.025
# Nearer to its foot the arm gets stuck, its elbow bent as far as it can.
_CLOSE, _CLOSE_COST = 0.47, 1.5


@dataclasses.dataclass(frozen=True)
class Target:
    """Where an object shall be.

    Attributes:
      centre, half: `[3]`, the box that its body has to come to rest in.
      wish: point on the ground near which it should be.
      slides: whether it is pushed along the ground.
      lean: rotation by which it is leaned over to lie on something sloping; None to leave it upright.
    """

    centre: np.ndarray
    half: np.ndarray
    wish: np.ndarray
    slides: bool = False
    lean: Rotation | None = None


@dataclasses.dataclass(frozen=True)
class Handling:
    """How to take an object from where it is to where it shall be.

    Attributes:
      grasp: where its body is now.
      spot: to put it.
      body: position of the object's body that the grasp was planned for.
      turn: rotation of hand and object on the way.
      leans: whether it is leaned over.
    """

    grasp: Grasp
    spot: Spot
    body: np.ndarray
    turn: Rotation
    leans: bool = False


class Skills:
    """Skills with objects; each is a motion, closed loop, and returns whether it succeeded."""

    def __init__(self, scene: Scene, rng: np.random.Generator):
        """Takes what all skills share."""
        self.scene, self.rng, self.arm = scene, rng, Arm(scene, rng)
        self.trouble = ""

    def bring(self, name: str, target: Callable[[], Target], reached: Callable[[], bool]) -> Motion:
        """Picks an object up, carries it to its target and lets go of it; again if it slipped."""
        failed: list[Grasp] = []
        for attempt in range(_TRIES):
            aim = target()
            # What did not get there when it was pushed is carried.
            if aim.slides and attempt < _TRIES - 1:
                yield from self.push(name, aim)
                if reached():
                    return True
                continue
            handling = self.plan(name, aim, failed)
            if handling is None:
                return False
            if not (yield from self.pick(name, handling)):
                failed.append(handling.grasp)
                continue
            # What slipped may have fallen where it belongs.
            if not (yield from self.carry(name, handling)) and not reached():
                continue
            yield from self.release(name, handling.spot.lean if not handling.leans else None)
            if reached():
                return True
        return False

    # Planning.

    def plan(self, name: str, target: Target, failed: list[Grasp]) -> Handling | None:
        """The best pair of grasp and spot; None if there is none, and `trouble` says of what."""
        scene = self.scene
        geoms, body = scene.geoms(name), scene.position(name)
        corners = scene.corners(geoms)
        middle = (corners.min(0) + corners.max(0)) / 2
        extent = float((corners.max(0) - corners.min(0))[:2].max()) / 2
        upper, around = scene.height_maps(middle, extent + 0.14, _CELL, geoms)
        found = [grasp for grasp in grasps.search(upper, around, middle) if not _tried(grasp, failed)]
        found = [grasp for grasp in found if self.arm.beyond_reach(grasp.point) < 0.03][:_GRASPS]
        side = float(target.half[:2].max())
        _, there = scene.height_maps(target.centre, side + extent + 0.14, 0.006, geoms)
        if target.lean is None:
            lower, _ = scene.height_maps(middle, extent + 0.02, _CELL, geoms, below=True)
            spots = self._spots(name, there, lower.points(), upper, target)
        else:
            spots = [Spot(target.centre, 0.0, 0.0, lean=target.lean)]
            across = target.lean.as_rotvec()
            found = [_preferring(grasp, across / np.linalg.norm(across)) for grasp in found]
        if not found or not spots:
            self.trouble = f"There is no {'place' if found else 'grasp'} for {name}."
            return None
        found = self._by_taste(found)
        pairs = [self._best_grasp(found, spot, body, there) for spot in spots[:_SPOTS]]
        _, grasp, spot = max(pairs, key=lambda pair: pair[0])
        grasp = dataclasses.replace(grasp, yaw=_unwound(grasp.yaw, spot.turn, self.arm.yaw))
        return Handling(grasp, spot, body, spot.rotation, target.lean is not None)

    def _spots(self, name: str, there: HeightMap, lower: np.ndarray, upper: HeightMap, target: Target) -> list[Spot]:
        """Places for an object that stands; leaning on a wall where it would stand too low for the goal."""
        underside = lower - self.scene.position(name)
        turns = _turns(target.half, underside)
        found = grasps.find_spots(there, underside, target.centre, target.half, target.wish, turns)
        floor = grasps.floor_height(there, target.centre, target.half)
        if found and found[0].point[2] + underside[:, 2].min() < floor + _ON_THE_FLOOR:
            return found
        # Millimetres decide whether it fits.
        side = float(target.half[:2].max()) + 0.02
        _, fine = self.scene.height_maps(target.centre, side, _FINE, self.scene.geoms(name))
        heights = np.linspace(lower[:, 2], np.maximum(lower[:, 2], upper.at(lower)), 9)
        whole = np.concatenate([np.column_stack([lower[:, :2], height]) for height in heights])
        whole -= self.scene.position(name)
        return grasps.find_leaning_spots(fine, whole, target.centre, target.half, turns) or found

    def _by_taste(self, found: list[Grasp]) -> list[Grasp]:
        """The grasps with scores that prefer a drawn side of the object, so that no two demonstrations are alike."""
        angle = self.rng.uniform(-np.pi, np.pi)
        side = _TASTE * np.array([np.cos(angle), np.sin(angle)])
        return [dataclasses.replace(grasp, score=grasp.score + float(grasp.point[:2] @ side)) for grasp in found]

    def _best_grasp(
        self, found: list[Grasp], spot: Spot, body: np.ndarray, there: HeightMap
    ) -> tuple[float, Grasp, Spot]:
        """The best grasp for a spot, and what both together are worth."""
        points = np.array([grasp.point for grasp in found])
        yaws = np.array([grasp.yaw for grasp in found])
        offsets = points - body
        hands = spot.point + spot.rotation.apply(offsets)
        clear = np.empty(len(found))
        for yaw in np.unique(yaws):
            clear[yaws == yaw] = grasps.clear_height(there, hands[yaws == yaw], yaw + spot.turn, lean=spot.lean)
        drop = np.maximum(0, clear - hands[:, 2])
        ends = zip(hands, points + [0, 0, _ABOVE], strict=True)
        far = np.array([sum(max(0.0, self.arm.beyond_reach(end) + _SPARE_REACH) for end in both) for both in ends])
        close = np.maximum(0, _CLOSE - np.linalg.norm((points - self.scene.shoulder)[:, :2], axis=1))
        costs = _DROP_COST * drop + _REACH_COST * far + _CLOSE_COST * close
        total = np.array([grasp.score for grasp in found]) + spot.score - costs
        index = int(total.argmax())
        return float(total[index]), found[index], spot

    # Acting.

    def pick(self, name: str, handling: Handling) -> Motion:
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
        height = scene.position(name)[2]
        for lift in _LIFTS:
            here, _ = scene.hand
            yield from arm.go((here + [0, 0, lift], rotation), SHUT, near=0.02, turned=0.3)
            # One finger alone holds nothing: the object leans on it, or lies on the other's outer side.
            if scene.holds(name) and scene.position(name)[2] > height + _RISEN:
                return True
        return False

    def _funnel(self, point: np.ndarray) -> float:
        """How far above its goal the hand has to stay while it is beside it."""
        away = np.linalg.norm((self.scene.hand[0] - point)[:2])
        return float(np.clip(8 * (away - 0.005), 0, _ABOVE))

    def carry(self, name: str, handling: Handling) -> Motion:
        """Takes what is held to a spot and lowers it there.

        Returns:
          False if it was lost on the way.
        """
        scene, arm = self.scene, self.arm
        here, axes = scene.hand
        rotation = handling.turn.as_matrix() @ axes
        held_at = axes.T @ (scene.position(name) - here)

        untouched: list[bool] = []

        def lost() -> bool:
            point, now = scene.hand
            moved = np.linalg.norm(now.T @ (scene.position(name) - point) - held_at)
            untouched.append(not any(scene.touched_by(scene.geoms(name))))
            return bool(moved > _LOST or (len(untouched) >= _UNTOUCHED and all(untouched[-_UNTOUCHED:])))

        def above(height: float) -> tuple[np.ndarray, np.ndarray]:
            """Where the hand has to be for the object to be above its spot."""
            point, now = scene.hand
            offset = rotation @ now.T @ (point - scene.position(name))
            return handling.spot.point + offset + [0, 0, height], rotation

        height = 0.06 if handling.leans else max(0.03, 0.01 + handling.spot.over - handling.spot.point[2])
        yield from arm.travel(*above(height), SHUT, load=scene.geoms(name), until=lost)
        if lost():
            return False
        clear = -np.inf if handling.leans else self._clear_at(name, handling)
        gap = 0.0 if handling.leans else _GAP

        def goal() -> tuple[np.ndarray, np.ndarray]:
            point, _ = above(gap)
            away = np.linalg.norm((scene.hand[0] - point)[:2])
            wait = np.clip((away - 0.005) / 0.008, 0, 1) * height
            return np.array([*point[:2], max(point[2], clear) + wait]), rotation

        yield from arm.go(goal, SHUT, near=0.005, turned=0.08, steps=80, until=lost)
        return not lost()

    def push(self, name: str, target: Target) -> Motion:
        """Pushes a plate or the like along the ground, with closed fingers from behind.

        The hand leans forward over what is flat, so that behind it only the fingertips need room. The ground between
        has to be level, and free but for what can be pushed along.

        Returns:
          False if it is stuck, or the hand has come on top of it.
        """
        scene, arm = self.scene, self.arm
        corners = scene.corners(scene.geoms(name))
        edge = float(np.ptp(corners, axis=0)[:2].min()) / 2 + _FINGERTIP
        height = float(corners[:, 2].min()) + grasps.TIP + _OFF_THE_GROUND

        def left() -> float:
            return float(np.linalg.norm(target.wish - scene.position(name)[:2]))

        def ahead() -> np.ndarray:
            return (target.wish - scene.position(name)[:2]) / max(left(), 1e-6)

        def along() -> float:
            return float((scene.hand[0][:2] - scene.position(name)[:2]) @ ahead())

        def on_the_line(distance: float) -> np.ndarray:
            return np.array([*(scene.position(name)[:2] + distance * ahead()), height])

        def pressing() -> tuple[np.ndarray, np.ndarray]:
            """Ahead of the hand on the line to the target, so that it presses, and below, so that it stays down."""
            return on_the_line(along() + _LEAD) - [0, 0, _DOWNWARD], rotation

        # Over what is higher than the fingertips are long, the palm would come to stand on it.
        lean = _PUSH_LEAN if np.ptp(corners[:, 2]) < grasps.PALM else 0.0
        forward = np.array([*(-np.sin(lean) * ahead()), -np.cos(lean)])
        across = np.array([-ahead()[1], ahead()[0], 0])
        # The fingers side by side, across the way, and the last joint of the arm turned little.
        choices = pitched(forward, across), pitched(forward, -across)
        rotation = max(choices, key=lambda choice: float(np.trace(choice.T @ pointing_down(0.0))))
        point = on_the_line(-edge - _BEHIND)
        yield from arm.travel(point + [0, 0, _ABOVE], rotation, SHUT)
        yield from arm.go((point, rotation), SHUT, near=0.008)

        lefts: list[float] = []

        def over() -> bool:
            """Whether it is there, or comes no nearer, or the hand has come on top of it."""
            lefts.append(left())
            stuck = len(lefts) > _STUCK and min(lefts[-_STUCK:]) > min(lefts[:-_STUCK]) - 0.002
            return lefts[-1] < _ARRIVED or stuck or along() > 0

        yield from arm.go(pressing, SHUT, steps=90, patience=90, speed=0.6, until=over)
        arrived = left() < _ARRIVED
        here, axes = scene.hand
        yield from arm.go((here + [0, 0, 0.05] - 0.02 * np.array([*ahead(), 0]), axes), SHUT, near=0.02, steps=25)
        return arrived

    def _clear_at(self, name: str, handling: Handling) -> float:
        here, axes = self.scene.hand
        point = handling.spot.point + handling.turn.apply(here - self.scene.position(name))
        _, there = self.scene.height_maps(point, 0.13, 0.006, self.scene.geoms(name))
        fingers = Rotation.from_euler("z", handling.spot.turn).apply(axes[:, 0])
        yaw = float(np.arctan2(-fingers[0], fingers[1]))
        return float(grasps.clear_height(there, point, yaw, lean=handling.spot.lean))

    def release(self, name: str, lean: Rotation | None = None) -> Motion:
        """Opens the fingers and rises; what is to lean on a wall is first pushed over toward it."""
        scene, arm = self.scene, self.arm
        yield from arm.open()
        if lean is None:
            yield from self._let_go(name)
        else:
            here, axes = scene.hand
            ahead = np.cross(lean.as_rotvec() / lean.magnitude(), [0, 0, 1])
            yield from arm.go((here + _TOPPLE * ahead, axes), OPEN, near=0.01, turned=0.3, steps=12)
        here, axes = scene.hand
        yield from arm.go((here - 0.10 * axes[:, 2], axes), OPEN, near=0.03, turned=0.5, steps=25)
        return not any(scene.touched_by(scene.geoms(name)))

    def _let_go(self, name: str) -> Motion:
        """Gets rid of what still touches a finger: down, for it may hang there by an edge, or sideways."""
        scene, arm = self.scene, self.arm

        def touched() -> tuple[bool, bool]:
            return scene.touched_by(scene.geoms(name))

        for _ in range(3):
            here, axes = scene.hand
            yield from arm.go(
                (here - [0, 0, _HANGING], axes), OPEN, near=0.003, steps=8, until=lambda: not any(touched())
            )
            if not any(touched()):
                return True
            here, axes = scene.hand
            outward = scene.finger_sides() @ np.array(touched(), float)
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


def _preferring(grasp: Grasp, across: np.ndarray) -> Grasp:
    """The grasp with a score that says how well its fingers lie along a direction."""
    along = abs(float(grasps.hand_axes(grasp.yaw)[0] @ across[:2]))
    return dataclasses.replace(grasp, score=grasp.score - _LEAN_COST * (1 - along))


def _turns(half: np.ndarray, underside: np.ndarray) -> tuple[float, ...]:
    """Turns about the vertical to try: where the place is narrow, those that align the object with it."""
    narrow = half[:2].max() > _NARROW * half[:2].min() > 0
    if not narrow:
        return (0.0,)
    angles = np.arange(0, np.pi, np.pi / 60)
    widths = [np.ptp(underside[:, :2] @ [-np.sin(angle), np.cos(angle)]) for angle in angles]
    along = angles[int(np.argmin(widths))]
    turn = ((0.0 if half[0] > half[1] else np.pi / 2) - along + np.pi / 2) % np.pi - np.pi / 2
    return (float(turn),)


def _unwound(yaw: float, turn: float, now: float) -> float:
    """The same grasp of two fingers by the yaw that is nearest to the hand's, and within what the arm can turn."""

    def cost(other: float) -> float:
        return 10 * max(0.0, abs(other) - _MOST_YAW, abs(other + turn) - _MOST_YAW) + abs(other - now)

    return min((yaw - np.pi, yaw, yaw + np.pi), key=cost)
