"""Parameters as one table per node: name, default, meaning, what is valid. Declared with descriptors and ranges."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    LivelinessPolicy,
    QoSProfile,
    ReliabilityPolicy,
)

from vla_spec.errors import BadConfig


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter.

    Attributes:
        name: with dots for groups.
        default: also says the type.
        meaning: for `ros2 param describe`.
        low, high: valid range of a number; None = no bound.
        is_fixed: can't be set after start.
        choices: valid strings; empty = any.
    """

    name: str
    default: bool | int | float | str | list[str] | list[float]
    meaning: str
    low: float | None = None
    high: float | None = None
    is_fixed: bool = True
    choices: tuple[str, ...] = ()

    def descriptor(self) -> ParameterDescriptor:
        """What ROS is told."""
        said = ParameterDescriptor(name=self.name, description=self.meaning, read_only=self.is_fixed)
        if self.choices:
            said.additional_constraints = f"one of {', '.join(self.choices)}"
        if self.low is not None and self.high is not None:
            if isinstance(self.default, float):
                said.floating_point_range = [FloatingPointRange(from_value=float(self.low), to_value=float(self.high))]
            elif isinstance(self.default, int):
                said.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high), step=1)]
        return said


def declare(node: Node, table: Sequence[Parameter]) -> dict[str, Any]:
    """Declare all and return their values.

    Raises:
        BadConfig: a value of another type, outside its range, or none of the choices; names node and parameter.
    """
    values = {}
    for parameter in table:
        try:
            value = node.declare_parameter(parameter.name, parameter.default, parameter.descriptor()).value
        except Exception as error:  # rclpy has a class per way to be wrong
            raise BadConfig(f"{node.get_name()}: parameter {parameter.name}: {error}") from error
        if parameter.choices and value not in parameter.choices:
            raise BadConfig(
                f"{node.get_name()}: parameter {parameter.name} is {value!r}; valid: {', '.join(parameter.choices)}"
            )
        values[parameter.name] = value
    known = {*values, "use_sim_time", "start_type_description_service"}
    # What a parameter file says under a misspelt name would otherwise be lost without a word.
    for name in sorted(getattr(node, "_parameter_overrides", {}).keys() - known):
        close = difflib.get_close_matches(name, values, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        node.get_logger().warning(f"parameter {name} is none of this node's, ignored{hint}")
    return values


def qos_parameters(topic: str, default: QoSProfile) -> tuple[Parameter, ...]:
    """Every setting of a topic's quality of service, as parameters ``qos.<topic>.*``."""
    prefix, lease = f"qos.{topic}", default.liveliness_lease_duration
    return (
        Parameter(
            f"{prefix}.reliability", "reliable" if default.reliability is ReliabilityPolicy.RELIABLE else "best_effort",
            f"of {topic}; a best-effort publisher and a reliable subscriber don't connect",
            choices=("reliable", "best_effort"),
        ),
        Parameter(
            f"{prefix}.durability",
            "transient_local" if default.durability is DurabilityPolicy.TRANSIENT_LOCAL else "volatile",
            f"of {topic}; transient_local: who joins late gets the last message",
            choices=("transient_local", "volatile"),
        ),
        Parameter(f"{prefix}.depth", default.depth, f"messages of {topic} that are kept", 1, 1000),
        Parameter(
            f"{prefix}.deadline_s", default.deadline.nanoseconds / 1e9 if _is_finite(default.deadline) else 0.0,
            f"longest time between messages of {topic} that is in order [s]; 0 = none is offered or asked for",
            0.0, 3600.0,
        ),
        Parameter(
            f"{prefix}.liveliness_s",
            lease.nanoseconds / 1e9 if _is_finite(lease) else 0.0,
            f"a publisher of {topic} that shows no sign of life for so long counts as gone [s]; 0 = never", 0.0, 3600.0,
        ),
    )  # fmt: skip


def qos_profile(values: dict[str, Any], topic: str) -> QoSProfile:
    """The profile that the parameters of `qos_parameters` say."""
    prefix = f"qos.{topic}"
    profile = QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=values[f"{prefix}.depth"],
        reliability=ReliabilityPolicy[values[f"{prefix}.reliability"].upper()],
        durability=DurabilityPolicy[values[f"{prefix}.durability"].upper()],
        liveliness=LivelinessPolicy.AUTOMATIC,
    )
    if values[f"{prefix}.deadline_s"] > 0:
        profile.deadline = Duration(seconds=values[f"{prefix}.deadline_s"])
    if values[f"{prefix}.liveliness_s"] > 0:
        profile.liveliness_lease_duration = Duration(seconds=values[f"{prefix}.liveliness_s"])
    return profile


def _is_finite(duration: Duration) -> bool:
    """ROS says "no limit" with 0 or with a duration of centuries."""
    return 0 < duration.nanoseconds < 10**18
