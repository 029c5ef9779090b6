"""LIBERO's camera pictures, drawn and prepared as the field's training data and evaluations have them.

Equal, bit for bit, to what robosuite's own renderer draws of the same state; the same steps behind it as in OpenVLA's
evaluation (Kim et al. 2024, arXiv:2406.09246): rotated by 180 degrees, through JPEG, resized by Lanczos with 3 lobes.
"""

from __future__ import annotations

import io
from typing import Any, final

import numpy as np

from vla_spec.types import UInt8

#: As TensorFlow's encoder has it by default, which wrote the training data.
JPEG_QUALITY = 95
#: As robosuite's.
MAX_GEOMETRIES = 1000


@final
class SceneRenderer:
    """Draws a MuJoCo scene without a screen. Not thread-safe: one OpenGL context, one owner.

    It outlives the model that it was made for: LIBERO compiles its model anew for every episode, always from the same
    XML, and uploading the same 300 MB of textures again would take a second each time.

    Args:
        model: a `mujoco.MjModel`.
        size: pictures are size x size.
        is_antialiased: several samples per pixel, as many as the model says.
    """

    def __init__(self, model: Any, size: int, is_antialiased: bool = True) -> None:
        import mujoco

        self._mujoco, self.size = mujoco, size
        self._gl = mujoco.GLContext(size, size)
        self._gl.make_current()
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        if not is_antialiased:
            model.vis.quality.offsamples = 0
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._perturbation = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._visible = mujoco.MjvOption()
        self._visible.geomgroup[0] = 0  # collision shapes; what is to be seen is in group 1
        self.show(model)

    def show(self, model: Any) -> None:
        """Draw this model from now on: one compiled from the same XML as the first."""
        self._model = model
        self._scene = self._mujoco.MjvScene(model, maxgeom=MAX_GEOMETRIES)

    def draw(self, data: Any, camera: str) -> UInt8:
        """One picture, uint8 [size, size, 3], upside down: OpenGL's first row is the lowest.

        Args:
            data: `mujoco.MjData` of the model that is shown.
            camera: its name in the model.
        """
        mujoco = self._mujoco
        # Another environment in this process may have made its own context current; drawing would go there, and what
        # is read here would be black (robosuite's renderer does not do this).
        self._gl.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model, data, self._visible, self._perturbation, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value,
            self._scene,
        )  # fmt: skip
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        picture = np.empty((self.size, self.size, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, self._viewport, self._context)
        return picture

    def close(self) -> None:
        """Free the context. While the interpreter still runs: at its end the library that frees it may be gone."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def prepare(picture: UInt8, size: int, is_jpeg: bool) -> UInt8:
    """A picture as OpenGL gives it, to what policies were trained on.

    Args:
        picture: uint8 [s, s, 3], lowest row first.
        size: of the result.
        is_jpeg: through JPEG and back, as the training data was stored.

    Returns:
        uint8 [size, size, 3], rotated by 180 degrees: upright, since the picture was upside down, and mirrored, since
        a rotation also swaps left and right. The published data sets are like that.
    """
    rotated = np.ascontiguousarray(picture[::-1, ::-1])
    if not is_jpeg and size == len(rotated):
        return rotated
    from PIL import Image

    image = Image.fromarray(rotated)
    if is_jpeg:
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
        image = Image.open(stored)
    if size != image.width:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8)
