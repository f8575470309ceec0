"""Images of a scene: several cameras from one OpenGL context, in two looks."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from como_jax.envs.libero import opengl
from como_jax.envs.libero.meshes import coarsen
from como_jax.envs.libero.variation import Variation

LOOKS = ("fast", "full")
"""`full` is what LIBERO's own environment shows, `fast` differs a little and takes a fraction of the time."""


_HIDDEN_GROUP = 5
# What shapes, cameras and lights are at; and sites, since a stove that is on glows by one.
_DRAWN_OF_DATA = (
    "geom_xpos",
    "geom_xmat",
    "site_xpos",
    "site_xmat",
    "cam_xpos",
    "cam_xmat",
    "light_xpos",
    "light_xdir",
)
_VARIED_OF_DATA = ("cam_xpos", "cam_xmat", "light_xdir")


class Scene(NamedTuple):
    """What is drawn at one step: the time in seconds, where everything is, and the colours of sites."""

    time: float
    places: tuple[np.ndarray, ...]
    site_rgba: np.ndarray


def take_scene(model: Any, data: Any) -> Scene:
    """The scene as it is now."""
    return Scene(data.time, tuple(getattr(data, name).copy() for name in _DRAWN_OF_DATA), model.site_rgba.copy())


def put_scene(model: Any, data: Any, scene: Scene) -> None:
    """Shows an earlier scene; the simulation cannot go on from there before it is reset."""
    data.time, model.site_rgba[:] = scene.time, scene.site_rgba
    for name, values in zip(_DRAWN_OF_DATA, scene.places, strict=True):
        getattr(data, name)[:] = values


class Renderer:
    """Draws a model from fixed cameras; several instances can exist at the same time."""

    def __init__(
        self, model: Any, data: Any, cameras: Sequence[str], size: int, look: str, variations: Sequence[str] = ()
    ):
        """Creates the OpenGL context, which copies what it needs of the model.

        Args:
          model, data: of MuJoCo; the look changes how the model is drawn, and nothing else.
          cameras: their names.
          size: side of the images in pixels.
          look: one of `LOOKS`.
          variations: what `vary` changes, see `como_jax.envs.libero.variation`.

        Raises:
          ConfigError: there is no OpenGL to draw with.
        """
        import mujoco

        self._model, self._data, self._cameras = model, data, tuple(cameras)
        self._variation = Variation(model, variations) if variations else None
        # What lies outside the image may be seen in a mirror.
        self._culls = look == "fast"
        if look == "fast":
            _leave_out_costly_effects(model)
            coarsen(model)
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        # The renderers of MuJoCo raise whatever their library raises.
        with opengl.errors(Exception):
            self._renderer = mujoco.Renderer(model, size, size)
        # At the end of the process a context would be freed after its library, which prints long complaints.
        atexit.register(self.close)
        self._options = mujoco.MjvOption()
        # Collision shapes, which robosuite hides too.
        self._options.geomgroup[0] = 0

    def vary(self, seed: int) -> None:
        """Lets the scene look otherwise from now on."""
        import mujoco

        if self._variation is not None:
            for texture in self._variation.draw(seed):
                mujoco.mjr_uploadTexture(self._model, self._renderer._mjr_context, texture)

    def render(self) -> list[np.ndarray]:
        """uint8 RGB `[size, size, 3]` of every camera, its lowest row first as robosuite has it."""
        before = {name: getattr(self._data, name).copy() for name in _VARIED_OF_DATA}
        if self._variation is not None:
            self._variation.place(self._data, self._data.time)
        images = [self._render(camera) for camera in self._cameras]
        for name, values in before.items():
            getattr(self._data, name)[:] = values
        return images

    def _render(self, camera: str) -> np.ndarray:
        groups = self._model.geom_group.copy()
        if self._culls:
            self._model.geom_group[_outside(self._model, self._data, self._model.camera(camera).id)] = _HIDDEN_GROUP
        self._renderer.update_scene(self._data, camera, self._options)
        self._model.geom_group[:] = groups
        return self._renderer.render()[::-1]

    def close(self) -> None:
        """Frees the OpenGL context."""
        atexit.unregister(self.close)
        self._renderer.close()


def _outside(model: Any, data: Any, camera: int) -> np.ndarray:
    """Which shapes a square image of a camera cannot show, bool `[G]`, by spheres around them."""
    seen = (data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
    # A plane is without end, and has no sphere.
    slope, radius = (
        np.tan(np.radians(model.cam_fovy[camera]) / 2),
        np.where(model.geom_rbound > 0, model.geom_rbound, np.inf),
    )
    beyond = np.abs(seen[:, :2]) + slope * seen[:, 2:] > radius[:, None] * np.sqrt(1 + slope**2)
    return beyond.any(axis=1) | (seen[:, 2] > radius)


def _leave_out_costly_effects(model: Any) -> None:
    """Switches off reflections and samples, which take most of the time; the context reads this when it is made."""
    model.vis.quality.offsamples = 0
    model.mat_reflectance[:] = 0
