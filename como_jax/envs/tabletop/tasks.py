"""Tasks of the tabletop: how a scene starts, what the instruction says, and when the task is solved."""

import math
from dataclasses import dataclass

import numpy as np

from como_jax.envs.tabletop.scene import (
    DRAWER_TRAVEL,
    HANDLE,
    OBJECT_HEIGHT,
    Button,
    Drawer,
    Gripper,
    Scene,
    TableObject,
    Zone,
)

TASKS = ("reach", "push", "pick_place", "open_drawer", "close_drawer", "press_button")
SHAPES = ("cube", "cylinder", "ball")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")

PHRASES = {
    "reach": ("reach the {object}", "move to the {object}", "go above the {object}"),
    "push": (
        "push the {object} to the {zone} zone",
        "slide the {object} onto the {zone} zone",
        "shove the {object} into the {zone} zone",
    ),
    "pick_place": (
        "pick up the {object} and place it on the {zone} zone",
        "put the {object} on the {zone} zone",
        "lift the {object} and set it down on the {zone} zone",
    ),
    "open_drawer": ("open the drawer", "pull the drawer open", "pull out the drawer"),
    "close_drawer": ("close the drawer", "push the drawer shut", "push the drawer in"),
    "press_button": ("press the button", "push the button down", "hit the button"),
}

SCENES = ("drawn", "fixed", "recoloured")
"""What lies on the table, at places that are always drawn.

In a "drawn" scene things have other colours in each episode, any of them may be the task's, and the instruction is one
of several. In a "fixed" one the three objects and two zones are always the same, and each task has one instruction,
about one of them, as in LIBERO-Goal (arXiv 2306.03310). "recoloured" is that with objects in the three other colours:
what was learned of shapes should hold there too.
"""
_FIXED_COLOURS = {"fixed": ("red", "green", "blue"), "recoloured": ("yellow", "purple", "orange")}
_FIXED_ZONES = ("yellow", "purple")
_FIXED_GOALS = {
    "reach": (0, 0, "reach the cube"),
    "push": (1, 0, "push the cylinder to the yellow zone"),
    "pick_place": (2, 1, "put the ball on the purple zone"),
    "open_drawer": (0, 0, "open the drawer"),
    "close_drawer": (0, 0, "close the drawer"),
    "press_button": (0, 0, "press the button"),
}

REACH_HEIGHT = OBJECT_HEIGHT + 0.03
REACH_TOLERANCE = 0.02
ZONE_TOLERANCE = 0.03

_START_DISTANCE = 0.14
_OBJECT_SPACING = 0.085
_ZONE_SPACING = 0.11
_PLACE_LOW = (-0.16, -0.13)
_PLACE_HIGH = (0.16, 0.03)


@dataclass(frozen=True)
class Goal:
    """What one episode asks for: the task, the object and zone it is about, and the words for it."""

    task: str
    target: int
    zone: int
    instruction: str


def sample_episode(task: str, rng: np.random.Generator, scenes: str = "drawn") -> tuple[Scene, Goal]:
    """Draws a start scene in which the task is not solved, and the goal.

    Args:
        task: one of TASKS.
        rng: the only source of chance.
        scenes: one of SCENES.
    """
    while True:
        scene = _sample_scene(task, rng, scenes)
        goal = Goal(task, *_FIXED_GOALS[task]) if scenes != "drawn" else _draw_goal(task, scene, rng)
        # Only reach can be nearly solved by chance: the placement keeps objects away from all zones.
        near = task == "reach" and _reach_distance(scene, goal) < _START_DISTANCE
        if not near and not is_solved(scene, goal):
            return scene, goal


def _draw_goal(task: str, scene: Scene, rng: np.random.Generator) -> Goal:
    target, zone = int(rng.integers(len(scene.objects))), int(rng.integers(len(scene.zones)))
    phrases = PHRASES[task]
    words = {"object": scene.objects[target].name, "zone": scene.zones[zone].colour}
    return Goal(task, target, zone, phrases[rng.integers(len(phrases))].format(**words))


def is_solved(scene: Scene, goal: Goal) -> bool:
    """Whether the scene, as it is now, fulfils the goal."""
    if goal.task == "reach":
        return _reach_distance(scene, goal) < REACH_TOLERANCE
    if goal.task in ("push", "pick_place"):
        item, zone = scene.objects[goal.target], scene.zones[goal.zone]
        at_rest = scene.held != goal.target and item.position[2] == 0
        return at_rest and math.hypot(item.position[0] - zone.x, item.position[1] - zone.y) < ZONE_TOLERANCE
    if goal.task == "open_drawer":
        return scene.drawer.opening > 0.85 * DRAWER_TRAVEL
    if goal.task == "close_drawer":
        return scene.drawer.opening < 0.08 * DRAWER_TRAVEL and scene.held != HANDLE
    return scene.button.pressed


def reach_point(scene: Scene, goal: Goal) -> np.ndarray:
    """The point above the goal's object that `reach` asks for, [3], in metres."""
    return scene.objects[goal.target].position + np.array([0.0, 0.0, REACH_HEIGHT])


def _reach_distance(scene: Scene, goal: Goal) -> float:
    return float(np.linalg.norm(scene.gripper.position - reach_point(scene, goal)))


def _sample_scene(task: str, rng: np.random.Generator, scenes: str) -> Scene:
    places = _sample_places(rng)
    if scenes == "drawn":
        colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
        shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    else:
        colours, shapes = [*_FIXED_COLOURS[scenes], *_FIXED_ZONES], SHAPES
    objects = [
        TableObject(shape, colour, np.array([x, y, 0.0]))
        for shape, colour, (x, y) in zip(shapes, colours, places[:3], strict=False)
    ]
    zones = tuple(Zone(colour, x, y) for colour, (x, y) in zip(colours[3:], places[3:], strict=False))
    side = rng.choice([-1.0, 1.0])
    if task == "open_drawer":
        opening = 0.0
    elif task == "close_drawer":
        opening = rng.uniform(0.75, 1.0)
    else:
        opening = rng.choice([0.0, rng.uniform(0.0, 1.0)])
    start = rng.uniform((-0.16, -0.14, 0.09), (0.16, 0.06, 0.17))
    return Scene(
        gripper=Gripper(start, float(rng.uniform(0.0, 1.0))),
        objects=objects,
        zones=zones,
        drawer=Drawer(float(side * rng.uniform(0.11, 0.15)), float(opening * DRAWER_TRAVEL)),
        button=Button(float(-side * rng.uniform(0.12, 0.19))),
    )


def _sample_places(rng: np.random.Generator) -> list[tuple[float, float]]:
    """Places for three objects and then two zones, (x, y) in metres, none too close to another."""
    while True:
        places: list[tuple[float, float]] = []
        for x, y in rng.uniform(_PLACE_LOW, _PLACE_HIGH, (40, 2)).tolist():
            is_object = len(places) < 3
            spacing = _OBJECT_SPACING if is_object else _ZONE_SPACING
            if all(math.hypot(x - other_x, y - other_y) > spacing for other_x, other_y in places):
                places.append((x, y))
            if len(places) == 5:
                return places
