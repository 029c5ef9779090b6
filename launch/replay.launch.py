"""A recorded robot: the bag's sensors, the policy, an actor that commands nothing, and the monitor."""

from launch import LaunchDescription

from vla_spec.nodes._launch import describe


def generate_launch_description() -> LaunchDescription:
    """`ros2 launch vla_spec replay.launch.py bag:=run.mcap`."""
    return describe(
        ["action_node", "monitor_node", "replay_node"], "metaworld.yaml", use_sim_time=True, dry_run=True,
        ends_with="replay_node", has_own_clock=True,
        arguments=[("bag", "", "MCAP file to play", "replay_node", "bag")],
    )  # fmt: skip
