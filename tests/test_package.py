"""The package: pip's and colcon's descriptions agree, the wheel holds real files, the core imports light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest
from source_copy import copy_source

import vla_spec
from vla_spec import plugins
from vla_spec.config import mode_names

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("run", "train", "test")  # each contains the one before

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def setup_arguments():
    """Keyword arguments of the call of setup(), as source."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def package_xml():
    return ElementTree.parse(ROOT / "package.xml").getroot()


def pins(name):
    lines = (ROOT / "requirements" / f"{name}.lock").read_text().split()
    return dict(line.split("==") for line in lines)


def test_versions_agree():
    assert package_xml().findtext("version") == vla_spec.__version__
    assert f"## {vla_spec.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_package_xml_is_an_ament_python_package_of_format_3():
    root = package_xml()
    assert root.get("format") == "3"
    assert root.findtext("name") == "vla_spec"
    assert root.findtext("license") == "Apache-2.0" == ast.literal_eval(setup_arguments()["license"])
    assert root.findtext("export/build_type") == "ament_python"
    assert {"rclpy", "sensor_msgs", "trajectory_msgs"} <= {item.text for item in root.findall("exec_depend")}


def test_colcon_finds_the_marker_and_the_scripts():
    assert (ROOT / "resource" / "vla_spec").is_file()
    data_files = setup_arguments()["data_files"]
    assert "share/ament_index/resource_index/packages" in data_files
    assert "package.xml" in data_files
    setup_cfg = (ROOT / "setup.cfg").read_text()
    assert "script_dir = $base/lib/vla_spec" in setup_cfg
    assert "install_scripts = $base/lib/vla_spec" in setup_cfg


def test_entry_points_exist():
    for module, function in re.findall(r"= ([\w.]+):(\w+)", setup_arguments()["entry_points"]):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        assert f"def {function}(" in source


@pytest.mark.parametrize("name", ["engines", "nodes", "calib"])
def test_top_level_folders_are_reached_by_relative_links(name):
    link = ROOT / "vla_spec" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("name", [*LOCKS, "ros"])
def test_locks_are_plain_exact_pins(name):
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    for line in text.splitlines():
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9][\w.]*", line), line


def test_locks_fit_into_one_environment_and_running_needs_no_torch():
    run, train, test = (pins(name) for name in LOCKS)
    assert run.items() <= train.items() <= test.items()
    assert run.items() <= pins("ros").items() <= test.items()
    assert "torch" not in run
    assert test["torch"] == "2.13.0"
    assert run["metaworld"] == "3.1.1"
    assert {"onnxruntime", "packaging", "mujoco", "matplotlib", "jinja2", "pillow", "setuptools"} <= set(run)


def test_what_setup_asks_for_is_pinned():
    names = set(
        re.findall(r'"([a-z][a-z0-9-]*)(?:[<>=]=[^"]*)?"', (ROOT / "setup.py").read_text().split("def share")[0])
    )
    assert {"numpy", "torch", "onnx", "hypothesis"} <= names
    # TensorRT's libraries come from the vendor's own index: the machine that has one brings it.
    assert names - {"types-PyYAML", "tensorrt"} <= {*pins("test"), "types-pyyaml"}


def test_the_core_imports_with_numpy_and_the_standard_library_only():
    script = (
        "import sys\n"
        "import vla_spec.types, vla_spec.interfaces, vla_spec.decoder, vla_spec.plugins, vla_spec.policy\n"
        "import vla_spec.chunks, vla_spec.runtime, vla_spec.trace, vla_spec.engines.toy, vla_spec.drafters.ngram\n"
        "third = {m.split('.')[0] for m in sys.modules} & "
        "{'pydantic', 'yaml', 'typer', 'rich', 'torch', 'onnxruntime', 'rclpy', 'mujoco', 'matplotlib'}\n"
        "assert not third, third\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy without build leftovers, as a packager would."""
    out = tmp_path_factory.mktemp("wheel")
    source = copy_source(tmp_path_factory.mktemp("source") / "vla_spec")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_real_files_and_nothing_at_the_top_level_but_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        tops = {name.split("/")[0] for name in names}
        assert tops == {
            "vla_spec",
            f"vla_spec-{vla_spec.__version__}.dist-info",
            f"vla_spec-{vla_spec.__version__}.data",
        }
        for folder in ("engines", "nodes", "calib"):
            assert f"vla_spec/{folder}/__init__.py" in names
        for kind, folder in plugins.FOLDERS.items():
            for name in plugins.names(kind):
                assert {f"vla_spec/{folder}/{name}.py", f"vla_spec/{folder}/{name}/__init__.py"} & set(names)
        for mode in mode_names():
            assert f"vla_spec/modes/{mode}.yaml" in names
        assert {"vla_spec/templates/report.html.j2", "vla_spec/templates/report.css", "vla_spec/py.typed"} <= set(names)
        data = f"vla_spec-{vla_spec.__version__}.data/data/share"
        assert f"{data}/ament_index/resource_index/packages/vla_spec" in names
        assert f"{data}/vla_spec/package.xml" in names


def test_the_wheel_works_without_the_source_tree(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "import vla_spec, vla_spec.engines.toy, vla_spec.nodes, vla_spec.calib\n"
        "from vla_spec import config, plugins\n"
        f"assert vla_spec.engines.toy.__file__.startswith({str(tmp_path)!r}), vla_spec.engines.toy.__file__\n"
        "assert 'toy' in plugins.names('engine') and 'exact' in config.mode_names()\n"
        "from vla_spec import cli\n"
        "cli.main(['run', '--engine', 'toy', '--robot', 'toy', '--modes', 'autoregressive', '--max-steps', '8',"
        " '--out', 'out'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "report.html").is_file()


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for target in ("run", "test", "check", "bench", "help", "doctor"):
        assert re.search(rf"^\s+make {target}\s+\S", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("torch", "is_left_out"), [("yes", False), ("no", True)])
def test_make_test_can_leave_pytorch_out(tmp_path, torch, is_left_out):
    command = ["make", "-n", "test", f"TORCH={torch}", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (install,) = [line for line in done.stdout.splitlines() if line.endswith("pip install -q -r /dev/stdin")]
    lock = subprocess.run(["bash", "-c", install.split(" | ")[0]], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = set(pins("test")) - {line.split("==")[0] for line in lock.stdout.split()}
    assert missing == ({"torch", "torchvision", "timm"} if is_left_out else set())  # the last two would bring it back


def test_make_says_what_torch_may_be():
    done = subprocess.run(
        ["make", "-n", "test", "TORCH=maybe"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert 'TORCH is "maybe"; valid: yes, no' in done.stderr


def test_ci_runs_the_tests_that_a_user_runs():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "make test" in text
