"""colcon builds this package both ways, and what it installs works without the source tree, or through links to it.

Needs colcon itself (`pip install colcon-common-extensions`, best in an environment of its own) on the path; no ROS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from source_copy import copy_source

COLCON = shutil.which("colcon")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COLCON is None, reason="needs colcon")]

SCRIPT = """
import vla_spec, vla_spec.engines.toy, vla_spec.nodes, vla_spec.calib
from vla_spec import cli, config, plugins
for module in (vla_spec, vla_spec.engines.toy, vla_spec.nodes, vla_spec.calib):
    assert module.__file__.startswith({place!r}), module.__file__
assert "toy" in plugins.names("engine") and "exact" in config.mode_names()
cli.main(["run", "--engine", "toy", "--robot", "toy", "--modes", "autoregressive", "--max-steps", "8", "--no-report",
          "--out", "out"])
"""


@pytest.mark.parametrize(("arguments", "place"), [([], "install/vla_spec/lib"), (["--symlink-install"], "build")])
def test_colcon_builds_it_and_it_runs_from_there(tmp_path, arguments, place):
    source = copy_source(tmp_path / "src" / "vla_spec")
    (source / "launch" / "params").mkdir(parents=True, exist_ok=True)
    (source / "launch" / "probe.launch.py").write_text("# found by ros2 launch\n")
    (source / "launch" / "params" / "probe.yaml").write_text("a: 1\n")
    # The interpreter under test must not lead colcon's own astray.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [COLCON, "build", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]

    installed = tmp_path / "install" / "vla_spec"
    share = installed / "share"
    for name in ("package.xml", "launch/probe.launch.py", "params/probe.yaml"):
        assert (share / "vla_spec" / name).is_file(), name
    assert (share / "ament_index" / "resource_index" / "packages" / "vla_spec").is_file()
    assert (installed / "lib" / "vla_spec" / "vla-spec").stat().st_mode & 0o100  # `ros2 run vla_spec vla-spec`

    script = SCRIPT.format(place=str(tmp_path / place))
    enter = 'source install/setup.bash && exec "$@"'
    done = subprocess.run(
        ["bash", "-c", enter, "bash", sys.executable, "-c", script], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "results.json").is_file()
