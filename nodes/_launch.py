"""What the launch files have in common: arguments, nodes, and the policy's lifecycle driven by events.

Needs `launch` and `launch_ros`, which come with ROS. The files in ``launch/`` are one call each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.event_handlers import OnProcessExit, OnProcessStart
from launch.events import Shutdown, matches_action
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

PACKAGE = "vla_spec"


def describe(
    nodes: Sequence[str], params: str, use_sim_time: bool, dry_run: bool | None = None, ends_with: str | None = None,
    has_own_clock: bool = False, arguments: Sequence[tuple[str, str, str, str, str]] = (),
) -> LaunchDescription:  # fmt: skip
    """A launch description.

    Args:
        nodes: executables, beside ``policy_node``, which is always there.
        params: default parameter file, a name in the package's ``share/params``.
        use_sim_time: default of the argument.
        dry_run: default of the argument of that name for ``action_node``; None = there is no such argument.
        ends_with: an executable whose end ends everything; None = none.
        has_own_clock: one of the nodes publishes ``/clock``: each namespace gets its own, so that two fit on a machine.
        arguments: further ones: name, default, description, node, parameter.
    """
    declared = [
        DeclareLaunchArgument(
            "params_file", default_value=PathJoinSubstitution([FindPackageShare(PACKAGE), "params", params]),
            description="parameters of all nodes (YAML)",
        ),
        DeclareLaunchArgument("namespace", default_value="", description="of all nodes, as in left_arm"),
        DeclareLaunchArgument(
            "use_sim_time", default_value=str(use_sim_time).lower(), description="take time from /clock",
            choices=["true", "false"],
        ),
        DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error"),
        DeclareLaunchArgument("model", default_value="models/metaworld", description="model folder"),
    ]  # fmt: skip
    if dry_run is not None:
        declared.append(
            DeclareLaunchArgument(
                "dry_run", default_value=str(dry_run).lower(), choices=["true", "false"],
                description="compute and report commands, send none",
            )
        )  # fmt: skip
    declared += [DeclareLaunchArgument(n, default_value=d, description=text) for n, d, text, _, _ in arguments]

    def parameters(name: str) -> list[Any]:
        own: dict[str, Any] = {"use_sim_time": LaunchConfiguration("use_sim_time")}
        if name == "policy_node":
            own["model"] = LaunchConfiguration("model")
        if name == "action_node" and dry_run is not None:
            own["dry_run"] = LaunchConfiguration("dry_run")
        own |= {key: LaunchConfiguration(argument) for argument, _, _, node, key in arguments if node == name}
        return [LaunchConfiguration("params_file"), own]

    common = {
        "package": PACKAGE,
        "namespace": LaunchConfiguration("namespace"),
        "output": "screen",
        "remappings": [("/clock", "clock")] if has_own_clock else [],
        "arguments": ["--ros-args", "--log-level", LaunchConfiguration("log_level")],
    }
    policy = LifecycleNode(
        name="policy_node", executable="policy_node", parameters=parameters("policy_node"), **common
    )  # fmt: skip
    others = {name: Node(name=name, executable=name, parameters=parameters(name), **common) for name in nodes}

    def change(transition: int) -> EmitEvent:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(policy), transition_id=transition))

    events = [
        RegisterEventHandler(OnProcessStart(target_action=policy, on_start=[change(Transition.TRANSITION_CONFIGURE)])),
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=policy, start_state="configuring", goal_state="inactive",
                entities=[change(Transition.TRANSITION_ACTIVATE)],
            )
        ),
    ]  # fmt: skip
    if ends_with is not None:
        over = EmitEvent(event=Shutdown(reason=f"{ends_with} ended"))
        events.append(RegisterEventHandler(OnProcessExit(target_action=others[ends_with], on_exit=[over])))
    # Handlers first: an event that comes before its handler is lost.
    return LaunchDescription([*declared, *events, policy, *others.values()])
