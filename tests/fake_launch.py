"""A stub of `launch` and `launch_ros` that records what a launch file asks for. These packages come with ROS only."""

import sys
import types


class Recorded:
    """Anything that was constructed: its class's name, positional and keyword arguments."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def __repr__(self):
        return f"{type(self).__name__}{self.args}{self.kwargs}"


class LaunchDescription(Recorded):
    @property
    def entities(self):
        return list(self.args[0])


def matches_action(action):
    return ("matches", action)


class Shutdown(Recorded):
    pass


CLASSES = {
    "launch": {"LaunchDescription": LaunchDescription},
    "launch.actions": ["DeclareLaunchArgument", "EmitEvent", "RegisterEventHandler"],
    "launch.event_handlers": ["OnProcessExit", "OnProcessStart"],
    "launch.events": {"Shutdown": Shutdown, "matches_action": matches_action},
    "launch.substitutions": ["LaunchConfiguration", "PathJoinSubstitution"],
    "launch_ros": [],
    "launch_ros.actions": ["LifecycleNode", "Node"],
    "launch_ros.event_handlers": ["OnStateTransition"],
    "launch_ros.events": [],
    "launch_ros.events.lifecycle": ["ChangeState"],
    "launch_ros.substitutions": ["FindPackageShare"],
    "lifecycle_msgs": [],
    "lifecycle_msgs.msg": {
        "Transition": types.SimpleNamespace(TRANSITION_CONFIGURE=1, TRANSITION_CLEANUP=2, TRANSITION_ACTIVATE=3)
    },
}


def install(monkeypatch):
    """Put the stubs where `import launch` finds them, until the test is over."""
    for name, content in CLASSES.items():
        module = types.ModuleType(name)
        module.__path__ = []
        items = content if isinstance(content, dict) else {c: type(c, (Recorded,), {}) for c in content}
        for key, value in items.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vla_spec.nodes._launch", raising=False)
