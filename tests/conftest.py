"""Strict numerics for all tests: what NumPy would whisper about is an error here."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# Stand-ins are imported by name (`contract.fakes`), however pytest was started and whatever is a package here.
sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("repeatable")

#: Libraries whose own warnings are not ours to fix.
FOREIGN = ("torch", "onnxruntime", "onnx", "mujoco", "metaworld", "gymnasium", "glfw", "matplotlib", "imageio", "scipy")


def pytest_configure(config):
    # Whoever starts the tests in the background of a shell has them ignore Ctrl-C, and all their children with them.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error")
    for library in FOREIGN:
        config.addinivalue_line("filterwarnings", rf"default:::{library}(\..*)?")
    # Raised from C code on behalf of whatever module is importing a SWIG or protobuf extension.
    config.addinivalue_line("filterwarnings", "default:builtin type .* has no __module__ attribute:DeprecationWarning")
    # An import of rclpy's parser, deep inside.
    config.addinivalue_line("filterwarnings", "default:module 'sre_.*' is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def strict_numerics():
    """Overflow, division by zero and NaN from numbers raise."""
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        yield
