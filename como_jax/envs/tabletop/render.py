"""Images of the tabletop scene."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from como_jax.envs.tabletop.agents import (
    Person,
    draw_gripper_back,
    draw_gripper_front,
    draw_hand_back,
    draw_hand_front,
)
from como_jax.envs.tabletop.backdrop import draw_backdrop
from como_jax.envs.tabletop.canvas import Camera, Canvas, Colour, level_circle, lightened, shaded
from como_jax.envs.tabletop.look import Look
from como_jax.envs.tabletop.scene import (
    BUTTON_HEIGHT,
    BUTTON_RADIUS,
    BUTTON_Y,
    CABINET_DEPTH,
    CABINET_FRONT,
    CABINET_HEIGHT,
    CABINET_WIDTH,
    CONTROL_RATE_HZ,
    DRAWER_TOP,
    DRAWER_WIDTH,
    FINGER_OFFSET,
    HANDLE_HALF_WIDTH,
    HANDLE_HEIGHT,
    HANDLE_LENGTH,
    OBJECT_HEIGHT,
    OBJECT_RADIUS,
    ZONE_RADIUS,
    Drawer,
    Scene,
    TableObject,
)

PALETTE: dict[str, Colour] = {
    "red": (222, 48, 44),
    "green": (52, 168, 68),
    "blue": (44, 98, 222),
    "yellow": (244, 208, 40),
    "purple": (150, 66, 190),
    "orange": (246, 134, 30),
}

_CABINET: Colour = (150, 112, 80)
_DRAWER: Colour = (186, 144, 104)
_HANDLE: Colour = (250, 250, 245)
_BUTTON_BASE: Colour = (110, 112, 120)
_BUTTON_UP: Colour = (214, 40, 90)
_BUTTON_DOWN: Colour = (110, 235, 90)

_CANVAS_SIZE = 256


@dataclass(frozen=True)
class Distractor:
    """Something that wanders on the table on a closed path, and is drawn but never touched."""

    colour: Colour
    radius: float
    centre: tuple[float, float]
    extent: tuple[float, float]
    frequency: tuple[float, float]
    phase: tuple[float, float]

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Distractor":
        """A random one."""
        return cls(
            colour=tuple(int(c) for c in rng.integers(30, 226, 3)),
            radius=float(rng.uniform(0.014, 0.03)),
            centre=tuple(rng.uniform((-0.2, -0.18), (0.2, 0.25))),
            extent=tuple(rng.uniform(0.05, 0.15, 2)),
            frequency=tuple(rng.uniform(0.1, 0.35, 2)),
            phase=tuple(rng.uniform(0, 2 * math.pi, 2)),
        )

    def position(self, seconds: float) -> np.ndarray:
        """Where it is, [3], in metres."""
        x, y = (
            self.centre[i] + self.extent[i] * math.sin(2 * math.pi * self.frequency[i] * seconds + self.phase[i])
            for i in range(2)
        )
        return np.array([x, y, 0.0])


class Renderer:
    """Draws a scene as the look asks. An image depends only on the episode, the scene and the step."""

    def __init__(self, image_size: int, look: Look):
        self._image_size = image_size
        self._look = look
        # At least two canvas pixels for each pixel of the image, for smooth edges.
        self._reduction = max(2, round(_CANVAS_SIZE / image_size))
        self._size = self._reduction * image_size
        self._margin = math.ceil(look.camera_shake * self._size)
        self._camera = Camera(self._size, self._margin)

    def start_episode(self, scene: Scene, rng: np.random.Generator) -> None:
        """Draws the appearance of an episode; `render` may be called from then on."""
        self._person = Person.sample(rng)
        self._shake_phases = rng.uniform(0, 2 * math.pi, (2, 2))
        self._light_phases = rng.uniform(0, 2 * math.pi, 2)
        self._light = _sample_light(self._image_size, self._look.lighting, rng)
        self._distractors = [Distractor.sample(rng) for _ in range(self._look.distractors)]
        self._backdrop_seed = int(rng.integers(2**32))
        self._still: np.ndarray | None = None

    def render(self, scene: Scene, step: int) -> np.ndarray:
        """The image of the scene at a step of the episode: uint8 [size, size, 3], RGB."""
        if self._still is None:
            self._still = self._draw_still(scene)
        seconds = step / CONTROL_RATE_HZ
        canvas = Canvas(self._still.copy(), self._camera)
        self._draw_moving(canvas, scene, seconds)
        x, y = self._shake(seconds)
        window = canvas.pixels[y : y + self._size, x : x + self._size]
        image = cv2.resize(window, (self._image_size, self._image_size), interpolation=cv2.INTER_AREA)
        return self._relight(image, seconds)

    def _draw_still(self, scene: Scene) -> np.ndarray:
        side = self._size + 2 * self._margin
        canvas = Canvas(np.empty((side, side, 3), np.uint8), self._camera)
        draw_backdrop(canvas, self._look.background == "textured", np.random.default_rng(self._backdrop_seed))
        for zone in scene.zones:
            centre = np.array([zone.x, zone.y, 0.0])
            canvas.disc(centre, ZONE_RADIUS, PALETTE[zone.colour])
            canvas.disc(centre, 0.78 * ZONE_RADIUS, lightened(PALETTE[zone.colour], 0.5))
        left, right = scene.drawer.x - CABINET_WIDTH / 2, scene.drawer.x + CABINET_WIDTH / 2
        back = CABINET_FRONT + CABINET_DEPTH
        canvas.box(np.array([left, CABINET_FRONT, 0.0]), np.array([right, back, CABINET_HEIGHT]), _CABINET)
        base = np.array([scene.button.x, BUTTON_Y, 0.0])
        canvas.cylinder(base, BUTTON_RADIUS, 0.5 * BUTTON_HEIGHT, _BUTTON_BASE)
        return canvas.pixels

    def _draw_moving(self, canvas: Canvas, scene: Scene, seconds: float) -> None:
        wanderers = [(d, d.position(seconds)) for d in self._distractors]
        for item in scene.objects:
            base = np.array([*item.position[:2], 0.0])
            canvas.shadow(level_circle(base + (0.006, 0.004, 0.0), 1.12 * OBJECT_RADIUS), 0.3)
        _draw_agent_shadow(canvas, scene)
        _draw_drawer(canvas, scene.drawer)
        button = scene.button
        cap = np.array([button.x, BUTTON_Y, 0.5 * BUTTON_HEIGHT])
        colour = _BUTTON_DOWN if button.pressed else _BUTTON_UP
        canvas.cylinder(cap, 0.75 * BUTTON_RADIUS, 0.5 * BUTTON_HEIGHT - button.depth, colour)
        self._draw_by_depth(canvas, scene, wanderers)

    def _draw_by_depth(self, canvas: Canvas, scene: Scene, wanderers: list[tuple[Distractor, np.ndarray]]) -> None:
        """Draws from back to front, which is right for upright things that stand apart."""
        toward = self._camera.position[:2]
        held = scene.held_object
        things = [(item.position, lambda i=item: _draw_object(canvas, i)) for item in scene.objects if item is not held]
        things += [(p, lambda d=d, p=p: canvas.ball(p + (0, 0, d.radius), d.radius, d.colour)) for d, p in wanderers]
        things.append((scene.gripper.position, lambda: self._draw_agent(canvas, scene)))
        for _, draw in sorted(things, key=lambda thing: -math.dist(thing[0][:2], toward)):
            draw()

    def _draw_agent(self, canvas: Canvas, scene: Scene) -> None:
        hand = self._look.agent == "hand"
        if hand:
            draw_hand_back(canvas, scene.gripper, self._person)
        else:
            draw_gripper_back(canvas, scene.gripper)
        if scene.held_object is not None:
            _draw_object(canvas, scene.held_object)
        if hand:
            draw_hand_front(canvas, scene.gripper, self._person)
        else:
            draw_gripper_front(canvas, scene.gripper)

    def _shake(self, seconds: float) -> tuple[int, int]:
        """Corner of the shaken window on the canvas, (x, y), in pixels; a slow sway with a faster tremor."""
        slow, fast = 2 * math.pi * 0.35 * seconds, 2 * math.pi * 1.7 * seconds
        x, y = (0.6 * math.sin(slow + phases[0]) + 0.4 * math.sin(fast + phases[1]) for phases in self._shake_phases)
        largest = self._look.camera_shake * self._size
        return round(self._margin + largest * x), round(self._margin + largest * y)

    def _relight(self, image: np.ndarray, seconds: float) -> np.ndarray:
        strength = self._look.lighting
        if strength == 0:
            return image
        slow, fast = self._light_phases
        flicker = 0.7 * math.sin(2 * math.pi * 0.25 * seconds + slow)
        flicker += 0.3 * math.sin(2 * math.pi * 1.3 * seconds + fast)
        return cv2.multiply(image, self._light, scale=1 + 0.25 * strength * flicker, dtype=cv2.CV_8U)


def _sample_light(size: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Factors [size, size, 3] of an episode's light: brightness, cast, and a slope across the image."""
    brightness = 1 + strength * rng.uniform(-0.35, 0.25)
    cast = 1 + strength * rng.uniform(-0.15, 0.15, 3)
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, size)
    slope = 1 + 0.5 * strength * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None])
    return (brightness * slope[..., None] * cast).astype(np.float32)


def _draw_object(canvas: Canvas, item: TableObject) -> None:
    colour, p = PALETTE[item.colour], item.position
    if item.shape == "cube":
        half = 0.9 * OBJECT_RADIUS
        canvas.box(p - (half, half, 0.0), p + (half, half, OBJECT_HEIGHT), colour)
    elif item.shape == "cylinder":
        canvas.cylinder(p, 0.95 * OBJECT_RADIUS, OBJECT_HEIGHT, colour)
    else:
        canvas.ball(p + (0.0, 0.0, OBJECT_RADIUS), OBJECT_RADIUS, colour)


def _draw_drawer(canvas: Canvas, drawer: Drawer) -> None:
    left, right, front = drawer.x - DRAWER_WIDTH / 2, drawer.x + DRAWER_WIDTH / 2, drawer.front
    if drawer.opening > 0:
        low = np.array([left, front, 0.012])
        canvas.shadow(_rectangle(left, right + 0.015, front, CABINET_FRONT, 0.0), 0.3)
        canvas.box(low, np.array([right, CABINET_FRONT, DRAWER_TOP]), _DRAWER)
        inside = _rectangle(left + 0.01, right - 0.01, min(front + 0.012, CABINET_FRONT), CABINET_FRONT, DRAWER_TOP)
        canvas.polygon(inside, shaded(_CABINET, 0.5))
    face = np.array(
        [[left, front, 0.012], [right, front, 0.012], [right, front, DRAWER_TOP], [left, front, DRAWER_TOP]]
    )
    canvas.polygon(face, _DRAWER)
    knob = np.array([drawer.x, front, HANDLE_HEIGHT])
    size = np.array([HANDLE_HALF_WIDTH, 0.0, 0.013])
    canvas.box(knob - size - (0.0, HANDLE_LENGTH, 0.0), knob + size, _HANDLE)


def _draw_agent_shadow(canvas: Canvas, scene: Scene) -> None:
    """The shadow straight below the gripper tells its height from its distance."""
    x, y, z = scene.gripper.position
    reach = scene.gripper.half_gap + FINGER_OFFSET
    strength = 0.5 - 1.2 * z
    for side in (-1, 1):
        middle = x + side * reach
        canvas.shadow(_rectangle(middle - 0.013, middle + 0.013, y - 0.018, y + 0.018, 0.0), strength)
    canvas.shadow(_rectangle(x - 0.07, x + 0.07, y - 0.026, y + 0.026, 0.0), 0.6 * strength)


def _rectangle(left: float, right: float, front: float, back: float, height: float) -> np.ndarray:
    return np.array([[left, front, height], [right, front, height], [right, back, height], [left, back, height]])
