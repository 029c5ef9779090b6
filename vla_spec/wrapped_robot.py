"""A robot around another one: all that a wrapper does not change is the wrapped robot's."""

from __future__ import annotations

from vla_spec.runtime import EpisodicRobot
from vla_spec.types import Float32, Observation


class WrappedRobot:
    """Passes everything on. Override what differs."""

    def __init__(self, robot: EpisodicRobot) -> None:
        self.robot = robot

    @property
    def action_low(self) -> Float32:
        """The wrapped robot's."""
        return self.robot.action_low

    @property
    def action_high(self) -> Float32:
        """The wrapped robot's."""
        return self.robot.action_high

    @property
    def dt_s(self) -> float:
        """The wrapped robot's."""
        return self.robot.dt_s

    @property
    def is_success(self) -> bool:
        """The wrapped robot's."""
        return self.robot.is_success

    def reset(self, seed: int) -> None:
        """Reset the wrapped robot."""
        self.robot.reset(seed)

    def observe(self, now_ns: int) -> Observation:
        """Look through the wrapped robot."""
        return self.robot.observe(now_ns)

    def act(self, action: Float32, now_ns: int) -> Float32:
        """Move the wrapped robot."""
        return self.robot.act(action, now_ns)

    def close(self) -> None:
        """Free what the wrapped robot holds."""
        self.robot.close()
