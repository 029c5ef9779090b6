"""Everything in simulation: the arm, its cameras, policy, actor and monitor. Ends when the episodes are played."""

from launch import LaunchDescription

from vla_spec.nodes._launch import describe


def generate_launch_description() -> LaunchDescription:
    """`ros2 launch vla_spec sim.launch.py`."""
    return describe(
        ["action_node", "monitor_node", "camera_node", "sim_node"], "metaworld.yaml", use_sim_time=True, dry_run=False,
        ends_with="sim_node", has_own_clock=True,
        arguments=[("bag", "", "MCAP file to record into; empty = none", "monitor_node", "bag")],
    )  # fmt: skip
