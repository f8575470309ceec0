"""Images of a scene: several cameras from one OpenGL context, in two looks."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from typing import Any

import numpy as np

from como_jax.envs.libero import opengl

LOOKS = ("fast", "full")
"""`full` is what LIBERO's own environment shows, `fast` differs a little and takes a fraction of the time."""


class Renderer:
    """Draws a model from fixed cameras; several instances can exist at the same time."""

    def __init__(self, model: Any, data: Any, cameras: Sequence[str], size: int, look: str):
        """Creates the OpenGL context, which copies what it needs of the model.

        Args:
          model, data: of MuJoCo; the look changes how the model is drawn, and nothing else.
          cameras: their names.
          size: side of the images in pixels.
          look: one of `LOOKS`.

        Raises:
          ConfigError: there is no OpenGL to draw with.
        """
        import mujoco

        self._model, self._data, self._cameras = model, data, tuple(cameras)
        if look == "fast":
            _leave_out_costly_effects(model)
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        # The renderers of MuJoCo raise whatever their library raises.
        with opengl.errors(Exception):
            self._renderer = mujoco.Renderer(model, size, size)
        # At the end of the process a context would be freed after its library, which prints long complaints.
        atexit.register(self.close)
        self._options = mujoco.MjvOption()
        # Collision shapes, which robosuite hides too.
        self._options.geomgroup[0] = 0

    def render(self) -> list[np.ndarray]:
        """uint8 RGB `[size, size, 3]` of every camera, its lowest row first as robosuite has it."""
        images = []
        for camera in self._cameras:
            self._renderer.update_scene(self._data, camera, self._options)
            images.append(self._renderer.render()[::-1])
        return images

    def close(self) -> None:
        """Frees the OpenGL context."""
        atexit.unregister(self.close)
        self._renderer.close()


def _leave_out_costly_effects(model: Any) -> None:
    """Switches off what takes more than half of the time; the context reads this when it is made."""
    model.vis.quality.offsamples = 0
    model.mat_reflectance[:] = 0
