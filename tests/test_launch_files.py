"""Launch files, parameter files, executables and the package's description agree. With a recording stub of `launch`."""

import importlib.util
import re
from pathlib import Path

import fake_launch
import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "launch").glob("*.launch.py"))
PARAMS = sorted((ROOT / "launch" / "params").glob("*.yaml"))
SETUP = (ROOT / "setup.py").read_text()
EXECUTABLES = re.findall(r'"(\w+_node)"', re.search(r"NODES = \[(.*?)\]", SETUP, re.S)[1])


def kind(thing):
    return type(thing).__name__


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def described(request, monkeypatch):
    fake_launch.install(monkeypatch)
    spec = importlib.util.spec_from_file_location("a_launch_file", request.param)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return request.param.name, module.generate_launch_description().entities


def nodes_of(entities):
    return [e for e in entities if kind(e) in ("Node", "LifecycleNode")]


def arguments_of(entities):
    return {e.args[0]: e.kwargs for e in entities if kind(e) == "DeclareLaunchArgument"}


def test_there_are_the_four_files():
    assert [f.name for f in FILES] == ["profile.launch.py", "replay.launch.py", "sim.launch.py", "vla.launch.py"]


def test_every_executable_is_an_entry_point(described):
    _, entities = described
    names = [n.kwargs["executable"] for n in nodes_of(entities)]
    assert {"policy_node", "action_node", "monitor_node"} <= set(names)
    assert set(names) <= set(EXECUTABLES)
    assert len(set(names)) == len(names)
    assert all(n.kwargs["package"] == "vla_spec" for n in nodes_of(entities))


def test_every_entry_point_has_a_module_with_main():
    for name in EXECUTABLES:
        assert "\ndef main() -> None:" in (ROOT / "nodes" / f"{name}.py").read_text(), name


def test_arguments_have_defaults_and_descriptions_and_are_used(described):
    _, entities = described
    declared = arguments_of(entities)
    assert {"params_file", "namespace", "use_sim_time", "log_level", "model"} <= set(declared)
    assert all("default_value" in said and said["description"] for said in declared.values())
    used = set(re.findall(r"LaunchConfiguration\('(\w+)',\)", repr(entities)))
    assert used == set(declared)


def test_the_default_parameter_file_is_there(described):
    _, entities = described
    default = arguments_of(entities)["params_file"]["default_value"]
    share, folder, name = default.args[0]
    assert share.args == ("vla_spec",)
    assert folder == "params"
    assert (ROOT / "launch" / "params" / name).is_file()


def test_a_real_robot_is_not_commanded_unless_told_so(described):
    name, entities = described
    default = arguments_of(entities)["dry_run"]["default_value"]
    assert default == ("false" if name in ("sim.launch.py", "profile.launch.py") else "true")


def test_the_lifecycle_is_driven_by_events_that_are_registered_first(described):
    _, entities = described
    policy = next(n for n in nodes_of(entities) if kind(n) == "LifecycleNode")
    handlers = [e.args[0] for e in entities if kind(e) == "RegisterEventHandler"]
    start = next(h for h in handlers if kind(h) == "OnProcessStart")
    assert start.kwargs["target_action"] is policy
    configure = start.kwargs["on_start"][0].kwargs["event"]
    assert configure.kwargs["transition_id"] == 1
    assert configure.kwargs["lifecycle_node_matcher"] == ("matches", policy)
    inactive = next(h for h in handlers if kind(h) == "OnStateTransition")
    assert (inactive.kwargs["start_state"], inactive.kwargs["goal_state"]) == ("configuring", "inactive")
    assert inactive.kwargs["entities"][0].kwargs["event"].kwargs["transition_id"] == 3
    places = [kind(e) for e in entities]
    assert max(i for i, k in enumerate(places) if k == "RegisterEventHandler") < places.index("LifecycleNode")


def test_a_simulation_ends_with_its_episodes(described):
    name, entities = described
    exits = [e.args[0] for e in entities if kind(e) == "RegisterEventHandler" and kind(e.args[0]) == "OnProcessExit"]
    wanted = {"vla.launch.py": None, "replay.launch.py": "replay_node"}.get(name, "sim_node")
    assert [e.kwargs["target_action"].kwargs["executable"] for e in exits] == ([] if wanted is None else [wanted])


def test_names_are_relative_so_that_two_robots_fit_on_one_machine(described):
    """Two namespaces: no topic, service or action name of a node begins with a slash, except time and diagnostics."""
    _, entities = described
    assert all(n.kwargs["namespace"].args == ("namespace",) for n in nodes_of(entities))
    for path in (ROOT / "nodes").glob("*_node.py"):
        made = re.findall(r'create_\w+\(\s*\w+,\s*f?"(/?[\w/{}]+)"', path.read_text())
        assert {name for name in made if name.startswith("/")} <= {"/clock", "/diagnostics"}, path.name


def test_a_world_of_its_own_has_a_time_of_its_own(described):
    """Who publishes time does so in its namespace; a robot listens to everybody's."""
    name, entities = described
    wanted = [] if name == "vla.launch.py" else [("/clock", "clock")]
    assert all(n.kwargs["remappings"] == wanted for n in nodes_of(entities))


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_every_parameter_in_a_file_is_declared_by_its_node(path):
    pytest.importorskip("rclpy")
    from vla_spec.nodes._parameters import Parameter

    for pattern, content in yaml.safe_load(path.read_text()).items():
        names = content["ros__parameters"]
        if pattern == "/**":
            assert set(names) <= {"use_sim_time"}
            continue
        module = importlib.import_module(f"vla_spec.nodes.{pattern.rsplit('/', 1)[-1]}")
        table = {p.name: p for p in module.PARAMETERS}
        assert all(isinstance(p, Parameter) for p in table.values())
        for name, value in names.items():
            assert name in table, f"{path.name}: {pattern}: {name}"
            default = table[name].default
            assert type(value) is type(default), f"{name}: {value!r}, default {default!r}"
            if table[name].low is not None:
                assert table[name].low <= value <= table[name].high
            assert not table[name].choices or value in table[name].choices


def test_the_package_depends_on_what_its_nodes_import():
    said = (ROOT / "package.xml").read_text()
    declared = set(re.findall(r"<exec_depend>(\w+)</exec_depend>", said))
    imported = set()
    for path in (ROOT / "nodes").glob("*.py"):
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M))
    ros = {name for name in imported if name.endswith(("_msgs", "_srvs", "_interfaces")) or name.startswith("ament_")}
    ros |= imported & {"rclpy", "launch", "launch_ros"}
    assert ros <= declared
    assert {name for name in declared if not name.startswith("python3-")} <= ros
