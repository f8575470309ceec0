"""State and kinematic physics of the tabletop scene, without any drawing.

The frame is right-handed: x to the right, y away from the camera, z up from the table top. Lengths are in
metres. The physics is kinematic: the gripper moves as commanded, and contacts move things apart.
"""

import math
from dataclasses import dataclass, field

import numpy as np

CONTROL_RATE_HZ = 10

MAX_STEP = 0.026
"""Farthest the gripper moves along one axis in one step, in metres."""
GRIP_RATE = 0.34
"""Largest change of the opening, which lies in [0, 1], in one step."""

WORKSPACE_LOW = (-0.22, -0.20, 0.008)
WORKSPACE_HIGH = (0.22, 0.19, 0.18)
OBJECT_LOW = (-0.19, -0.16)
OBJECT_HIGH = (0.19, 0.045)

OBJECT_RADIUS = 0.028
OBJECT_HEIGHT = 0.05
ZONE_RADIUS = 0.05

MAX_HALF_GAP = 0.045
FINGER_OFFSET = 0.011
FINGER_RADIUS = 0.014
GRASP_DEPTH = 0.02

CABINET_FRONT = 0.18
CABINET_DEPTH = 0.11
CABINET_HEIGHT = 0.09
CABINET_WIDTH = 0.15
DRAWER_WIDTH = 0.12
DRAWER_TRAVEL = 0.08
DRAWER_TOP = 0.078
HANDLE_LENGTH = 0.03
HANDLE_HALF_WIDTH = 0.012
HANDLE_HEIGHT = 0.045

BUTTON_Y = 0.14
BUTTON_RADIUS = 0.034
BUTTON_HEIGHT = 0.055
BUTTON_TRAVEL = 0.022

HANDLE = -1
"""Value of `Scene.held` while the gripper holds the handle of the drawer."""

_FALL_STEP = 0.04
_PUSH_LIMIT = 0.03
_RELEASE_MARGIN = 0.15
_CONTACT_ROUNDS = 3


@dataclass
class Gripper:
    """Point between the fingertips, in metres, and opening: 0 is closed, 1 is open by 2 * MAX_HALF_GAP."""

    position: np.ndarray
    opening: float

    @property
    def half_gap(self) -> float:
        """Distance from the middle to the inner face of each finger, in metres."""
        return self.opening * MAX_HALF_GAP


@dataclass
class TableObject:
    """Something that can be pushed and grasped; `position` [3] is the centre of its base, in metres."""

    shape: str
    colour: str
    position: np.ndarray

    @property
    def name(self) -> str:
        """How an instruction calls it, as "red cube"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Zone:
    """Coloured disc painted on the table, centred at (x, y), in metres."""

    colour: str
    x: float
    y: float


@dataclass
class Drawer:
    """Drawer of the cabinet at `x`, pulled out by `opening` metres towards the camera."""

    x: float
    opening: float

    @property
    def front(self) -> float:
        """The y of its front panel, in metres."""
        return CABINET_FRONT - self.opening

    @property
    def handle(self) -> np.ndarray:
        """Where to grasp the handle, [3], in metres."""
        return np.array([self.x, self.front - 0.6 * HANDLE_LENGTH, HANDLE_HEIGHT])


@dataclass
class Button:
    """Button at (x, BUTTON_Y), pressed down by `depth` metres."""

    x: float
    depth: float = 0.0

    @property
    def pressed(self) -> bool:
        """Whether it is down far enough to switch."""
        return self.depth > 0.7 * BUTTON_TRAVEL


@dataclass
class Scene:
    """Everything the physics knows. `held` is an index into `objects`, HANDLE, or None."""

    gripper: Gripper
    objects: list[TableObject]
    zones: tuple[Zone, ...]
    drawer: Drawer
    button: Button
    held: int | None = None
    grasp_offset: np.ndarray = field(default_factory=lambda: np.zeros(3))

    @property
    def held_object(self) -> TableObject | None:
        """The object in the gripper, if any."""
        return self.objects[self.held] if self.held is not None and self.held != HANDLE else None

    def proprioception(self) -> np.ndarray:
        """Gripper x, y, z in metres and opening in [0, 1]: float32 [4]."""
        return np.array([*self.gripper.position, self.gripper.opening], np.float32)

    def advance(self, action: np.ndarray) -> None:
        """Moves the scene one control step on, in place.

        Args:
            action: [4] in [-1, 1]: the motion along x, y, z as a share of MAX_STEP, and the grip as a share
                of GRIP_RATE, which closes the fingers when positive and opens them when negative.
        """
        _move_gripper(self, action[:3] * MAX_STEP)
        _move_fingers(self, float(action[3]))
        _press_button(self)
        _move_objects(self)


def _move_gripper(scene: Scene, motion: np.ndarray) -> None:
    before = scene.gripper.position
    if scene.held == HANDLE:
        _slide_drawer(scene, float(motion[1]))
        return
    after = np.clip(before + motion, WORKSPACE_LOW, WORKSPACE_HIGH)
    x, half = scene.drawer.x, CABINET_WIDTH / 2
    top = CABINET_FRONT + CABINET_DEPTH
    _stay_outside(before, after, (x - half, CABINET_FRONT - FINGER_RADIUS, -1), (x + half, top, CABINET_HEIGHT))
    x, y, r = scene.button.x, BUTTON_Y, BUTTON_RADIUS
    _stay_outside(before, after, (x - r, y - r, -1), (x + r, y + r, BUTTON_HEIGHT - BUTTON_TRAVEL))
    if scene.held_object is not None:
        after[2] = max(after[2], -scene.grasp_offset[2])
    else:
        _push_drawer(scene, before, after)
    scene.gripper.position = after


def _stay_outside(before: np.ndarray, after: np.ndarray, low: tuple, high: tuple) -> None:
    """Stops `after`, in place, at the face of a box through which the motion from `before` entered it."""
    if not all(low[i] < after[i] < high[i] for i in range(3)):
        return
    for axis in range(3):
        if before[axis] <= low[axis]:
            after[axis] = low[axis]
            return
        if before[axis] >= high[axis]:
            after[axis] = high[axis]
            return
    after[2] = high[2]


def _slide_drawer(scene: Scene, motion_y: float) -> None:
    """Moves the drawer with the gripper that holds its handle; the rails allow only motion along y."""
    drawer = scene.drawer
    opening = min(max(drawer.opening - motion_y, 0.0), DRAWER_TRAVEL)
    scene.gripper.position = scene.gripper.position + np.array([0.0, drawer.opening - opening, 0.0])
    drawer.opening = opening


def _push_drawer(scene: Scene, before: np.ndarray, after: np.ndarray) -> None:
    """Closes the drawer when the gripper runs into it from the front, and stops the gripper at its end."""
    drawer = scene.drawer
    aside = abs(after[0] - drawer.x)
    if aside > DRAWER_WIDTH / 2 or after[2] > DRAWER_TOP or before[1] > drawer.front:
        return
    half_gap = scene.gripper.half_gap
    passes_handle = (
        abs(aside - half_gap - FINGER_OFFSET) > HANDLE_HALF_WIDTH + FINGER_OFFSET
        or abs(after[2] - HANDLE_HEIGHT) > 0.03
    )
    face = drawer.front if passes_handle else drawer.front - HANDLE_LENGTH
    overlap = after[1] + FINGER_RADIUS - face
    # A large overlap means the gripper came down astride the handle: nothing to push.
    if not 0 < overlap <= MAX_STEP + FINGER_RADIUS:
        return
    moved = min(overlap, drawer.opening)
    drawer.opening -= moved
    after[1] -= overlap - moved


def _move_fingers(scene: Scene, grip: float) -> None:
    gripper = scene.gripper
    half_gap_before = gripper.half_gap
    opening = min(max(gripper.opening - grip * GRIP_RATE, 0.0), 1.0)
    if scene.held is not None:
        width = HANDLE_HALF_WIDTH if scene.held == HANDLE else OBJECT_RADIUS
        closed = width / MAX_HALF_GAP
        gripper.opening = max(opening, closed)
        if opening > closed + _RELEASE_MARGIN:
            scene.held = None
        return
    gripper.opening = opening
    if grip > 0:
        _grasp(scene, half_gap_before)


def _grasp(scene: Scene, half_gap_before: float) -> None:
    """Takes hold of what the closing fingers meet between them."""
    gripper, position = scene.gripper, scene.gripper.position

    def meets(centre: np.ndarray, half_width: float) -> bool:
        between = abs(centre[0] - position[0]) <= half_gap_before and half_gap_before >= half_width - 1e-3
        return between and abs(centre[1] - position[1]) < GRASP_DEPTH and gripper.half_gap <= half_width

    handle = scene.drawer.handle
    if meets(handle, HANDLE_HALF_WIDTH) and abs(handle[2] - position[2]) < GRASP_DEPTH:
        scene.held = HANDLE
        gripper.opening = HANDLE_HALF_WIDTH / MAX_HALF_GAP
        return
    for index, item in enumerate(scene.objects):
        low_enough = item.position[2] - 0.01 <= position[2] < item.position[2] + OBJECT_HEIGHT - 0.01
        if low_enough and meets(item.position, OBJECT_RADIUS):
            scene.held = index
            gripper.opening = OBJECT_RADIUS / MAX_HALF_GAP
            item.position[0] = position[0]
            scene.grasp_offset = item.position - position
            return


def _press_button(scene: Scene) -> None:
    x, y, z = scene.gripper.position
    above = math.hypot(x - scene.button.x, y - BUTTON_Y) < BUTTON_RADIUS
    scene.button.depth = min(max(BUTTON_HEIGHT - z, 0.0), BUTTON_TRAVEL) if above else 0.0


def _move_objects(scene: Scene) -> None:
    held = scene.held_object
    for item in scene.objects:
        if item is held:
            item.position = scene.gripper.position + scene.grasp_offset
        else:
            item.position[2] = max(item.position[2] - _FALL_STEP, 0.0)
    for _ in range(_CONTACT_ROUNDS):
        if held is None:
            _push_objects(scene)
        _separate_objects(scene)
        for item in scene.objects:
            if item is not held:
                _keep_on_table(item)


def _push_objects(scene: Scene) -> None:
    x, y, z = scene.gripper.position
    offset = scene.gripper.half_gap + FINGER_OFFSET
    for item in scene.objects:
        if not item.position[2] - 0.01 <= z < item.position[2] + OBJECT_HEIGHT:
            continue
        for finger_x in (x - offset, x + offset):
            dx, dy = item.position[0] - finger_x, item.position[1] - y
            distance = math.hypot(dx, dy)
            overlap = OBJECT_RADIUS + FINGER_RADIUS - distance
            if overlap > 0:
                share = min(overlap, _PUSH_LIMIT) / max(distance, 1e-6)
                item.position[0] += share * dx
                item.position[1] += share * dy


def _separate_objects(scene: Scene) -> None:
    objects, held = scene.objects, scene.held_object
    for i, first in enumerate(objects):
        for second in objects[i + 1 :]:
            if abs(first.position[2] - second.position[2]) >= OBJECT_HEIGHT:
                continue
            dx, dy = second.position[0] - first.position[0], second.position[1] - first.position[1]
            distance = math.hypot(dx, dy)
            overlap = 2 * OBJECT_RADIUS - distance
            if overlap <= 0:
                continue
            dx, dy = (dx / distance, dy / distance) if distance > 1e-6 else (1.0, 0.0)
            # What the gripper holds does not give way.
            share = 0.0 if first is held else 1.0 if second is held else 0.5
            first.position[:2] -= share * overlap * np.array([dx, dy])
            second.position[:2] += (1 - share) * overlap * np.array([dx, dy])


def _keep_on_table(item: TableObject) -> None:
    """Keeps the object within reach; one dropped on a fixture slides off, so that it never jumps."""
    for axis in range(2):
        value = float(item.position[axis])
        inside = min(max(value, OBJECT_LOW[axis]), OBJECT_HIGH[axis])
        item.position[axis] = value + min(max(inside - value, -_PUSH_LIMIT), _PUSH_LIMIT)
