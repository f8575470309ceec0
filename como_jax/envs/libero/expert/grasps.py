"""Where to grasp an object from above, and where to put it down: both searched in height maps, with no simulator."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from scipy.spatial.transform import Rotation

from como_jax.envs.libero.expert.heights import HeightMap

# The Panda's hand in its own axes, in metres: along the fingers' axis, across it, and down from the grip point.
REACH = 0.035
TIP = 0.0115
PALM = 0.030
_PAD = 0.008
_DEPTH = 0.027
_LEAST_DEPTH = 0.003
# Walls thinner than this are held between the pads alone, which reach so far up: what is above them slips.
_THIN, _DEPTH_OF_WALLS = 0.020, 0.013
_FINGER = (0.037, 0.060, 0.011)
_HAND = (0.106, 0.036)
_CELL = 0.006
_YAWS = np.arange(12) * np.pi / 12
_CLEARANCE = 0.001
# Fingers slip off what is so much wider at one side of the pads.
_MOST_TAPER = 0.012
# How far over things lean on the wall of a compartment.
_LEANS = np.radians(np.arange(9.0, 28.0, 1.5))


def _grid(low: float, high: float, side: float, step: float) -> np.ndarray:
    """Points `[K, 2]` of a rectangle of the hand: from low to high along the fingers' axis, and both sides across."""
    along = np.linspace(low, high, max(2, int(np.ceil((high - low) / step)) + 1))
    across = np.linspace(-side, side, int(np.ceil(2 * side / step)) + 1)
    return np.stack(np.meshgrid(along, across, indexing="ij"), axis=-1).reshape(-1, 2)


_STRIP_ALONG = np.linspace(-REACH, REACH, 29)
_STRIP_ACROSS = np.array([-_PAD, 0.0, _PAD])
_STRIP = np.stack(np.meshgrid(_STRIP_ALONG, _STRIP_ACROSS, indexing="ij"), axis=-1)
_FINGERS = np.concatenate([_grid(*_FINGER, 0.0035), _grid(-_FINGER[1], -_FINGER[0], _FINGER[2], 0.0035)])
_SWEEP = _grid(-_FINGER[0], _FINGER[0], _FINGER[2], 0.0035)
_PALM_AREA = _grid(-_HAND[0], _HAND[0], _HAND[1], 0.012)
# Fingers and hand as points around the grip point: along the fingers' axis, across it, and up.
_BODY = np.concatenate(
    [np.column_stack([_FINGERS, np.full(len(_FINGERS), up)]) for up in np.linspace(-TIP, PALM, 4)]
    + [np.column_stack([_PALM_AREA, np.full(len(_PALM_AREA), PALM)])]
)
# So inexactly the hand moves; the first is none.
_SHIFTS = 0.01 * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])


@dataclasses.dataclass(frozen=True)
class Grasp:
    """A grasp from above.

    Attributes:
      point: of the grip point, in the world.
      yaw: of the hand; 0 has the fingers along the world's y axis.
      score: higher is better.
    """

    point: np.ndarray
    yaw: float
    score: float


@dataclasses.dataclass(frozen=True)
class Spot:
    """A place for an object.

    Attributes:
      point: of the object's body when it rests there.
      turn: about the vertical that it is turned by on the way.
      score: higher is better.
      over: height of its body at which it is above all that is beside the place.
      lean: how it is leaned over after that; None if it stays upright.
    """

    point: np.ndarray
    turn: float
    score: float
    over: float = -np.inf
    lean: Rotation | None = None

    @property
    def rotation(self) -> Rotation:
        """From where it is now to how it rests there."""
        turn = Rotation.from_euler("z", self.turn)
        return turn if self.lean is None else self.lean * turn


def hand_axes(yaw: float) -> np.ndarray:
    """Directions `[2, 2]` on the ground, in rows: along the fingers' axis and across it."""
    return np.array([[-np.sin(yaw), np.cos(yaw)], [np.cos(yaw), np.sin(yaw)]])


def clear_height(
    around: HeightMap, points: np.ndarray, yaw: float, margin: float = _CLEARANCE, lean: Rotation | None = None
) -> np.ndarray:
    """Least heights of the grip point at which fingers and hand touch nothing; for points `[..., 2]`.

    With `lean` the hand, after it was turned to its yaw, is leaned over like what it holds.
    """
    axes = hand_axes(yaw)
    if lean is not None:
        body = lean.apply(np.column_stack([_BODY[:, :2] @ axes, _BODY[:, 2]]))
        return (around.at(points[..., None, :2] + body[:, :2]) - body[:, 2]).max(axis=-1) + margin
    fingers = around.at(points[..., None, :2] + _FINGERS @ axes).max(axis=-1) + TIP
    palm = around.widened.at(points[..., None, :2] + _PALM_AREA @ axes).max(axis=-1) - PALM
    return np.maximum(fingers, palm) + margin


def search(target: HeightMap, around: HeightMap, middle: np.ndarray) -> list[Grasp]:
    """Grasps of what the first map shows, the best first.

    Args:
      target: heights of the object.
      around: heights of all else.
      middle: of the object, which grasps had better be near.

    Returns:
      Grasps that neither collide nor miss; none if there is none.
    """
    both = dataclasses.replace(target, heights=np.maximum(target.heights, around.heights))
    cells = target.points()[:, :2]
    if not len(cells):
        return []
    low, high = cells.min(0), cells.max(0)
    centres = np.stack(
        np.meshgrid(*[np.arange(a - 0.012, b + 0.0121, _CELL) for a, b in zip(low, high, strict=True)]), axis=-1
    ).reshape(-1, 2)
    found = [grasp for yaw in _YAWS for grasp in _at_yaw(target, around, both, centres, float(yaw), middle)]
    return sorted(found, key=lambda grasp: -grasp.score)


def _at_yaw(
    target: HeightMap, around: HeightMap, both: HeightMap, centres: np.ndarray, yaw: float, middle: np.ndarray
) -> list[Grasp]:
    strip = target.at(centres[:, None, None] + _STRIP @ hand_axes(yaw))
    top = strip.max(axis=(1, 2))
    something = np.isfinite(top)
    centres, strip, top = centres[something], strip[something], top[something]
    if not len(centres):
        return []
    # Where the fingers close, there must be nothing but the object.
    swept = around.at(centres[:, None] + _SWEEP @ hand_axes(yaw)).max(axis=-1) + TIP + _CLEARANCE
    heights = np.max([top - _DEPTH, clear_height(both, centres, yaw), swept], axis=0)
    # What the pads close on: columns of the strip that are higher than the grip point.
    material = strip > (heights - 0.001)[:, None, None]
    along = _STRIP_ALONG[None, :, None]
    first = np.where(material, along, np.inf).min(axis=1)
    last = np.where(material, along, -np.inf).max(axis=1)
    solid = np.isfinite(first).all(axis=1)
    first, last = np.where(np.isfinite(first), first, 0.0), np.where(np.isfinite(last), last, 0.0)
    widths, offsets = last.max(axis=1) - first.min(axis=1), (last.max(axis=1) + first.min(axis=1)) / 2
    wall = widths < _THIN
    heights = np.where(wall, np.maximum(heights, top - _DEPTH_OF_WALLS), heights)
    depth, wanted = top - heights, np.where(wall, _DEPTH_OF_WALLS, 0.020)
    skew = np.abs((first + last)[:, 2] - (first + last)[:, 0]) / 2
    taper = np.abs((last - first)[:, 2] - (last - first)[:, 0])
    valid = solid & (taper <= _MOST_TAPER) & (depth >= _LEAST_DEPTH) & (widths <= 2 * REACH - 0.006)
    distance = np.linalg.norm(centres - middle[:2], axis=-1)
    turn = _nearest_yaw(yaw)
    scores = (
        -4.0 * np.abs(offsets)
        - 6.0 * np.maximum(0, wanted - depth)
        - 6.0 * skew
        - 0.2 * widths
        - 1.0 * np.maximum(0, widths - 0.055)
        - 0.3 * distance
        - 0.012 * abs(turn)
    )
    return [
        Grasp(np.array([*centres[index], heights[index]]), turn, float(scores[index]))
        for index in np.flatnonzero(valid)
    ]


def _nearest_yaw(yaw: float) -> float:
    """The same grasp of two fingers, turned least."""
    return (yaw + np.pi / 2) % np.pi - np.pi / 2


def rest_heights(around: HeightMap, underside: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Heights at which a body touches down, for points `[N, 2]`.

    Args:
      around: heights of all else.
      underside: points `[K, 3]` of the object's underside, seen from its body.
      points: of the body.
    """
    return (around.at(points[:, None] + underside[:, :2]) - underside[:, 2]).max(axis=1)


def find_spots(
    around: HeightMap,
    underside: np.ndarray,
    centre: np.ndarray,
    half: np.ndarray,
    wish: np.ndarray | None = None,
    turns: tuple[float, ...] = (0.0,),
) -> list[Spot]:
    """Places for an object in a box, the best first.

    Args:
      around: heights of all but the object and the robot.
      underside: points `[K, 3]` of the object's underside, seen from its body.
      centre, half: `[3]`, the box that the object's body has to come to rest in; sides of 0 leave one point.
      wish: point on the ground that the place should be near; the centre by default.
      turns: about the vertical that may be tried.
    """
    wish = centre[:2] if wish is None else wish
    inner = np.maximum(0.0, np.minimum(0.8 * half[:2], half[:2] - 0.008))
    steps = [np.linspace(-side, side, 2 * int(np.ceil(side / 0.012)) + 1) for side in inner]
    points = centre[:2] + np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 2)
    rests = {}
    for turn in turns:
        feet = np.column_stack([underside[:, :2] @ hand_turn(turn).T, underside[:, 2]])
        rests[turn] = np.array([rest_heights(around, feet, points + shift) for shift in _SHIFTS])
    lowest = min(rest[0].min() for rest in rests.values())
    spots = []
    for turn, rest in rests.items():
        scores = (
            -1.0 * np.linalg.norm(points - wish, axis=-1)
            - 3.0 * (rest[0] - lowest)
            - 0.5 * np.clip(rest.max(axis=0) - rest[0], 0.0, 0.1)
            - 0.02 * abs(turn)
        )
        inside = np.abs(rest[0] - centre[2]) < half[2]
        over = rest.max(axis=0)
        spots += [
            Spot(np.array([*points[i], rest[0][i]]), turn, float(scores[i]), over[i]) for i in np.flatnonzero(inside)
        ]
    return sorted(spots, key=lambda spot: -spot.score)


def floor_height(around: HeightMap, centre: np.ndarray, half: np.ndarray) -> float:
    """The least height over a box."""
    sides = [np.linspace(-side, side, 2 * int(np.ceil(side / 0.006)) + 1) for side in half[:2]]
    return float(around.at(centre[:2] + np.stack(np.meshgrid(*sides), axis=-1)).min())


def find_leaning_spots(
    around: HeightMap,
    body: np.ndarray,
    centre: np.ndarray,
    half: np.ndarray,
    turns: tuple[float, ...] = (0.0,),
) -> list[Spot]:
    """Places in a compartment for what would stand too low in it, so that it has to lean on a wall; the best first.

    Args:
      around: heights of all but the object and the robot.
      body: points `[K, 3]` all over the object, seen from its body.
      centre, half: `[3]`, the box that the object's body has to come to rest in.
      turns: about the vertical that may be tried.
    """
    inner = np.maximum(0.0, half[:2] - 0.004)
    steps = [np.linspace(-side, side, 2 * int(np.ceil(side / 0.005)) + 1) for side in inner]
    points = centre[:2] + np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 2)
    floor = floor_height(around, centre, half)
    spots = []
    for turn, angle, axis in itertools.product(
        turns, _LEANS, np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    ):
        lean = Rotation.from_rotvec(angle * axis)
        leaning = (lean * Rotation.from_euler("z", turn)).apply(body)
        foot = leaning[leaning[:, 2].argmin()]
        # What leans less falls back, and does not stay on the wall.
        if (leaning.mean(axis=0) - foot) @ np.cross(axis, [0, 0, 1]) <= 0:
            continue
        rest = rest_heights(around, leaning, points)
        # What does not stand on the floor slides down, and leans less.
        most = floor - foot[2] + 0.002
        for point in points[(rest < most) & (np.abs(rest - centre[2]) < half[2])]:
            near = rest_heights(around, leaning, point + 0.4 * _SHIFTS)
            over = rest_heights(around, leaning, point + _SHIFTS).max()
            score = float(angle) - 0.1 * np.count_nonzero(near > most)
            spots.append(Spot(np.array([*point, near[0]]), turn, score, over, lean))
    return sorted(spots, key=lambda spot: -spot.score)


def hand_turn(turn: float) -> np.ndarray:
    """The matrix `[2, 2]` of a turn on the ground."""
    return np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
