"""Choose how MuJoCo renders without a screen, before MuJoCo is imported: EGL if it works here, else OSMesa."""

from __future__ import annotations

import ctypes.util
import os
import sys

from vla_spec.errors import MissingDependency

INSTALL_HINT = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri   (or: libosmesa6)"


def select_gl_backend() -> str:
    """Set MUJOCO_GL (unless the user did) and return its value.

    Raises:
        MissingDependency: neither library is on this machine.
    """
    # Software rendering with one thread is the fastest here for 96 x 96 pictures and leaves cores for inference.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is None and "mujoco" not in sys.modules:
        if ctypes.util.find_library("EGL"):
            chosen = "egl"
        elif ctypes.util.find_library("OSMesa"):
            chosen = "osmesa"
        else:
            raise MissingDependency("an OpenGL library for rendering without a screen", INSTALL_HINT)
        os.environ["MUJOCO_GL"] = chosen
    return chosen or "as imported"
