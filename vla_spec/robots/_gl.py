"""Choose how MuJoCo renders without a screen, before MuJoCo is imported: EGL if it works here, else OSMesa.

Having the library is not enough: EGL without a usable driver or device fails when the context is made, and MuJoCo can
no longer change its mind then. So a context is made once in a child process, and the answer is kept.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from vla_spec.errors import BadConfig, MissingDependency

INSTALL_HINT = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri   (or: libosmesa6)"
BACKENDS = ("egl", "osmesa")
PROBE_TIMEOUT_S = 60
_PROBE = "import mujoco; c = mujoco.GLContext(16, 16); c.make_current(); c.free()"


def select_gl_backend() -> str:
    """Set MUJOCO_GL (unless the user did) and return its value.

    Raises:
        MissingDependency: neither backend can make a context on this machine; says what each one answered.
        BadConfig: somebody imported mujoco first, and without a screen its choice can't work.
    """
    # Software rendering with one thread is the fastest here for 96 x 96 pictures and leaves cores for inference.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is None and "mujoco" in sys.modules:
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise BadConfig(
                "rendering: mujoco was imported before a backend was chosen and there is no screen; "
                "set MUJOCO_GL=egl (or osmesa) before the program starts"
            )
        return "as imported"
    if chosen is None:
        chosen = _first_that_works()
        os.environ["MUJOCO_GL"] = chosen
    return chosen


@functools.cache
def _first_that_works() -> str:
    """The first of `BACKENDS` that makes a context. An exception is not kept: what is missing may get installed."""
    answers = []
    for backend in BACKENDS:
        answer = probe(backend)
        if not answer:
            return backend
        answers.append(f"{backend}: {answer}")
    raise MissingDependency(f"OpenGL for rendering without a screen ({'; '.join(answers)})", INSTALL_HINT)


def probe(backend: str) -> str:
    """Make an OpenGL context in a child process. Empty = it works, else what went wrong in one line."""
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.strip().splitlines() if line and "Exception ignored" not in line]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"
