"""The arm: actions that bring the hand to a pose, and ways around what stands between."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
from scipy.ndimage import grey_dilation
from scipy.spatial.transform import Rotation

from como_jax.envs.libero.expert.grasps import PALM, TIP
from como_jax.envs.libero.expert.heights import HeightMap
from como_jax.envs.libero.expert.scene import Scene

OPEN, SHUT = -1.0, 1.0
# Of the controller: what an action of 1 asks for, in metres and radians.
_STEP, _TURN = 0.05, 0.5
# Times the way left is asked for, less so many times the way of the last step: quick, with little overshoot.
_GAIN, _DAMPING = 2.2, 3.0
# A hand that has not come nearer for so many steps is at the end of its way.
_STALLED = 10
_MOST_STEPS = 150
# Steps that the fingers need: until they press, and at most until they meet; and to open.
_CLOSING = (8, 5)
_OPENING = 10
_OPEN_WIDTH = 0.072
_DOWN = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])
_REACH = 0.70
# The wrist is so far above the grip point of a hand that points down, and so much nearer to the shoulder.
_WRIST, _WRIST_BEHIND = 0.21, 0.088
_MARGIN = 0.015
# What begins so far above the bottom of what is held hangs over it.
_HANGS = 0.03
# The hand travels up to so much higher than it has to: nobody moves twice the same way.
_HIGHER = 0.02

Motion = Generator[np.ndarray, None, bool]
Pose = tuple[np.ndarray, np.ndarray]


def pointing_down(yaw: float) -> np.ndarray:
    """The hand's rotation matrix for grasps from above."""
    return Rotation.from_euler("z", yaw).as_matrix() @ _DOWN


def pitched(forward: np.ndarray, fingers: np.ndarray) -> np.ndarray:
    """The hand's rotation matrix with its approach and its fingers' axis along two directions at right angles."""
    forward, fingers = (vector / np.linalg.norm(vector) for vector in (forward, fingers))
    return np.column_stack([fingers, np.cross(forward, fingers), forward])


class Arm:
    """Moves the hand; each motion yields actions `float32[7]` and returns whether it got there."""

    def __init__(self, scene: Scene, rng: np.random.Generator):
        """Takes the scene that the arm is in, and what draws the heights that it travels at."""
        self.scene, self.rng = scene, rng
        self._before = scene.hand

    @property
    def yaw(self) -> float:
        """Of the hand, if it points down: see `pointing_down`."""
        fingers = self.scene.hand[1][:, 0]
        return float(np.arctan2(-fingers[0], fingers[1]))

    def toward(self, point: np.ndarray, rotation: np.ndarray, grip: float, speed: float = 1.0) -> np.ndarray:
        """One action toward a pose."""
        here, axes = self.scene.hand
        moved, rotated = here - self._before[0], _rotation_vector(axes @ self._before[1].T)
        self._before = here, axes
        move = (_GAIN * (point - here) - _DAMPING * moved) / _STEP
        turn = (_GAIN * _rotation_vector(rotation @ axes.T) - _DAMPING * rotated) / _TURN
        move = move * min(1.0, speed / max(np.abs(move).max(), 1e-9))
        turn = turn * min(1.0, 1.0 / max(np.abs(turn).max(), 1e-9))
        return np.array([*move, *turn, grip], np.float32)

    def go(
        self,
        goal: Pose | Callable[[], Pose],
        grip: float,
        *,
        near: float = 0.006,
        turned: float = 0.08,
        steps: int = _MOST_STEPS,
        speed: float = 1.0,
        patience: int = _STALLED,
        until: Callable[[], bool] = lambda: False,
    ) -> Motion:
        """Moves until the hand is at a pose, which may move itself, or until something holds.

        Returns:
          False if it did not get there: it was stopped, or ran out of steps.
        """
        least, since = np.inf, 0
        for _ in range(steps):
            point, rotation = goal() if callable(goal) else goal
            here, axes = self.scene.hand
            away = float(np.linalg.norm(point - here))
            angle = float(np.linalg.norm(_rotation_vector(rotation @ axes.T)))
            if until() or (away < near and angle < turned):
                return True
            left = away + 0.1 * angle
            least, since = (left, 0) if left < least - 0.0005 else (least, since + 1)
            if since >= patience:
                return False
            yield self.toward(point, rotation, grip, speed)
        return False

    def hold(self, grip: float, steps: int, until: Callable[[], bool] = lambda: False) -> Motion:
        """Stays where it is, as when the fingers move."""
        point, rotation = self.scene.hand
        for _ in range(steps):
            if until():
                return True
            yield self.toward(point, rotation, grip)
        return until()

    def close(self, geoms: set[int]) -> Motion:
        """Closes the fingers on geometries where it is; returns whether both touch them."""
        yield from self.hold(SHUT, _CLOSING[0])
        touching = yield from self.hold(SHUT, _CLOSING[1], lambda: all(self.scene.touched_by(geoms)))
        return touching

    def open(self) -> Motion:
        """Opens the fingers where it is."""
        return (yield from self.hold(OPEN, _OPENING, lambda: self.scene.opening > _OPEN_WIDTH))

    def travel(
        self,
        point: np.ndarray,
        rotation: np.ndarray,
        grip: float,
        *,
        load: set[int] | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> Motion:
        """Moves over all that stands between to a point above a place, with what it holds."""
        yield from self._from_under(load or set(), rotation, grip)
        here, _ = self.scene.hand
        need = self._needed(here, point, load or set())
        ways = np.linspace(0, 1, 25)[:, None]
        line = here + ways * (point - here)
        needed = need(line)
        if np.any(needed > line[:, 2]):
            top = max(needed.max() + self.rng.uniform(0, _HIGHER), point[2])
            top = min(top, max(self._highest(point), point[2] + 0.02))
            blocked = np.flatnonzero(needed > here[2])
            # It need not be all the way up before it sets out.
            free = max(0, blocked[0] - 2) / 24 if len(blocked) else 1.0
            climb = np.array([*(here + 0.7 * free * (point - here))[:2], top])

            def risen() -> bool:
                now = self.scene.hand[0]
                return until() or bool(now[2] > top - 0.005 and np.linalg.norm((now - climb)[:2]) < 0.04)

            # What it holds may stand in something: all the way up comes before the way across.
            yield from self.go((climb, rotation), grip, turned=0.6, until=risen)
            yield from self.go((np.array([*point[:2], top]), rotation), grip, near=0.025, turned=0.6, until=until)
            if until():
                return False
        return (yield from self.go((point, rotation), grip, near=0.012, turned=0.12, until=until))

    def _from_under(self, load: set[int], rotation: np.ndarray, grip: float) -> Motion:
        """Moves what is held sideways from under what hangs over it, such as an open drawer."""
        if not load:
            return True
        corners = self.scene.corners(load)
        low, high = corners.min(axis=0), corners.max(axis=0)
        boxes = [(box.min(axis=0), box.max(axis=0)) for box in self.scene.boxes_but(load)]
        over = [
            (a, b)
            for a, b in boxes
            if a[2] > low[2] + _HANGS and b[2] > high[2] and np.all(a[:2] < high[:2]) and np.all(b[:2] > low[:2])
        ]
        if not over:
            return True
        edges = np.min([a for a, _ in over], axis=0), np.max([b for _, b in over], axis=0)
        steps = [
            np.eye(3)[axis] * way
            for axis in (0, 1)
            for way in (edges[0][axis] - high[axis], edges[1][axis] - low[axis])
        ]
        step = min(steps, key=lambda step: float(np.linalg.norm(step)))
        here, _ = self.scene.hand
        aside = here + step * (1 + _MARGIN / max(float(np.linalg.norm(step)), 1e-6))
        return (yield from self.go((aside, rotation), grip, near=0.008, turned=0.6, steps=25))

    def beyond_reach(self, point: np.ndarray) -> float:
        """How much further than it can reach a point is, in metres; at most 0 within reach."""
        away = point + [0, 0, _WRIST] - self.scene.shoulder
        flat = max(0.0, float(np.linalg.norm(away[:2])) - _WRIST_BEHIND)
        return float(np.hypot(flat, away[2]) - _REACH)

    def _highest(self, point: np.ndarray) -> float:
        """The greatest height above a point that the arm can reach."""
        flat = np.linalg.norm(point[:2] - self.scene.shoulder[:2]) - _WRIST_BEHIND
        return float(self.scene.shoulder[2] - _WRIST + np.sqrt(max(0.0, (_REACH - 0.02) ** 2 - flat**2)))

    def _needed(self, here: np.ndarray, point: np.ndarray, load: set[int]) -> Callable[[np.ndarray], np.ndarray]:
        """Least heights of the grip point over points `[N, 3]`."""
        low, high = np.minimum(here, point)[:2] - 0.25, np.maximum(here, point)[:2] + 0.25
        tops = _ahead(self.scene.tops(load, low, high, 0.01), here, point)
        parts = [(0.065, TIP), (0.11, -PALM)]
        if load:
            corners = self.scene.corners(load)
            parts.append((float(np.linalg.norm((corners - here)[:, :2], axis=1).max()), here[2] - corners[:, 2].min()))
        maps = [(_grown(tops, radius), below) for radius, below in parts]
        return lambda points: np.max([grown.at(points) + below for grown, below in maps], axis=0) + _MARGIN


def _rotation_vector(matrix: np.ndarray) -> np.ndarray:
    return Rotation.from_matrix(matrix).as_rotvec()


def _ahead(tops: HeightMap, here: np.ndarray, point: np.ndarray) -> HeightMap:
    """The map without what lies behind on the way from here to a point: the hand only gets further away from it."""
    rows, columns = np.indices(tops.heights.shape)
    ground = tops.corner + tops.cell * np.stack([rows, columns], axis=-1)
    behind = (ground - here[:2]) @ (point - here)[:2] < 0
    return HeightMap(tops.corner, tops.cell, np.where(behind, -np.inf, tops.heights))


def _grown(tops: HeightMap, radius: float) -> HeightMap:
    """The map with the greatest height within a radius of each cell."""
    cells = int(np.ceil(radius / tops.cell))
    side = np.arange(-cells, cells + 1)
    disc = side[:, None] ** 2 + side[None] ** 2 <= cells**2
    heights = np.where(np.isfinite(tops.heights), tops.heights, -9.0)
    return HeightMap(tops.corner, tops.cell, grey_dilation(heights, footprint=disc))
