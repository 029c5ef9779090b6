"""The simulated robot, recorded: everything that is needed to see where time goes, in one MCAP file."""

from launch import LaunchDescription

from vla_spec.nodes._launch import describe


def generate_launch_description() -> LaunchDescription:
    """`ros2 launch vla_spec profile.launch.py bag:=profile.mcap`; open it in Foxglove."""
    return describe(
        ["action_node", "monitor_node", "camera_node", "sim_node"], "metaworld.yaml", use_sim_time=True, dry_run=False,
        ends_with="sim_node", has_own_clock=True,
        arguments=[
            ("bag", "profile.mcap", "MCAP file to record into", "monitor_node", "bag"),
            ("mode", "exact", "decoding mode", "policy_node", "mode"),
        ],
    )  # fmt: skip
