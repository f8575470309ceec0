"""Meta-World and MuJoCo, imported when they are first needed: one task, its expert, and images of its scene."""

from __future__ import annotations

import atexit
import os
import sys
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from como_jax.envs.base import missing_extra
from como_jax.errors import ConfigError

# Names as in Meta-World's scene files. The first camera shows the hand and the objects largest: at 64 pixels a goal is
# one or two pixels wide there, but less than one in corner2, the usual choice, which shows the whole table. It stands
# where the code of TD-MPC2 (Hansen et al., 2023, arXiv:2310.16828) moves corner2.
CAMERAS = ("corner4", "corner", "corner2", "corner3", "topview", "behindGripper", "gripperPOV")
IMAGE_SIZES = (16, 512)
# Images are rendered larger and averaged, so that motions of less than a pixel can be seen; the cost lies in the
# meshes, not in the pixels.
_SUPERSAMPLING = 2
_GL_PACKAGES = "libosmesa6 libegl1 libgl1 libegl-mesa0 libgles2"


def load_mujoco() -> ModuleType:
    """MuJoCo, with a renderer that needs no display unless `MUJOCO_GL` asks for another one.

    Raises:
      ConfigError: it or Meta-World is not installed, or it finds no OpenGL.
    """
    if sys.platform == "linux" and "mujoco" not in sys.modules:
        # MuJoCo reads it when it is imported, and never again; its own default needs a screen.
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise missing_extra("Meta-World", "metaworld", error) from error
    except Exception as error:
        # PyOpenGL raises errors of many types, mostly an AttributeError about a library that was not found.
        raise unusable_gl(error) from error
    try:
        # What Meta-World builds on imports more packages, but only when an environment is made.
        import gymnasium.envs.mujoco.mujoco_rendering  # noqa: F401
        import metaworld  # noqa: F401
    except ImportError as error:
        raise missing_extra("Meta-World", "metaworld", error) from error
    return mujoco


def unusable_gl(error: Exception) -> ConfigError:
    """The error to raise where MuJoCo cannot draw."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({reason}); set it to egl or osmesa "
        f"before MuJoCo is imported, and on Debian or Ubuntu install: apt-get install {_GL_PACKAGES}"
    )


def make_simulator(task: str, max_steps: int) -> Any:
    """Meta-World's own environment of a task, an untyped `SawyerXYZEnv`.

    Its own generator, which `seed` seeds, draws the places of objects and goals. Its observations include the goal,
    which the experts need. `set_task` is not used, since it fixes the places beforehand.

    Args:
      task: name of the task.
      max_steps: steps of the simulator that an episode can have.
    """
    load_mujoco()
    from metaworld.env_dict import ENV_CLS_MAP

    simulator = ENV_CLS_MAP[task]()
    simulator.max_path_length = max_steps
    simulator.seeded_rand_vec = True
    simulator._freeze_rand_vec = False
    simulator._set_task_called = True
    simulator._partially_observable = False
    # Cached while the goal was hidden; observations are clipped to it.
    del simulator.sawyer_observation_space
    return simulator


def make_expert(task: str) -> Any:
    """Meta-World's scripted policy of a task, whose `get_action` takes an observation."""
    load_mujoco()
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[task]()


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
        raise ConfigError(f"Meta-World renders images of {low} to {high} pixels, not {size}.")


class Cameras:
    """Renders square images of a model; several instances can exist at the same time."""

    def __init__(self, model: Any, data: Any, names: tuple[str, ...], image_size: int):
        """Creates the renderer; raises ConfigError where there is no OpenGL to draw with."""
        mujoco = load_mujoco()
        self._data, self._size = data, image_size
        side = _SUPERSAMPLING * image_size
        _leave_out_costly_effects(model, side)
        try:
            self._renderer = mujoco.Renderer(model, side, side)
        except Exception as error:
            # The renderers of MuJoCo raise whatever their library raises.
            raise unusable_gl(error) from error
        # At the end of the process a context would be freed after its library, which prints long complaints.
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
    """Switches off effects that take nine tenths of the time; the context reads this when it is made."""
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = side
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0


def _is_upside_down(mujoco: Any, model: Any, data: Any, name: str) -> bool:
    """Whether a fixed camera is mounted with its top towards the floor, as all corners are."""
    camera = model.camera(name).id
    is_fixed = model.cam_mode[camera] == mujoco.mjtCamLight.mjCAMLIGHT_FIXED
    upwards = data.cam_xmat[camera].reshape(3, 3)[2, 1]
    return bool(is_fixed and upwards < -1e-6)
