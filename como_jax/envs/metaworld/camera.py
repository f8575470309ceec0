"""Pictures of the MuJoCo scene: quick ones, the same for demonstrations and rollouts."""

from __future__ import annotations

import atexit
from typing import Any

import cv2
import numpy as np

from como_jax.envs.metaworld.simulator import load_mujoco, unusable_gl
from como_jax.errors import ConfigError

# As in Meta-World's scene files. The first sees the hand and what it works on largest: at 64 pixels a goal is one or
# two pixels wide there and less than one in corner2, the usual choice, which shows the whole table. It stands where
# the code of TD-MPC2 (Hansen et al., 2023, arXiv:2310.16828) moves corner2.
CAMERAS = ("corner4", "corner", "corner2", "corner3", "topview", "behindGripper", "gripperPOV")
IMAGE_SIZES = (16, 512)
# Rendered larger and averaged, so that what moves by less than a pixel moves in the picture; the cost lies in the
# meshes, not in the pixels.
_SUPERSAMPLING = 2


def check_cameras(cameras: tuple[str, ...]) -> None:
    """Raises ConfigError for cameras that Meta-World does not have."""
    unknown = [name for name in cameras if name not in CAMERAS]
    if unknown or not cameras:
        raise ConfigError(f"Meta-World has no camera {', '.join(unknown) or 'without a name'}: {', '.join(CAMERAS)}.")
    if len(set(cameras)) < len(cameras):
        raise ConfigError(f"a camera is named twice: {', '.join(cameras)}.")


def check_image_size(size: int) -> None:
    """Raises ConfigError for a size that is not rendered."""
    low, high = IMAGE_SIZES
    if not low <= size <= high:
        raise ConfigError(f"Meta-World renders pictures of {low} to {high} pixels, not {size}.")


class Cameras:
    """Renders square pictures of a model; several can live side by side."""

    def __init__(self, model: Any, data: Any, names: tuple[str, ...], image_size: int):
        """Raises ConfigError where there is no OpenGL to draw with."""
        mujoco = load_mujoco()
        self._data, self._size = data, image_size
        side = _SUPERSAMPLING * image_size
        _leave_out_costly_effects(model, side)
        try:
            self._renderer = mujoco.Renderer(model, side, side)
        except Exception as error:
            # The renderers of MuJoCo raise whatever their library does.
            raise unusable_gl(error) from error
        # Left to the end of the process, a context would be freed after its library, which complains at length.
        atexit.register(self.close)
        self._turned = {name: _is_upside_down(mujoco, model, data, name) for name in names}

    def render(self) -> dict[str, np.ndarray]:
        """uint8 RGB `[size, size, 3]` of every camera, upright."""
        return {name: self._render(name, turned) for name, turned in self._turned.items()}

    def close(self) -> None:
        """Frees the OpenGL context."""
        atexit.unregister(self.close)
        self._renderer.close()

    def _render(self, name: str, turned: bool) -> np.ndarray:
        self._renderer.update_scene(self._data, camera=name)
        image = cv2.resize(self._renderer.render(), (self._size, self._size), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(image[::-1, ::-1]) if turned else image


def _leave_out_costly_effects(model: Any, side: int) -> None:
    """To be called before the context is made, which reads it; these effects take nine tenths of the time."""
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = side
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0


def _is_upside_down(mujoco: Any, model: Any, data: Any, name: str) -> bool:
    """Whether a camera that stands in the room is mounted with its top towards the floor, as all corners are."""
    camera = model.camera(name).id
    is_fixed = model.cam_mode[camera] == mujoco.mjtCamLight.mjCAMLIGHT_FIXED
    upwards = data.cam_xmat[camera].reshape(3, 3)[2, 1]
    return bool(is_fixed and upwards < -1e-6)
