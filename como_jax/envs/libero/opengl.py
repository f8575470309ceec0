"""The OpenGL that MuJoCo draws with, and what to do where there is none."""

from __future__ import annotations

import contextlib
import ctypes.util
import glob
import os
import sys
from collections.abc import Iterator

from como_jax.errors import ConfigError

_PACKAGES = "libosmesa6 libegl1 libgl1 libegl-mesa0 libgles2"
_GPUS = ("/dev/dri/render*", "/dev/nvidia[0-9]*")


def choose() -> None:
    """Sets MUJOCO_GL where nobody has: EGL where there is a GPU, else OSMesa, which draws on the CPU.

    MuJoCo reads the variable when it is imported, and never again.
    """
    if sys.platform == "linux" and "mujoco" not in sys.modules and not os.environ.get("MUJOCO_GL"):
        has_gpu = any(glob.glob(pattern) for pattern in _GPUS)
        os.environ["MUJOCO_GL"] = "osmesa" if not has_gpu and ctypes.util.find_library("OSMesa") else "egl"


@contextlib.contextmanager
def errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of missing or useless graphics libraries into a ConfigError."""
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({reason}); set it to osmesa or "
            f"egl before MuJoCo is imported, and on Debian or Ubuntu install: apt-get install {_PACKAGES}"
        ) from error
