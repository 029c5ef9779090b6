"""A robot: policy, actor and monitor. Nothing is commanded until dry_run:=false."""

from launch import LaunchDescription

from vla_spec.nodes._launch import describe


def generate_launch_description() -> LaunchDescription:
    """`ros2 launch vla_spec vla.launch.py params_file:=...`."""
    return describe(
        ["action_node", "monitor_node"], "robot.yaml", use_sim_time=False, dry_run=True,
        arguments=[("bag", "", "MCAP file to record into; empty = none", "monitor_node", "bag")],
    )  # fmt: skip
