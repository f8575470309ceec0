"""The two appearances of the agent: a robot gripper on an arm, and a human hand with its forearm."""

from dataclasses import dataclass

import numpy as np

from como_jax.envs.tabletop.canvas import Canvas, Colour, shaded
from como_jax.envs.tabletop.scene import FINGER_OFFSET, Gripper

_SHOULDER = np.array([0.02, 0.85, 0.42])
_ELBOW = np.array([0.16, 0.75, 0.36])

_METAL: Colour = (52, 58, 72)
_ACCENT: Colour = (0, 190, 200)
_FINGER: Colour = (30, 32, 40)
_TIP: Colour = (0, 225, 235)

_SKINS: tuple[Colour, ...] = ((241, 194, 165), (224, 172, 130), (190, 128, 88), (141, 85, 54), (96, 60, 42))
_SLEEVES: tuple[Colour, ...] = ((60, 90, 160), (150, 50, 60), (70, 70, 75), (60, 120, 90), (230, 225, 215))


@dataclass(frozen=True)
class Person:
    """Whose hand it is: colours of skin and sleeve, and the size of the hand relative to the average."""

    skin: Colour
    sleeve: Colour
    size: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Person":
        """A random person."""
        skin, sleeve = _SKINS[rng.integers(len(_SKINS))], _SLEEVES[rng.integers(len(_SLEEVES))]
        return cls(skin, sleeve, float(rng.uniform(0.9, 1.1)))


def draw_gripper_back(canvas: Canvas, gripper: Gripper) -> None:
    """Draws what lies behind an object between the fingers: the arm and the left finger."""
    wrist = gripper.position + (0.0, 0.01, 0.155)
    canvas.limb(_SHOULDER, wrist, (0.055, 0.04), _METAL)
    canvas.limb(wrist, gripper.position + (0.0, 0.0, 0.115), (0.034, 0.034), _ACCENT)
    _draw_finger(canvas, gripper, -1)


def draw_gripper_front(canvas: Canvas, gripper: Gripper) -> None:
    """Draws what hides an object between the fingers: the right finger and the palm."""
    _draw_finger(canvas, gripper, 1)
    p = gripper.position
    canvas.box(p + (-0.072, -0.03, 0.075), p + (0.072, 0.03, 0.108), _METAL)


def _draw_finger(canvas: Canvas, gripper: Gripper, side: int) -> None:
    middle = gripper.position + (side * (gripper.half_gap + FINGER_OFFSET), 0.0, 0.0)
    canvas.box(middle + (-0.011, -0.016, 0.025), middle + (0.011, 0.016, 0.08), _FINGER)
    canvas.box(middle + (-0.011, -0.016, -0.005), middle + (0.011, 0.016, 0.025), _TIP)


def draw_hand_back(canvas: Canvas, gripper: Gripper, person: Person) -> None:
    """Draws the forearm, the resting fingers and the thumb."""
    p, s = gripper.position, person.size
    wrist = p + s * np.array([0.02, 0.085, 0.125])
    cuff = wrist + 0.35 * (_ELBOW - wrist) / np.linalg.norm(_ELBOW - wrist)
    canvas.limb(_ELBOW, wrist, (0.05, 0.03 * s), person.skin)
    canvas.limb(_ELBOW, cuff, (0.062, 0.05), person.sleeve)
    reach = gripper.half_gap
    for spread, back in ((1.0, 0.05), (1.05, 0.03), (1.0, 0.012)):
        knuckle = p + s * np.array([0.03, 0.02 + back, 0.09])
        bend = p + s * np.array([0.035 + spread * reach, 0.005 + back, 0.06])
        tip = p + s * np.array([0.02 + spread * reach, back, 0.022])
        _draw_digit(canvas, (knuckle, bend, tip), 0.0125 * s, shaded(person.skin, 0.93))
    base = p + s * np.array([-0.02, 0.035, 0.085])
    bend = p + s * np.array([-0.032 - reach, 0.01, 0.055])
    tip = p + np.array([-0.011 - reach, -0.002, 0.008])
    _draw_digit(canvas, (base, bend, tip), 0.0145 * s, person.skin)


def draw_hand_front(canvas: Canvas, gripper: Gripper, person: Person) -> None:
    """Draws the index finger and the back of the hand."""
    p, s, reach = gripper.position, person.size, gripper.half_gap
    knuckle = p + s * np.array([0.018, 0.012, 0.098])
    bend = p + s * np.array([0.034 + reach, 0.0, 0.06])
    tip = p + np.array([0.011 + reach, -0.002, 0.008])
    _draw_digit(canvas, (knuckle, bend, tip), 0.013 * s, person.skin)
    wrist = p + s * np.array([0.02, 0.085, 0.125])
    canvas.limb(wrist, p + s * np.array([0.003, 0.025, 0.1]), (0.034 * s, 0.04 * s), person.skin)


def _draw_digit(canvas: Canvas, joints: tuple[np.ndarray, ...], radius: float, skin: Colour) -> None:
    knuckle, bend, tip = joints
    canvas.limb(knuckle, bend, (1.15 * radius, radius), skin)
    canvas.limb(bend, tip, (radius, 0.85 * radius), skin)
