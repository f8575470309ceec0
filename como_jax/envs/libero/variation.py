"""Scenes that look otherwise: what makes a simulator's videos as different from the robot's as other people's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

VARIATIONS = ("camera", "motion", "colours", "textures", "light", "arm", "hand")
"""What can be varied, all of it drawn anew for each episode:

- camera: where the fixed cameras stand; motion: they move about that place as if held by hand.
- colours: of all that is not the robot; textures: patterns on floor, walls and table.
- light: its colour, strength and direction.
- arm: the robot in other colours; hand: of the robot only the hand is to be seen, in the colour of skin.
"""
_ROBOT, _HAND = ("robot0", "gripper0", "mount0"), ("gripper0", "robot0_right_hand")
_CAMERA_OF_HAND = "eye_in_hand"
_SURFACES = ("floor", "wall", "table", "plane", "ceramic", "tile", "wood")
# Where the fixed cameras look at lies about this far in front of them, in metres.
_DISTANCE = 0.9
_MAX_YAW, _MAX_PITCH, _SCALES = 0.6, 0.2, (0.85, 1.2)
_SWAY, _SWAY_HZ = 0.06, (0.1, 0.5)
_HIDDEN_GROUP = 5
_CHANGED = (
    "geom_rgba", "geom_matid", "geom_group", "mat_rgba", "light_diffuse", "light_ambient", "tex_data"
)  # fmt: skip


class Variation:
    """Varies how a model is drawn, and neither how it moves nor how things collide."""

    def __init__(self, model: Any, names: Sequence[str]):
        """Remembers how the model looks.

        Args:
          model: of MuJoCo.
          names: of `VARIATIONS`.
        """
        self._model, self._names = model, frozenset(names)
        changed = [name for name in _CHANGED if name != "tex_data" or "textures" in names]
        self._original = {name: getattr(model, name).copy() for name in changed}
        bodies = [model.body(int(body)).name for body in model.geom_bodyid]
        visible = model.geom_group != 0
        self._robot = visible & np.array([name.startswith(_ROBOT) for name in bodies])
        self._hand = visible & np.array([name.startswith(_HAND) for name in bodies])
        self._cameras = [camera for camera in range(model.ncam) if _CAMERA_OF_HAND not in model.camera(camera).name]
        self._turn, self._scale, self._sway = Rotation.identity(), 1.0, np.zeros((3, 2))
        self._sun = Rotation.identity()

    def draw(self, seed: int) -> list[int]:
        """Draws another look; returns the numbers of the textures that a renderer has to load again."""
        rng, model = np.random.default_rng([seed, 3]), self._model
        for name, values in self._original.items():
            getattr(model, name)[:] = values
        if "camera" in self._names:
            pitch, yaw = rng.uniform(-_MAX_PITCH, _MAX_PITCH), rng.uniform(-_MAX_YAW, _MAX_YAW)
            self._turn, self._scale = Rotation.from_euler("yz", [pitch, yaw]), rng.uniform(*_SCALES)
        if "motion" in self._names:
            self._sway = np.stack([rng.uniform(*_SWAY_HZ, 3), rng.uniform(0, 2 * np.pi, 3)], axis=1)
        if "colours" in self._names:
            self._draw_colours(rng)
        if "light" in self._names:
            model.light_diffuse[:] *= rng.uniform(0.5, 1.3) * rng.uniform(0.8, 1.2, 3)
            model.light_ambient[:] = rng.uniform(0, 0.3)
            self._sun = Rotation.from_euler("xy", rng.uniform(-0.6, 0.6, 2))
        if self._names & {"arm", "hand"}:
            self._draw_robot(rng)
        return self._draw_textures(rng) if "textures" in self._names else []

    def place(self, data: Any, seconds: float) -> None:
        """Moves the fixed cameras and the light of a scene to where they are now."""
        phase = 2 * np.pi * self._sway[:, 0] * seconds + self._sway[:, 1]
        sway = _SWAY * np.sin(phase) * bool(self._sway.any())
        turn = Rotation.from_euler("xyz", sway) * self._turn
        for camera in self._cameras:
            pose = data.cam_xmat[camera].reshape(3, 3)
            centre = data.cam_xpos[camera] - _DISTANCE * pose[:, 2]
            data.cam_xpos[camera] = centre + turn.apply(self._scale * _DISTANCE * pose[:, 2])
            data.cam_xmat[camera] = (turn.as_matrix() @ pose).ravel()
        data.light_xdir[:] = self._sun.apply(data.light_xdir)

    def _draw_colours(self, rng: np.random.Generator) -> None:
        """The colours of materials and of shapes without one, as if seen through coloured glass."""
        model = self._model
        of_robot = np.zeros(len(model.mat_rgba), bool)
        of_robot[model.geom_matid[self._robot & (model.geom_matid >= 0)]] = True
        for colours, fixed in ((model.mat_rgba, of_robot), (model.geom_rgba, self._robot | (model.geom_matid >= 0))):
            colours[~fixed, :3] *= rng.uniform(0.35, 1.25, (int((~fixed).sum()), 3))
            np.clip(colours, 0, 1, out=colours)

    def _draw_robot(self, rng: np.random.Generator) -> None:
        model, is_hand = self._model, "hand" in self._names
        if is_hand:
            model.geom_group[self._robot & ~self._hand] = _HIDDEN_GROUP
        shown = self._hand if is_hand else self._robot
        model.geom_matid[shown] = -1
        skin = np.array([0.9, 0.65, 0.5]) * rng.uniform(0.45, 1.1)
        own = rng.uniform(0, 1, (len(model.geom_rgba), 3))
        # Parts of an arm differ a little from its one colour.
        model.geom_rgba[shown, :3] = np.clip(skin if is_hand else 0.8 * own[0] + 0.2 * own[shown], 0, 1)
        model.geom_rgba[shown, 3] = 1

    def _draw_textures(self, rng: np.random.Generator) -> list[int]:
        model, drawn = self._model, []
        for texture in range(model.ntex):
            if not any(word in model.tex(texture).name.lower() for word in _SURFACES):
                continue
            height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
            channels = int(model.tex_nchannel[texture])
            first = int(model.tex_adr[texture])
            image = model.tex_data[first : first + height * width * channels].reshape(height, width, channels)
            image[..., :3] = pattern(rng, height, width)
            drawn.append(texture)
        return drawn


def pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Stripes, checks or waves in two colours, uint8 `[height, width, 3]`."""
    colours = rng.uniform(40, 240, (2, 3))
    across, along = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    counts, kind = rng.integers(2, 9, 2), rng.integers(3)
    first, second = np.sin(2 * np.pi * counts[0] * across), np.sin(2 * np.pi * counts[1] * along)
    share = ((first + 0 * second > 0), (first * second > 0), (1 + first * second) / 2)[kind]
    return (colours[0] + share[..., None] * (colours[1] - colours[0])).astype(np.uint8)
